#!/usr/bin/env python3
"""Compare Halo's tokenizer with the libraries people use, on random text.

  pip install tokenizers tiktoken
  python3 tests/peers/tokenizer_peer.py [texts per tokenizer, default 3000]

Families: GPT-2, Qwen2 (with NFC) and Llama 3's pattern through Hugging Face `tokenizers`; tiktoken's
ranks through `tiktoken`. Vocabularies come from the shared data (HALO_SHARED, or ../shared beside the
project). Text is drawn from alphabets that hit the corners: case folding of contractions, every kind of
white space, combining marks in the wrong order, numbers of several scripts, special tokens. Prints one
line per family and exits 1 at a difference.
"""
import base64
import json
import os
import random
import subprocess
import sys
import tempfile

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.environ.get("HALO_SHARED", os.path.join(HERE, "../../../shared"))
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im", "<think>"]

ALPHABETS = [
    "abcdefghij ETAOIN", " \t\n\r\x0b\x0c\x85\xa0\u1680\u180e\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff",
    "'sStTrReEvVmMlLdD\u017f\u212a \u2019", "0123456789\u0660\u00b2\u2163\u0967\U0001d7ce",
    ".,;:!?-_()[]{}<>@#$%^&*+=/\\|~`\"", "e\u0301o\u0308a\u0323\u0307\u0327\u0345\u0330x\u0338",
    "\u1100\u1161\u11a8\uac00\ub098", "\u4e2d\u6587\u6f22\uf900\u2f800", "\u0915\u093c\u0958\u0921\u0cc6\u0cc2\u0cd5",
    "\u00e9\u00c5\u212b\u1f73\u03ad\u0390\u1fd3", "\U0001f600\U0001f468\u200d\U0001f469\u2764\ufe0f", "\u0000\u0001\u007f",
]


def random_text(rng):
    parts = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.random()
        if kind < 0.1:
            parts.append(rng.choice(SPECIAL))
        elif kind < 0.15:
            parts.append("".join(chr(c) for c in (rng.randrange(0x110000) for _ in range(rng.randint(1, 5)))
                                 if not 0xD800 <= c < 0xE000))
        elif kind < 0.2:
            parts.append(rng.choice("ab \n.\u0301") * rng.randint(1, 200))
        else:
            letters = rng.choice(ALPHABETS)
            parts.append("".join(rng.choice(letters) for _ in range(rng.randint(1, 12))))
    return "".join(parts)


def halo(folder, texts, mode):
    lines = "\n".join(t.encode().hex() for t in texts) + "\n"
    done = subprocess.run(["luajit", os.path.join(HERE, "encode.lua"), folder, mode],
                          input=lines, capture_output=True, text=True, check=True)
    return [[int(i) for i in line.split()] for line in done.stdout.split("\n")[:-1]]


def bpe(name):
    folder = os.path.join(SHARED, "data/tokenizers", name)
    return models.BPE.from_file(os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt"))


def hugging_face(name, pattern, nfc, ignore_merges=False):
    tok = Tokenizer(bpe(name))
    tok.model.ignore_merges = ignore_merges
    if nfc:
        tok.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tok.pre_tokenizer = level if pattern is None else pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(s, normalized=False) for s in SPECIAL])
    return tok


def compare(name, texts, ours, theirs):
    bad = [i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b]
    print(f"{name}: {len(texts) - len(bad)} of {len(texts)} texts equal")
    for i in bad[:3]:
        print("  text", ascii(texts[i]), "\n  halo", ours[i], "\n  peer", theirs[i])
    return not bad and len(ours) == len(theirs) == len(texts)


def main():
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    ok = True
    for name, pattern, nfc, whole in [("gpt2", None, False, False), ("qwen2.5", QWEN2, True, False),
                                      ("qwen2.5", LLAMA3, False, True)]:
        rng = random.Random(name)
        texts = [random_text(rng) for _ in range(n)]
        peer = hugging_face(name, pattern, nfc, whole)
        with tempfile.TemporaryDirectory() as folder:
            peer.save(os.path.join(folder, "tokenizer.json"))
            ours = halo(folder, texts, "special")
        label = f"{name}, {'GPT-2' if pattern is None else 'Llama 3' if pattern is LLAMA3 else 'Qwen2'} pattern"
        ok &= compare("tokenizers, " + label, texts, ours, [e.ids for e in peer.encode_batch(texts)])

    # The byte tokenizer's own files, as a checkpoint folder carries them.
    rng = random.Random("byte")
    texts = [random_text(rng) + rng.choice(["", "<|eos|>", "<|bos|>a"]) for _ in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        ours = halo(folder, texts, "byte")
        peer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    ok &= compare("tokenizers, byte tokenizer", texts, ours, [e.ids for e in peer.encode_batch(texts)])

    # tiktoken: the Qwen vocabulary as ranks, whose ids are its merge order.
    with open(os.path.join(SHARED, "data/tokenizers/qwen2.5/vocab.json"), encoding="utf-8") as f:
        vocab = json.load(f)
    printable = {c: b for b, c in bytes_to_characters().items()}
    ranks = {bytes(printable[c] for c in text): rank for text, rank in vocab.items()}
    special = {f"<|s{i}|>": len(ranks) + i for i in range(2)}
    peer = tiktoken.Encoding("peer", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens=special)
    rng = random.Random("tiktoken")
    texts = [random_text(rng) + rng.choice(["", "<|s1|>x", "<|s0|>"]) for _ in range(n)]
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "tokenizer.model"), "wb") as f:
            for text, rank in sorted(ranks.items(), key=lambda e: e[1]):
                f.write(base64.b64encode(text) + b" %d\n" % rank)
        with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
            json.dump({"bos_token": "<|s0|>", "eos_token": "<|s1|>", "added_tokens_decoder": {
                str(i): {"content": t, "special": True} for t, i in special.items()}}, f)
        ours = halo(folder, texts, "special")
        theirs = [peer.encode(t, allowed_special="all") for t in texts]
        ok &= compare("tiktoken, Llama 3 pattern", texts, ours, theirs)
        plain = halo(folder, texts, "plain")
        ok &= compare("tiktoken, special tokens off", texts, plain, [peer.encode_ordinary(t) for t in texts])
    return 0 if ok else 1


def bytes_to_characters():
    """GPT-2's alphabet (openai/gpt-2 src/encoder.py, bytes_to_unicode)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in kept}
    for i, b in enumerate(b for b in range(256) if b not in table):
        table[b] = chr(256 + i)
    return table


if __name__ == "__main__":
    sys.exit(main())
