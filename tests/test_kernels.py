"""Products, activations and SwiGLU of every instruction set, against exact float64 arithmetic."""

from __future__ import annotations

from typing import Protocol

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mer._ext.kernels import Kernels, Pool, isas
from mer.errors import ConfigError

F32, F16, Q4_0, Q8_0, Q4_K, BF16, MXFP4 = 0, 1, 2, 8, 12, 30, 39
BLOCK = {F32: 1, F16: 1, BF16: 1, Q4_0: 32, Q8_0: 32, Q4_K: 256, MXFP4: 32}
BLOCK_BYTES = {F32: 4, F16: 2, BF16: 2, Q4_0: 18, Q8_0: 34, Q4_K: 144, MXFP4: 17}
Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS = 3, 6, 7, 10, 11, 13, 14, 20, 23
READ = (Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS)
for read in READ:
    BLOCK[read], BLOCK_BYTES[read] = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(read)]
INTEGER = (Q4_0, Q8_0, Q4_K, MXFP4, *READ)
# Where in a block the F16 scale is, and that of the minimum.
SCALES = {Q4_1: (0, 2), Q5_0: (0,), Q5_1: (0, 2), Q2_K: (80, 82), Q3_K: (108,), Q5_K: (0, 2), Q6_K: (208,)}
SCALES |= {IQ4_NL: (0,), IQ4_XS: (0,), Q4_K: (0, 2)}
FORMATS = pytest.mark.parametrize("fmt", BLOCK, ids=lambda f: gguf.GGMLQuantizationType(f).name)
ISAS = pytest.mark.parametrize("isa", isas())

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def encode(fmt: int, w: Floats) -> Bytes:
    """Weights in a format. gguf can't quantise to all: there, blocks of random bits with sane scales."""
    if fmt not in SCALES:
        return gguf.quants.quantize(w, gguf.GGMLQuantizationType(fmt)).view(np.uint8).reshape(len(w), -1)
    rng = np.random.default_rng(abs(hash(w.tobytes())) % 2**32)
    rows, blocks = len(w), w.shape[1] // BLOCK[fmt]
    out = rng.integers(0, 256, (rows, blocks, BLOCK_BYTES[fmt]), np.uint8)
    for at in SCALES[fmt]:
        scale = rng.uniform(1e-4, 1e-2, (rows, blocks, 1)).astype(np.float16)
        out[:, :, at : at + 2] = scale.view(np.uint8)
    return out.reshape(rows, -1)


def decode(fmt: int, w: Bytes) -> NDArray[np.float64]:
    kind = gguf.GGMLQuantizationType(fmt)
    if fmt == F32:
        return w.view(np.float32).astype(np.float64)
    if fmt == F16:
        return w.view(np.float16).astype(np.float64)
    return gguf.quants.dequantize(w, kind).astype(np.float64)


def pad64(n: int) -> int:
    return -(-n // 64) * 64


def split_acts(
    acts: Bytes, cols: int
) -> tuple[NDArray[np.int8], Floats, NDArray[np.int32], Floats, NDArray[np.int32]]:
    nb = cols // 32
    at = np.cumsum([0, pad64(cols), pad64(4 * nb), pad64(4 * nb), pad64(4 * nb)])
    q = acts[:, :cols].view(np.int8)
    d, s, ds = (np.ascontiguousarray(acts[:, a : a + 4 * nb]) for a in at[1:4])
    half = np.ascontiguousarray(acts[:, at[4] : at[4] + 8 * nb])
    return q, d.view(np.float32), s.view(np.int32), ds.view(np.float32), half.view(np.int32)


class Prepares(Protocol):
    def prepare_py(self, fmt: int, x: Floats) -> Bytes: ...


def activations(k: Prepares, fmt: int, x: Floats) -> NDArray[np.float64]:
    """What the prepared activations stand for: with floats what went in, in parts or whole."""
    if fmt not in INTEGER:
        return x.astype(np.float64)
    q, d, *_ = split_acts(k.prepare_py(fmt, x), x.shape[1])
    return q.astype(np.float64) * np.repeat(d.astype(np.float64), 32, axis=1)


def weight_bounds(fmt: int, w: Bytes) -> NDArray[np.float64]:
    """Magnitudes that the rounding of a product works with: |w|, or scale * q and minimum apart."""
    if len(SCALES.get(fmt, ())) < 2:
        return np.abs(decode(fmt, w))
    top = w.copy().reshape(len(w), -1, BLOCK_BYTES[fmt])
    low = top.copy()
    scale, least = SCALES[fmt]
    top[:, :, least : least + 2] = 0  # no minimum
    low[:, :, scale : scale + 2] = 0  # nothing but the minimum
    return np.abs(decode(fmt, top.reshape(w.shape))) + np.abs(decode(fmt, low.reshape(w.shape)))


def make(fmt: int, rows: int, cols: int, n_tok: int, seed: int = 0) -> tuple[Bytes, Floats]:
    rng = np.random.default_rng([seed, fmt, rows, cols, n_tok])
    w = encode(fmt, (rng.standard_normal((rows, cols)) * 0.05).astype(np.float32))
    x = rng.standard_normal((n_tok, cols)) * np.exp(rng.standard_normal((n_tok, 1)))
    return w, x.astype(np.float32)


def assert_close(k: Prepares, fmt: int, w: Bytes, x: Floats, y: Floats) -> None:
    """Within 2^-23 * (4 + sqrt(terms)) of the sum of the terms' magnitudes, from the exact product."""
    acts = activations(k, fmt, x)
    exact = acts @ decode(fmt, w).T
    terms = x.shape[1] // (32 if fmt in INTEGER else 1)
    bound = np.abs(acts) @ weight_bounds(fmt, w).T * 2.0**-23 * (4 + np.sqrt(terms))
    assert np.all(np.abs(y - exact) <= bound), float(np.max(np.abs(y - exact) / (bound + 1e-300)))


def shapes(fmt: int) -> list[tuple[int, int, int]]:
    """(rows, cols, n_tok): one of everything, odd counts, the edges of groups of rows and tokens."""
    b = BLOCK[fmt]
    if b == 1:
        return [(1, 1, 1), (3, 7, 2), (17, 33, 5), (2, 100, 33), (9, 255, 4), (16, 512, 1), (31, 1031, 3)]
    return [
        (1, b, 1),
        (3, b, 33),
        (8, 2 * b, 4),
        (17, 3 * b, 5),
        (33, 5 * b, 2),
        (16, 8 * b, 9),
        (7, 11 * b, 3),
    ]


@ISAS
@FORMATS
def test_product_is_close_to_exact(isa: str, fmt: int) -> None:
    k = Kernels(isa)
    for rows, cols, n_tok in shapes(fmt):
        w, x = make(fmt, rows, cols, n_tok)
        assert_close(k, fmt, w, x, k.matmul_py(fmt, w, x))


@ISAS
@FORMATS
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bytes_do_not_depend_on_the_batch(isa: str, fmt: int, data: st.DataObject) -> None:
    """Any rows and tokens of a product equal the same ones computed alone, byte for byte."""
    k = Kernels(isa)
    rows, n_tok = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 33))
    cols = data.draw(st.integers(1, 6)) * 256 if BLOCK[fmt] == 256 else data.draw(st.integers(1, 20)) * 32
    if BLOCK[fmt] == 1:
        cols = data.draw(st.integers(1, 300))
    w, x = make(fmt, rows, cols, n_tok, seed=1)
    whole = k.matmul_py(fmt, w, x)
    r0 = data.draw(st.integers(0, rows - 1))
    r1 = data.draw(st.integers(r0 + 1, rows))
    t0 = data.draw(st.integers(0, n_tok - 1))
    t1 = data.draw(st.integers(t0 + 1, n_tok))
    part = k.matmul_py(fmt, w, x[t0:t1], r0, r1)
    assert part.tobytes() == whole[t0:t1, r0:r1].tobytes()


@ISAS
@FORMATS
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_linear_equals_the_plain_product(isa: str, fmt: int, threads: int) -> None:
    k, pool = Kernels(isa), Pool(threads)
    for rows, cols, n_tok in [(1, 256, 1), (75, 1024, 1), (200, 2048, 7), (1000, 256, 3)]:
        w, x = make(fmt, rows, cols, n_tok)
        assert k.linear_py(pool, fmt, w, x).tobytes() == k.matmul_py(fmt, w, x).tobytes()


@pytest.mark.parametrize("fmt", INTEGER)
def test_integer_formats_give_the_same_bytes_on_every_instruction_set(fmt: int) -> None:
    for rows, cols, n_tok in shapes(fmt):
        w, x = make(fmt, rows, cols, n_tok)
        assert len({Kernels(isa).matmul_py(fmt, w, x).tobytes() for isa in isas()}) == 1


@pytest.mark.skipif("avx512" not in isas(), reason="this CPU has no AVX-512 with VNNI")
@FORMATS
def test_avx512_gives_the_bytes_of_avx2(fmt: int) -> None:
    for rows, cols, n_tok in shapes(fmt):
        w, x = make(fmt, rows, cols, n_tok)
        assert (
            Kernels("avx512").matmul_py(fmt, w, x).tobytes() == Kernels("avx2").matmul_py(fmt, w, x).tobytes()
        )


@ISAS
@FORMATS
def test_weights_at_any_address(isa: str, fmt: int) -> None:
    k = Kernels(isa)
    w, x = make(fmt, 11, 512, 5)
    want = k.matmul_py(fmt, w, x).tobytes()
    room = np.empty(w.size + 64, np.uint8)
    for shift in (1, 2, 3, 17):
        view = room[shift : shift + w.size].reshape(w.shape)
        view[:] = w
        assert k.matmul_py(fmt, view, x).tobytes() == want


@ISAS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@FORMATS
def test_nan_and_infinity_in_activations(isa: str, fmt: int, bad: float) -> None:
    """Float weights: as numpy. Integer formats: the whole token is NaN. Other tokens are untouched."""
    k = Kernels(isa)
    w, x = make(fmt, 19, 512, 6)
    clean = k.matmul_py(fmt, w, x)
    for at in (0, 31, 300, 511):
        dirty = x.copy()
        dirty[2, at] = bad
        y = k.matmul_py(fmt, w, dirty)
        others = [0, 1, 3, 4, 5]
        assert y[others].tobytes() == clean[others].tobytes()
        if fmt in INTEGER:
            assert np.isnan(y[2]).all()
        else:
            with np.errstate(invalid="ignore"):
                want = dirty[2].astype(np.float64) @ decode(fmt, w).T
            assert not np.isfinite(y[2]).any()
            np.testing.assert_array_equal(y[2], want.astype(np.float32))


@ISAS
@pytest.mark.parametrize("fmt", [F32, F16, BF16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_float_weights(isa: str, fmt: int, bad: float) -> None:
    k = Kernels(isa)
    rng = np.random.default_rng(3)
    dense = rng.standard_normal((18, 77)).astype(np.float32)
    dense[4, 0] = dense[17, 76] = bad
    w = encode(fmt, dense)
    y = k.matmul_py(fmt, w, np.abs(rng.standard_normal((3, 77))).astype(np.float32))
    assert np.isfinite(np.delete(y, [4, 17], axis=1)).all()
    np.testing.assert_array_equal(y[:, [4, 17]], np.full((3, 2), bad, np.float32))


@ISAS
@pytest.mark.parametrize("fmt", INTEGER)
def test_extreme_weights(isa: str, fmt: int) -> None:
    """All scales of interest (subnormal, zero, the largest, negative) with the extreme quants."""
    k = Kernels(isa)
    rows, cols = 24, 512
    per_block = BLOCK_BYTES[fmt]
    w = np.zeros((rows, cols // BLOCK[fmt], per_block), np.uint8)
    scales = np.array([0, 1, 3, 0x3FF, 0x8001, 0x7BFF, 0xFBFF, 0x3C00], np.uint16)  # F16 bits
    fills = [0x00, 0xFF, 0x80]
    for r in range(rows):
        w[r, :, :] = fills[r % 3]
        if fmt == MXFP4:
            w[r, :, 0] = (0, 1, 2, 3, 127, 140, 150, 160)[r % 8]  # beyond, sums overflow
            continue
        for i, at in enumerate(SCALES.get(fmt, (0,))):
            w[r, :, at : at + 2] = scales[(r + 3 * i) % 8 : (r + 3 * i) % 8 + 1].view(np.uint8)
    w = w.reshape(rows, -1)
    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 1.0], (4, cols)).astype(np.float32)
    x[1] = 1.0
    x[2] = -1.0
    x[3] = 1e25 * rng.standard_normal(cols)
    assert_close(k, fmt, w, x, k.matmul_py(fmt, w, x))


@ISAS
def test_activation_blocks(isa: str) -> None:
    """The definition of the int8 form, on ordinary, zero, tiny, huge and halfway blocks."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((12, 96)).astype(np.float32)
    x[1, :32] = 0
    x[2] *= 1e-36
    x[3] *= 1e37
    x[4] = np.arange(96) - 48 + 0.5
    x[4, ::32] = 127
    x[5, 40] = np.finfo(np.float32).max
    x[6] = 2.0**-101
    x[7] = -(2.0**-99)
    q, d, s, ds, half = split_acts(Kernels(isa).prepare_py(Q8_0, x), 96)
    blocks = x.reshape(12, 3, 32)
    amax = np.abs(blocks).max(axis=2)
    live = amax >= np.float32(2.0**-100)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inv = np.where(live, np.float32(127) / amax, np.float32(0)).astype(np.float32)
    want = np.rint(blocks * inv[:, :, None]).astype(np.int8)
    np.testing.assert_array_equal(q.reshape(12, 3, 32), want)
    np.testing.assert_array_equal(d, np.where(live, amax / np.float32(127), 0))
    np.testing.assert_array_equal(s, want.sum(axis=2, dtype=np.int32))
    np.testing.assert_array_equal(half, want.reshape(12, 6, 16).sum(axis=2, dtype=np.int32))
    with np.errstate(over="ignore"):  # a block of huge values: its sum has no float
        np.testing.assert_array_equal(ds, d * s.astype(np.float32))
    assert np.abs(q).max() == 127


def test_activations_are_the_same_bytes_on_every_instruction_set() -> None:
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((50, 256)) * np.exp(20 * rng.standard_normal((50, 1)))).astype(np.float32)
    x[3, 7] = np.nan
    x[4, 100] = -np.inf
    x[5] = 0
    assert len({Kernels(isa).prepare_py(Q4_K, x).tobytes() for isa in isas()}) == 1


@ISAS
def test_swiglu_accuracy(isa: str) -> None:
    gate = np.concatenate([np.linspace(-86, 100, 50_001), np.geomspace(1e-30, 1, 999)]).astype(np.float32)
    up = np.full_like(gate, 0.75)
    h = Kernels(isa).swiglu_py(gate, up)
    g = gate.astype(np.float64)
    exact = g / (1 + np.exp(-g)) * 0.75
    assert np.max(np.abs(h - exact) / np.spacing(np.abs(exact).astype(np.float32))) <= 4


@ISAS
def test_geglu_accuracy(isa: str) -> None:
    """Against PyTorch's gelu with approximate='tanh'."""
    torch = pytest.importorskip("torch")
    gate = np.concatenate([np.linspace(-6, 100, 50_001), np.geomspace(1e-30, 1, 999)]).astype(np.float32)
    up = np.full_like(gate, 0.75)
    h = Kernels(isa).swiglu_py(gate, up, gelu=True)
    exact = torch.nn.functional.gelu(torch.from_numpy(gate).double(), approximate="tanh").numpy() * 0.75
    # The argument of the exponential is rounded, and where it is large that shows.
    off = np.abs(h - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert off[gate > -1].max() <= 6
    assert off.max() <= 60
    np.testing.assert_array_equal(
        Kernels(isa).swiglu_py([-200, 0, 200, np.nan], [1, 1, 2, 1], gelu=True), [0, 0, 400, np.nan]
    )


@ISAS
def test_clamped_swiglu_accuracy(isa: str) -> None:
    rng = np.random.default_rng(9)
    gate, up = (8 * rng.standard_normal((2, 50_003))).astype(np.float32)
    h = Kernels(isa).swiglu_py(gate, up, (1.702, 7.0, 1.0))
    g, u = np.minimum(gate.astype(np.float64), 7), np.clip(up.astype(np.float64), -7, 7)
    exact = g / (1 + np.exp(-1.702 * g)) * (u + 1)
    assert all(((each > 7).any() and (each < -7).any()) for each in (gate, up))
    # alpha * g is rounded before the exponential, and u + 1 where u is near -1
    bound = 2.0**-23 * (
        np.abs(g / (1 + np.exp(-1.702 * g))) * (8 + np.abs(u) * 6 + np.abs(u + 1) * np.abs(g) * 2)
    )
    assert np.all(np.abs(h - exact) <= bound + 1e-30)
    wide = Kernels(isa).swiglu_py(
        np.array([-200, np.nan, 9], np.float32), np.array([1, 1, np.nan], np.float32), (1.702, 7.0, 1.0)
    )
    np.testing.assert_array_equal(wide, [0, np.nan, np.nan])


@ISAS
def test_swiglu_edges(isa: str) -> None:
    gate = np.array([0, -0.0, np.inf, np.nan, -200, 200, -3.4e38, 3.4e38, 1, np.nan], np.float32)
    up = np.array([1, 1, 1, 1, 1, 2, 1, 1, np.inf, np.inf], np.float32)
    h = Kernels(isa).swiglu_py(gate, up)
    np.testing.assert_array_equal(
        h, np.array([0, 0, np.inf, np.nan, 0, 400, 0, 3.4e38, np.inf, np.nan], np.float32)
    )


@pytest.mark.parametrize(("clamp", "gelu"), [(None, False), (None, True), ((1.702, 7.0, 1.0), False)])
def test_swiglu_bytes_depend_on_neither_place_nor_instruction_set(
    clamp: tuple[float, float] | None, gelu: bool
) -> None:
    rng = np.random.default_rng(8)
    gate, up = (rng.standard_normal((2, 200)) * 10).astype(np.float32)
    one_by_one = b"".join(
        Kernels("scalar").swiglu_py(gate[i : i + 1], up[i : i + 1], clamp, gelu).tobytes() for i in range(200)
    )
    for isa in isas():
        for start, end in [(0, 200), (1, 8), (5, 22), (3, 36), (100, 101)]:
            part = Kernels(isa).swiglu_py(gate[start:end], up[start:end], clamp, gelu).tobytes()
            assert part == one_by_one[4 * start : 4 * end]


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"isa='sse9'.*scalar"):
        Kernels("sse9")
    monkeypatch.setenv("MER_ISA", "sse9")
    with pytest.raises(ConfigError, match="MER_ISA='sse9'"):
        Kernels()


def test_the_environment_chooses_and_the_best_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MER_ISA", raising=False)
    assert Kernels().isa == isas()[0]
    monkeypatch.setenv("MER_ISA", "scalar")
    assert Kernels().isa == "scalar"
    assert Kernels(isas()[0]).isa == isas()[0]


@pytest.mark.parametrize(
    ("fmt", "w_shape", "x_shape", "rows"),
    [
        (4, (1, 18), (1, 32), None),  # a number that ggml no longer uses
        (-1, (1, 18), (1, 32), None),
        (99, (1, 18), (1, 32), None),
        (Q4_0, (1, 18), (1, 33), None),
        (Q4_0, (1, 19), (1, 32), None),
        (Q4_K, (1, 18), (1, 32), None),
        (Q4_0, (4, 18), (1, 32), 5),
    ],
)
def test_arguments_that_do_not_agree(
    fmt: int, w_shape: tuple[int, int], x_shape: tuple[int, int], rows: int | None
) -> None:
    with pytest.raises(ValueError, match=r"format|columns|rows"):
        Kernels().matmul_py(fmt, np.zeros(w_shape, np.uint8), np.zeros(x_shape, np.float32), 0, rows)
