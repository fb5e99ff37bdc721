"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, the pool under ThreadSanitizer too."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mer._ext.kernels import isas

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "mer/_ext/csrc"


def run_sanitized(tmp_path: Path, compiler: str, sanitizer: str, stress: str, sources: str) -> str:
    """Builds a stress program with C files of the kernels and runs it; returns what it prints."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    program = tmp_path / "stress"
    files = [ROOT / "tests" / stress, *sorted((CSRC / "kernels").glob(sources))]
    # Unoptimised, since compiling takes longest, and nothing is optimised away that a sanitizer could report.
    flags = ["-std=gnu11", "-O0", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror", "-fno-math-errno"]
    flags += ["-ffp-contract=off", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{CSRC}"]
    flags += ['-DMER_TILES="soft_tiles.h"', '-DMER_DOT4="soft_dot4.h"', f"-I{ROOT / 'tests'}"]
    flags += ["-fno-var-tracking", "-DTOKENS=2"]  # the unrolled loops of lanes.h take long to compile

    def build(source: Path) -> subprocess.CompletedProcess[str]:
        command = [compiler, *flags, "-c", "-o", tmp_path / f"{source.stem}.o", source]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(build, files):
            assert done.returncode == 0, done.stderr
    objects = [tmp_path / f"{source.stem}.o" for source in files]
    link = [compiler, "-pthread", f"-fsanitize={sanitizer}", "-o", program, *objects, "-lm"]
    made = subprocess.run(link, capture_output=True, text=True)
    if made.returncode and "cannot find" in made.stderr:
        pytest.skip(f"no runtime for -fsanitize={sanitizer}")
    assert made.returncode == 0, made.stderr
    # the addresses of a sanitized program must not be randomised too widely
    command = ["setarch", "-R", program] if shutil.which("setarch") else [program]
    options = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | options)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# one sanitizer at a time: both at once take several times as long to compile
@pytest.mark.parametrize(("compiler", "sanitizer"), [("gcc", "address"), ("clang", "undefined")])
def test_kernels_touch_nothing_but_their_own(tmp_path: Path, compiler: str, sanitizer: str) -> None:
    compiler = compiler if shutil.which(compiler) else "gcc"
    printed = run_sanitized(tmp_path, compiler, sanitizer, "kernels_stress.c", "*.c")
    tested = isas()
    if tested[0] == "avx512":
        tested.append("amx")  # its tiles in plain C
    if "avx2" in tested and "avxvnni" not in tested:
        tested.append("avxvnni")  # its products in plain C
    assert printed.split() == [word for isa in tested for word in ("passed:", isa)]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_pool_has_no_races(tmp_path: Path, sanitizer: str) -> None:
    assert run_sanitized(tmp_path, "gcc", sanitizer, "pool_stress.c", "pool.c") == "passed\n"
