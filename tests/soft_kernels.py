"""Kernels of an instruction set that this CPU may lack, its instructions in plain C."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import c_int, c_long, c_size_t, c_void_p
from pathlib import Path

import numpy as np
from test_kernels import Bytes, Floats

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "mer/_ext/csrc"


class SoftKernels:
    """The face of mer._ext.kernels.Kernels, on a library with soft_kernels.h in it."""

    def __init__(self, library: Path) -> None:
        lib = ctypes.CDLL(str(library))
        self._act_bytes, self._prepare, self._matmul = lib.soft_act_bytes, lib.soft_prepare, lib.soft_matmul
        self._act_bytes.argtypes, self._act_bytes.restype = (c_int, c_long), c_size_t
        self._prepare.argtypes, self._prepare.restype = (c_int, c_void_p, c_void_p, c_long), None
        self._matmul.restype = None
        self._matmul.argtypes = (
            *(c_int, c_void_p, c_long, c_long, c_long, c_void_p, c_long, c_void_p, c_long),
        )

    @classmethod
    def build(cls, directory: Path, source: str, instead_of: str) -> SoftKernels:
        """source: the file of tests/ that has `instead_of`, a file of csrc/kernels, in it."""
        library = directory / "kernels.so"
        flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", "-ffp-contract=off", "-fPIC"]
        flags += [f"-I{CSRC}", f"-I{ROOT / 'tests'}"]
        tested = library.with_suffix(".o")
        others = [file for file in sorted((CSRC / "kernels").glob("*.c")) if file.name != instead_of]
        for command in (
            ["-Og", "-c", "-o", tested, ROOT / "tests" / source],
            # To optimise them takes minutes.
            ["-O0", "-DTOKENS=2", "-shared", "-pthread", "-o", library, tested, *others, "-lm"],
        ):
            made = subprocess.run(["gcc", *flags, *command], capture_output=True, text=True)
            assert made.returncode == 0, made.stderr
        return cls(library)

    def prepare_py(self, fmt: int, x: Floats) -> Bytes:
        acts = np.zeros((len(x), self._act_bytes(fmt, x.shape[1])), np.uint8)
        for row, act in zip(np.ascontiguousarray(x), acts, strict=True):
            self._prepare(fmt, row.ctypes.data, act.ctypes.data, x.shape[1])
        return acts

    def matmul_py(self, fmt: int, w: Bytes, x: Floats, r0: int = 0, r1: int | None = None) -> Floats:
        end, acts = len(w) if r1 is None else r1, self.prepare_py(fmt, x)
        pointers = (c_void_p * len(x))(*(act.ctypes.data for act in acts))
        y = np.zeros((len(x), len(w)), np.float32)
        self._matmul(fmt, w.ctypes.data, x.shape[1], r0, end, pointers, len(x), y.ctypes.data, len(w))
        return y[:, r0:end]
