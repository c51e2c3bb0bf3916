#!/usr/bin/env python3
"""Train beside PyTorch: a model with random weights written by Transformers, loaded by Halo, N AdamW steps of
both on the same batches; the losses must agree.

    tests/peers/parity_train.py small            fp32, a few million parameters: within 1e-5
    tests/peers/parity_train.py 3b               Qwen2.5-3B's shape, bf16: within 2e-3
    tests/peers/parity_train.py 3b --layers 6    the same with fewer layers
    tests/peers/parity_train.py small --device cpu

Both sides keep fp32 masters of bf16 weights: here a bf16 model, and after every step its weights are the
rounded masters. Gradients of PyTorch's side are bf16 when they reach the master, Halo's are summed in fp32.
Tokens follow a rule (a permutation, seven times out of ten), so that there is something to learn.

needs    torch, transformers; Halo's program (build/halo, or $HALO); a GPU for 3b
prints   step, both losses, relative difference; exit code 1 when one exceeds the bound
"""
import argparse, json, os, subprocess, sys, tempfile, time

import numpy as np
import torch
import transformers

SHAPES = {
    "small": dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
                  num_key_value_heads=2, vocab_size=1536, dtype="f32", tokens=512, batch=2, lr=3e-4, bound=1e-5),
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, vocab_size=151936, dtype="bf16", tokens=2048, batch=1, lr=1e-4, bound=2e-3),
}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("shape", choices=sorted(SHAPES))
    p.add_argument("--layers", type=int)
    p.add_argument("--tokens", type=int)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--device", default="cuda")
    p.add_argument("--bound", type=float)
    p.add_argument("--work", help="folder for model, batches and losses (default: a temporary one)")
    p.add_argument("--json", help="write losses and differences to this file")
    return p.parse_args()


def make_batches(o, vocab, steps):
    """[steps, batch, tokens] token ids: next = permutation[this] with probability 0.7, else any."""
    rng = np.random.default_rng(7)
    used = min(vocab, 4096)
    permutation = rng.permutation(used)
    ids = np.empty((steps, o["batch"], o["tokens"]), dtype=np.int32)
    ids[:, :, 0] = rng.integers(0, used, ids.shape[:2])
    for t in range(1, o["tokens"]):
        follow = rng.random(ids.shape[:2]) < 0.7
        ids[:, :, t] = np.where(follow, permutation[ids[:, :, t - 1]], rng.integers(0, used, ids.shape[:2]))
    return ids


def write_model(o, folder, device):
    config = transformers.Qwen2Config(
        **{k: v for k, v in o.items() if k.startswith(("hidden", "intermediate", "num_", "vocab"))},
        max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="sdpa")
    dtype = torch.bfloat16 if o["dtype"] == "bf16" else torch.float32
    torch.manual_seed(1)
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(config)
    torch.set_default_dtype(old)
    model.save_pretrained(folder)
    return model


def train(model, batches, o):
    """Losses of PyTorch's side, one AdamW step per batch."""
    if o["layers"] > 8:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    model.config.use_cache = False
    names = [n for n, _ in model.named_parameters()]
    parameters = list(model.parameters())
    masters = [p.detach().float().clone() for p in parameters]
    groups = [{"params": [m for m in masters if m.ndim >= 2], "weight_decay": 0.1},
              {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o["lr"], betas=(0.9, 0.95), eps=1e-8, foreach=True)
    device, losses, norms = parameters[0].device, [], []
    for ids in batches:
        x = torch.tensor(ids, dtype=torch.long, device=device)
        hidden = model.model(input_ids=x).last_hidden_state
        logits = model.lm_head(hidden[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1))
        loss.backward()
        for m, p in zip(masters, parameters):
            m.grad = p.grad.float()
            p.grad = None
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, 1.0)))
        optimizer.step()
        with torch.no_grad():
            for m, p in zip(masters, parameters):
                p.copy_(m)
                m.grad = None
        losses.append(loss.item())
    assert len(names) == len(set(names))
    return losses, norms


def main():
    a = arguments()
    o = dict(SHAPES[a.shape])
    o["num_hidden_layers"] = a.layers or o["num_hidden_layers"]
    o["layers"], o["tokens"] = o["num_hidden_layers"], a.tokens or o["tokens"]
    bound = a.bound or o["bound"]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    holder = None if a.work else tempfile.TemporaryDirectory()
    work = a.work or holder.name
    folder = os.path.join(work, "model")
    batches = make_batches(o, o["vocab_size"], a.steps)
    os.makedirs(work, exist_ok=True)
    batches.tofile(os.path.join(work, "batches.i32"))
    began = time.time()
    model = write_model(o, folder, a.device)
    parameters = sum(p.numel() for p in model.parameters())
    wrote = time.time()
    reference, norms = train(model, batches, o)
    trained = time.time()
    del model
    torch.cuda.empty_cache() if a.device == "cuda" else None
    settings = dict(model=folder, batches=os.path.join(work, "batches.i32"), steps=a.steps, batch=o["batch"],
                    tokens=o["tokens"], lr=o["lr"], dtype=o["dtype"], device=a.device,
                    recompute=o["layers"] > 8, out=os.path.join(work, "halo.json"))
    with open(os.path.join(work, "settings.json"), "w") as f:
        json.dump(settings, f)
    here = os.path.dirname(os.path.abspath(__file__))
    halo = os.environ.get("HALO", os.path.join(here, "..", "..", "build", "halo"))
    subprocess.run([halo, "exec", os.path.join(here, "parity_train.lua"), os.path.join(work, "settings.json")],
                   check=True)
    with open(settings["out"]) as f:
        ours = json.load(f)
    worst = 0.0
    print(f"{a.shape}: {o['layers']} layers, {parameters / 1e6:.1f} M parameters, {o['dtype']}, "
          f"{o['batch']} x {o['tokens']} tokens; torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"wrote {wrote - began:.1f} s, torch {trained - wrote:.1f} s, halo {time.time() - trained:.1f} s "
          f"(its steps {sum(ours['seconds']):.1f} s)")
    print("step     torch      halo  relative     norm of torch, halo")
    for i, (x, y) in enumerate(zip(reference, ours["losses"])):
        difference = abs(x - y) / abs(x)
        worst = max(worst, difference)
        print(f"{i + 1:4d} {x:9.5f} {y:9.5f}  {difference:.2e}    {norms[i]:9.5f} {ours['norms'][i]:9.5f}")
    fine = worst <= bound and len(ours["losses"]) == len(reference)
    print(f"worst {worst:.2e}, bound {bound:.0e}: {'passed' if fine else 'FAILED'}")
    if a.json:
        with open(a.json, "w") as f:
            json.dump(dict(shape=a.shape, layers=o["layers"], parameters=parameters, dtype=o["dtype"],
                           torch_losses=reference, halo_losses=ours["losses"], worst=worst, bound=bound), f)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
