"""Kernels are compiled once, and what is kept of them is used only where it is whole and fits."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from mer.errors import GpuError
from mer.gpu import compile as compiling
from mer.gpu.compile import Target, kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("nvidia") is None,
    reason="mer[cuda] is not installed",
)

TARGET = Target((9, 0), 13000)
KERNEL = """
#include "scale.cuh"
extern "C" __global__ void twice(float *x) { x[threadIdx.x] = FACTOR * x[threadIdx.x]; }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = tmp_path / "kernels"
    code.mkdir()
    (code / "a.cu").write_text(KERNEL)
    (code / "b.cu").write_text('#include "scale.cuh"\nextern "C" __global__ void other(int *x) { *x = 7; }\n')
    (code / "scale.cuh").write_text("#pragma once\n#define FACTOR 2.0f\n")
    return code


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Target]:
    """What was compiled."""
    done: list[Target] = []
    real = compiling.compile_kernels

    def count(code: Any, target: Target) -> bytes:
        done.append(target)
        return real(code, target)

    monkeypatch.setattr(compiling, "compile_kernels", count)
    return done


def entries(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache/mer/kernels").iterdir())


def test_all_files_become_one_cubin(folder: Path) -> None:
    image = kernels(TARGET, folder)
    assert image[:4] == b"\x7fELF"
    assert b"twice" in image
    assert b"other" in image
    # e_machine of CUDA, and sm_90 in its flags.
    assert int.from_bytes(image[18:20], "little") == 190


def test_compiled_once(folder: Path, compiled: list[Target]) -> None:
    first = kernels(TARGET, folder)
    assert kernels(TARGET, folder) == first
    assert compiled == [TARGET]
    (file,) = entries(folder)
    assert file.name.startswith("sm_90-")
    assert os.stat(file.parent).st_mode & 0o077 == 0


def test_what_makes_it_another_one(
    folder: Path, compiled: list[Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels(TARGET, folder)
    others = [Target((8, 0), 13000), Target((9, 0), 13010)]
    for target in others:
        kernels(target, folder)
    (folder / "scale.cuh").write_text("#pragma once\n#define FACTOR 3.0f\n")
    kernels(TARGET, folder)
    monkeypatch.setattr(compiling, "_OPTIONS", (*compiling._OPTIONS, "--device-debug"))
    kernels(TARGET, folder)
    monkeypatch.setattr(compiling, "nvrtc_version", lambda: (13, 0))
    kernels(TARGET, folder)
    assert compiled == [TARGET, *others, TARGET, TARGET, TARGET]
    assert len(entries(folder)) == 6


@pytest.mark.parametrize("harm", ["truncated", "empty", "a bit", "only a checksum"])
def test_a_damaged_entry_is_made_again(folder: Path, compiled: list[Target], harm: str) -> None:
    image = kernels(TARGET, folder)
    (file,) = entries(folder)
    kept = bytearray(file.read_bytes())
    if harm == "a bit":
        kept[len(kept) // 2] ^= 4
    file.write_bytes(kept[: {"truncated": len(kept) - 1, "empty": 0, "only a checksum": 32}.get(harm)])
    assert kernels(TARGET, folder) == image
    assert len(compiled) == 2
    assert kernels(TARGET, folder) == image
    assert len(compiled) == 2


def test_where_nothing_can_be_kept(
    folder: Path, compiled: list[Target], caplog: pytest.LogCaptureFixture
) -> None:
    (folder.parent / "cache").write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING, "mer"):
        assert kernels(TARGET, folder) == kernels(TARGET, folder)
    assert len(compiled) == 2
    assert "not kept" in caplog.text


def test_nothing_is_left_of_an_entry_that_can_not_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiling.os, "replace", full)
    assert kernels(TARGET, folder)[:4] == b"\x7fELF"
    assert entries(folder) == []


def test_code_that_does_not_compile(folder: Path) -> None:
    (folder / "c.cu").write_text("this is no CUDA\n")
    with pytest.raises(GpuError, match=r"(?s)sm_90 do not compile.*c\.cu\(1\)"):
        kernels(TARGET, folder)
    assert not (folder.parent / "cache").exists()


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_no_kernels(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "none")
    with pytest.raises(GpuError, match="install mer again"):
        kernels(TARGET, tmp_path / "none")


def test_one_product_and_sum_is_not_fused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the option it is other code."""
    (folder / "a.cu").write_text(
        'extern "C" __global__ void twice(float *x, float *y) { *x = *x * y[0] + y[1]; }\n'
    )
    image = kernels(TARGET, folder)
    kept = tuple(each for each in compiling._OPTIONS if each != "--fmad=false")
    assert len(kept) == len(compiling._OPTIONS) - 1
    monkeypatch.setattr(compiling, "_OPTIONS", kept)
    assert kernels(TARGET, folder) != image
