"""Experts in a device's memory give the bytes of experts in the host's, whatever becomes of the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu_simulator import Simulator
from moe_model import EXPERTS, MAX_TOKENS, TOP_K, Model, Streamed

from mer._ext.device import Device
from mer._ext.kernels import Kernels
from mer.errors import GpuError, GpuMemoryError
from mer.weights import formats

pytestmark = pytest.mark.skipif(Kernels().isa in ("scalar", "amx"), reason="floats are added up otherwise")

TOTAL = 2 * EXPERTS
FEW = (1, 2, 1, 7, 1, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("vram")
    return Model(folder, [(formats.Q8_0, formats.Q4_0, 96, 160), (formats.BF16, formats.F32, 101, 67)])


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator()


@pytest.fixture
def device(simulator: Simulator) -> Iterator[Device]:
    simulator.reset()
    yield simulator.open()
    simulator.reset()


def least_bytes(model: Model, device: Device, **options: int) -> int:
    """What one expert takes, with all that is needed beside it."""
    made = Streamed(model, **options)
    with made.reader:
        made.streamer.use_vram(device, 1 << 26)
        stats = made.streamer.stats()
        return stats["vram_bytes"] - (stats["vram_slots"] - 1) * model.tables.slot_bytes


def streamed(
    model: Model, device: Device, in_vram: int, slots: int | None = None, **options: int
) -> Streamed:
    """With that many experts in the device's memory, at the most."""
    made = Streamed(model, slots, **options)
    least = least_bytes(model, device, **options)
    made.streamer.use_vram(device, least + (in_vram - 1) * model.tables.slot_bytes)
    assert made.streamer.stats()["vram_slots"] == in_vram
    return made


def check_all(made: Streamed, seeds: int = 3, tokens: tuple[int, ...] = FEW) -> None:
    for seed in range(seeds):
        for count in tokens:
            for layer in range(len(made.model.layers)):
                made.check(layer, count, seed)


@pytest.mark.parametrize("wire", ["bf16", "f16"])
def test_rounded_rows_give_the_same_bytes(
    model: Model, device: Device, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "wire", wire)
    made = streamed(model, device, 5, TOP_K)
    with made.reader:
        check_all(made, tokens=(*FEW, MAX_TOKENS))
    assert made.streamer.stats()["vram_hits"] > 0


@pytest.mark.parametrize(("in_vram", "slots"), [(1, 1), (5, TOP_K), (5, None), (TOTAL, TOP_K)])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_any_budget_gives_the_same_bytes(
    model: Model, device: Device, simulator: Simulator, in_vram: int, slots: int | None, late: bool
) -> None:
    made = streamed(model, device, in_vram, slots)
    if late:
        simulator.defer()
    with made.reader:
        check_all(made, seeds=2, tokens=(*FEW, MAX_TOKENS))
    stats = made.streamer.stats()
    assert stats["vram_hits"] > 0
    assert stats["lost"] is None
    assert 0 < stats["vram_resident"] <= in_vram


@pytest.mark.parametrize("form", formats.WRITTEN, ids=lambda form: form.name)
def test_every_format_that_is_written(form: formats.Format, tmp_path: Path, device: Device) -> None:
    hidden, inter = (256, 256) if form.block == 256 else (96, 160) if form.block == 32 else (100, 67)
    made = streamed(Model(tmp_path, [(form, form, hidden, inter)]), device, EXPERTS)
    with made.reader:
        check_all(made, seeds=2, tokens=(1, 2, 13))
    assert made.streamer.stats()["vram_hits"] > 0


def test_biases_and_clamps(tmp_path: Path, device: Device) -> None:
    model = Model(tmp_path, [(formats.Q8_0, formats.Q8_0, 96, 160), (formats.Q4_0, formats.Q4_0, 96, 64)])
    model.add_biases(1.702, 0.7)
    made = streamed(model, device, TOTAL)
    with made.reader:
        check_all(made)
    assert made.streamer.stats()["vram_hits"] > 0


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_more_experts_pass_than_there_are_buffers(
    tmp_path: Path, device: Device, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr("moe_model.EXPERTS", 40)
    made = streamed(Model(tmp_path, [(formats.Q8_0, formats.Q4_0, 32, 32)]), device, 1, max_tokens=400)
    if late:
        simulator.defer()
    with made.reader:
        check_all(made, seeds=1, tokens=(400, 1))
    assert made.streamer.stats()["vram_passed"] >= 16


def test_in_time_everything_is_there_and_nothing_is_read(model: Model, device: Device) -> None:
    """What moved up leaves its slot of the cache: together both hold more than either."""
    made = streamed(model, device, TOTAL, TOP_K)
    with made.reader:
        check_all(made, seeds=6)
        before = made.streamer.stats()
        check_all(made, seeds=6)
        after = made.streamer.stats()
    assert after["vram_resident"] == TOTAL
    assert (after["misses"], after["bus_bytes"]) == (before["misses"], before["bus_bytes"])
    assert made.cache.stats()["resident"] == 0


def test_beside_a_cache_for_all_nothing_is_dropped(model: Model, device: Device) -> None:
    made = streamed(model, device, 5)
    with made.reader:
        check_all(made)
    assert made.cache.stats()["resident"] == TOTAL


def test_experts_that_are_wanted_more_take_the_place_of_others(model: Model, device: Device) -> None:
    made = streamed(model, device, TOP_K, prefetch=4)
    x, _, weights = model.inputs(0, 1)
    first, second = np.arange(TOP_K), np.arange(TOP_K) + TOP_K
    with made.reader:
        for wanted in (first, second):
            for _ in range(70):
                made.forward(0, x, wanted[None].astype(np.int32), weights)
            hits = made.streamer.stats()["vram_hits"]
            made.forward(0, x, wanted[None].astype(np.int32), weights)
            assert made.streamer.stats()["vram_hits"] == hits + TOP_K
    assert made.streamer.stats()["vram_evictions"] == TOP_K


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
def test_whenever_the_device_is_lost_the_result_is_right(
    model: Model, device: Device, simulator: Simulator, late: bool
) -> None:
    """At every call of the driver in a run of some layers; experts are computed here from then on."""
    for n in range(1, 120, 11 if late else 9):
        simulator.reset()
        made = streamed(model, simulator.open(), 4, 5)
        if late:
            simulator.defer()
        with made.reader:
            made.check(0, 1)
            simulator.fail_from(n)
            check_all(made, seeds=1, tokens=(1, 7, 20))
        stats = made.streamer.stats()
        assert stats["lost"]
        assert stats["vram_resident"] == 0
        simulator.reset()


def test_less_memory_than_wanted_is_used_as_it_is(model: Model, device: Device, simulator: Simulator) -> None:
    made = Streamed(model)
    least, (free, _) = least_bytes(model, device), device.memory()
    simulator.taken(free - least - 3 * model.tables.slot_bytes)
    with made.reader:
        made.streamer.use_vram(device, 1 << 40)
        assert 1 <= made.streamer.stats()["vram_slots"] <= 4
        check_all(made, seeds=1)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_memory_at_all_is_an_error_and_changes_nothing(
    model: Model, device: Device, simulator: Simulator, n: int
) -> None:
    made = Streamed(model)
    with made.reader:
        before = simulator.counts()
        with pytest.raises(GpuMemoryError, match="0 MiB of its memory are too little"):
            made.streamer.use_vram(device, 1000)
        simulator.taken(device.memory()[1])
        with pytest.raises(GpuMemoryError, match="out of memory"):
            made.streamer.use_vram(device, 1 << 30)
        after = simulator.counts()
        assert (after.allocations, after.registered) == (before.allocations, before.registered)
        simulator.reset()
        simulator.fail_from(n)
        with pytest.raises(GpuError):
            made.streamer.use_vram(Device(driver=str(simulator.path)), 1 << 30)
        simulator.reset()
        check_all(made, seeds=1)
    assert made.streamer.stats()["vram_slots"] == 0


def test_everything_is_given_back(model: Model, simulator: Simulator) -> None:
    simulator.reset()
    before = simulator.counts()
    device = simulator.open()
    made = streamed(model, device, 4)
    with made.reader:
        check_all(made, seeds=1)
    del made, device
    after = simulator.counts()
    assert (after.allocations, after.registered, after.streams, after.events, after.modules) == (
        before.allocations, before.registered, before.streams, before.events, before.modules,
    )  # fmt: skip
