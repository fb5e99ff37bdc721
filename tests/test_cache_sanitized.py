"""The expert cache under many threads, with ThreadSanitizer, and AddressSanitizer with UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mer._ext.cache import POLICIES

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "mer/_ext/csrc"


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sanitizer = request.param
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("sanitized") / "cache_stress"
    flags = ["-std=gnu11", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    sources = [ROOT / "tests/cache_stress.c", *sorted(CSRC.glob("cache/*.c"))]
    command = [compiler, *flags, "-o", program, *sources]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip(f"no runtime for -fsanitize={sanitizer}")
    assert made.returncode == 0, made.stderr
    return program


@pytest.mark.parametrize("policy", POLICIES)
def test_no_race_and_no_slot_overwritten_in_use(program: Path, policy: str) -> None:
    # the addresses of a sanitized program must not be randomised too widely
    command = ["setarch", "-R", program, policy] if shutil.which("setarch") else [program, policy]
    options = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | options)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "passed\n"
