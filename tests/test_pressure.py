"""Caches give memory back while it is short and take it again: the rule, its signs, a control group."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

import http_server
import httpx
import pytest
from http_server import PATIENCE, SERVE, serving
from oracle.make_checkpoints import make
from oracle.make_tokenizer import write_tokenizer
from test_doctor import fake

from bench.cgroups import MemoryGroup
from mer.engine.breath import Breath
from mer.streaming.pressure import Gauge

MIB = 1 << 20
ASKED, FLOOR, RESERVE = 4096, 512, 128  # MiB


# ram, unfilled, room, stalled -> ram then; all in MiB
@pytest.mark.parametrize(
    ("ram", "unfilled", "room", "stalled", "then"),
    [
        (4096, 0, 1000, 0.0, 4096),  # enough
        (4096, 0, 128, 0.0, 4096),  # just what shall be free
        (4096, 0, 28, 0.0, 4096 - 100 - 128),  # what is short, and as much as shall be free
        (4096, 1000, 28, 0.0, 3096 - 100 - 128),  # what was never filled can't be given back
        (4096, 0, 0, 0.0, 4096 - 128 - 128),
        (4096, 3500, 0, 0.0, 512),  # not below the least
        (4096, 0, 1000, 0.09, 4096),
        (4096, 0, 1000, 0.5, 4096 - 256 - 128),  # a sixteenth, where tasks wait
        (600, 200, 0, 1.0, 512),
        (2000, 0, 128, 0.0, 2000),  # neither: less to take than shall be free
        (2000, 0, 1256, 0.0, 2500),  # half of what is free beyond twice what shall be
        (2000, 1000, 1256, 0.0, 2000),  # which the cache may take already
        (4000, 0, 4000, 0.0, 4096),  # never more than was asked for
        (400, 0, 0, 0.0, 400),  # a cache that is below the least already does not grow by pressure
    ],
)
def test_one_look(ram, unfilled, room, stalled, then):
    breath = Breath(ASKED * MIB, ram * MIB)
    assert breath.reserve == RESERVE * MIB
    found = breath.step(
        0,
        floor=FLOOR * MIB,
        held=(ram - unfilled) * MIB,
        unfilled=unfilled * MIB,
        room=room * MIB,
        stalled=stalled,
    )
    assert found == breath.ram == then * MIB


def test_given_at_once_and_taken_again_with_patience():
    breath = Breath(ASKED * MIB, ASKED * MIB)

    def look(now, room):
        return (
            breath.step(now, floor=FLOOR * MIB, held=breath.ram, unfilled=0, room=room * MIB, stalled=0)
            // MIB
        )

    assert look(10.0, 0) == 3840
    assert look(10.1, 1256) == look(14.9, 1256) == 3840
    assert look(15.0, 512) == look(15.9, 4000) == 3840 + 128
    assert look(16.1, 4000) == ASKED


def test_two_that_breathe_on_one_machine_settle():
    """Neither takes all: what one gives the other may not take at once."""
    total, each = 6000 * MIB, [Breath(ASKED * MIB, 2000 * MIB) for _ in range(2)]
    seen = []
    for tick in range(600):
        for breath in each:
            room = total - sum(other.ram for other in each)
            breath.step(tick / 10, floor=FLOOR * MIB, held=breath.ram, unfilled=0, room=room, stalled=0)
        seen.append(tuple(breath.ram for breath in each))
    assert seen[-1] == seen[-200]
    assert total - sum(seen[-1]) >= RESERVE * MIB
    assert min(seen[-1]) > 2000 * MIB


def psi(some: int) -> str:
    return (
        f"some avg10=0.00 avg60=0.00 avg300=0.00 total={some}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9"
    )


@pytest.mark.parametrize(
    ("files", "pressure", "share"),
    [
        # Its own group: always.
        ({"proc/self/cgroup": "0::/a/b"}, "sys/fs/cgroup/a/b/memory.pressure", 0.25),
        # In a container the path is the host's.
        ({"proc/self/cgroup": "0::/docker/1"}, "sys/fs/cgroup/memory.pressure", 0.25),
        # The machine: others may wait, for reasons of their own.
        ({"proc/self/cgroup": "4:memory:/x"}, "proc/pressure/memory", 0.0),
        ({"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 90 kB"}, "proc/pressure/memory", 0.25),
        ({}, "nowhere", 0.0),
    ],
)
def test_waiting(tmp_path, files, pressure, share):
    at = 7.0
    fake(tmp_path, files | {pressure: psi(1000)})
    gauge = Gauge(tmp_path, lambda: at)
    at = 9.0
    fake(tmp_path, files | {pressure: psi(501000)})
    assert gauge.read()[1] == share
    at = 11.0
    assert gauge.read()[1] == 0


def test_page_cache_counts_as_room(tmp_path):
    fake(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a",
            "sys/fs/cgroup/a/memory.max": "300000000",
            "sys/fs/cgroup/a/memory.current": "250000000",
            "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 100000000\nactive_file 20000000",
        },
    )
    assert Gauge(tmp_path).read() == (170000000, 0.0)


# Takes 4 MiB at a time. Where there is no room it waits a second for the others, who may be slow to notice.
HOG = """
import sys, time
used, limit, pieces = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
held = []
for _ in range(pieces):
    end = time.monotonic() + 1
    while time.monotonic() < end and int(open(used).read()) > limit - (24 << 20):
        time.sleep(0.01)
    held.append(b"x" * (4 << 20))
    time.sleep(0.02)
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def group():
    try:
        made = MemoryGroup(4096 * MIB)
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    with made:
        yield made


def test_a_server_gives_way_to_another_process_in_its_group(tmp_path, group, monkeypatch):
    """Without it the kernel ends one of the two."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 1024, "num_experts": 160, "num_hidden_layers": 2}
    make(tmp_path, "qwen3_moe", vocab_size=300, eos_token_id=0, **sizes)
    write_tokenizer(tmp_path)
    inside = ["sh", "-c", f'echo $$ > {group.path}/cgroup.procs; exec "$@"', "sh"]
    monkeypatch.setattr(http_server, "SERVE", [*inside, *SERVE])
    with serving(tmp_path, "--context", 512, "--ram", "2GiB", "--admin-port", 0) as server:
        url = re.search(r"admin endpoints at (\S+)", "".join(server.lines))[1]

        def ask(seed):
            assert server.process.poll() is None, (server.process.poll(), server.lines, group.used >> 20)
            body = {"prompt": [seed, 2, 3], "max_tokens": 30, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        def state():
            return httpx.get(f"{url}/admin/models", timeout=PATIENCE).json()

        seeds = range(20, 32)
        expected = [ask(seed) for seed in seeds]
        before = state()
        assert before["ram_bytes"] == before["asked_ram_bytes"] == 2 << 30
        limit = group.used + 150 * MIB
        group.limit(limit)
        command = [*inside, sys.executable, "-c", HOG, str(group.usage), str(limit), "50"]
        hog = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            told = threading.Event()
            threading.Thread(target=lambda: hog.stdout.readline() and told.set(), daemon=True).start()
            while not told.is_set():
                assert hog.poll() is None, "it was killed"
                assert [ask(seed) for seed in seeds] == expected
            print(server.lines, group.used >> 20, hog.poll())
            small = state()
            assert small["ram_bytes"] < small["asked_ram_bytes"] == 2 << 30
            slots = [each["models"][0]["cache_slots"] for each in (before, small)]
            assert 2 <= slots[1] < slots[0] == 320
            assert small["resident_bytes"] < before["resident_bytes"] - 50 * MIB
            assert [ask(seed) for seed in seeds] == expected
        finally:
            hog.communicate()
        server.wait_for("memory is short")
        deadline = time.monotonic() + PATIENCE
        group.limit(4096 * MIB)
        while state()["ram_bytes"] < 2 << 30:
            assert time.monotonic() < deadline, state()
            time.sleep(0.2)
        assert state()["models"][0]["cache_slots"] == 320
        assert [ask(seed) for seed in seeds] == expected
