"""A training step of Qwen2.5-3B's shape in PyTorch and Transformers, on one GPU.

Random weights, bf16 weights and AdamW moments (fused), every layer recomputed, cross-entropy in chunks of
4096 tokens so that logits never exist whole. Prints one JSON object per length: seconds of the best step,
tokens/s, peak GiB.

    python3 train_peers.py [--tokens 32768] [--attention cudnn|flash] [--steps 2] [--layers 36]
"""
import argparse
import json
import time
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2Model

warnings.filterwarnings("ignore")
CHUNK = 4096
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def model_of(layers):
    config = Qwen2Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=2, max_position_embeddings=1 << 20, rms_norm_eps=1e-6,
        tie_word_embeddings=True, attn_implementation="sdpa", use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2Model(config)
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def loss_of(model, ids):
    hidden = model(input_ids=ids[:, :-1]).last_hidden_state[0]
    labels, head = ids[0, 1:], model.embed_tokens.weight

    def part(rows, wanted):
        return F.cross_entropy((rows @ head.T).float(), wanted, reduction="sum")

    parts = [checkpoint(part, hidden[i:i + CHUNK], labels[i:i + CHUNK], use_reentrant=False)
             for i in range(0, len(labels), CHUNK)]
    return sum(parts) / len(labels)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--tokens", default="32768")
    options.add_argument("--attention", choices=BACKENDS, default="cudnn")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--layers", type=int, default=36)
    o = options.parse_args()
    model = model_of(o.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(tokens):
        ids = torch.randint(0, model.config.vocab_size, (1, tokens + 1), device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with sdpa_kernel(BACKENDS[o.attention]):
            loss = loss_of(model, ids)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    step(2048)  # moments are made, kernels loaded
    for tokens in map(int, o.tokens.split(",")):
        row = {"peer": "torch " + o.attention, "tokens": tokens, "layers": o.layers}
        try:
            torch.cuda.reset_peak_memory_stats()
            best = min(step(tokens) for _ in range(o.steps))
            row.update(seconds=best, tokens_per_s=tokens / best,
                       peak_gib=torch.cuda.max_memory_allocated() / 2**30)
        except Exception as problem:
            row["failed"] = repr(problem)[:200]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
