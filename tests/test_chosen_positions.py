"""The choice of positions and attention over them, the decoder's C functions against numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from test_decoder import INT, LONG, POINTER, STORED, Attention, at, lib, softmax_attention

__all__ = ["lib"]  # the fixture


class Index(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("q", "weights", "keys")),
        ("block_bytes", ctypes.c_size_t),
        ("n_heads", LONG),
        ("dim", LONG),
        ("kv", INT),
    )


def choose(lib, scores: np.ndarray, k: int) -> list[int]:
    scratch, chosen = np.zeros(2 * k, np.uint64), np.full(k, -1, np.int32)
    lib.mer_choose(at(scores), LONG(len(scores)), LONG(k), at(scratch), at(chosen))
    return chosen.tolist()


@pytest.mark.parametrize("n", [1, 2, 5, 40, 1000, 4096])
@pytest.mark.parametrize("distinct", [1, 3, 10_000])
def test_highest_scores(lib, n, distinct):
    """Of equals the first, in ascending order."""
    rng = np.random.default_rng(n)
    scores = (rng.integers(0, distinct, n) - distinct // 2).astype(np.float32)
    for k in {1, 2, n // 3, n - 1, n} & set(range(1, n + 1)):
        expected = sorted(np.argsort(-scores, kind="stable")[:k].tolist())
        assert choose(lib, scores, k) == expected
    assert choose(lib, np.float32([-0.0, 0.0, 0.0]), 2) == [0, 1]


def test_what_is_no_number_is_the_lowest_score(lib):
    scores = np.float32([np.nan, -1e30, np.inf, -np.inf, 0, np.nan])
    assert choose(lib, scores, 3) == [1, 2, 4]
    assert choose(lib, scores, 4) == [0, 1, 2, 4]


@pytest.mark.parametrize("kv", [0, 1, 2])
@pytest.mark.parametrize(("heads", "dim", "length"), [(1, 8, 16), (5, 33, 61), (64, 128, 100)])
def test_index_scores(lib, kv, heads, dim, length):
    rng = np.random.default_rng(dim)
    given = rng.normal(size=(length, dim)).astype(np.float32)
    keys = STORED[kv](given).astype(np.float64)
    q, weights = (
        rng.normal(size=(3, heads, dim)).astype(np.float32),
        rng.normal(size=(3, heads)).astype(np.float32),
    )
    before = 96  # bytes of latents
    blocks = np.full((9, before + lib.mer_kv_part_bytes(kv, LONG(dim))), 255, np.uint8)
    table = rng.permutation(9).astype(np.int32)
    for i in range(length):
        part = ctypes.c_void_p(blocks[table[i // 16]].ctypes.data + before)
        lib.mer_index_store(part, kv, LONG(i % 16), at(given[i]), LONG(dim))
    index = Index(
        q.ctypes.data, weights.ctypes.data, blocks.ctypes.data + before, blocks.strides[0], heads, dim, kv
    )
    scratch = np.zeros(16 * dim, np.float32)
    n_blocks = -(-length // 16)
    scores = np.full(n_blocks * 16, np.nan, np.float32)
    for b in range(n_blocks):  # block by block is as all at once
        lib.mer_index_scores(
            ctypes.byref(index), at(table), LONG(2), LONG(b), LONG(b + 1), at(scratch), at(scores[16 * b :])
        )
    expected = weights[2].astype(np.float64) @ np.maximum(q[2].astype(np.float64) @ keys.T, 0)
    np.testing.assert_allclose(scores[:length], expected, rtol=1e-5, atol=2e-5 * heads)
    whole = np.zeros_like(scores)
    lib.mer_index_scores(
        ctypes.byref(index), at(table), LONG(2), LONG(0), LONG(n_blocks), at(scratch), at(whole)
    )
    assert whole[:length].tobytes() == scores[:length].tobytes()


@pytest.mark.parametrize("kv", [0, 1, 2])
@pytest.mark.parametrize(("dim", "length"), [(8, 16), (33, 61), (64, 100)])
def test_attention_over_chosen_positions(lib, kv, dim, length):
    rng = np.random.default_rng(length)
    heads, queries, value_dim = 6, 3, dim - 3
    given = rng.normal(size=(length, dim)).astype(np.float32)
    keys = STORED[kv](given)
    q = (rng.normal(size=(queries, heads, dim)) * 3).astype(np.float32)
    blocks = np.full((20, lib.mer_kv_part_bytes(kv, LONG(dim))), 255, np.uint8)
    table = rng.permutation(20).astype(np.int32)
    for i in range(length):
        block = ctypes.c_void_p(blocks[table[i // 16]].ctypes.data)
        lib.mer_latent_store(block, kv, LONG(i % 16), at(given[i]), LONG(dim))
    positions = np.full(queries, length - 1, np.int32)
    out = np.full((queries, heads, value_dim), np.nan, np.float32)
    scratch = np.full(16 * dim + 19 * heads * queries + 16, np.nan, np.float32)
    a = Attention(
        q.ctypes.data, out.ctypes.data, blocks.ctypes.data, positions.ctypes.data, None, scratch.ctypes.data,
        blocks.strides[0], 0, heads, 1, dim, value_dim, 0, 0.3, kv, 1,
    )  # fmt: skip
    for n in {1, 7, 16, 33, length} & set(range(1, length + 1)):
        chosen = np.sort(rng.choice(length, n, replace=False)).astype(np.int32)
        lib.mer_attend_chosen(
            ctypes.byref(a), at(table), at(chosen), LONG(n), LONG(1), LONG(0), LONG(heads), INT(0)
        )
        for h in range(heads):
            expected = softmax_attention(q[1, h], keys[chosen], keys[chosen, :value_dim], 0.3)
            np.testing.assert_allclose(out[1, h], expected, rtol=2e-5, atol=2e-6)
    # All of them, in the bytes of attention that knows of no choice.
    lib.mer_attend(ctypes.byref(a), at(table), LONG(1), LONG(2), LONG(0), LONG(heads), INT(0))
    expected = out[1].copy()
    lib.mer_attend_chosen(
        ctypes.byref(a), at(table), at(np.arange(length, dtype=np.int32)), LONG(length), LONG(1), LONG(0),
        LONG(heads), INT(0),
    )  # fmt: skip
    assert out[1].tobytes() == expected.tobytes()
