"""Attention as others give it, on one GPU: PyTorch's SDPA (flash and cuDNN backends) and FlexAttention.

Prints one JSON object per case. Shapes are Qwen2.5-3B's: batch 1, 16 query heads over 2 key/value heads of
size 128, bf16, causal, normal inputs. TFLOP/s count pairs that are kept: 4 D a pair forward, 10 D backward.
A backward's time is that of forward and backward together less the forward's own.

    python3 attention_peers.py [--tokens 32768,131072] [--cases flash,cudnn,flex,flex_sparse] [--kept 0.05]
"""
import argparse
import json
import statistics
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

warnings.filterwarnings("ignore")
HEADS, KV_HEADS, SIZE, BLOCK = 16, 2, 128, 128


def milliseconds(run, repeats):
    """Median over `repeats` runs, each between two events, after two that compile and warm."""
    for _ in range(2):
        run()
    spans = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end))
    return statistics.median(spans)


def inputs(tokens):
    torch.manual_seed(1)
    make = lambda heads: torch.randn(1, heads, tokens, SIZE, device="cuda", dtype=torch.bfloat16)
    leaves = [make(heads).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return leaves, make(HEADS)


def sdpa(backend):
    def prepare(tokens, kept):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attend, 0.5
    return prepare


def flex(tokens, kept):
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device="cuda", BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), 0.5


def flex_sparse(tokens, kept):
    """Random blocks of 128 x 128, `kept` of the causal ones, with the diagonal and the first column forced."""
    n = tokens // BLOCK
    torch.manual_seed(2)
    wanted = torch.rand(1, HEADS, n, n, device="cuda") < kept
    row, column = torch.arange(n, device="cuda")[:, None], torch.arange(n, device="cuda")[None, :]
    wanted = (wanted | (row == column) | (column == 0)) & (row >= column)
    lists = []
    for part in (wanted & (row == column), wanted & (row > column)):  # cut by the mask, or whole
        lists.append(part.sum(-1, dtype=torch.int32))
        lists.append(torch.argsort(part.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32))
    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=lambda b, h, i, j: i >= j)
    compiled = torch.compile(flex_attention)
    pairs = wanted.sum().item() - 0.5 * n * HEADS  # half a block on the diagonal
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), pairs / (HEADS * n * n)


CASES = {
    "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "flex_sparse": flex_sparse,
}


def measure(name, tokens, kept, repeats):
    attend, share = CASES[name](tokens, kept)
    (q, k, v), grad = inputs(tokens)

    def forward():
        with torch.no_grad():
            attend(q, k, v)

    def both():
        q.grad = k.grad = v.grad = None
        attend(q, k, v).backward(grad)

    fwd = milliseconds(forward, repeats)
    bwd = milliseconds(both, max(2, repeats // 2)) - fwd
    work = 4 * SIZE * HEADS * share * tokens * tokens
    return {"fwd_ms": fwd, "bwd_ms": bwd, "share": share, "fwd_tflops": work / fwd / 1e9,
            "bwd_tflops": 2.5 * work / bwd / 1e9}


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--tokens", default="32768")
    options.add_argument("--cases", default="flash,cudnn,flex,flex_sparse")
    options.add_argument("--kept", type=float, default=0.05)
    options.add_argument("--repeats", type=int, default=5)
    o = options.parse_args()
    for tokens in map(int, o.tokens.split(",")):
        for name in o.cases.split(","):
            row = {"peer": name, "tokens": tokens}
            try:
                row.update(measure(name, tokens, o.kept, o.repeats))
            except Exception as problem:  # what a peer cannot do is a result, too
                row["failed"] = str(problem).split("\n")[0][:200]
            torch.cuda.empty_cache()
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
