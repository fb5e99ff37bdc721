"""AVX-VNNI's kernels with its instruction in plain C (soft_dot4.h): CPUs without it test all but that."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from soft_kernels import SoftKernels
from test_kernels import BLOCK, INTEGER, make

from mer._ext.kernels import Kernels, isas

pytestmark = [
    pytest.mark.skipif("avx2" not in isas(), reason="AVX-VNNI's kernels are made of AVX2's"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc"),
]


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> SoftKernels:
    return SoftKernels.build(tmp_path_factory.mktemp("avxvnni"), "soft_avxvnni.c", "lanes_avxvnni.c")


@pytest.mark.parametrize("fmt", INTEGER)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bytes_of_avx2(soft: SoftKernels, fmt: int, data: st.DataObject) -> None:
    """Of any rows and tokens, which AVX-VNNI may take in another order and in other tiles."""
    rows, n_tok = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 40))
    cols = BLOCK[fmt] * data.draw(st.integers(1, 10 if BLOCK[fmt] == 32 else 3))
    w, x = make(fmt, rows, cols, n_tok, seed=data.draw(st.integers(0, 3)))
    r0 = data.draw(st.integers(0, rows - 1))
    r1 = data.draw(st.integers(r0 + 1, rows))
    y = soft.matmul_py(fmt, w, x, r0, r1)
    assert y.tobytes() == Kernels("avx2").matmul_py(fmt, w, x)[:, r0:r1].tobytes()


@pytest.mark.skipif("avxvnni" not in isas(), reason="this CPU has no AVX-VNNI")
@pytest.mark.parametrize("fmt", INTEGER)
def test_the_hardware_has_the_bytes_of_plain_c(soft: SoftKernels, fmt: int) -> None:
    for rows, n_tok in ((1, 1), (8, 2), (17, 3), (24, 8), (9, 33)):
        w, x = make(fmt, rows, 3 * BLOCK[fmt], n_tok)
        assert Kernels("avxvnni").matmul_py(fmt, w, x).tobytes() == soft.matmul_py(fmt, w, x).tobytes()
