"""The simulated GPU itself: threads, order, faults."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gpu_simulator import ECC_UNCORRECTABLE, REAL, Simulator

from mer._ext.device import COMPUTE, COPY, Device
from mer.errors import GpuError, GpuMemoryError

MIB = 1 << 20

pytestmark = pytest.mark.skipif(REAL, reason="a GPU takes its place")


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    made = Simulator()
    yield made
    made.reset()


@pytest.fixture
def device(simulator: Simulator) -> Device:
    return simulator.open()


def test_threads_wait_for_their_block(device: Device) -> None:
    at, out = device.alloc_py(4 * 256), np.empty((2, 128), np.int32)
    want = np.tile((np.arange(128) + 1) % 128 + 1, (2, 1))
    for barrier in (1, 0):
        device.launch_py("test_neighbours", (2, 1, 1), 128, [np.uint64(at), np.int32(barrier)])
        device.download_py(out, at)
        device.finish_py()
        assert np.array_equal(out, want) == bool(barrier)
    device.free_py(at)


def test_lanes_exchange_words(device: Device) -> None:
    at, out = device.alloc_py(4 * 96), np.empty((3, 4, 8), np.int32)
    device.launch_py("test_lanes", (1, 1, 1), 96, [np.uint64(at)])
    device.download_py(out, at)
    device.finish_py()
    device.free_py(at)
    sums = np.arange(96).reshape(3, 4, 8).sum(axis=2)[:, ::-1]
    np.testing.assert_array_equal(out, np.repeat(sums[:, :, None], 8, axis=2))


def test_threads_that_wait_for_each_other_for_ever_are_a_failed_launch(device: Device) -> None:
    with pytest.raises(GpuError, match="launch failure"):
        device.launch_py("test_stuck", (1, 1, 1), 32, [np.uint64(0)])
    assert device.lost is not None


def test_an_order_that_nothing_enforces_is_not_kept(device: Device, simulator: Simulator) -> None:
    at, out = device.alloc_py(8), np.zeros(8, np.uint8)
    for enforced in (True, False):
        device.fill_py(at, 1, 8)
        device.finish_py()
        simulator.defer()
        device.fill_py(at, 2, 8, COPY)
        if enforced:
            device.finish_py(COPY)
        device.download_py(out, at, COMPUTE)
        assert out[0] == 0
        device.finish_py(COMPUTE)
        assert out[0] == (2 if enforced else 1)
        simulator.defer(False)
        out[:] = 0
    device.free_py(at)


def test_memory_ends(device: Device, simulator: Simulator) -> None:
    free, total = device.memory()
    others = total - free  # of tests before this one
    simulator.vram(others + 4 * MIB)
    held = device.alloc_py(MIB)
    assert device.memory() == (3 * MIB, others + 4 * MIB)
    simulator.taken(MIB)
    with pytest.raises(GpuMemoryError):
        device.alloc_py(2 * MIB + 1)
    simulator.fail_alloc(2)
    device.free_py(device.alloc_py(1))
    with pytest.raises(GpuMemoryError):
        device.alloc_py(1)
    device.free_py(device.alloc_py(1))
    device.free_py(held)
    assert device.lost is None


def test_a_device_that_is_lost_stays_lost(device: Device, simulator: Simulator) -> None:
    before = simulator.counts().allocations
    device.alloc_py(8)
    simulator.fail_from(3, ECC_UNCORRECTABLE)  # a thread takes the device first, with a call of its own
    device.memory()
    for _ in range(2):
        with pytest.raises(GpuError, match="ECC"):
            device.memory()
    assert simulator.counts().allocations == before + 1
    simulator.reset()
    assert simulator.counts().allocations == 0  # it comes back empty
    Device(driver=str(simulator.path)).memory()


def test_a_call_that_fails_once(device: Device, simulator: Simulator) -> None:
    simulator.fail_once(2)
    with pytest.raises(GpuMemoryError):
        device.memory()  # enter, then the question
    assert device.memory()


@pytest.mark.parametrize("wrong", ["beyond", "freed", "host"])
def test_what_is_not_its_memory_is_refused(device: Device, simulator: Simulator, wrong: str) -> None:
    at, array = device.alloc_py(8), np.zeros(8, np.uint8)
    if wrong == "freed":
        device.free_py(at)
    place = {"beyond": at + 1, "freed": at, "host": array.ctypes.data}[wrong]
    with pytest.raises(GpuError, match="invalid argument"):
        device.upload_py(place, array)


def test_what_lives_is_counted(device: Device, simulator: Simulator) -> None:
    before, array = simulator.counts(), np.zeros(100, np.uint8)
    at = device.alloc_py(1000)
    device.pin_py(array)
    device.upload_py(at, array)
    now = simulator.counts()
    assert (now.allocations, now.bytes) == (before.allocations + 1, before.bytes + 1024)
    assert (now.registered, now.copied_in) == (before.registered + 1, before.copied_in + 100)
    device.unpin_py(array)
    device.free_py(at)
    assert simulator.counts()._replace(copied_in=0, copies=0) == before._replace(copied_in=0, copies=0)
