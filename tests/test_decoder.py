"""The decoder's C functions against numpy, compiled here and called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from levels import LEVELS, AtLevel, has

CSRC = Path(__file__).parent.parent / "mer" / "_ext" / "csrc"
POINTER, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class Router(ctypes.Structure):
    _fields_ = (
        *((name, LONG) for name in ("n_experts", "top_k", "n_groups", "top_groups")),
        *((name, INT) for name in ("group_best", "score", "normalise")),
        *((name, FLOAT) for name in ("scale", "epsilon", "jitter")),
        ("bias", POINTER),
        ("expert_scale", POINTER),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("q", "out", "blocks", "positions", "sinks", "scratch")),
        *((name, ctypes.c_size_t) for name in ("block_bytes", "scratch_floats")),
        *((name, LONG) for name in ("n_heads", "n_kv", "key_dim", "value_dim", "window")),
        ("scale", FLOAT),
        ("kv", INT),
        ("latent", INT),
    )


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = tmp_path_factory.mktemp("decoder") / "decoder.so"
    sources = sorted(map(str, (CSRC / "decoder").glob("*.c")))
    flags = ["-O3", "-std=gnu11", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, f"-I{CSRC}", "-o", str(target), *sources, "-lm"], check=True)
    found = ctypes.CDLL(str(target))
    found.mer_attend_scratch.restype = found.mer_kv_part_bytes.restype = ctypes.c_size_t
    return found


def at(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def route(
    lib,
    logits,
    top_k,
    *,
    groups=1,
    top_groups=1,
    best=2,
    sigmoid=0,
    normalise=0,
    scale=1.0,
    bias=None,
    jitter=0.0,
    expert_scale=None,
):
    logits = np.array(logits, np.float32)
    bias = None if bias is None else np.array(bias, np.float32)
    router = Router(
        len(logits), top_k, groups, top_groups, best, sigmoid, normalise, scale, 0.0, jitter, None, None
    )
    if bias is not None:
        router.bias = bias.ctypes.data
    expert_scale = None if expert_scale is None else np.array(expert_scale, np.float32)
    if expert_scale is not None:
        router.expert_scale = expert_scale.ctypes.data
    choice, ids, weights = np.zeros_like(logits), np.full(top_k, -1, np.int32), np.zeros(top_k, np.float32)
    lib.mer_route(ctypes.byref(router), at(logits), at(choice), None, at(ids), at(weights))
    return ids.tolist(), weights


def test_router_takes_the_lowest_index_of_equals(lib):
    assert route(lib, [1, 3, 3, 0, 3], 2)[0] == [1, 2]
    assert route(lib, [5, 5, 5, 5], 4)[0] == [0, 1, 2, 3]
    assert route(lib, [0] * 8, 2, sigmoid=1, groups=4, top_groups=2)[0] == [0, 1]


def test_router_softmax(lib):
    logits = np.random.default_rng(0).normal(size=60).astype(np.float32) * 3
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")[:6]
    ids, weights = route(lib, logits, 6)
    assert ids == order.tolist()
    np.testing.assert_allclose(weights, p[order], rtol=1e-5)
    ids, weights = route(lib, logits, 6, normalise=1, scale=2.5)
    np.testing.assert_allclose(weights, 2.5 * p[order] / p[order].sum(), rtol=1e-5)


def test_router_bias_chooses_but_does_not_weigh(lib):
    ids, weights = route(lib, [0.0, 1.0, 2.0, 3.0], 2, sigmoid=1, bias=[9, 0, 0, 8])
    assert ids == [0, 3]
    np.testing.assert_allclose(weights, [0.5, 1 / (1 + np.exp(-3))], rtol=1e-6)


def test_router_scales_by_expert(lib):
    """After the weights were normalised, and without part in the choice."""
    ids, weights = route(lib, [0.0, 1.0, 2.0, 3.0], 2, normalise=1, expert_scale=[9, 8, 3, 0.5])
    assert ids == [3, 2]
    p = np.exp([3.0, 2.0])
    np.testing.assert_allclose(weights, p / p.sum() * [0.5, 3], rtol=1e-6)


def test_router_groups_count_their_two_best(lib):
    # The best single expert, 7, stands in a group whose second is poor.
    logits = [2.0, 2.0, 0.0, 1.9, 1.9, 0.0, -9.0, 3.0, -9.0]
    assert route(lib, logits, 2, sigmoid=1, groups=3, top_groups=1)[0] == [0, 1]
    assert route(lib, logits, 3, sigmoid=1, groups=3, top_groups=2)[0] == [0, 1, 3]


def test_router_mixes_sparsely(lib):
    """Weights are shares of a softmax over those nearly as good, the better choices left out."""
    rng = np.random.default_rng(6)
    for jitter in (0.01, 0.2, 1.5):
        logits = rng.normal(size=12).astype(np.float32)
        ids, weights = route(lib, logits, 3, jitter=jitter)
        order = np.argsort(-logits, kind="stable")
        assert ids == order[:3].tolist()
        for k in range(3):
            left = logits[order[k:]].astype(np.float64)
            near = (left[0] - left) / np.maximum(np.abs(left), left[0]) <= 2 * jitter
            np.testing.assert_allclose(weights[k], 1 / np.exp(left[near] - left[0]).sum(), rtol=1e-5)


def test_router_groups_count_their_best(lib):
    logits = np.random.default_rng(4).normal(size=24).astype(np.float32)
    best = np.argsort(-logits.reshape(6, 4).max(1), kind="stable")[:2]
    allowed = np.isin(np.arange(24) // 4, best)
    expected = np.argsort(np.where(allowed, -logits, np.inf), kind="stable")[:5]
    ids, weights = route(lib, logits, 5, groups=6, top_groups=2, best=1)
    assert ids == expected.tolist()
    np.testing.assert_allclose(weights, (np.exp(logits) / np.exp(logits).sum())[expected], rtol=1e-5)
    assert route(lib, [1.0, 3.0, 2.0], 2, groups=3, top_groups=2, best=1)[0] == [1, 2]


@pytest.mark.parametrize(("sigmoid", "jitter"), [(0, 0.0), (1, 0.0), (0, 0.1)])
def test_router_survives_what_is_no_number(lib, sigmoid, jitter):
    for bad in ([np.nan] * 6, [np.inf] * 6, [-np.inf] * 6, [1, np.nan, 2, -np.inf, np.inf, 0]):
        ids = route(lib, bad, 4, sigmoid=sigmoid, groups=2, top_groups=2, jitter=jitter)[0]
        assert len(set(ids)) == 4
        assert all(0 <= each < 6 for each in ids)


def softmax_attention(q, keys, values, scale, sink=-np.inf):
    s = (keys.astype(np.float64) @ q.astype(np.float64)) * scale
    top = max(s.max(), sink)
    p = np.exp(s - top)
    return (p / (p.sum() + np.exp(sink - top))) @ values.astype(np.float64)


def as_q8_0(x):
    """What GGUF's Q8_0 makes of each vector, the last block of 32 filled up with zeros."""
    padded = np.zeros((*x.shape[:-1], -(-x.shape[-1] // 32) * 32), np.float32)
    padded[..., : x.shape[-1]] = x
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.dequantize(gguf.quants.quantize(padded, kind), kind)[..., : x.shape[-1]]


STORED = (lambda x: x, lambda x: x.astype(np.float16).astype(np.float32), as_q8_0)


@pytest.mark.parametrize(("latent", "with_sinks"), [(0, False), (0, True), (1, False)])
@pytest.mark.parametrize("kv", [0, 1, 2])
@pytest.mark.parametrize(("dim", "length", "window"), [(8, 16, 0), (33, 61, 0), (64, 100, 7), (20, 50, 16)])
def test_attention(lib, latent, with_sinks, kv, dim, length, window):
    """Keys written one by one to scattered blocks, then queries of the last positions, at each level."""
    rng = np.random.default_rng(dim)
    heads, kv_heads, queries = 6, 1 if latent else 2, 9
    sinks = np.linspace(-4, 20, heads, dtype=np.float32)  # of no weight, up to nearly all of it
    value_dim = dim - 3 if latent else dim
    given = rng.normal(size=(2, length, kv_heads, dim)).astype(np.float32)
    k, v = (STORED[kv](each) for each in given)
    v = k[..., :value_dim] if latent else v
    q = (rng.normal(size=(queries, heads, dim)) * 3).astype(np.float32)
    parts = 1 if latent else 2 * kv_heads
    blocks = np.full((20, parts * lib.mer_kv_part_bytes(kv, LONG(dim))), 255, np.uint8)  # NaN in F16 and F32
    table = rng.permutation(20).astype(np.int32)
    for i in range(length):
        block = ctypes.c_void_p(blocks[table[i // 16]].ctypes.data)
        if latent:
            lib.mer_latent_store(block, kv, LONG(i % 16), at(given[0, i]), LONG(dim))
        else:
            lib.mer_kv_store(block, kv, LONG(i % 16), *map(at, given[:, i]), LONG(kv_heads), LONG(dim))
    positions = np.arange(length - queries, length, dtype=np.int32)
    out = np.full((queries, heads, value_dim), np.nan, np.float32)
    a = Attention(
        q.ctypes.data, out.ctypes.data, blocks.ctypes.data, positions.ctypes.data,
        sinks.ctypes.data if with_sinks else None, None,
        blocks.strides[0], 0, heads, kv_heads, dim, value_dim, window, 0.3, kv, latent,
    )  # fmt: skip
    group = heads // kv_heads
    a.scratch_floats = lib.mer_attend_scratch(ctypes.byref(a), LONG(queries), LONG(group))
    scratch = np.full(a.scratch_floats, np.nan, np.float32)
    a.scratch = scratch.ctypes.data
    found = set()
    for each in (lib, *(AtLevel(lib, level) for level in LEVELS if has(level))):
        out[:] = np.nan
        for h in range(0, heads, group):
            span = LONG(0), LONG(queries), LONG(h), LONG(h + group)
            each.mer_attend(ctypes.byref(a), at(table), *span, INT(0))
        found.add(out.tobytes())
    assert len(found) == 1
    for t, position in enumerate(positions):
        first = max(0, position - window + 1) if window else 0
        seen = slice(first, position + 1)
        for h in range(heads):
            expected = softmax_attention(
                q[t, h], k[seen, h // group], v[seen, h // group], 0.3, sinks[h] if with_sinks else -np.inf
            )
            np.testing.assert_allclose(out[t, h], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("seed", range(20))
def test_exponential(lib, seed):
    """Weights of one block, seen through one-hot values: the softmax of the scores to the last bits."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-5 * seed - 1, 0, 16).astype(np.float32)
    scores[seed % 16] = 0.0
    block = np.concatenate([scores, np.eye(16, dtype=np.float32).ravel()])
    q, out, position = np.ones(1, np.float32), np.zeros(16, np.float32), np.full(1, 15, np.int32)
    scratch, table = np.zeros(600, np.float32), np.zeros(1, np.int32)
    a = Attention(
        q.ctypes.data, out.ctypes.data, block.ctypes.data, position.ctypes.data, None, scratch.ctypes.data,
        block.nbytes, 0, 1, 1, 1, 16, 0, 1.0, 0, 0,
    )  # fmt: skip
    lib.mer_attend(ctypes.byref(a), at(table), LONG(0), LONG(1), LONG(0), LONG(1), INT(0))
    expected = np.exp(scores.astype(np.float64))
    expected[scores < -87] = np.exp(-87)
    np.testing.assert_allclose(out, expected / expected.sum(), rtol=5e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_q8_0_of_what_is_no_number(lib, bad):
    """A group with such an element is NaN, the others are as they were."""
    rows = np.random.default_rng(3).normal(size=(2, 64)).astype(np.float32)
    block = np.zeros((2, lib.mer_kv_part_bytes(2, LONG(64))), np.uint8)
    lib.mer_latent_store(at(block[0]), 2, LONG(5), at(rows[0]), LONG(64))
    rows[0, 40] = bad
    lib.mer_latent_store(at(block[1]), 2, LONG(5), at(rows[0]), LONG(64))
    codes, scales = block[:, 5 * 64 : 6 * 64], block[:, 16 * 64 :].view(np.float16).reshape(2, 16, 2)[:, 5]
    np.testing.assert_array_equal(codes[0, :32], codes[1, :32])
    assert scales[0, 0] == scales[1, 0]
    assert np.isnan(scales[1, 1])


def test_every_f16_value_is_kept(lib):
    """Narrowed by the store, widened by attention over one position (weight 1): each comes back."""
    every = np.arange(0x10000, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].astype(np.float32)
    block = np.zeros(16 * len(every), np.float16)
    lib.mer_latent_store(at(block), 1, LONG(0), at(every), LONG(len(every)))
    np.testing.assert_array_equal(block[: len(every)].astype(np.float32), every)
    assert block[: len(every)].tobytes() == every.astype(np.float16).tobytes()

    out, q = np.zeros_like(every), np.zeros_like(every)
    scratch, zero = np.zeros(16 * len(every) + 19 * 16, np.float32), np.zeros(1, np.int32)
    a = Attention(
        q.ctypes.data, out.ctypes.data, block.ctypes.data, zero.ctypes.data, None, scratch.ctypes.data,
        block.nbytes, 0, 1, 1, len(every), len(every), 0, 1.0, 1, 1,
    )  # fmt: skip
    lib.mer_attend(ctypes.byref(a), at(zero), LONG(0), LONG(1), LONG(0), LONG(1), INT(0))
    np.testing.assert_array_equal(out, every)


@pytest.mark.parametrize(
    ("name", "needs"), [("portable", ()), ("f16c", ("avx2", "f16c")), ("avx512", ("avx512f",))]
)
def test_every_way_to_widen_f16(lib, name, needs):
    """With infinities, and NaNs as the CPU's instruction has them: quiet."""
    if not set(needs) <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip(f"this CPU has no {name}")
    every = np.arange(0x10000, dtype=np.uint16)
    every = every[~(np.isnan(every.view(np.float16)) & (every & 0x200 == 0))]
    every = np.concatenate([every, np.zeros(-len(every) % 16, np.uint16)])
    found = np.zeros(len(every), np.float32)
    getattr(lib, f"mer_widen_{name}")(at(every), LONG(len(every)), at(found))
    assert found.tobytes() == every.view(np.float16).astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("name", "needs"), [("portable", ()), ("avx2", ("avx2", "f16c")), ("avx512", ("avx512f",))]
)
@pytest.mark.parametrize("dim", [7, 32, 57, 96])
def test_every_way_to_widen_q8_0(lib, name, needs, dim):
    if not set(needs) <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip(f"this CPU has no {name}")
    rng, groups = np.random.default_rng(dim), -(-dim // 32)
    codes = rng.integers(-127, 128, (16, dim)).astype(np.int8)
    scales = rng.uniform(-5, 5, (16, groups)).astype(np.float16)
    scales[0, 0] = np.nan
    want = codes.astype(np.float32) * np.repeat(scales.astype(np.float32), 32, axis=1)[:, :dim]
    for by_element in (0, 1):
        given = [np.ascontiguousarray(each.T if by_element else each) for each in (codes, scales)]
        found = np.zeros(16 * dim + 1, np.float32)
        getattr(lib, f"mer_widen_codes_{name}")(*map(at, given), LONG(dim), INT(by_element), at(found))
        np.testing.assert_array_equal(found[:-1].reshape(given[0].shape), want.T if by_element else want)
        assert found[-1] == 0


def test_f16_rounds_to_even_and_saturates(lib):
    values = np.random.default_rng(5).uniform(-30, 30, 4000)
    floats = (np.sign(values) * np.exp2(np.abs(values) - 20)).astype(np.float32)
    halfway = np.float32([2049.0, 2051.0, 1.5 * 2**-24, 2.5 * 2**-24, 0.5 * 2**-24, 65519.0])
    floats = np.concatenate([floats[np.abs(floats) < 65504], halfway])
    block = np.zeros(16 * len(floats), np.float16)
    lib.mer_latent_store(at(block), 1, LONG(0), at(floats), LONG(len(floats)))
    np.testing.assert_array_equal(block[: len(floats)], np.clip(floats, -65504, 65504).astype(np.float16))
    wild = np.float32([1e6, -1e30, np.inf, np.nan])
    lib.mer_latent_store(at(block), 1, LONG(0), at(wild), LONG(4))
    np.testing.assert_array_equal(block[:4], np.float16([65504, -65504, 65504, np.nan]))


@pytest.mark.parametrize("n", [1, 15, 16, 47, 2048])
def test_rms_norm(lib, n):
    rng = np.random.default_rng(n)
    x, w = rng.normal(size=(2, n)).astype(np.float32)
    y = np.zeros_like(x)
    lib.mer_rms_norm(at(x), at(w), at(y), LONG(n), FLOAT(1e-5))
    np.testing.assert_allclose(y, w * x / np.sqrt((x.astype(np.float64) ** 2).mean() + 1e-5), rtol=2e-6)


@pytest.mark.parametrize("n", [1, 15, 16, 47, 2048])
def test_layer_norm(lib, n):
    rng = np.random.default_rng(n)
    x, w, bias = rng.normal(size=(3, n)).astype(np.float32) + np.float32(3)
    exact = x.astype(np.float64) - x.astype(np.float64).mean()
    expected = exact / np.sqrt((exact**2).mean() + 1e-5) * w + bias
    y = np.zeros_like(x)
    lib.mer_layer_norm(at(x), at(w), at(bias), at(y), LONG(n), FLOAT(1e-5))
    np.testing.assert_allclose(y, expected, rtol=5e-6, atol=2e-5)
    lib.mer_layer_norm(at(x), at(w), at(bias), at(x), LONG(n), FLOAT(1e-5))
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rope_turns_pairs(lib, interleaved):
    rng = np.random.default_rng(1)
    x = rng.normal(size=14).astype(np.float32)
    frequencies = np.float32(10000.0 ** (-np.arange(7) / 7))
    cosine, sine = np.zeros(7, np.float32), np.zeros(7, np.float32)
    lib.mer_rope_angles(INT(123), at(frequencies), LONG(7), FLOAT(1.5), at(cosine), at(sine))
    pairs = x.reshape(7, 2) if interleaved else x.reshape(2, 7).T
    turned = (
        (pairs[:, 0] + 1j * pairs[:, 1]) * 1.5 * np.exp(1j * (np.float32(123) * frequencies).astype(float))
    )
    lib.mer_rope(at(x), at(cosine), at(sine), LONG(7), INT(interleaved))
    pairs = x.reshape(7, 2) if interleaved else x.reshape(2, 7).T
    np.testing.assert_allclose(pairs, np.stack([turned.real, turned.imag], -1), atol=1e-5)


def test_clip(lib):
    x = np.float32([-3, -1, 0, 0.5, 2, np.inf, -np.inf])
    lib.mer_clip(at(x), FLOAT(1.0), LONG(len(x)))
    assert x.tolist() == [-1, -1, 0, 0.5, 1, 1, -1]


def test_norm_without_weights(lib):
    x = np.random.default_rng(2).normal(size=47).astype(np.float32)
    y = np.zeros_like(x)
    lib.mer_rms_norm(at(x), None, at(y), LONG(len(x)), FLOAT(1e-5))
    np.testing.assert_allclose(y, x / np.sqrt((x.astype(np.float64) ** 2).mean() + 1e-5), rtol=2e-6)


def test_soft_cap(lib):
    x = np.float32([-1e4, -3, -0.5, 0, 1e-3, 2, 40, np.inf])
    expected = 5 * np.tanh(x.astype(np.float64) / 5)
    lib.mer_soft_cap(at(x), FLOAT(5.0), LONG(len(x)))
    np.testing.assert_allclose(x, expected, rtol=1e-6)
