"""DeepSeek-V4's compressed rows and streams: C functions of every instruction set against numpy."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from levels import AtLevel
from test_decoder import CSRC, FLOAT, INT, LONG, POINTER, STORED, Attention, at, softmax_attention

BLOCKS = 20
# What each level of x86-64 needs, as Linux names it; attention has levels of its own.
OWN = {"x86-64": "plain", "x86-64-v3": "avx2", "x86-64-v4": "avx512"}
LEVELS = {
    "x86-64": set(),
    "x86-64-v3": {"avx2", "fma", "bmi2"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


class Rows(ctypes.Structure):
    _fields_ = (
        ("blocks", POINTER),
        *((name, ctypes.c_size_t) for name in ("block_bytes", "raw", "entries")),
        *((name, LONG) for name in ("dim", "rate")),
        *((name, INT) for name in ("overlap", "kv", "raw_kv")),
    )


class Streams(ctypes.Structure):
    _fields_ = (
        *((name, LONG) for name in ("n", "width", "rounds")),
        *((name, FLOAT) for name in ("eps", "norm_eps")),
        ("last", INT),
    )


@pytest.fixture(scope="module", params=LEVELS)
def lib(request, tmp_path_factory):
    """Compiled for one level alone, without the choice that the compiler makes at run time."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    flags = ["-O3", "-std=gnu11", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    if platform.machine() == "x86_64":
        has = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
        if not LEVELS[request.param] <= has:
            pytest.skip(f"this CPU is below {request.param}")
        flags += [f"-march={request.param}", "-D__SANITIZE_THREAD__"]  # by which vec.h leaves the choice out
    elif LEVELS[request.param]:
        pytest.skip("no x86-64")
    target = tmp_path_factory.mktemp("rows") / "rows.so"
    sources = sorted(map(str, (CSRC / "decoder").glob("*.c")))
    subprocess.run([compiler, *flags, f"-I{CSRC}", "-o", str(target), *sources, "-lm"], check=True)
    found = ctypes.CDLL(str(target))
    found.mer_kv_row_bytes.restype = ctypes.c_size_t
    found.mer_entry.restype = POINTER
    return AtLevel(found, OWN[request.param])


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def rows(lib, dim: int, rate: int, overlap: int, kv: int, raw_kv: int) -> tuple[Rows, np.ndarray]:
    """Blocks as a layer has them: 16 keys, 16 rows to compress, compressed rows; full of NaN."""
    raw = 16 * lib.mer_kv_row_bytes(kv, LONG(dim))
    entries = raw + 16 * lib.mer_kv_row_bytes(raw_kv, LONG(2 * (1 + overlap) * dim))
    size = entries + max(16 // rate, 1) * lib.mer_kv_row_bytes(kv, LONG(dim))
    blocks = np.full((BLOCKS, size), 255, np.uint8)
    return Rows(blocks.ctypes.data, size, raw, entries, dim, rate, overlap, kv, raw_kv), blocks


def compressed(values, gates, bias, rate: int, overlap: int, position: int) -> np.ndarray:
    """Of each element the mean of a window's values [tokens, places, dim] by the softmax of its gates.

    With overlap the window before takes part with the first of its two places, its own with the second.
    """
    first = position + 1 - rate
    taken = [(p, overlap) for p in range(first, position + 1)]
    if overlap and first:
        taken += [(p, 0) for p in range(first - rate, first)]
    gate = np.stack([gates[p, place] + bias[p % rate, place] for p, place in taken])
    weights = np.exp(gate - gate.max(0))
    return (weights * np.stack([values[p, place] for p, place in taken])).sum(0) / weights.sum(0)


@pytest.mark.parametrize("raw_kv", [0, 1])
@pytest.mark.parametrize(("dim", "rate", "overlap"), [(16, 4, 1), (37, 4, 1), (24, 32, 0), (70, 8, 0)])
def test_compression(lib, dim, rate, overlap, raw_kv):
    rng = np.random.default_rng(dim)
    r, blocks = rows(lib, dim, rate, overlap, 0, raw_kv)
    table = rng.permutation(BLOCKS).astype(np.int32)
    length, places = 5 * rate, 1 + overlap
    values, gates = normal(rng, length, places, dim), normal(rng, length, places, dim) * 6
    gates[0, 0, :2] = 90.0, -90.0
    bias = normal(rng, rate, places, dim)
    for i in range(length):
        half = lib.mer_kv_row_bytes(raw_kv, LONG(places * dim))
        row = blocks[table[i // 16]].ctypes.data + r.raw + i % 16 * 2 * half
        lib.mer_kv_row_store(POINTER(row), raw_kv, at(values[i]), LONG(places * dim))
        lib.mer_kv_row_store(POINTER(row + half), raw_kv, at(gates[i]), LONG(places * dim))
    kept, asked = (STORED[raw_kv](each).astype(np.float64) for each in (values, gates))
    for position in range(rate - 1, length, rate):
        scratch, out = (np.full(size, np.nan, np.float32) for size in (2 * places * dim + 2 * dim, dim))
        lib.mer_compress(ctypes.byref(r), at(table), LONG(position), at(bias), at(scratch), at(out))
        expected = compressed(kept, asked, bias, rate, overlap, position)
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kv", [0, 1, 2])
@pytest.mark.parametrize(("dim", "rate", "window"), [(32, 4, 9), (70, 32, 16), (20, 8, 3)])
def test_scores_and_attention(lib, dim, rate, window, kv):
    """The indexer's scores of compressed rows, and attention over a window and some of them or the first."""
    rng = np.random.default_rng(dim)
    heads, length = 5, 6 * rate + 2
    n = length // rate
    r, blocks = rows(lib, dim, rate, 0, kv, 0)
    table = rng.permutation(BLOCKS).astype(np.int32)
    keys, entries = normal(rng, length, dim), normal(rng, n, dim)
    for i in range(length):
        row = blocks[table[i // 16]].ctypes.data + i % 16 * lib.mer_kv_row_bytes(kv, LONG(dim))
        lib.mer_kv_row_store(POINTER(row), kv, at(keys[i]), LONG(dim))
    for i in range(n):
        row = POINTER(lib.mer_entry(ctypes.byref(r), at(table), LONG(i)))
        lib.mer_kv_row_store(row, kv, at(entries[i]), LONG(dim))
    keys, entries = STORED[kv](keys), STORED[kv](entries)
    q, weights, sinks = normal(rng, 1, heads, dim) * 2, normal(rng, heads), normal(rng, heads)
    scratch, scores = np.full(dim, np.nan, np.float32), np.full(n, np.nan, np.float32)
    lib.mer_entry_scores(
        ctypes.byref(r), at(table), at(q), at(weights), LONG(heads), LONG(n), at(scratch), at(scores)
    )
    expected = weights.astype(np.float64) @ np.maximum(
        q[0].astype(np.float64) @ entries.T.astype(np.float64), 0
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-4)

    positions = np.array([length - 1], np.int32)
    out = np.full((1, heads, dim), np.nan, np.float32)
    scratch = np.full(16 * dim + 19 * 16, np.nan, np.float32)
    a = Attention(
        q.ctypes.data, out.ctypes.data, blocks.ctypes.data, positions.ctypes.data, sinks.ctypes.data,
        scratch.ctypes.data, r.block_bytes, 0, heads, 1, dim, dim, window, 0.3, kv, 1,
    )  # fmt: skip
    for chosen in (None, np.array([0, 2, n - 1], np.int32)):
        count = n - 1 if chosen is None else len(chosen)
        seen = np.concatenate(
            [keys[length - window :], entries[: n - 1] if chosen is None else entries[chosen]]
        )
        lib.mer_attend_rows(
            ctypes.byref(a), ctypes.byref(r), at(table), None if chosen is None else at(chosen), LONG(count),
            LONG(0), LONG(0), LONG(heads), INT(0),
        )  # fmt: skip
        for h in range(heads):
            expected = softmax_attention(q[0, h], seen, seen, 0.3, sinks[h])
            np.testing.assert_allclose(out[0, h], expected, rtol=2e-5, atol=2e-6)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(("n", "width", "rounds"), [(4, 64, 20), (2, 37, 3), (1, 16, 1)])
def test_streams(lib, n, width, rounds):
    """Weights of streams, streams made one, and a block's output made several."""
    rng = np.random.default_rng(width)
    x, base, scale = normal(rng, n, width), normal(rng, 2 * n + n * n), normal(rng, 3)
    mixes = normal(rng, 2 * n + n * n) * 3
    eps, norm_eps = 1e-6, 1e-5
    scaled = mixes.astype(np.float64) / np.sqrt(np.mean(x.astype(np.float64) ** 2) + norm_eps)
    pre = sigmoid(scaled[:n] * scale[0] + base[:n]) + eps
    post = 2 * sigmoid(scaled[n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (scaled[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n)
    comb = np.exp(comb - comb.max(1, keepdims=True))
    comb = comb / comb.sum(1, keepdims=True) + eps
    comb = comb / (comb.sum(0) + eps)
    for _ in range(rounds - 1):
        comb = comb / (comb.sum(1, keepdims=True) + eps)
        comb = comb / (comb.sum(0) + eps)
    expected = np.concatenate([pre, post, comb.ravel()])
    found = mixes.copy()
    s = Streams(n, width, rounds, eps, norm_eps, 0)
    lib.mer_stream_weights(at(found), at(x), at(base), at(scale), ctypes.byref(s))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    last = mixes.copy()
    s.last = 1
    lib.mer_stream_weights(at(last), at(x), at(base), at(scale), ctypes.byref(s))
    np.testing.assert_array_equal(last, np.concatenate([found[:n], mixes[n:]]))

    out, y = np.full(width, np.nan, np.float32), normal(rng, width)
    weights = [np.ascontiguousarray(each) for each in np.split(found, [n, 2 * n])]
    lib.mer_collapse(at(x), at(weights[0]), LONG(n), LONG(width), at(out))
    np.testing.assert_allclose(out, pre @ x, rtol=1e-5, atol=2e-6)
    spread = x.copy()
    lib.mer_spread(at(spread), at(y), at(weights[1]), at(weights[2]), LONG(n), LONG(width))
    np.testing.assert_allclose(spread, np.outer(post, y) + comb.T @ x, rtol=2e-5, atol=3e-6)
