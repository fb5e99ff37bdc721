"""An engine with a GPU gives the bytes of one without, in any division of memory; the GPU is simulated."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_models import Logits, convert_to, opened, prompt
from gpu_simulator import Simulator
from oracle.make_checkpoints import make

from mer import SamplingParams
from mer._ext.device import Device
from mer.errors import ConfigError, GpuError

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [prompt(n) for n in (40, 5, 19)]


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    made = Simulator()
    Device(driver=str(made.path))  # only then its memory can be set
    return made


@pytest.fixture(autouse=True)
def driver(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MER_CUDA_DRIVER", str(simulator.path))
    simulator.reset()
    simulator.vram((1 << 30) + (1 << 29))
    yield
    simulator.reset()


@pytest.fixture(scope="module", params=["q4_0", "q8_0"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    make(folder / "hf", "qwen3_moe")
    return convert_to(folder / "hf", folder / "store", request.param, "q8_0")


async def answers(path: Path, logits: Logits, **settings):
    """What three requests get, the first one's beginning alone; and the engine's last facts."""
    async with opened(path, **settings) as engine:
        first = asyncio.create_task(engine.generate(PROMPTS[0], PARAMS))
        await asyncio.sleep(0.05)
        rest = [engine.generate(ids, PARAMS) for ids in PROMPTS[1:]]
        results = [await first, *await asyncio.gather(*rest)]
        found = [(r.token_ids, logits.take(ids)) for r, ids in zip(results, PROMPTS, strict=True)]
        return found, engine.snapshot().vram, engine.stats


async def test_the_same_bytes_in_any_division_of_memory(path: Path, logits: Logits) -> None:
    want, vram, _ = await answers(path, logits, device="cpu")
    assert vram is None
    for settings in (
        {"vram": "1GiB"},
        {"vram": "8MiB", "cache_experts": "50%"},
        {"gpu_layers": 0, "cache_experts": 3},
        {"gpu_layers": 1, "cache_experts": 3},
    ):
        got, vram, stats = await answers(path, logits, device="cuda", **settings)
        assert got == want
        assert vram.lost is None
        assert stats.vram_hits > 0


@pytest.mark.parametrize("n", [1, 40, 200])
async def test_requests_go_on_when_the_device_is_lost(
    path: Path, logits: Logits, simulator: Simulator, n: int, caplog: pytest.LogCaptureFixture
) -> None:
    want, _, _ = await answers(path, logits, device="cpu")
    async with opened(path, device="cuda", gpu_layers=0, cache_experts="50%") as engine:
        simulator.fail_from(n)
        results = await asyncio.gather(*(engine.generate(ids, PARAMS) for ids in PROMPTS))
        found = [(r.token_ids, logits.take(ids)) for r, ids in zip(results, PROMPTS, strict=True)]
        assert found == want
        assert engine.snapshot().vram.lost
        assert caplog.text.count("is given up") == 1
        simulator.reset()  # so that what the engine pinned is given back


async def test_no_memory_for_experts(path: Path, logits: Logits, simulator: Simulator) -> None:
    """By name it is an error, by itself the CPU goes on alone."""
    simulator.vram(1 << 16)
    with pytest.raises(ConfigError, match="memory"):
        await answers(path, logits, device="cuda")
    want, _, _ = await answers(path, logits, device="cpu")
    got, vram, _ = await answers(path, logits, device="auto")
    assert got == want
    assert vram is None


async def test_a_device_that_does_not_answer(
    path: Path, logits: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise GpuError("asking for its memory: unknown error")

    monkeypatch.setattr("mer.engine.placing.vram_budget", refuse)
    with pytest.raises(GpuError):
        await answers(path, logits, device="cuda")
    _, vram, _ = await answers(path, logits, device="auto")
    assert vram is None
