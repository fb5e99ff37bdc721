"""The AMX kernels with tiles in plain C (soft_tiles.h): CPUs without AMX test all but the instructions.

Integer formats must have AVX-512's bytes; BF16, whose sums have an order of their own, is held to exact
arithmetic.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from soft_kernels import SoftKernels
from test_kernels import BF16, BLOCK, FORMATS, INTEGER, assert_close, decode, encode, make

from mer._ext.kernels import Kernels, isas

pytestmark = [
    pytest.mark.skipif("avx512" not in isas(), reason="the AMX kernels are made of AVX-512 ones"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc"),
]


@pytest.fixture(scope="module")
def amx(tmp_path_factory: pytest.TempPathFactory) -> SoftKernels:
    return SoftKernels.build(tmp_path_factory.mktemp("amx"), "soft_amx.c", "amx.c")


def shapes(fmt: int) -> list[tuple[int, int, int]]:
    """(rows, cols, n_tok): the edges of tiles and strips of tokens, groups of rows, steps of columns."""
    if BLOCK[fmt] == 1:
        return [
            (1, 1, 1),
            (17, 33, 16),
            (3, 47, 64),
            (16, 64, 17),
            (33, 1031, 65),
            (20, 16, 5),
            (64, 512, 100),
        ]
    b = BLOCK[fmt]
    return [(1, b, 8), (16, 2 * b, 16), (17, b, 24), (3, 3 * b, 33), (33, 2 * b, 71), (20, b, 7), (5, b, 136)]


@FORMATS
def test_bytes_of_avx512_but_for_bf16(amx: SoftKernels, fmt: int) -> None:
    for rows, cols, n_tok in shapes(fmt):
        w, x = make(fmt, rows, cols, n_tok)
        y, other = amx.matmul_py(fmt, w, x), Kernels("avx512").matmul_py(fmt, w, x)
        if fmt != BF16:
            assert y.tobytes() == other.tobytes()
            continue
        assert_close(amx, fmt, w, x, y)


@pytest.mark.skipif("amx" not in isas(), reason="this CPU has no AMX")
@FORMATS
def test_the_hardwares_tiles_have_the_bytes_of_those_in_c(amx: SoftKernels, fmt: int) -> None:
    for rows, cols, n_tok in shapes(fmt):
        w, x = make(fmt, rows, cols, n_tok)
        assert Kernels("amx").matmul_py(fmt, w, x).tobytes() == amx.matmul_py(fmt, w, x).tobytes()


@pytest.mark.parametrize("fmt", [*INTEGER, BF16])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_bytes_do_not_depend_on_the_batch(amx: SoftKernels, fmt: int, data: st.DataObject) -> None:
    rows, n_tok = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    cols = BLOCK[fmt] * data.draw(st.integers(1, 3 if BLOCK[fmt] > 1 else 100))
    w, x = make(fmt, rows, cols, n_tok, seed=1)
    whole = amx.matmul_py(fmt, w, x)
    r0 = data.draw(st.integers(0, rows - 1))
    r1 = data.draw(st.integers(r0 + 1, rows))
    t0 = data.draw(st.integers(0, n_tok - 1))
    t1 = data.draw(st.integers(t0 + 1, n_tok))
    assert amx.matmul_py(fmt, w, x[t0:t1], r0, r1).tobytes() == whole[t0:t1, r0:r1].tobytes()


def test_bf16_splits_activations_without_loss(amx: SoftKernels) -> None:
    """Times one, each activation of ordinary size comes out as it went in."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((40, 1)) * np.exp(20 * rng.standard_normal((40, 1)))).astype(np.float32)
    x[0], x[1] = np.finfo(np.float32).max, -1e-30
    one = encode(BF16, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(amx.matmul_py(BF16, one, x), x)


def test_bf16_of_one_token_has_the_bytes_of_tiles(amx: SoftKernels) -> None:
    """It goes without them; subnormal numbers count as zero in tiles, as operands and as results."""
    rng = np.random.default_rng(2)
    w = encode(
        BF16, (rng.standard_normal((37, 77)) * np.exp(8 * rng.standard_normal((37, 77)))).astype(np.float32)
    )
    x = rng.standard_normal((40, 77)) * np.exp(rng.uniform(-88, 20, (40, 1)))
    x[3] *= 1e-38 / np.abs(x[3]).max()
    whole = amx.matmul_py(BF16, w, x.astype(np.float32))
    assert np.any((whole == 0) & (np.abs(x @ decode(BF16, w).T) > 0))
    for t in range(len(x)):
        one = amx.matmul_py(BF16, w, x[t : t + 1].astype(np.float32))
        assert one.tobytes() == whole[t : t + 1].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", [*INTEGER, BF16])
def test_what_is_not_finite_stays_in_its_token(amx: SoftKernels, fmt: int, bad: float) -> None:
    w, x = make(fmt, 19, 512, 20)
    clean, dirty = amx.matmul_py(fmt, w, x), x.copy()
    dirty[2, 300] = bad
    y = amx.matmul_py(fmt, w, dirty)
    assert not np.isfinite(y[2]).any()
    assert np.delete(y, 2, 0).tobytes() == np.delete(clean, 2, 0).tobytes()
