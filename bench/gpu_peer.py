"""llama.cpp's CUDA build on a GGUF file, by its llama-bench: prefill and decode tokens/s; see bench/gpu.py.

Its way to run in little VRAM: everything dense and the experts of as many layers as fit on the GPU, the
experts of the first layers (`--n-cpu-moe`) on the CPU, mapped from the file. What fits is reckoned from the
bytes of weights alone, without keys, values and buffers: it gets that much more than mer does.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class GpuPeerError(Exception):
    """llama-bench could not do it: what it said last."""


def cpu_layers(layers: int, dense: int, layer: int, vram: int) -> int:
    """Layers whose experts are left to the CPU: of bytes `layer` each, where `dense` bytes come first."""
    return min(layers, max(0, layers - max(0, vram - dense) // layer))


def measure(
    bench: Path,
    gguf: Path,
    seconds: float,
    *,
    prompt: int,
    decode: int,
    threads: int | None,
    left: int | None,
) -> dict[str, Any]:
    """One process, two repetitions of each. left: layers for the CPU; None: no GPU. Raises GpuPeerError."""
    command = [str(bench), "-m", str(gguf), "-p", str(prompt), "-n", str(decode), "-r", "2", "-o", "json"]
    command += ["-t", str(threads or os.cpu_count()), "-fa", "1"]
    command += ["-dev", "none", "-ngl", "0"] if left is None else ["-ngl", "99", "-ncmoe", str(left)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise GpuPeerError(f"took longer than {seconds:.0f} s") from None
    except OSError as error:
        raise GpuPeerError(f"{bench}: {error.strerror}") from None
    if done.returncode:
        raise GpuPeerError(f"failed ({done.returncode}): {done.stderr.strip()[-600:]}")
    return read(done.stdout)


def read(printed: str) -> dict[str, Any]:
    """What llama-bench -o json printed of one prompt and one continuation."""
    found: dict[str, Any] = {}
    for run in json.loads(printed):
        kind = "prefill" if run["n_prompt"] else "decode"
        found[kind] = float(run["avg_ts"])
        found["build"], found["gpu"] = f"{run['build_number']} {run['build_commit']}", run["gpu_info"]
    return found
