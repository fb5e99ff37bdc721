"""Layers whose experts are all on a (simulated) GPU: it chooses, the bytes are the CPU's, nobody waits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import Logits, opened, prompt, runnable
from gpu_simulator import LAUNCH_FAILED, OUT_OF_MEMORY, REAL, Counts, Simulator
from oracle.family_cases import CASES
from oracle.make_checkpoints import make

from mer import Engine, SamplingParams
from mer.engine.placing import OnDevice
from mer.model.families import load
from mer.model.forward import Forward
from mer.model.placement import ON_THE_CPU
from mer.streaming.experts import expert_tables
from mer.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("simulator")

PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
# After the first one all experts that are wanted are there.
PROMPTS = [prompt(30), prompt(9, 1), prompt(5, 2), prompt(3, 3)]
SIZES = {"step_tokens": 16, "max_running": 3, "context": 128, "speculate": "off"}
GPU = {"device": "cuda", "vram": "150MiB"}

# Softmax with a shared expert and its gate; biases and clamps; a norm of the router's own, scales of experts;
# sigmoid with a bias; groups by their best two, a factor; groups by their best one; layers with a state.
ROUTERS = ["qwen2_moe", "gpt_oss", "gemma4_text", "minimax_m2", "deepseek_v3", "deepseek_v2", "qwen3_next"]

Steps = list[tuple[int, Counts]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("choice"), "qwen3_moe", num_hidden_layers=2)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, simulator: Simulator) -> Steps:
    """Tokens of each step, and what it asked of the device."""
    found: Steps = []
    step = Forward.step

    def counted(forward: Forward, batch: Any) -> Any:
        before = simulator.now() if not REAL else None
        logits = step(forward, batch)
        if before is not None:
            spent = [b - a for a, b in zip(before, simulator.now(), strict=True)]
            found.append((len(batch.tokens), Counts(*spent)))
        return logits

    monkeypatch.setattr(Forward, "step", counted)
    return found


def write(folder: Path, family: str, **changes: Any) -> Path:
    make(folder / "model", family, **{"vocab_size": 211, "eos_token_id": 0} | changes)
    return runnable(folder / "model", family)


async def ask(engine: Engine, logits: Logits) -> list[tuple[tuple[int, ...], bytes]]:
    """The first one twice, then three in a batch."""
    results = [await engine.generate(PROMPTS[0], PARAMS) for _ in range(2)]
    results += await asyncio.gather(*(engine.generate(ids, PARAMS) for ids in PROMPTS[1:]))
    asked = [PROMPTS[0], *PROMPTS[1:]]
    return [(r.token_ids, b"") for r in results] + [((), logits.take(ids)) for ids in asked]


async def filled(engine: Engine) -> None:
    """Until every expert is on the device."""
    for _ in range(300):
        vram = engine.snapshot().vram
        if vram is not None and vram.resident == vram.slots:
            return
        await engine.generate(prompt(4, 9), PARAMS)
    raise AssertionError("some expert never came")


async def both(path: Path, logits: Logits, steps: Steps, *, fill: bool = True) -> tuple[Any, Any]:
    """The same of the CPU and of the device; and the engine's statistics."""
    async with opened(path, device="cpu", **SIZES) as engine:
        expected = await ask(engine, logits)
    steps.clear()
    async with opened(path, **SIZES, **GPU) as engine:
        if fill:
            await filled(engine)
        assert await ask(engine, logits) == expected
        return engine.stats, engine.snapshot().vram


@pytest.mark.parametrize(
    ("family", "late"), [*((family, False) for family in ROUTERS), ("deepseek_v3", True), ("gpt_oss", True)]
)
async def test_a_step_waits_once(
    tmp_path: Path, logits: Logits, steps: Steps, simulator: Simulator, family: str, late: bool
) -> None:
    simulator.defer(late)
    path = write(tmp_path, family, **CASES[family].get("plain", {}))
    stats, vram = await both(path, logits, steps)
    assert vram.resident == vram.slots
    assert stats.vram_hits > 0
    if not REAL:
        # At its beginning and at its end; a recurrent layer waits for what its state takes in.
        recurrent = 2 if family == "qwen3_next" else 0
        assert {counts.waits for _, counts in steps[-6:]} == {2 + recurrent}


async def test_routers_that_only_the_cpu_knows(tmp_path: Path, logits: Logits, steps: Steps) -> None:
    """Sparsemixer."""
    stats, _ = await both(write(tmp_path, "phimoe"), logits, steps, fill=False)
    assert stats.vram_hits > 0
    assert REAL or steps[-1][1].waits > 2


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
async def test_experts_are_exchanged_beside_complete_layers(
    tmp_path: Path,
    logits: Logits,
    steps: Steps,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    late: bool,
) -> None:
    """Of four layers three are complete at the most; who leaves one may still be computed with."""
    path = write(tmp_path, "qwen3_moe", num_hidden_layers=4)
    _, vram = await both(path, logits, steps)
    slot = expert_tables(load(open_checkpoint(path)).experts, path).slot_bytes
    monkeypatch.setattr(OnDevice, "experts", property(lambda _: vram.nbytes - 2 * slot))
    monkeypatch.setattr("test_gpu_choice.PROMPTS", [*PROMPTS, *(prompt(13, 10 + i) for i in range(4))])
    simulator.defer(late)
    _, fewer = await both(path, logits, steps, fill=False)
    assert fewer.slots == vram.slots - 2
    assert fewer.evictions > 0
    if not REAL:
        waits = {counts.waits for tokens, counts in steps if tokens == 1}
        assert 2 not in waits
        assert min(waits) < 2 + 2 * 4


@pytest.mark.skipif(REAL, reason="a GPU takes no orders")
@pytest.mark.parametrize(("call", "error"), [(7, LAUNCH_FAILED), (29, LAUNCH_FAILED), (16, OUT_OF_MEMORY)])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
async def test_a_device_that_fails_meanwhile(
    model: Path, logits: Logits, steps: Steps, simulator: Simulator, call: int, error: int, late: bool
) -> None:
    """The 16th call of a step is one of those for a layer's experts."""
    async with opened(model, device="cpu", **SIZES) as engine:
        expected = await ask(engine, logits)
    simulator.defer(late)
    async with opened(model, **SIZES, **GPU) as engine:
        await filled(engine)
        assert await ask(engine, logits) == expected
        assert steps[-1][1].waits == 2
        (simulator.fail_once if error == OUT_OF_MEMORY else simulator.fail_from)(call, error)
        assert await ask(engine, logits) == expected
        assert engine._runner.placement == ON_THE_CPU
        lost = engine.snapshot().vram
        assert (lost.lost is None) == (error == OUT_OF_MEMORY)
        simulator.reset()


async def test_who_asks_is_told_what_was_chosen(
    model: Path, logits: Logits, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of steps that drafts are made for."""
    found: list[list[Any]] = []
    step = Forward.step

    def kept(forward: Forward, batch: Any) -> Any:
        forward.routes = np.zeros((2, 16, 2), np.int32)
        forward.keep_routes = True
        logits = step(forward, batch)
        found[-1].append(forward.routes[:, : len(batch.tokens)])
        return logits

    monkeypatch.setattr(Forward, "step", kept)
    for settings in ({"device": "cpu"}, GPU):
        found.append([])
        async with opened(model, **SIZES, **settings) as engine:
            if settings is GPU:
                await filled(engine)
                found[-1].clear()
            for ids in PROMPTS[:2]:
                await engine.generate(ids, PARAMS)
    assert REAL or steps[-1][1].waits == 2
    assert len(found[0]) == len(found[1])
    for cpu, gpu in zip(*found, strict=True):
        np.testing.assert_array_equal(cpu, gpu)


async def test_a_trace_has_every_choice(tmp_path: Path, model: Path, logits: Logits) -> None:
    traces = []
    for name, settings in (("cpu", {"device": "cpu"}), ("gpu", GPU)):
        file = tmp_path / f"{name}.trace"
        async with opened(model, **SIZES, **settings, trace=file) as engine:
            for _ in range(2):
                await engine.generate(PROMPTS[1], PARAMS)
        traces.append(file.read_bytes())
    assert traces[0] == traces[1]
