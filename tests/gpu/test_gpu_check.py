"""bench.gpu_check with a simulated GPU: what a part reports comes into the file and the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from gpu_simulator import Simulator

from bench import gpu_check


def test_a_part_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MER_CUDA_DRIVER", str(Simulator().path))
    out = tmp_path / "out.json"
    asked = ["--small", "--parts", "kernels", "--work", str(tmp_path / "work"), "--json", str(out)]
    done = CliRunner().invoke(gpu_check.main, asked)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert report["device"].startswith("Simulated GPU, driver of CUDA 13.0")
    (part,) = report["parts"]
    assert (part["name"], part["state"]) == ("kernels", "done")
    assert [(r["format"], r["tokens"]) for r in part["found"]["results"]] == [("q8_0", 1), ("q8_0", 64)]
    assert "of a copy, one token: q8_0" in part["told"]
    assert "q8_0" in done.output


def test_parts_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MER_CUDA_DRIVER", str(Simulator().path))
    refused = CliRunner().invoke(gpu_check.main, ["--parts", "mla,moe"])
    assert refused.exit_code == 2
    assert "moe: known are tests, kernels, dense, mla" in " ".join(refused.output.split())
    monkeypatch.setenv("MER_CUDA_DRIVER", "/nowhere/libcuda.so.1")
    assert "there is no NVIDIA driver here" in CliRunner().invoke(gpu_check.main, []).output


def test_what_a_part_needs_comes_along(tmp_path: Path) -> None:
    found = gpu_check.parts(tmp_path, small=False)
    assert [part.name for part in gpu_check._chosen(found, "store")] == ["qwen", "store"]
    assert gpu_check._chosen(found, None) == found
