"""bench/vram_policy.py: two tiers by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_policy import random_visits, write_trace

from bench import policy, vram_policy

# A moves up at once, B takes its place when it was wanted clearly more often; then A is wanted again.
CHANGE = [(1, t, 0, [expert]) for t, expert in enumerate([0, *[1] * 8, 0])]


@pytest.mark.parametrize(
    ("way", "last", "back"), [("drop", "read", 0), ("copy-back", "ram", 1), ("inclusive", "ram", 0)]
)
def test_who_left_the_gpu_is_wanted_again(tmp_path: Path, way: str, last: str, back: int) -> None:
    trace = policy.read_trace(write_trace(tmp_path / "t.csv", CHANGE, layers=1, experts=4))
    tiers = vram_policy.Tiers(trace, 1, 3, way)
    for visit in trace.visits[:-1]:
        before = dict(tiers.counts)
        tiers.visit(visit)
    assert tiers.above.tolist() == [False, True, False, False]
    assert tiers.counts["back"] == back
    before = dict(tiers.counts)
    tiers.visit(trace.visits[-1])
    assert tiers.counts[last] == before[last] + 1


@pytest.mark.parametrize("way", vram_policy.WAYS)
def test_no_tier_holds_more_than_it_has_room_for(tmp_path: Path, way: str) -> None:
    visits = random_visits(np.random.default_rng(3), 30, experts=8)
    trace = policy.read_trace(write_trace(tmp_path / "t.csv", visits, experts=8))
    tiers = vram_policy.Tiers(trace, 3, 4, way)
    for visit in trace.visits:
        tiers.visit(visit)
        assert tiers.above.sum() <= 3
        assert tiers.below.sum() <= 4
        assert way == "inclusive" or not (tiers.above & tiers.below).any()
    found = vram_policy.replay(trace, 3, 4, way)
    assert found.vram + found.ram + found.read == sum(len(v.experts) for v in trace.visits if v.decode)


def test_the_command(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.csv", random_visits(np.random.default_rng(1), 9))
    out = tmp_path / "out.json"
    done = CliRunner().invoke(
        vram_policy.main, [str(path), "--vram", "25", "--ram", "50", "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert [each["way"] for each in json.loads(out.read_text())] == list(vram_policy.WAYS)
