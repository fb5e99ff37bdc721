"""How many reads a device is given at once: by what was measured, and where measuring would be of no use."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from engine_models import GREEDY, opened, prompt
from oracle.make_checkpoints import make

from mer.cli.run import run
from mer.errors import DeviceReadError
from mer.streaming import depth, probe
from mer.streaming.experts import ExpertTables
from mer.streaming.probe import DEPTHS, DepthRate, enough

MIB = 1 << 20


def rates(**found: float) -> list[DepthRate]:
    """GB/s by depth: d1=0.5."""
    return [DepthRate(int(name[1:]), 1e9 * rate) for name, rate in found.items()]


@pytest.mark.parametrize(
    ("found", "block", "size", "want"),
    [
        # 10 ms at 1.5 GB/s are 15 MB: six reads of 2.5 MB, so eight
        (rates(d1=1.2, d2=1.49, d4=1.5), 2_500_000, 2_500_000, 8),
        # a drive with much to do before it answers: 95 % of the best want more than 10 ms (7.6 reads) do
        (rates(d1=0.01, d8=0.06, d16=0.09, d32=0.1), 131072, 131072, 32),
        (rates(d1=0.01, d8=0.06, d16=0.09, d32=0.1), 131072, 524288, 8),
        # small reads of a fast drive: more than there are
        (rates(d16=5.0, d32=7.0, d64=7.1), 131072, 131072, 64),
        # reads larger than what was measured, and one that would take long
        (rates(d1=1.5, d2=1.5), 4 * MIB, 100 * MIB, 2),
    ],
)
def test_the_least_depth_that_will_do(found, block, size, want):
    assert enough(found, block, size) == want


class Drive:
    """A reader of a drive that answers after `latency` seconds, at most `rate` bytes a second."""

    def __init__(self, clock, *, backend="uring", latency=0.001, rate=2e9, cached=False, fails=False):
        self.backend, self.alignment = backend, 1 if backend == "buffered" else 4096
        self.queue_depth = 64
        self.asked: list[tuple[int, int, int]] = []
        self._clock, self._latency, self._rate = clock, latency, rate
        self._cached, self._fails = cached, fails

    def cached(self, file, offset, length):
        return self._cached

    def measure(self, file, block, depth, seconds, into):
        if self._fails:
            raise DeviceReadError("a bad sector")
        assert into.nbytes >= block
        self.asked.append((file, block, depth))
        took = max(self._latency, depth * block / self._rate)
        turns = max(1, round(seconds / took))
        self._clock.now += turns * took
        return turns * depth * block, turns * took

    def set_queue_depth(self, depth):
        self.queue_depth = depth


@pytest.fixture
def clock(monkeypatch):
    """Time goes by where a drive reads, and nowhere else."""
    clock = SimpleNamespace(now=100.0)
    for module in (depth, probe):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def tables(nbytes=2_500_000, experts=1000, pieces=1) -> ExpertTables:
    """Experts of `pieces` reads each, in file 1; the first one has another, in file 0."""
    reads = np.zeros((experts, pieces + 1, 5), np.int64)
    length = -(-nbytes // 4096) * 4096
    for i in range(pieces):
        reads[:, i] = [1, 0, length, nbytes, i * length]
        reads[:, i, 1] = (np.arange(experts) * pieces + i) * length
    reads[0, pieces] = [0, 0, 4096, 100, pieces * length]
    none = np.zeros((experts, 3), np.int64)
    return ExpertTables(100, (pieces * length) + 4096, np.zeros((10, 5), np.int64), reads, none)


def test_it_is_measured_where_the_experts_lie(clock):
    drive = Drive(clock)
    why = depth.settle_depth(drive, tables(), 500, None)
    # 2 GB/s: 20 MB in 10 ms, eight reads
    assert drive.queue_depth == 8
    assert why.startswith("measured: ")
    assert "2.00 GB/s with 4" in why
    assert {(file, block % 4096) for file, block, _ in drive.asked} == {(1, 0)}
    assert all(2_490_000 < block < 2_510_000 for _, block, _ in drive.asked)
    assert [d for _, _, d in drive.asked] == [1, 2, 4] * 2  # more would be over 16 MiB at a time


def test_small_reads_are_measured_up_to_64_at_once(clock):
    drive = Drive(clock, latency=0.0001, rate=0.4e9)
    depth.settle_depth(drive, tables(100_000, 3000, pieces=3), 500, None)
    assert sorted({d for _, _, d in drive.asked}) == list(DEPTHS)
    assert drive.queue_depth == 64  # 4 MB in 10 ms are forty


def test_a_slow_drive_is_not_asked_for_long(clock):
    drive = Drive(clock, latency=0.05, rate=100e6)
    depth.settle_depth(drive, tables(), 500, None)
    # no more begins after 0.2 s, and what was begun is 4 reads of 25 ms
    assert clock.now - 100 < 0.31
    assert drive.queue_depth == 2


@pytest.mark.parametrize(
    ("drive", "slots", "experts", "why"),
    [
        ({}, 1000, 1000, "all weights have room in memory"),
        ({}, 0, 0, "all weights have room in memory"),
        ({}, 50, 100, "all experts are read in no time"),
        ({"backend": "buffered"}, 500, 1000, "page cache"),
        ({"cached": True}, 500, 1000, "page cache holds"),
    ],
)
def test_it_is_not_measured_for_nothing(clock, drive, slots, experts, why):
    reader = Drive(clock, **drive)
    found = tables(experts=experts) if experts else tables(experts=1)
    if not experts:
        found = ExpertTables(0, 0, *(np.zeros(s, np.int64) for s in ((0, 5), (0, 0, 5), (0, 3))))
    said = depth.settle_depth(reader, found, slots, None)
    assert said.startswith("not measured: ")
    assert why in said
    assert not reader.asked
    assert reader.queue_depth == (4 if reader.backend == "buffered" else 64)


def test_threads_are_no_more_than_there_are(clock):
    drive = Drive(clock, backend="preadv", rate=8e9)
    depth.settle_depth(drive, tables(100_000, 9000), 500, None)
    assert max(d for _, _, d in drive.asked) == drive.queue_depth == 16


def test_a_read_that_fails_does_not_stop_the_start(clock):
    drive = Drive(clock, fails=True)
    assert "a bad sector" in depth.settle_depth(drive, tables(), 500, None)
    assert drive.queue_depth == 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("depth") / "model"
    make(path, "qwen3_moe", num_hidden_layers=2)
    return path


@pytest.mark.parametrize("backend", ["uring", "preadv", "buffered"])
async def test_answers_are_the_same_with_a_measured_depth(model, backend, monkeypatch):
    settings = {"cache_experts": 3, "io_backend": backend}
    found = []
    for small, asked in itertools.product((1 << 40, 0), (None, 1)):
        monkeypatch.setattr(depth, "_SMALL", small)
        async with opened(model, **settings, queue_depth=asked) as engine:
            found.append((await engine.generate(prompt(20), GREEDY)).token_ids)
            facts = engine.facts()
        if asked:
            assert (facts["queue_depth"], facts["queue_depth_why"]) == (1, "as asked for")
        else:
            assert facts["queue_depth"] in DEPTHS
            assert "measured: " in facts["queue_depth_why"]
    assert len(set(found)) == 1


def test_the_command_takes_it_and_tells():
    command = ["demo", "Once", "-n", "1", "--temperature", "0", "--queue-depth"]
    done = CliRunner().invoke(run, [*command, "3", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["engine"]["queue_depth"] == 3
    done = CliRunner().invoke(run, [*command, "5"])
    assert "at most 5 at once" in done.output
