"""C code that is compiled for each width of registers (csrc/decoder/level.h), one level at a time."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any

import pytest

# What each level needs, as Linux names it.
LEVELS = {
    "plain": set(),
    "avx2": {"avx2", "bmi2", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


def has(level: str) -> bool:
    if platform.machine() != "x86_64":
        return not LEVELS[level]
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]
    return LEVELS[level] <= set(flags.split())


class AtLevel:
    """A library with the functions of one level, where there are several. Skips where the CPU is below it."""

    def __init__(self, lib: ctypes.CDLL, level: str) -> None:
        if not has(level):
            pytest.skip(f"this CPU has no {level}")
        self._lib, self._level = lib, level

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._lib, f"{name}_{self._level}")
        except AttributeError:
            return getattr(self._lib, name)
