"""`mer doctor`: facts from /proc and /sys, a measured device, clear words for what can't be measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_models import write_mixtral
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mer.cli.doctor import doctor
from mer.demo import model_path
from mer.errors import ConfigError, MerError
from mer.streaming import machine, probe


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "FILE_BYTES", 64 << 20)
    monkeypatch.setattr(probe.probe, "__kwdefaults__", probe.probe.__kwdefaults__ | {"seconds": 0.02})


def test_a_directory_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    done = CliRunner().invoke(doctor, [str(tmp_path), "--json", "--block", "128KiB"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert [rate["depth"] for rate in facts["device"]["rates"]] == list(probe.DEPTHS)
    assert all(rate["bytes_per_second"] > 0 for rate in facts["device"]["rates"])
    assert facts["device"]["block"] == 128 << 10
    assert facts["uses"]["backend"] in ("uring", "preadv", "buffered")
    assert facts["uses"]["kernels"] in facts["instruction_sets"]
    assert facts["uses"]["queue_depth"] in probe.DEPTHS
    assert facts["memory_bytes_per_second"] > 0
    assert facts["io_uring"]["available"] == (facts["io_uring"]["refusal"] is None)
    assert list(tmp_path.iterdir()) == []


def test_the_table_says_what_will_be_used(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(os.urandom(1 << 20))
    done = CliRunner().invoke(doctor, [str(file), "--block", "4096"])
    assert done.exit_code == 0, done.output
    for word in (
        "io_uring",
        "O_DIRECT",
        "huge pages",
        "memlock",
        "instruction sets",
        "mer will use here",
        "GB/s",
    ):
        assert word in done.output
    assert file.stat().st_size == 1 << 20
    used = done.output.split("mer will use here\n")[1].split("\nWhat would be faster")[0].splitlines()
    assert {line[:11].strip() for line in used} == {"I/O", "device", "memory", "kernels", "GPU", ""}
    assert all(line[:2] == "  " != line[2:4] or line[:11].isspace() for line in used), "further lines hang"


@pytest.fixture
def never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.setattr(probe.tempfile, "TemporaryFile", refuse)


def measured(path: Path | str, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(doctor, [str(path), "--json", *options])
    assert done.exit_code == 0, (done.output, done.exception)
    device: dict[str, Any] = json.loads(done.stdout)["device"]
    return device


@pytest.mark.usefixtures("never_written")
def test_a_model_is_read_where_it_lies(tmp_path: Path) -> None:
    write_mixtral(tmp_path / "model", num_hidden_layers=1, num_local_experts=3, vocab_size=4000)
    files = {file.name: file.stat().st_size for file in (tmp_path / "model").iterdir()}
    dense, experts = sorted((tmp_path / "model").glob("*.safetensors"))
    assert not any(".experts." in name for name in load_file(dense))
    assert dense.stat().st_size > experts.stat().st_size
    device = measured(tmp_path / "model")
    assert device["path"] == str(experts)
    # Three matrices of 256 x 96 in F16, each with up to a page around it.
    assert 0 < device["block"] - 3 * 256 * 96 * 2 <= 3 * 4096
    assert device["block"] % 4096 == 0
    assert measured(tmp_path / "model", "--block", "8KiB")["block"] == 8192
    assert {file.name: file.stat().st_size for file in (tmp_path / "model").iterdir()} == files


@pytest.mark.usefixtures("never_written")
def test_the_bundled_model_is_read_where_it_lies() -> None:
    device = measured("demo")
    assert Path(device["path"]).parent == model_path()
    assert Path(device["path"]).name.startswith("experts")


@pytest.mark.usefixtures("never_written")
def test_a_file_smaller_than_an_expert_of_the_model(tmp_path: Path) -> None:
    tensors = write_mixtral(tmp_path / "model", num_hidden_layers=1)
    for file in (tmp_path / "model").glob("*.safetensors*"):
        file.unlink()
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / "model" / f"{i:02}.safetensors")
    assert measured(tmp_path / "model")["block"] == 256 * 96 * 2


def test_what_is_no_model_is_a_directory(tmp_path: Path) -> None:
    write_mixtral(tmp_path / "model", model_type="llama_99")
    device = measured(tmp_path / "model")
    assert (device["path"], device["block"]) == (str(tmp_path / "model"), 1 << 20)


@pytest.mark.parametrize(
    ("path", "words"),
    [("missing", "no such file"), ("small.bin", "smaller than one block"), ("fifo", "neither a file")],
)
def test_a_bad_path_gets_one_line(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "small.bin").write_bytes(b"x" * 5000)
    os.mkfifo(tmp_path / "fifo")
    done = CliRunner().invoke(doctor, [str(tmp_path / path)])
    assert isinstance(done.exception, MerError)
    assert words in str(done.exception)
    assert path in str(done.exception)


@pytest.mark.parametrize("block", ["0", "1000", "4097", "big", "-1MiB"])
def test_a_bad_block_gets_one_line(tmp_path: Path, block: str) -> None:
    done = CliRunner().invoke(doctor, [str(tmp_path), f"--block={block}"])
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit | MerError)


def test_a_full_or_read_only_directory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LEAST_FILE_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match="too little to measure"):
        probe.probe(tmp_path)
    monkeypatch.undo()
    if os.access("/proc/self", os.W_OK):
        with pytest.raises(ConfigError, match="/proc"):
            probe.probe(Path("/proc"))


def test_the_least_depth_that_nearly_reaches_the_best() -> None:
    rates = tuple(
        probe.DepthRate(d, r) for d, r in [(1, 50.0), (4, 94.0), (8, 95.1), (16, 100.0), (32, 99.0)]
    )
    device = probe.Device("p", "ext4", True, None, "uring", "", 4096, rates)
    assert device.depth == 8
    assert device.best == 100.0


def fake(root: Path, files: dict[str, str]) -> Path:
    meminfo = {"proc/meminfo": "MemTotal:  1000000 kB\nMemAvailable:   800000 kB\n"}
    for name, text in (meminfo | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_memory_without_limits(tmp_path: Path) -> None:
    found = machine.memory(fake(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}))
    assert found == machine.Memory(1000000 << 10, 800000 << 10, None, None)


def test_memory_of_version_2_counts_cache_as_free(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a/b"
    root = fake(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/memory.max": "300000000",  # the parent's is the tighter one
            "sys/fs/cgroup/a/memory.current": "250000000",
            "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 100000000",
            f"{group}/memory.max": "400000000",
            f"{group}/memory.current": "1000",
        },
    )
    found = machine.memory(root)
    assert found.limit == 300000000
    assert found.limit_from == str(root / "sys/fs/cgroup/a/memory.max")
    assert found.available == 150000000


def test_memory_of_version_1(tmp_path: Path) -> None:
    found = machine.memory(
        fake(
            tmp_path,
            {
                "proc/self/cgroup": "4:cpu:/\n3:memory:/job\n0::/",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "500000000",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "100000000",
                "sys/fs/cgroup/memory/job/memory.stat": "cache 9\ntotal_inactive_file 50000000",
            },
        )
    )
    assert (found.limit, found.available) == (500000000, 450000000)


def test_memory_of_a_container_that_sees_the_path_of_its_host(tmp_path: Path) -> None:
    root = fake(
        tmp_path,
        {
            "proc/self/cgroup": "0::/docker/0123",
            "sys/fs/cgroup/memory.max": "200000000",
            "sys/fs/cgroup/memory.current": "50000000",
        },
    )
    assert machine.memory(root).available == 150000000


def test_other_facts(tmp_path: Path) -> None:
    root = fake(
        tmp_path,
        {
            "proc/sys/kernel/io_uring_disabled": "2",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
            "proc/cpuinfo": "processor : 0\nmodel name\t: Some CPU",
            "proc/self/status": "Name: x\nCapEff:\t0000000000004000",
        },
    )
    found = machine.describe(root)
    assert found.io_uring_disabled == 2
    assert found.huge_pages == "madvise"
    assert found.cpu_model == "Some CPU"
    assert found.may_exceed_memlock
    assert machine.describe(tmp_path / "nothing").huge_pages is None


def test_the_file_system_is_named(tmp_path: Path) -> None:
    device = os.stat(tmp_path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    root = fake(
        tmp_path,
        {
            "proc/self/mountinfo": "1 0 0:77 / / rw - tmpfs none rw\n"
            f"2 1 {number} / {tmp_path} rw - xfs /dev/x rw\n"
            "3 1 0:78 / /elsewhere rw - ext4 /dev/y rw"
        },
    )
    assert machine.file_system(tmp_path, root) == "xfs"
