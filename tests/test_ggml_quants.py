"""Quantising against ggml's own library, bit for bit. The package pywhispercpp brings it."""

import ctypes
from importlib import metadata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mer.weights import formats

FORMATS = [formats.Q8_0, formats.Q4_0, formats.Q4_K]
COLS = 1024


@pytest.fixture(scope="module")
def ggml():
    """f32 [rows, cols] -> uint8 [rows, row_bytes], by ggml."""
    name = next(f for f in metadata.files("pywhispercpp") if f.name == "libggml-base.so")
    quantize = ctypes.CDLL(str(name.locate())).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = (ctypes.c_int, *(ctypes.c_void_p,) * 2, *(ctypes.c_int64,) * 3, ctypes.c_void_p)

    def call(form, values):
        rows, cols = values.shape
        out = np.empty((rows, form.row_bytes(cols)), np.uint8)
        size = quantize(form.id, values.ctypes.data, out.ctypes.data, 0, rows, cols, None)
        assert size == out.size
        return out

    return call


def normal(rng, scale, rows=32):
    return scale * rng.standard_normal((rows, COLS))


def outliers(rng):
    return normal(rng, 0.02) * np.where(rng.random((32, COLS)) < 0.003, 50, 1)


def sparse(rng):
    return normal(rng, 0.02) * (rng.random((32, COLS)) < 0.3)


def bfloat16(rng):
    return formats.BF16.dequantize(formats.BF16.quantize(normal(rng, 0.02)))


def blocks_apart(rng):
    """Neighbouring blocks of 32 differ by orders of magnitude: many have the scale code 0."""
    return (
        rng.standard_normal((32, COLS // 32, 32)) * 10.0 ** rng.integers(-8, 4, (32, COLS // 32, 1))
    ).reshape(32, COLS)


DATA = {
    "normal": lambda rng: normal(rng, 0.02),
    "small": lambda rng: normal(rng, 1e-7),
    "large": lambda rng: normal(rng, 3000),
    "heavy tails": lambda rng: 0.02 * rng.standard_t(2, (32, COLS)),
    "positive": lambda rng: 0.01 + np.abs(normal(rng, 0.02)),
    "negative": lambda rng: -0.01 - np.abs(normal(rng, 0.02)),
    "uniform": lambda rng: rng.uniform(-1, 1, (32, COLS)),
    "constant": lambda rng: rng.standard_normal((32, COLS // 32)).repeat(32, axis=1),
    "zeros": lambda rng: np.zeros((2, COLS)),
    "few values": lambda rng: 0.125 * rng.integers(-8, 8, (32, COLS)),
    "outliers": outliers,
    "sparse": sparse,
    "bfloat16": bfloat16,
    "blocks apart": blocks_apart,
    "tiny": lambda rng: normal(rng, 1e-30),
    "huge": lambda rng: normal(rng, 1e30),
}


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("kind", DATA)
def test_quantises_as_ggml(ggml, form, kind):
    values = DATA[kind](np.random.default_rng(1)).astype(np.float32)
    np.testing.assert_array_equal(form.quantize(values), ggml(form, values))


@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-44, 1e38])
@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_quantises_the_ends_of_float32_as_ggml(ggml, form, scale):
    """Denormals, and sums that overflow."""
    values = np.clip(normal(np.random.default_rng(2), scale), -3.4e38, 3.4e38).astype(np.float32)
    np.testing.assert_array_equal(form.quantize(values), ggml(form, values))


@settings(max_examples=100, deadline=None)
@given(
    arrays.arrays(np.float32, (1, 256), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
)
def test_quantises_any_block_as_ggml(ggml, values):
    values += 0  # of a block of negative zeros ggml and the gguf package give Q4_0's scale a different sign
    for form in FORMATS:
        np.testing.assert_array_equal(form.quantize(values), ggml(form, values))
