"""The C core of the reader under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "mer/_ext/csrc"


def compile_stress(program: Path, sanitizer: str) -> None:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    sources = [ROOT / "tests/reader_stress.c", *sorted((CSRC / "uring").glob("*.c"))]
    flags = ["-std=gnu11", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitizer}"]
    command = [compiler, *flags, f"-I{CSRC}", "-o", program, *sources, "-luring"]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip(f"no runtime for -fsanitize={sanitizer}")
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_nothing_for_the_sanitizers_to_report(tmp_path: Path, sanitizer: str) -> None:
    program, data = tmp_path / "reader_stress", tmp_path / "data.bin"
    compile_stress(program, sanitizer)
    data.write_bytes(b"".join(struct.pack("<q", at) for at in range(0, 2_000_000, 8)))
    # the addresses of a sanitized program must not be randomised too widely
    command = ["setarch", "-R", program, data] if shutil.which("setarch") else [program, data]
    options = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | options)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed: uring 0, direct 0" in run.stdout
