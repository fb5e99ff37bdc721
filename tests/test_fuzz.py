"""Some thousand inputs of tests/fuzz_headers.py, which finds more the longer it runs."""

import subprocess
import sys
from pathlib import Path

import pytest
from header_seeds import write_seeds

SCRIPT = Path(__file__).with_name("fuzz_headers.py")


@pytest.mark.parametrize(("kind", "runs"), [("gguf", 1000), ("safetensors", 4000)])
def test_headers(kind, runs, tmp_path):
    pytest.importorskip("atheris", reason="has no wheel for this Python")
    write_seeds(kind, tmp_path / "seeds")
    words = [sys.executable, str(SCRIPT), kind, "--runs", str(runs), "--seeds", str(tmp_path / "seeds")]
    # A process's peak memory begins at its parent's: gigabytes, behind other tests. A shell's is small.
    words = ["sh", "-c", '"$@"; exit $?', "sh", *words]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {runs} runs" in done.stderr
