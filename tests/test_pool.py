"""The compute pool from Python: sizes, names, sleep, the end. For its races see test_kernels_sanitized.py."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from mer._ext.cpus import usable_cpus
from mer._ext.kernels import Kernels, Pool

Q8_0 = 8


def workers() -> set[Path]:
    """The pool threads of this process; some may be of other tests, and about to end."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            if (task / "comm").read_text().startswith("mer-compute-"):
                found.add(task)
    return found


def product(pool: Pool) -> bytes:
    rng = np.random.default_rng(0)
    w = rng.integers(0, 100, (500, 34 * 8), np.uint8)
    return Kernels().linear_py(pool, Q8_0, w, rng.standard_normal((3, 256)).astype(np.float32)).tobytes()


def test_threads_are_started_named_and_joined() -> None:
    before = workers()
    pool = Pool(4)
    assert pool.n_threads == 4
    mine = workers() - before
    assert len(mine) == 3
    del pool
    assert not workers() & mine


def test_the_default_is_what_the_process_may_use() -> None:
    assert Pool().n_threads == usable_cpus()


@pytest.mark.parametrize("arguments", [{"n_threads": 0}, {"n_threads": -3}, {"n_threads": 2, "spin_us": -1}])
def test_impossible_pools_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="n_threads >= 1"):
        Pool(**arguments)  # type: ignore[arg-type]


def test_idle_threads_sleep() -> None:
    """Without work every thread is in the kernel, asleep, and stays so."""
    before = workers()
    pool = Pool(3)
    product(pool)
    mine = workers() - before
    assert len(mine) == 2

    def asleep() -> bool:
        return all((t / "stat").read_text().rpartition(")")[2].split()[0] == "S" for t in mine)

    end = time.monotonic() + 60
    while not asleep():
        assert time.monotonic() < end
        time.sleep(0.005)
    switches = [(t / "status").read_text().split("voluntary_ctxt_switches:")[1] for t in mine]
    time.sleep(0.05)
    assert switches == [(t / "status").read_text().split("voluntary_ctxt_switches:")[1] for t in mine]


def test_callers_from_several_threads_take_turns() -> None:
    pool, want = Pool(3), product(Pool(1))
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.extend(product(pool) for _ in range(30))) for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [want] * 120


@pytest.mark.parametrize("spin_us", [0, 30, 100_000])
def test_the_interpreter_ends_with_a_living_pool(spin_us: int) -> None:
    code = (
        "from mer._ext.kernels import Pool, Kernels\nimport numpy as np, sys\n"
        f"pool = Pool(3, spin_us={spin_us})\n"
        "Kernels().linear_py(pool, 0, np.zeros((200, 4), np.uint8), np.ones((2, 1), np.float32))\n"
        "sys.modules['keep'] = pool\nprint('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("done\n", 0)


def test_a_forked_child_can_use_and_drop_the_pool() -> None:
    pool = Pool(3)
    want = product(pool)
    pid = os.fork()
    if pid == 0:
        ok = product(pool) == want
        del pool
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0


def fake_root(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


V1 = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),  # a container
        ({"sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "5:cpuacct,cpu:/k\n0::/\n",
                f"{V1}/k/cpu.cfs_quota_us": "600000",
                f"{V1}/k/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        ({f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"}, 8),
        ({"proc/self/cgroup": "nonsense\n", "sys/fs/cgroup/cpu.max": "much\n"}, 8),
    ],
)
def test_quotas_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], want: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cpus(fake_root(tmp_path, files)) == want
