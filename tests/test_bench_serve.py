"""bench/serve.py: its arithmetic on requests made up, and all of it once on a small model."""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest
from click.testing import CliRunner
from engine_models import write_text_model

from bench import overhead, serve
from bench.faces import Record

FACES = ("in process", "HTTP", "gRPC")


def test_summary():
    records = [
        Record(10.0, [10.5, 10.6, 10.8], 3),
        Record(10.0, [12.0, 12.1, 12.2], 3),  # late
        Record(10.0, [10.1, 11.1], 2),  # slow
        Record(10.0, [], 0, "503"),
        Record(10.0, [10.9], 1),
    ]
    found = serve.summary("HTTP", "closed, 2", records, 4.0, 0.9, [0.001] * 99 + [0.5], (1.0, 0.16))
    assert (found.requests, found.failed, found.tokens) == (5, 1, 9)
    assert (found.tokens_per_s, found.goodput) == (9 / 4, 2 / 4)
    assert found.cpu_s_per_token == pytest.approx(0.1)
    assert found.first_token_s[0] == pytest.approx(0.7)
    assert found.next_token_s == pytest.approx((0.1, 0.84, 0.968))
    assert found.lag_s[0] == 0.001 < found.lag_s[2]
    nothing = serve.summary("HTTP", "closed, 2", records[3:4], 4.0, 0.0, [], (1.0, 0.16))
    assert (nothing.failed, nothing.tokens_per_s, nothing.first_token_s) == (1, 0, (0, 0, 0))


def test_costs_are_medians_of_pairs():
    def load(face, rate, cpu):
        return serve.Load(face, "closed, 1", 1, 0, 9, 1.0, rate, cpu, (0,) * 3, (0,) * 3, (0,) * 3, 1.0)

    loads = []
    for plain, http in ((100, 50), (200, 100), (50, 10)):
        loads += [load("in process", plain, 0.001), load("HTTP", http, 0.003)]
    cost = serve.costs(loads)["HTTP, closed, 1"]
    assert cost["wall_s"] == pytest.approx(0.01)
    assert cost["cpu_s"] == pytest.approx(0.002)
    assert serve.median(loads[::2]).tokens_per_s == 100


async def test_arrivals_of_an_open_loop():
    """A Poisson process: the gaps are those of the seed, and nobody waits for an answer."""

    class Slow:
        name = "slow"

        def __init__(self):
            self.asked = []
            self.here = self.most = 0

        async def ask(self, prompt, tokens):
            self.asked.append(time.perf_counter())
            self.here += 1
            self.most = max(self.most, self.here)
            await asyncio.sleep(0.3)
            self.here -= 1
            return Record(self.asked[-1], [time.perf_counter()], 1)

    face, draw = Slow(), random.Random(3)
    begun = time.perf_counter()
    records = await serve.opened(face, [[1]] * 8, 1, 100.0, 3)
    assert len(records) == 8
    due = begun
    for at in face.asked:
        due += draw.expovariate(100.0)
        assert at >= due
    assert face.most > 1, "nobody waits for the answer before"


def test_a_small_load_on_every_face(tmp_path):
    model, out = write_text_model(tmp_path / "model"), tmp_path / "load.json"
    numbers = {"rounds": 1, "requests": 3, "tokens": 4, "prompt": 5, "rate": 50, "context": 64}
    options = [f"--{name}={value}" for name, value in numbers.items()]
    drawn = ["--temperature=0.8", "--speculate=off"]
    done = CliRunner().invoke(serve.main, [str(model), *options, "--streams=1,2", *drawn, f"--json={out}"])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert [each["face"] for each in found["runs"]] == list(FACES) * 3
    assert [each["load"] for each in found["runs"][::3]] == ["closed, 1", "closed, 2", "open, 50/s"]
    for each in found["runs"]:
        assert (each["requests"], each["failed"], each["tokens"]) == (3, 0, 12)
        assert each["tokens_per_s"] == pytest.approx(12 / each["seconds"])
        assert 0 < each["first_token_s"][0] <= each["first_token_s"][2] < each["seconds"]
    assert any(each["lag_s"][2] > 0 for each in found["runs"])
    assert set(found["cost_per_token"]) == {f"{f}, closed, {n}" for f in FACES[1:] for n in (1, 2)}
    assert set(found["scaling"]) == set(found["cpu_scaling"]) == set(FACES)
    assert "2 streams give" in done.output


async def test_what_a_face_costs():
    found = await overhead.measure([2], 5, 1, 0.001)
    assert list(found) == ["2"]
    assert list(found["2"]) == list(FACES)
    assert all(cost > 0 for cost in found["2"].values())


def test_what_can_not_be_is_refused(tmp_path):
    for streams in ("0", "1,x"):
        done = CliRunner().invoke(serve.main, ["demo", "--streams", streams])
        assert done.exit_code == 2
        assert "--streams" in done.output
    done = CliRunner().invoke(serve.main, ["nowhere", "--no-server"])
    assert done.exit_code == 1
    assert "nowhere does not exist" in done.output
