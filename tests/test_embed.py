"""Rows of an embedding as floats, against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from mer._ext.decoder import embed
from mer.model.dense import DenseWeights, Matrix

KINDS = gguf.GGMLQuantizationType


@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0])
def test_rows_are_what_gguf_makes_of_them(kind):
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((50, 96)) * 10.0 ** rng.integers(-7, 4, (50, 1))).astype(np.float32)
    data = np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8)
    expected = gguf.quants.dequantize(data.view(np.float16) if kind is KINDS.F16 else data, kind)
    if kind is KINDS.F32:
        expected = values
    weight, tokens = Matrix(data, int(kind), 96), np.array([49, 0, 7, 7, 12], np.int32)
    out = np.full((5, 96), np.nan, np.float32)
    assert embed(weight, tokens, out) == (kind is not KINDS.Q4_0)  # that is left to numpy
    DenseWeights({}, [], weight).embed(tokens, out)
    assert out.tobytes() == expected[tokens].astype(np.float32).tobytes()


def test_an_array_of_another_size_is_refused():
    weight = Matrix(np.zeros((4, 34), np.uint8), int(KINDS.Q8_0), 32)
    with pytest.raises(ValueError, match="2 rows of 32 floats"):
        embed(weight, np.array([1, 2], np.int32), np.zeros((1, 32), np.float32))
