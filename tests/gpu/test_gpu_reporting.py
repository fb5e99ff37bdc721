"""What an engine with experts on a GPU tells: its numbers are given here, and have to arrive everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from engine_models import write_text_model
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from mer import Engine, SamplingParams
from mer.api.grpc import convert
from mer.api.metrics import Metrics
from mer.cli.dashboard.panels import speed
from mer.cli.generation import describe, print_summary
from mer.cli.moments import Moment
from mer.model.placement import ON_THE_CPU, Placement
from mer.v1 import inference_pb2 as pb

FOUND: dict[str, Any] = {
    "vram_slots": 7, "vram_bytes": 7 << 20, "vram_resident": 5, "vram_hits": 300, "vram_promotions": 11,
    "vram_evictions": 6, "vram_passed": 9, "bus_bytes": 11 << 20, "gpu_wait_s": 0.25, "lost": None,
}  # fmt: skip


class Streamer:
    """The engine's, with what a tier in VRAM would count."""

    def __init__(self, real: Any, found: dict[str, Any]) -> None:
        self._real, self.found = real, found

    def stats(self) -> dict[str, Any]:
        return self._real.stats() | self.found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@attrs.frozen
class Card:
    name: str = "Card 1"
    lost: str | None = None


@contextmanager
def with_gpu(engine: Engine, found: dict[str, Any]) -> Iterator[Streamer]:
    runner = engine._runner
    assert runner.experts is not None
    real = runner.experts.streamer
    given: Any = Streamer(real, found)
    card: Any = Card()
    runner.experts.streamer, runner.device = given, card
    try:
        yield given
    finally:
        runner.experts.streamer, runner.device = real, None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("gpu"))


def exported(metrics: Metrics) -> dict[str, float]:
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(metrics.render()[0].decode())
        for sample in family.samples
    }


def summary(engine: Engine, result: Any) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        print_summary(console, engine, result.usage, result.timings)
    return capture.get()


async def test_with_a_gpu(model: Path) -> None:
    async with Engine.open(model, context=64, device="cpu") as engine:
        with with_gpu(engine, dict.fromkeys(FOUND, 0) | {"lost": None, "vram_slots": 7}) as streamer:
            before = engine.view()
            given = engine._worker
            streamer.found |= FOUND
            result = await engine.generate([1, 5, 6], SamplingParams(max_tokens=4, ignore_eos=True))
            assert given is engine._worker
            steps = engine.stats
            assert attrs.astuple(steps)[-5:] == (300, 9, 11, 11 << 20, 0.25)
            now = exported(Metrics(engine, "small"))
            assert now["mer_expert_cache_slots vram"] == 7
            assert now["mer_expert_cache_resident vram"] == 5
            assert now["mer_expert_cache_hits_total vram"] == 300
            assert now["mer_expert_cache_hits_total ram"] == steps.hits > 0
            assert now["mer_expert_cache_evictions_total vram"] == 6
            assert [now[f"mer_vram_bytes {part}"] for part in ("experts", "dense", "kv")] == [7 << 20, 0, 0]
            assert (now["mer_vram_layers"], now["mer_vram_lost"]) == (0, 0)
            assert (now["mer_vram_promotions_total"], now["mer_bus_bytes_total"]) == (11, 11 << 20)
            assert now["mer_vram_passed_total"] == 9
            assert now["mer_gpu_wait_seconds_total"] == 0.25
            assert engine.facts()["device"] == "Card 1"

            timings = attrs.evolve(result.timings, steps=steps)
            assert timings.hit_rate == (steps.hits + 300) / (steps.hits + steps.misses + 300)
            shown = summary(engine, attrs.evolve(result, timings=timings))
            share = 309 / (300 + steps.hits + steps.misses)
            assert (
                f"Card 1, 7 MiB with 5 of 7 experts; it computed {share:.1%} of experts, 11 MiB went over "
                "the bus for 20, waiting for it took 0.25 s"
            ) in " ".join(shown.split())
            said = describe(engine, result.usage, timings)
            assert said["timings"]["vram_hits"] == 300
            assert said["engine"]["device"] == "Card 1"
            json.dumps(said)

            answers = [convert.watched(each, "m", 1.0, experts=False) for each in (before, engine.view())]
            answers[1].time = answers[0].time + 2
            assert answers[1].stats.vram == pb.Vram(
                device="Card 1", slots=7, nbytes=7 << 20, resident=5, evictions=6
            )
            moment = Moment.between(*answers)
            assert moment.vram is not None
            assert moment.vram.bus_bytes_per_s == (11 << 20) / 2
            old, new = (each.stats.steps for each in answers)
            hits, misses = new.hits - old.hits, new.misses - old.misses
            assert hits > 0
            assert moment.vram.computed_share == 309 / (300 + hits + misses)
            assert moment.expert_hit_rate == (300 + hits) / (300 + hits + misses)
            spent = new.step_s - old.step_s
            assert moment.time_share.experts == pytest.approx(
                (new.expert_s - old.expert_s + 0.25) / max(spent, 2), rel=1e-6
            )
            told = "\n".join(str(line) for line in speed(moment, [1.0], 60))
            assert "5 of 7, " in told
            assert "% computed" in told


async def test_a_gpu_that_was_lost(model: Path) -> None:
    async with Engine.open(model, context=64, device="cpu") as engine:
        result = await engine.generate([1, 5, 6], SamplingParams(max_tokens=4, ignore_eos=True))
        with with_gpu(engine, FOUND | {"lost": "it fell off the bus", "vram_slots": 0, "vram_resident": 0}):
            assert exported(Metrics(engine, "small"))["mer_vram_lost"] == 1
            assert "Card 1 was given up (it fell off the bus)" in summary(engine, result)
            answer = convert.watched(engine.view(), "m", 1.0, experts=False)
            moment = Moment.between(answer, answer)
            assert moment.as_json()["vram"]["lost"] == "it fell off the bus"
            told = "\n".join(str(line) for line in speed(moment, [1.0], 60))
            assert "given up: it fell off the bus" in told


async def test_with_dense_layers_alone(model: Path) -> None:
    async with Engine.open(model, context=64, device="cpu") as engine:
        result = await engine.generate([1, 5, 6], SamplingParams(max_tokens=4, ignore_eos=True))
        with with_gpu(engine, {}):
            engine._runner.placement = Placement(2)
            engine._runner._forward.device_bytes = 3 << 20, 5 << 20
            text = "dense part of 2 layers 3 MiB, their keys and values 5 MiB"
            assert f"Card 1, {text}" in summary(engine, result)
            assert engine.snapshot().vram.told(12) == f"Card 1: {text}, no experts"
            now = exported(Metrics(engine, "small"))
            assert [now[f"mer_vram_bytes {part}"] for part in ("experts", "dense", "kv")] == [
                0,
                3 << 20,
                5 << 20,
            ]
            assert now["mer_vram_layers"] == 2
            answer = convert.watched(engine.view(), "m", 1.0, experts=False)
            found = answer.stats.vram
            assert (found.layers, found.slots, found.dense_bytes, found.kv_bytes) == (2, 0, 3 << 20, 5 << 20)
            told = "\n".join(str(line) for line in speed(Moment.between(answer, answer), [1.0], 60))
            assert "VRAM" in told
            assert "2 dense layers 3 MiB, KV 5 MiB" in told
            engine._runner.placement = ON_THE_CPU
            assert engine.snapshot().vram is None


async def test_without_a_gpu_nothing_is_said(model: Path) -> None:
    async with Engine.open(model, context=64, device="cpu") as engine:
        result = await engine.generate([1, 5, 6], SamplingParams(max_tokens=4, ignore_eos=True))
        now = exported(Metrics(engine, "small"))
        assert not [name for name in now if name.endswith(" vram")]
        assert [now[f"mer_vram_bytes {part}"] for part in ("experts", "dense", "kv")] == [0, 0, 0]
        assert (now["mer_vram_layers"], now["mer_vram_lost"], now["mer_bus_bytes_total"]) == (0, 0, 0)
        assert engine.facts()["device"] == "cpu"
        assert engine.snapshot().vram is None
        assert "gpu" not in summary(engine, result)
        answer = convert.watched(engine.view(), "m", 1.0, experts=False)
        assert not answer.stats.HasField("vram")
        moment = Moment.between(answer, answer)
        assert moment.vram is None
        assert "VRAM" not in "\n".join(str(line) for line in speed(moment, [1.0], 60))
