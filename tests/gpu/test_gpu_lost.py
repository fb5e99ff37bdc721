"""A (simulated) GPU with dense layers that fails: the CPU goes on, and no byte of an answer tells."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_models import Logits, opened, prompt, write_text_model
from gpu_simulator import LAUNCH_FAILED, OUT_OF_MEMORY, REAL, Simulator

from mer import Engine, SamplingParams
from mer.config import EngineConfig
from mer.engine import budget as budgets
from mer.engine.budget import usable
from mer.engine.observer import EndReason
from mer.engine.outputs import Usage
from mer.engine.placing import ALONE, OnDevice
from mer.engine.runner import Runner
from mer.engine.stats import StepStats
from mer.errors import BudgetError, ConfigError
from mer.model.placement import ON_THE_CPU

pytestmark = pytest.mark.skipif(REAL, reason="a GPU takes no orders")

PROMPTS = [prompt(20, vocab=300), prompt(3, 1, 300), prompt(9, 2, 300)]
PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
SIZES = {"context": 128, "step_tokens": 16, "max_running": 3}
GPU = {"device": "cuda", "vram": "200MiB"} | SIZES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("lost") / "model")


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator()


@pytest.fixture(autouse=True)
def driver(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MER_CUDA_DRIVER", str(simulator.path))
    monkeypatch.setenv("MER_ISA", "avx2")
    simulator.reset()
    yield
    simulator.reset()


class Fault:
    """Orders a fault once so many tokens were drawn, on the thread that computes."""

    def __init__(self, simulator: Simulator, tokens: int, call: int, error: int) -> None:
        self.simulator, self.left, self.call, self.error = simulator, tokens, call, error

    def token(self, first: bool, seconds: float) -> None:
        self.left -= 1
        if self.left == 0:
            order = self.simulator.fail_once if self.error == OUT_OF_MEMORY else self.simulator.fail_from
            order(self.call, self.error)

    def queued(self, request_id: int) -> None: ...

    def started(self, queue_s: float) -> None: ...

    def step(self, tokens: int, requests: int, stats: StepStats) -> None: ...

    def ended(self, reason: EndReason, usage: Usage | None) -> None: ...


async def answers(engine: Engine, logits: Logits) -> list[tuple[list[int], bytes]]:
    come = threading.Event()  # the same steps each time: none begins before all have come
    engine._worker._send(come.wait)
    tasks = [asyncio.create_task(engine.generate(ids, PARAMS)) for ids in PROMPTS]
    await asyncio.sleep(0)
    come.set()
    results = await asyncio.gather(*tasks)
    return [(list(r.token_ids), logits.take(ids)) for r, ids in zip(results, PROMPTS, strict=True)]


@pytest.fixture
async def expected(model: Path, logits: Logits) -> list[tuple[list[int], bytes]]:
    async with opened(model, device="cpu", **SIZES) as engine:
        return await answers(engine, logits)


@pytest.mark.parametrize(
    ("tokens", "call", "layers", "error"),
    [
        (1, 1, "auto", LAUNCH_FAILED),
        (3, 1, 1, OUT_OF_MEMORY),
        (5, 90, 2, LAUNCH_FAILED),
        (6, 2, 3, OUT_OF_MEMORY),
    ],
)
async def test_in_mid_stream(
    model: Path,
    logits: Logits,
    simulator: Simulator,
    expected: list[tuple[list[int], bytes]],
    caplog: pytest.LogCaptureFixture,
    tokens: int,
    call: int,
    layers: int | str,
    error: int,
) -> None:
    async with opened(model, **GPU, gpu_layers=layers, cache_experts="50%") as engine:
        before = engine.snapshot()
        assert before.vram is not None
        assert before.vram.layers
        assert before.vram.kv_bytes
        engine.observe(Fault(simulator, tokens, call, error))
        assert await answers(engine, logits) == expected
        now, budget = engine.snapshot(), engine.budget
        assert engine._runner.placement == ON_THE_CPU
        assert now.preemptions > 0
        assert caplog.text.count("is with the CPU from now on") == 1
        assert budget.total <= usable(budget.ram)
        assert (now.vram is None or now.vram.layers, now.vram is None or now.vram.kv_bytes) == (0, 0)
        if error == LAUNCH_FAILED:
            assert now.vram.lost
        # Nothing of the blocks' content is shared with what was computed before.
        assert await answers(engine, logits) == expected


async def test_embeddings_and_logprobs_of_a_prompt(model: Path, simulator: Simulator) -> None:
    found = []
    for settings in ({"device": "cpu"} | SIZES, GPU):
        async with opened(model, **settings) as engine:
            if settings is GPU:
                simulator.fail_from(60)
            every = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, ignore_eos=True)
            mean, result = await asyncio.gather(engine.embed(PROMPTS[0]), engine.generate(PROMPTS[2], every))
            found.append((mean.tobytes(), result.token_ids, result.prompt_logprobs))
            assert engine._runner.placement == ON_THE_CPU
    assert found[0] == found[1]


async def test_the_cache_makes_room(model: Path, simulator: Simulator) -> None:
    engine = await Engine.open(model, **GPU)
    try:
        before = engine.budget
        whole = before.without_gpu(engine._runner.checkpoint, engine._runner._architecture)
        more = whole.fixed - before.fixed
        assert more > 0
        await engine.set_ram(before.floor + more + 2 * before.slot)
        before = engine.budget
        simulator.fail_from(1)
        await engine.generate(PROMPTS[1], PARAMS)
        after = engine.budget
        assert before.least_slots <= after.slots < before.slots
        assert after.total <= usable(after.ram) == usable(before.ram)
        assert engine._runner.experts.cache.n_slots == after.slots
    finally:
        await engine.close()


async def test_no_room_for_what_was_there(model: Path, simulator: Simulator) -> None:
    """Whoever asks is told, and what to do; the server goes on, and may be given more."""
    engine = await Engine.open(model, **GPU)
    try:
        await engine.set_ram(engine.budget.floor)
        simulator.fail_from(1)
        for _ in range(2):
            with pytest.raises(BudgetError, match=r"the GPU, which had .* 2 layers, failed .* too little .*"):
                await engine.generate(PROMPTS[1], PARAMS)
        await engine.set_ram("8GiB")
        assert len((await engine.generate(PROMPTS[1], PARAMS)).token_ids) == 5
    finally:
        await engine.close()


@pytest.mark.parametrize("n", range(1, 16))
async def test_no_memory_at_any_allocation_of_the_start(model: Path, simulator: Simulator, n: int) -> None:
    """Fewer experts, no layers, or nothing there: `auto` opens and computes, and all is given back."""
    before = simulator.counts()
    simulator.fail_alloc(n)
    async with opened(model, **GPU | {"device": "auto"}) as engine:
        vram = engine.snapshot().vram
        assert vram is None or vram.layers == 0 or vram.slots == 0 or n == 5
        assert engine.budget.fits
        await engine.generate([5, 6], PARAMS)
    del engine
    await simulator.given_back(before)


@pytest.mark.parametrize("settings", [{"device": "cuda"}, {"device": "auto", "gpu_layers": 2}])
def test_no_memory_for_what_was_asked_for(
    model: Path, simulator: Simulator, settings: dict[str, object]
) -> None:
    simulator.fail_alloc(8)
    with pytest.raises(ConfigError, match=r"device .*: .* memory.*--gpu-layers 0"):
        Runner.open(model, EngineConfig(**GPU | settings))


def test_what_the_driver_holds_is_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine beside others, too, for which the bytes of the process are given."""
    before = budgets.resident_bytes()
    held = 0

    def opens(*arguments: object) -> OnDevice:
        nonlocal held
        held = 64 << 20
        return ALONE

    monkeypatch.setattr("mer.engine.placing.place", opens)
    monkeypatch.setattr(budgets, "resident_bytes", lambda: before + held)
    runner = Runner.open(model, EngineConfig(ram=before + (1 << 30), **SIZES), process=before)
    runner.close()
    assert runner.budget.interpreter - before == 64 << 20
