"""Halo and what users have otherwise, side by side on one GPU: attention, and a training step.

Rounds of halo and peers take turns in processes of their own, so that both meet the same clocks and
neither keeps memory from the other; the best of the rounds counts, for both. Writes one JSON file with
every figure of every round and prints one table. A peer that cannot run says why in its row.

    python3 tests/peers/cuda/side_by_side.py attention --tokens 8192,32768
    python3 tests/peers/cuda/side_by_side.py step --tokens 32768,131072 --peers cudnn --rounds 1 --json step.json

llm.c has no Python interface; its figures are taken from its own program where LLMC names its folder
(train_gpt2cu beside gpt2_124M.bin), and are left out otherwise.
"""
import argparse
import json
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))
QWEN = "heads=16 kv_heads=2 head_dim=128"


def output_of(command, seconds):
    """Standard output of a command, or the last line of what it complained about."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, f"took over {seconds} s"
    except OSError as problem:
        return None, str(problem)
    if done.returncode != 0:
        return None, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
    return done.stdout, None


def peers(script, *arguments):
    text, problem = output_of([sys.executable, os.path.join(HERE, script), *arguments], 1800)
    if problem:
        return [{"name": script, "failed": problem}]
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    for row in rows:
        row["name"] = row.pop("peer")
    return rows


def halo(o, what, *arguments):
    text, problem = output_of([o.halo, "bench", what, *arguments, "--json"], 1800)
    return (None, [{"name": "halo", "failed": problem}]) if problem else (json.loads(text)["data"], None)


def attention(o, tokens):
    shape = QWEN.split() + [f"tokens={tokens}", f"kept={o.kept}", "block=128", "device=cuda", "dtype=bf16"]
    ours, rows = halo(o, "attention", *shape)
    if ours:
        rows = [{"name": "halo " + r["name"], "fwd_ms": r["forward_ms"], "bwd_ms": r["backward_ms"],
                 "share": r["kept"] / 2, "fwd_tflops": r["forward_gflops"] / 1e3,
                 "bwd_tflops": r["backward_gflops"] / 1e3} for r in ours["rows"]]
    return rows + peers("attention_peers.py", "--tokens", str(tokens), "--kept", str(o.kept), "--cases",
                        o.peers or "flash,cudnn,flex,flex_sparse")


def step(o, tokens):
    shape = ["model=qwen2.5-3b", f"tokens={tokens}", f"layers={o.layers}", "device=cuda", f"steps={o.steps}"]
    ours, rows = halo(o, "step", *shape)
    if ours:
        seconds = min(ours["seconds"])
        rows = [{"name": "halo", "seconds": seconds, "tokens_per_s": tokens / seconds,
                 "peak_gib": ours["peak_bytes"]["all"] / 2**30}]
    for kind in (o.peers or "cudnn,flash").split(","):
        rows += peers("train_peers.py", "--tokens", str(tokens), "--attention", kind, "--layers", str(o.layers),
                      "--steps", str(o.steps))
    return rows + llmc()


def llmc():
    """GPT-2 124M by llm.c at T = 1024: another model, for short contexts; compare with the same in halo."""
    folder = os.environ.get("LLMC")
    if not folder:
        return []
    command = [os.path.join(folder, "train_gpt2cu"), "-e", "d12", "-b", "64", "-t", "1024", "-x", "20", "-v", "0", "-s", "0"]
    text, problem = output_of(command, 600)
    rates = [float(v) for v in re.findall(r"([\d.]+) tok/s", text or "")]
    if not rates:
        return [{"name": "llm.c GPT-2 124M", "failed": problem or "no tok/s in its output"}]
    return [{"name": "llm.c GPT-2 124M, T=1024, B=64", "tokens_per_s": max(rates)}]


# What is told of a case, and which of two rounds is the better one.
COLUMNS = {
    "attention": ["fwd_ms", "bwd_ms", "share", "fwd_tflops", "bwd_tflops"],
    "step": ["seconds", "tokens_per_s", "peak_gib"],
}
SMALLER = {"fwd_ms", "bwd_ms", "seconds", "peak_gib"}


def best(rounds, columns):
    """One row per name in order of first appearance, each column by its own best."""
    out = {}
    for rows in rounds:
        for row in rows:
            kept = out.setdefault(row["name"], {"name": row["name"]})
            if "failed" in row:
                kept.setdefault("failed", row["failed"])
            for column in columns:
                if column not in row:
                    continue
                pick = min if column in SMALLER else max
                kept[column] = pick(kept.get(column, row[column]), row[column])
    return list(out.values())


def table(title, rows, columns):
    lines = [f"### {title}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [f"{row[c]:.4g}" if c in row and row[c] < 10000 else f"{row[c]:,.0f}" if c in row else "" for c in columns]
        if "failed" in row and not any(cells):
            cells[0] = row["failed"]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def main():
    options = argparse.ArgumentParser()
    options.add_argument("what", choices=COLUMNS)
    options.add_argument("--tokens", default="32768")
    options.add_argument("--peers", help="some of flash, cudnn, and for attention flex, flex_sparse (default: all)")
    options.add_argument("--kept", type=float, default=0.05)
    options.add_argument("--layers", type=int, default=36)
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--halo", default=os.path.join(ROOT, "build", "halo"))
    options.add_argument("--json", default="side_by_side.json")
    o = options.parse_args()
    run = {"attention": attention, "step": step}[o.what]
    everything = []
    for tokens in map(int, o.tokens.split(",")):
        rounds = [run(o, tokens) for _ in range(o.rounds)]
        rows = best(rounds, COLUMNS[o.what])
        everything.append({"what": o.what, "tokens": tokens, "best": rows, "rounds": rounds})
        print(table(f"{o.what}, {tokens} tokens", rows, COLUMNS[o.what]), flush=True)
    with open(o.json, "w") as file:
        json.dump(everything, file, indent=1)


if __name__ == "__main__":
    main()
