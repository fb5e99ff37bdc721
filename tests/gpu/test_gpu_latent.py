"""Latent attention (MLA) on a (simulated) GPU: batches, shared prefixes, preemption, a lost device."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from attrs import evolve
from engine_models import Logits, opened, prompt, write_tokenizer
from gpu_simulator import REAL, Simulator
from oracle.make_checkpoints import make

from mer import Engine, SamplingParams
from mer.model.placement import ON_THE_CPU, Placement

pytestmark = pytest.mark.usefixtures("simulator")

PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
# In the end each of the first two has two blocks, and so has the last at once.
PROMPTS = [prompt(5, vocab=300), prompt(6, 1, 300), prompt(20, 2, 300)]
SIZES = {"step_tokens": 13, "max_running": 3, "cache_experts": "50%", "speculate": "off"}

Answers = list[tuple[tuple[int, ...], bytes]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latent") / "model"
    make(path, "deepseek_v3", vocab_size=300, num_hidden_layers=2, eos_token_id=0)
    write_tokenizer(path)
    return path


async def together(engine: Engine, logits: Logits) -> Answers:
    """All prompts in one batch."""
    engine.pause()
    asked = [asyncio.create_task(engine.generate(ids, PARAMS)) for ids in PROMPTS]
    while engine.snapshot().waiting < len(asked):  # noqa: ASYNC110 (it happens elsewhere)
        await asyncio.sleep(0.001)
    engine.resume()
    results = await asyncio.gather(*asked)
    return [(r.token_ids, logits.take(ids)) for r, ids in zip(results, PROMPTS, strict=True)]


@pytest.fixture
async def expected(model: Path, logits: Logits) -> Answers:
    """One after the other, by the CPU."""
    found = []
    async with opened(model, device="cpu", context=256) as engine:
        for ids in PROMPTS:
            result = await engine.generate(ids, PARAMS)
            found.append((result.token_ids, logits.take(ids)))
    return found


@pytest.mark.parametrize(("layers", "placement"), [(1, Placement(1)), ("auto", Placement(2, True))])
async def test_batches(
    model: Path, logits: Logits, expected: Answers, layers: int | str, placement: Placement
) -> None:
    """Of three blocks: requests are paused and computed again; then blocks that another left are shared."""
    gpu = {"device": "cuda", "vram": "200MiB", "gpu_layers": layers}
    async with opened(model, context=48, **SIZES, **gpu) as engine:
        assert engine._runner.placement == placement
        assert await together(engine, logits) == expected
        assert engine.snapshot().preemptions
        tokens, rows = expected[0]
        longer = PROMPTS[0] + list(tokens[:15])
        for _ in range(2):
            result = await engine.generate(longer, evolve(PARAMS, max_tokens=5))
            assert (result.token_ids, logits.take(longer)) == (tokens[15:], rows[len(rows) // 20 * 15 :])
        assert result.usage.cached_tokens == 16


@pytest.mark.skipif(REAL, reason="a GPU takes no orders")
async def test_a_device_that_is_lost(
    model: Path, logits: Logits, expected: Answers, simulator: Simulator
) -> None:
    async with opened(model, context=256, **SIZES, device="cuda", vram="200MiB") as engine:
        assert engine._runner.placement == Placement(2, True)
        simulator.fail_from(150)
        assert await together(engine, logits) == expected
        assert engine._runner.placement == ON_THE_CPU
        assert engine.snapshot().preemptions
