#!/usr/bin/env python3
"""Compare Halo's safetensors reader and writer with the reference library (pip install safetensors numpy).

    python tests/tools/safetensors_differential.py [--cases 10000] [--seed 1] [--lib build/libhalo.so]

Reader: generates malformed and odd files (families of structure, header and data mutations) and asks both
readers for a verdict. Halo may refuse what the reference accepts only for a reason on the STRICTER list;
it may never accept what the reference refuses. Writer: a file that Halo writes must be byte for byte the
one the reference writes for the same tensors.
"""
import argparse
import collections
import ctypes
import json
import os
import random
import struct
import sys
import tempfile

import numpy
import safetensors
import safetensors.numpy

# Words of Halo's message, and why it is stricter there.
STRICTER = {
    "comes twice": "duplicate keys: two readers may see two models in one file",
    "twice the field": "duplicate fields",
    "unknown field": "fields the format does not have",
    "bytes; 1 to 1024 are allowed": "names that are empty or longer than 1024 bytes",
    "control characters": "names that talk to a terminal",
    "more than 8 dims": "ranks no model has",
    "is followed by something that is no space": "padding that is not spaces",
    "the product of its sizes overflows": "overflow hidden behind a size of zero",
    "does not begin with {": "white space before the header",
    "__metadata__ is not an object": "null metadata",
}

DTYPES = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
          "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6}


def halo_library(path):
    lib = ctypes.CDLL(os.path.abspath(path))
    lib.halo_error_message.restype = ctypes.c_char_p
    lib.halo_status_name.restype = ctypes.c_char_p
    lib.halo_safetensors_free.argtypes = [ctypes.c_void_p]
    lib.halo_safetensors_open.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p, ctypes.c_int32]
    return lib


def halo_verdict(lib, path):
    handle = ctypes.c_void_p()
    status = lib.halo_safetensors_open(ctypes.byref(handle), path.encode(), 0)
    if status == 0:
        lib.halo_safetensors_free(handle)
        return True, ""
    return False, lib.halo_status_name(status).decode() + ": " + lib.halo_error_message().decode(errors="replace")


def reference_verdict(data):
    try:
        safetensors.deserialize(data)
        return True, ""
    except Exception as error:  # the library raises its own type and others
        return False, str(error)


def random_tensors(rng):
    """A valid list of (name, dtype, shape, bytes)."""
    out = []
    for i in range(rng.choice([0, 1, 1, 2, 3, 8])):
        dtype = rng.choice(list(DTYPES))
        shape = [rng.choice([0, 1, 2, 3, 4, 8]) for _ in range(rng.choice([0, 1, 1, 2, 3, 8]))]
        if DTYPES[dtype] < 8:
            shape.append(8)
        count = 1
        for size in shape:
            count *= size
        if count * DTYPES[dtype] > 1 << 16:
            continue
        out.append((rng.choice(["w", "layer.0.q", "é", "a b", "../x", "\\u0061"]) + str(i), dtype, shape,
                    count * DTYPES[dtype] // 8))
    return out


def entry_text(rng, name, dtype, shape, begin, end):
    fields = ['"dtype":"%s"' % dtype, '"shape":%s' % json.dumps(shape), '"data_offsets":[%d,%d]' % (begin, end)]
    if rng.random() < 0.2:
        rng.shuffle(fields)
    return '"%s":{%s}' % (name, ",".join(fields))


def build(rng):
    """One file: (family, bytes). Starts valid, then at most one thing is changed."""
    tensors = random_tensors(rng)
    at, entries = 0, []
    for name, dtype, shape, size in tensors:
        entries.append([name, dtype, list(shape), at, at + size])
        at += size
    data = bytes(rng.randrange(256) for _ in range(at))
    metadata = rng.choice([None, None, '"__metadata__":{}', '"__metadata__":{"format":"pt","k":"v"}'])
    family = rng.choice(FAMILIES)
    header_edit = lambda text: text
    if entries and family == "offset":
        e = rng.choice(entries)
        e[3 + rng.randrange(2)] += rng.choice([-1, 1, 4, -4, 1 << 40, -(1 << 62)])
    elif entries and family == "size":
        e = rng.choice(entries)
        e[2] = rng.choice([e[2] + [2], e[2][:-1], [1 << 32, 1 << 32], [(1 << 63) - 1, 2], [0, 1 << 40], [1] * 9,
                           [-1], [1 << 64]])
    elif entries and family == "dtype":
        rng.choice(entries)[1] = rng.choice(list(DTYPES) + ["f32", "I128", "", "F33", "FLOAT"])
    elif entries and family == "name":
        rng.choice(entries)[0] = rng.choice(["", "n" * 1024, "n" * 1025, "__metadata__", "\\u0000", "\\u001b", "\\ud800",
                                             "\x01", entries[0][0], "a\\nb"])
    elif len(entries) > 1 and family == "swap":
        a, b = rng.sample(range(len(entries)), 2)
        entries[a][3:], entries[b][3:] = entries[b][3:], entries[a][3:]
    elif family == "order":
        rng.shuffle(entries)
    elif family == "data":
        data = rng.choice([data[:-1], data + b"\0", data + b"PK\3\4", b""])
    elif family == "metadata":
        metadata = rng.choice(['"__metadata__":{"a":1}', '"__metadata__":null', '"__metadata__":[]', '"__metadata__":"x"',
                               '"__metadata__":{"a":"1","a":"2"}', '"__metadata__":{"a":{"b":"c"}}'])
    elif family == "number":
        number = rng.choice(["1.0", "1e0", "-0", "01", "+1", "0x1", "1_0", '"1"', "null", "true", "NaN", "1E400"])
        header_edit = lambda text: replace_number(rng, text, number)
    elif family == "character":
        header_edit = lambda text: edit_character(rng, text)
    elif family == "field":
        header_edit = lambda text: text.replace('"shape"', rng.choice(
            ['"shape":[1],"shape"', '"Shape"', '"x":1,"shape"', '"x":{"y":[1]},"shape"', '""']), 1)
    elif family == "duplicate" and entries:
        entries.append(list(entries[0]))
    parts = ([metadata] if metadata else []) + [entry_text(rng, *e) for e in entries]
    if family == "metadata last":
        parts.reverse()
    text = header_edit("{" + ",".join(parts) + "}")
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if family == "byte" and raw:
        i = rng.randrange(len(raw))
        raw = raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1:]
    if family == "padding":
        raw = rng.choice([raw + b" " * rng.randrange(20), raw + b"\n", raw + b"\0", b" " + raw, raw + b"x", b"\xef\xbb\xbf" + raw])
    length = len(raw)
    if family == "length":
        length = rng.choice([0, 1, length - 1, length + 1, length + len(data), length + len(data) + 1, 1 << 63,
                             (1 << 64) - 1, (1 << 64) - 8, 100000001])
    out = struct.pack("<Q", length & ((1 << 64) - 1)) + raw + data
    if family == "cut":
        out = out[:rng.randrange(len(out) + 1)]
    return family, out


FAMILIES = ["valid", "order", "offset", "size", "dtype", "name", "swap", "data", "metadata", "metadata last", "number",
            "character", "field", "duplicate", "byte", "padding", "length", "cut"]


def replace_number(rng, text, number):
    places = [i for i, c in enumerate(text) if c.isdigit() and not text[i - 1].isalnum() and text[i - 1] not in '._"']
    if not places:
        return text
    i = rng.choice(places)
    end = i
    while end < len(text) and text[end].isdigit():
        end += 1
    return text[:i] + number + text[end:]


def edit_character(rng, text):
    i = rng.randrange(len(text))
    return rng.choice([text[:i] + text[i + 1:], text[:i] + rng.choice('{}[],:"\\ \t0aé') + text[i:], text[:i] + text[i:] * 2])


def compare_readers(lib, cases, seed, folder):
    rng, path = random.Random(seed), os.path.join(folder, "case.safetensors")
    counts, stricter, wrong = collections.Counter(), collections.Counter(), []
    for i in range(cases):
        family, data = build(rng)
        with open(path, "wb") as file:
            file.write(data)
        ours, why = halo_verdict(lib, path)
        theirs, _ = reference_verdict(data)
        counts[family, ours] += 1
        if ours == theirs:
            continue
        reasons = [k for k in STRICTER if k in why]
        if theirs and reasons:
            stricter[reasons[0]] += 1
        else:
            wrong.append((i, family, ours, theirs, why, data[:300]))
    for family in FAMILIES:
        print("  %-14s %5d accepted %5d refused" % (family, counts[family, True], counts[family, False]))
    print("stricter on purpose, as a count of files:")
    for reason, n in stricter.most_common():
        print("  %5d  %s: %s" % (n, reason, STRICTER[reason]))
    for case in wrong[:20]:
        print("DISAGREE", case)
    return len(wrong)


def compare_writers(lib, folder):
    """The same tensors through both writers: equal bytes."""
    p = ctypes.POINTER
    lib.halo_tensor_from.argtypes = [p(ctypes.c_void_p), ctypes.c_int32, ctypes.c_int32, ctypes.c_int32,
                                     p(ctypes.c_int64), ctypes.c_void_p]
    lib.halo_safetensors_writer_add.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_char_p]
    lib.halo_safetensors_writer_save.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]
    lib.halo_safetensors_writer_free.argtypes = [ctypes.c_void_p]
    lib.halo_tensor_free.argtypes = [ctypes.c_void_p]
    rng, random_state = random.Random(3), numpy.random.RandomState(3)
    codes = {"float32": 0, "float64": 1, "int32": 3, "int64": 4, "uint8": 5}
    wrong = 0
    for case in range(200):
        arrays, handles, writer = {}, [], ctypes.c_void_p()
        lib.halo_safetensors_writer_new(ctypes.byref(writer))
        for i in range(rng.randrange(1, 8)):
            dtype = rng.choice(list(codes))
            shape = tuple(rng.randrange(0, 5) for _ in range(rng.randrange(0, 4)))
            name = rng.choice(["a", "b.c", "é", 'q"uote', "back\\slash"]) + str(i)
            array = numpy.ascontiguousarray((random_state.standard_normal(shape) * 50).astype(dtype))
            array = array.reshape(shape)
            arrays[name] = array
            t, sizes = ctypes.c_void_p(), (ctypes.c_int64 * 8)(*shape)
            assert lib.halo_tensor_from(ctypes.byref(t), codes[dtype], 0, len(shape), sizes, array.ctypes.data) == 0
            assert lib.halo_safetensors_writer_add(writer, name.encode(), t, None) == 0
            handles.append(t)
        path = os.path.join(folder, "writer.safetensors")
        assert lib.halo_safetensors_writer_save(writer, path.encode(), 0) == 0, lib.halo_error_message()
        with open(path, "rb") as file:
            ours = file.read()
        theirs = safetensors.numpy.save(arrays, metadata={"format": "pt"})
        if ours != theirs:
            wrong += 1
            print("WRITER", case, ours[:400], theirs[:400])
        for t in handles:
            lib.halo_tensor_free(t)
        lib.halo_safetensors_writer_free(writer)
    return wrong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lib", default=os.path.join(os.path.dirname(__file__), "../../build/libhalo.so"))
    o = parser.parse_args()
    lib = halo_library(o.lib)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        print("reference: safetensors", safetensors.__version__)
        wrong = compare_readers(lib, o.cases, o.seed, folder)
        wrong += compare_writers(lib, folder)
    print("%d files read, 200 written, %d disagreements" % (o.cases, wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
