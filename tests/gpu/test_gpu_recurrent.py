"""Layers with a recurrent state on a (simulated) GPU: products there, states with the CPU, the same bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engine_models import Logits, convert_to, opened, prompt
from gpu_simulator import REAL, Simulator
from oracle.make_checkpoints import make

from mer import Engine, SamplingParams
from mer.config import EngineConfig
from mer.engine.runner import Runner
from mer.engine.scheduler import Scheduler, Sequence
from mer.model.placement import ON_THE_CPU, Placement

pytestmark = pytest.mark.usefixtures("simulator")

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [prompt(20), prompt(5, 1), [5, 6, 7, 8] * 3]
SIZES = {"step_tokens": 16, "max_running": 3, "context": 256}
GPU = {"device": "cuda", "vram": "200MiB"}
# Rows of whole blocks, for Q8_0.
WHOLE = {"linear_value_head_dim": 32, "intermediate_size": 96, "shared_expert_intermediate_size": 64}

Answers = list[tuple[tuple[int, ...], bytes]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three layers, of which the first keeps a state and the second does not; two are Q8_0, with biases."""
    folder = tmp_path_factory.mktemp("recurrent")
    make(folder / "qwen3_5", "qwen3_5_moe_text")
    make(folder / "lfm2-f32", "lfm2_moe", intermediate_size=96, conv_bias=True)
    make(folder / "next-f32", "qwen3_next", **WHOLE)
    for name in ("lfm2", "next"):
        convert_to(folder / f"{name}-f32", folder / name, "q8_0", "q8_0")
    return {name: folder / name for name in ("qwen3_5", "lfm2", "next")}


async def answers(engine: Engine, logits: Logits) -> Answers:
    results = await asyncio.gather(*(engine.generate(ids, PARAMS) for ids in PROMPTS))
    return [(r.token_ids, logits.take(ids)) for r, ids in zip(results, PROMPTS, strict=True)]


async def by_the_cpu(path: Path, logits: Logits) -> Answers:
    async with opened(path, device="cpu", **SIZES) as engine:
        return await answers(engine, logits)


@pytest.mark.parametrize(("name", "some"), [("qwen3_5", 2), ("lfm2", 1), ("next", 1)])
async def test_any_number_of_layers(models: dict[str, Path], logits: Logits, name: str, some: int) -> None:
    """Where the first layer of the CPU keeps a state, and where it does not."""
    expected = await by_the_cpu(models[name], logits)
    async with opened(models[name], gpu_layers=some, **GPU, **SIZES) as engine:
        assert engine._runner.placement == Placement(some)
        assert await answers(engine, logits) == expected
    async with opened(models[name], **GPU, **SIZES) as engine:
        assert engine._runner.placement == Placement(3, True)
        assert await answers(engine, logits) == expected
        assert await answers(engine, logits) == expected  # from snapshots of the states


def with_a_wrong_draft(path: Path, **settings: object) -> list[bytes]:
    """Logits of a step with a draft, and of the one after it was set back."""
    runner = Runner.open(path, EngineConfig(speculate="ngram", **SIZES, **settings))
    scheduler = Scheduler(
        n_blocks=runner.budget.kv_blocks, step_tokens=16, max_running=3, rows=runner.budget.rows,
        n_images=runner.budget.state_images,
    )  # fmt: skip
    sequence, found = Sequence(prompt(14)), []
    scheduler.add(sequence)
    for drawn in (7, 9, 11):
        chunks = scheduler.schedule()
        if drawn == 9:
            chunks = scheduler.with_drafts(chunks, [[1, 2, 3]])
        start = sequence.computed
        found.append(runner.step(chunks).tobytes())
        scheduler.commit(chunks)
        if drawn == 9:
            before, after, *_ = sequence.images.move(start)
            runner.replay([(0, sequence.computed - start, before, after)])
            scheduler.commit_state(chunks[0])
        sequence.tokens.append(drawn)
    runner.close()
    return found


@pytest.mark.parametrize("name", ["lfm2", "next"])
def test_a_wrong_draft_is_set_back(models: dict[str, Path], name: str) -> None:
    expected = with_a_wrong_draft(models[name], device="cpu")
    assert with_a_wrong_draft(models[name], **GPU) == expected
    assert len(set(expected)) == 3


@pytest.mark.skipif(REAL, reason="a GPU takes no orders")
@pytest.mark.parametrize(("name", "call"), [("qwen3_5", 1), ("lfm2", 17), ("lfm2", 130), ("next", 60)])
async def test_a_device_that_is_lost(
    models: dict[str, Path], logits: Logits, simulator: Simulator, name: str, call: int
) -> None:
    expected = await by_the_cpu(models[name], logits)
    async with opened(models[name], **GPU, **SIZES) as engine:
        simulator.fail_from(call)
        assert await answers(engine, logits) == expected
        assert engine._runner.placement == ON_THE_CPU
        assert await answers(engine, logits) == expected
        simulator.reset()
