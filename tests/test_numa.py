"""Where threads and memory go on machines of several memory nodes, on a made-up one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mer._ext.cpus import numa_nodes, share_cpus
from mer._ext.kernels import Pool, interleave


def machine(root: Path, **nodes: str) -> Path:
    """A /sys with these nodes: node0="0-3"."""
    for name, cpus in nodes.items():
        folder = root / "sys/devices/system/node" / name
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    return root


@pytest.fixture
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


@pytest.mark.usefixtures("sixteen_cpus")
@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ({}, {}),
        ({"node0": "0-15"}, {0: list(range(16))}),
        ({"node0": "0-3,8-9", "node1": "4-7,12"}, {0: [0, 1, 2, 3, 8, 9], 1: [4, 5, 6, 7, 12]}),
        # memory without CPUs, CPUs that are not ours, numbers in no order, what makes no sense
        ({"node10": "2", "node2": "0-1", "node3": "", "node4": "16-31"}, {2: [0, 1], 10: [2]}),
        ({"node0": "0-1", "node1": "x-3", "node77": "5"}, {0: [0, 1]}),
    ],
)  # fmt: skip
def test_nodes(tmp_path: Path, nodes: dict[str, str], found: dict[int, list[int]]) -> None:
    assert numa_nodes(machine(tmp_path, **nodes)) == found


def test_threads_are_shared_out_by_cpus() -> None:
    a, b = [0, 1, 2, 3, 4, 5], [6, 7]
    assert share_cpus({0: a, 1: b}, 8) == [a] * 6 + [b] * 2
    assert share_cpus({0: a, 1: b}, 4) == [a, a, a, b]
    assert share_cpus({0: a, 1: b}, 1) == [a]
    assert share_cpus({0: a}, 8) == []
    assert share_cpus({}, 8) == []


def test_a_pinned_pool_computes() -> None:
    cpu = min(os.sched_getaffinity(0))
    pool = Pool(3)
    pool.pin([[cpu]] * 3)
    allowed = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # one of another test that has ended meanwhile
            if (task / "comm").read_text().startswith("mer-compute"):
                allowed.append(os.sched_getaffinity(int(task.name)))
    assert allowed.count({cpu}) >= 2
    assert os.sched_getaffinity(0) != set()
    assert pool.memory_bandwidth(1, 1) > 0


def test_memory_on_the_nodes_there_are() -> None:
    """One node takes it all, or the container does not allow it; the bytes stay."""
    data = np.arange(1 << 16, dtype=np.int64)
    first = min(numa_nodes() or {0: []})
    assert interleave(data.ctypes.data, data.nbytes, [first]) in (True, False)
    np.testing.assert_array_equal(data, np.arange(1 << 16))
    assert interleave(data.ctypes.data + 1, 100, [first])  # no whole page: nothing to do
