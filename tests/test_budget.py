"""`--ram` holds: measured by the process itself and enforced by a control group, on a model of 6 GB."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cgroups import MemoryGroup

RAM = 3 << 30
MER = [sys.executable, "-c", "from mer.cli.main import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shapes of Qwen3-30B-A3B with 4 layers; the experts are holes in the files and take no disk."""
    path = tmp_path_factory.mktemp("budget") / "model"
    command = [sys.executable, "-m", "bench.make_model", "qwen3-30b-a3b", str(path)]
    root = Path(__file__).parent.parent
    subprocess.run([*command, "--layers", "4", "--as", "hf", "--sparse"], cwd=root, check=True)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def group():
    try:
        made = MemoryGroup(RAM)
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    with made:
        yield made


def command(model: Path, *options: str, prompt: int = 10, answer: int = 4) -> list[str]:
    ids = " ".join(str(7 * i % 1000) for i in range(prompt))
    return [
        *MER,
        "run",
        str(model),
        ids,
        "--ids",
        "-n",
        str(answer),
        "--temperature",
        "0",
        "--json",
        *options,
    ]


def test_the_model_is_much_larger_than_the_budget(model):
    assert sum(file.stat().st_size for file in model.iterdir()) >= 5 * 10**9


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_the_process_stays_below_ram(model, group, io):
    """A prompt of more than a full step: every buffer is used, the cache is full and evicts."""
    run = group.run(command(model, "--ram", "3GiB", "--io", io, prompt=520))
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert len(answer["token_ids"]) == 4
    assert answer["timings"]["misses"] > answer["engine"]["cache_slots"], "the cache was never full"
    assert answer["engine"]["peak_bytes"] <= RAM
    # No budget is left lying idle, either: what is allowed is used to 85 %.
    assert answer["engine"]["peak_bytes"] >= 0.85 * RAM
    assert group.peak <= RAM


def test_the_default_is_what_the_control_group_leaves(model, group):
    run = group.run(command(model))
    assert run.returncode == 0, run.stderr
    engine = json.loads(run.stdout)["engine"]
    assert engine["peak_bytes"] <= engine["ram"] < RAM


def test_a_budget_that_cannot_work_names_the_least_that_does(model, group):
    refused = group.run(command(model, "--ram", "1GiB"))
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    for part in ("dense weights", "KV cache", "buffers", "experts"):
        assert part in refused.stderr
    least = int(re.search(r"at least ([\d,]+) MiB", refused.stderr)[1].replace(",", ""))
    assert 1024 < least < 3072
    run = group.run(command(model, "--ram", f"{least}MiB"))
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["engine"]["peak_bytes"] <= least << 20
    assert group.run(command(model, "--ram", f"{least - 8}MiB")).returncode == 1
