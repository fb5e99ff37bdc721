"""A prefix store of an engine with layers on a (simulated) GPU: the CPU's bytes, out and back."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from engine_models import check_idle, opened, prompt
from gpu_simulator import LAUNCH_FAILED, OUT_OF_MEMORY, REAL, Simulator
from oracle.make_checkpoints import make
from prefix_stores import PARAMS, Answer, ask, quiet, stored, take_turns

from mer import Engine
from mer.config import EngineConfig
from mer.engine.budget import resident_bytes
from mer.engine.prefix_store import buffer_bytes
from mer.engine.runner import Runner
from mer.model.placement import ON_THE_CPU

pytestmark = pytest.mark.usefixtures("simulator")

GPU = {"device": "cuda", "vram": "60MiB"}
SHORT = [prompt(50), prompt(40), prompt(33)]
FAMILIES = ("qwen3_moe", "deepseek_v3")
orders = pytest.mark.skipif(REAL, reason="a GPU takes no orders")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, path in paths.items():
        make(path, family, num_hidden_layers=2)
    return paths


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> Path:
    return models["qwen3_moe"]


@pytest.fixture
async def expected(model: Path, known: list[Answer]) -> list[Answer]:
    """What the CPU answers to SHORT, asked once."""
    if not known:
        known += (await ask(model, SHORT, device="cpu", prefix_cache=False))[0]
    return known


@pytest.fixture(scope="module")
def known() -> list[Answer]:
    return []


@pytest.mark.parametrize(("family", "layers"), [("qwen3_moe", "auto"), ("qwen3_moe", 1), ("deepseek_v3", 2)])
async def test_what_either_has_stored_both_find(
    models: dict[str, Path], simulator: Simulator, tmp_path: Path, family: str, layers: int | str
) -> None:
    path, here, there = models[family], tmp_path / "cpu", tmp_path / "gpu"
    gpu = GPU | {"gpu_layers": layers}
    expected, cached, _ = await ask(path, SHORT, device="cpu", prefix_store=here)
    assert cached == [0, 0, 0]
    simulator.defer()
    assert (await ask(path, SHORT, prefix_store=there, **gpu))[:2] == (expected, [0, 0, 0])
    assert stored(there) == stored(here)
    for store, settings in ((there, gpu), (there, {"device": "cpu"}), (here, gpu)):
        assert (await ask(path, SHORT, prefix_store=store, **settings))[:2] == (expected, [48, 32, 32])


async def test_what_falls_out_of_its_memory_comes_back(
    model: Path, simulator: Simulator, expected: list[Answer], tmp_path: Path
) -> None:
    """Also while the expert cache shrinks and grows."""
    async with opened(model, context=64, prefix_store=tmp_path, gpu_layers=1, **GPU) as engine:
        simulator.defer()
        await take_turns(engine, expected, SHORT, together=1)
        await engine.set_ram(engine.budget.floor)
        await take_turns_again(engine, expected)
        await engine.set_ram("8GiB")
        await take_turns_again(engine, expected)


async def take_turns_again(engine: Engine, expected: list[Answer]) -> None:
    for ids, answer in zip(SHORT, expected, strict=True):
        result = await engine.generate(ids, PARAMS)
        await quiet(engine)
        assert (result.token_ids, result.logprobs) == answer
        assert result.usage.cached_tokens >= 32


async def test_damage_is_a_miss(model: Path, expected: list[Answer], tmp_path: Path) -> None:
    await ask(model, SHORT, prefix_store=tmp_path, **GPU)
    blocks = tmp_path / "prefix.blocks"
    whole = blocks.read_bytes()
    slot = len(whole) // 7  # 3 + 2 + 2 blocks
    flipped = bytearray(whole)
    for at in range(slot + 7, len(flipped), slot * 3):
        flipped[at] ^= 1
    for content, hits in ((flipped, range(1, 111)), (whole[slot:] + whole[:slot], [0]), (b"", [0])):
        blocks.write_bytes(content)
        answers, cached, _ = await ask(model, SHORT, prefix_store=tmp_path, **GPU)
        assert answers == expected
        assert sum(cached) in hits


class Fault:
    """Orders a fault once so many steps were computed, on the thread that computes."""

    def __init__(self, simulator: Simulator, steps: int, call: int, error: int) -> None:
        self.simulator, self.left, self.call, self.error = simulator, steps, call, error

    def step(self, *facts: object) -> None:
        self.left -= 1
        if self.left == 0:
            order = self.simulator.fail_once if self.error == OUT_OF_MEMORY else self.simulator.fail_from
            order(self.call, self.error)

    def __getattr__(self, event: str):
        return lambda *facts: None


@orders
@pytest.mark.parametrize(
    ("steps", "call", "error"),
    [
        (1, 1, LAUNCH_FAILED),
        (3, 5, LAUNCH_FAILED),
        (6, 14, LAUNCH_FAILED),
        (2, 3, OUT_OF_MEMORY),
        (4, 9, OUT_OF_MEMORY),
        (12, 60, OUT_OF_MEMORY),
    ],
)
async def test_in_mid_stream(
    model: Path,
    simulator: Simulator,
    expected: list[Answer],
    tmp_path: Path,
    steps: int,
    call: int,
    error: int,
) -> None:
    """Blocks are on their way out and in; what is stored nevertheless is right."""
    async with opened(model, context=64, prefix_store=tmp_path, **GPU) as engine:
        for ids in SHORT:
            await engine.generate(ids, PARAMS)
        await quiet(engine)
        engine.observe(Fault(simulator, steps, call, error))
        results = await asyncio.gather(*(engine.generate(ids, PARAMS) for ids in SHORT * 2))
        assert [(each.token_ids, each.logprobs) for each in results] == expected * 2
        await quiet(engine)
        check_idle(engine)
        assert error == OUT_OF_MEMORY or engine._runner.placement == ON_THE_CPU
        simulator.reset()
    answers, cached, _ = await ask(model, SHORT, prefix_store=tmp_path, device="cpu")
    assert answers == expected
    assert sum(cached) >= 80  # what had left before is there


@orders
@pytest.mark.parametrize("error", [LAUNCH_FAILED, OUT_OF_MEMORY])
async def test_what_was_just_read_is_lost_with_it(
    model: Path, simulator: Simulator, expected: list[Answer], tmp_path: Path, error: int
) -> None:
    """The step of another request fails when blocks have come, and nobody was told yet."""
    await ask(model, SHORT[:1], prefix_store=tmp_path, **GPU)
    async with opened(model, prefix_store=tmp_path, **GPU) as engine:
        came, go = threading.Event(), threading.Event()
        fill = engine._store._fill

        def held(keys: list[bytes], blocks: list[int]) -> int:
            found = fill(keys, blocks)
            came.set()
            assert go.wait(60)
            return found

        engine._store._fill = held
        asked = asyncio.create_task(engine.generate(SHORT[0], PARAMS))
        assert await asyncio.to_thread(came.wait, 60)
        simulator.fail_once(1, error) if error == OUT_OF_MEMORY else simulator.fail_from(1, error)
        await engine.generate(prompt(5), PARAMS)
        assert engine._runner.placement == ON_THE_CPU
        go.set()
        result = await asked
        assert (result.token_ids, result.logprobs) == expected[0]
        assert result.usage.cached_tokens == 48  # read again, into memory
        await quiet(engine)
        simulator.reset()


@orders
async def test_a_store_that_comes_later(
    model: Path, simulator: Simulator, expected: list[Answer], tmp_path: Path
) -> None:
    """With buffers that can't be pinned; and all that was pinned is given back."""
    config = EngineConfig(context=512, prefix_store=tmp_path, **GPU)
    before = simulator.counts()
    for pinned in (12, 2):
        async with Engine.beside(model, config, resident_bytes(), storeless=True) as engine:
            opened_with = simulator.counts().registered
            if pinned == 2:
                simulator.fail_alloc(3)
            await engine.open_store()
            assert simulator.counts().registered == opened_with + pinned
            results = [await engine.generate(ids, PARAMS) for ids in SHORT]
            assert [(each.token_ids, each.logprobs) for each in results] == expected
        assert sum(each.usage.cached_tokens for each in results) == (0 if pinned == 12 else 112)
        del engine
        await simulator.given_back(before)


@orders
@pytest.mark.parametrize("deferred", [False, True])
def test_a_copy_that_fails(model: Path, simulator: Simulator, deferred: bool) -> None:
    """At any call: it is told, and never half a block; others are as before."""
    runner = Runner.open(model, EngineConfig(context=64, step_tokens=16, gpu_layers=1, **GPU))
    copies = runner.copies
    rng = np.random.default_rng(1)
    blocks = [rng.integers(0, 256, copies.block_bytes, np.uint8) for _ in range(3)]
    for n, block in enumerate(blocks):
        assert copies.put(n, block)

    def found(n: int) -> bytes | None:
        buffer = np.zeros(copies.block_bytes, np.uint8)
        there = copies.take(n, buffer)
        return buffer.tobytes() if there is not None and there() else None

    simulator.defer(deferred)
    failed = []
    for call in range(1, 12):
        simulator.fail_once(call)
        taken = found(1)
        failed.append(taken is None)
        assert taken in (None, blocks[1].tobytes())
        simulator.fail_once(call)
        assert copies.put(2, blocks[0]) or call < 8
        simulator.fail_once(0)
        assert copies.put(2, blocks[2])
        assert [found(n) for n in range(3)] == [block.tobytes() for block in blocks]
    assert failed[0]
    assert not failed[-1]
    simulator.fail_from(2)
    assert found(1) is None
    assert not copies.put(1, blocks[1])
    runner.close()


def test_its_buffers_are_counted(model: Path, tmp_path: Path) -> None:
    """Of whole blocks, also where no layer's keys and values are in memory."""
    sizes = {"context": 64, "step_tokens": 16} | GPU
    without = Runner.open(model, EngineConfig(**sizes))
    with_store = Runner.open(model, EngineConfig(prefix_store=tmp_path, **sizes))
    more = with_store.budget.buffers - without.budget.buffers
    assert with_store.budget.kv == 0
    assert more == buffer_bytes(with_store.copies.block_bytes)
    without.close()
    with_store.close()
