"""Which NVIDIA GPUs there are: the driver's own library is asked, if there is one."""

from __future__ import annotations

import ctypes
import os
from typing import Final

import numpy as np
from attrs import frozen

from mer._ext.device import COPY, DRIVER, Device, Event
from mer.errors import GpuError
from mer.gpu.compile import Target, check

# From cuda.h.
_CAPABILITY: Final = (75, 76)
_NO_DEVICE: Final = 100

_BUS_BYTES: Final = 64 << 20


@frozen
class Gpu:
    """One device. capability: (9, 0); total: bytes of its memory; driver: version of its driver, see Target.

    refusal: why it can't be used; None: it can.
    """

    ordinal: int
    name: str
    capability: tuple[int, int]
    total: int
    driver: int
    refusal: str | None = None

    @property
    def target(self) -> Target:
        return Target(self.capability, self.driver)


@frozen
class Load:
    """A device at work. free: bytes that no program has taken; bus_bytes_per_second: from pinned memory."""

    free: int
    bus_bytes_per_second: float | None


def driver_library() -> str:
    """The driver's library: `libcuda.so.1`, or what tests put in its place by MER_CUDA_DRIVER."""
    return os.environ.get("MER_CUDA_DRIVER") or DRIVER


def simulated() -> bool:
    """Whether tests have put another library in the driver's place: it brings its own kernels."""
    return driver_library() != DRIVER


def gpus() -> tuple[Gpu, ...]:
    """All devices that the driver shows this process. Raises GpuError, saying why, where there are none."""
    name = driver_library()
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        raise GpuError(f"there is no NVIDIA driver here ({error})") from None
    try:
        return tuple(_all(driver))
    except AttributeError as error:  # a symbol is missing
        raise GpuError(f"{name} is no driver that mer can use: {error}") from None


def _all(driver: ctypes.CDLL) -> list[Gpu]:
    version, count = ctypes.c_int(), ctypes.c_int()
    if error := driver.cuInit(0):
        raise GpuError(
            _no_device() if error == _NO_DEVICE else f"the driver does not start: {_said(driver, error)}"
        )
    _call(driver, "cuDriverGetVersion", ctypes.byref(version))
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise GpuError(_no_device())
    return [_one(driver, ordinal, version.value) for ordinal in range(count.value)]


def _one(driver: ctypes.CDLL, ordinal: int, version: int) -> Gpu:
    device, total, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGet", ctypes.byref(device), ordinal)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(total), device)
    capability = []
    for attribute in _CAPABILITY:
        value = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(value.value)
    found = (capability[0], capability[1])
    refusal = None
    if not simulated():
        try:
            check(Target(found, version))
        except GpuError as error:
            refusal = str(error)
    return Gpu(ordinal, name.value.decode(errors="replace"), found, total.value, version, refusal)


def _call(driver: ctypes.CDLL, name: str, *arguments: object) -> None:
    if error := getattr(driver, name)(*arguments):
        raise GpuError(f"the driver does not work, {name}: {_said(driver, error)}")


def _said(driver: ctypes.CDLL, error: int) -> str:
    text = ctypes.c_char_p()
    if driver.cuGetErrorString(error, ctypes.byref(text)) or not text.value:
        return f"error {error}"
    return f"{text.value.decode(errors='replace')} ({error})"


def _no_device() -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden} leaves those)"
    return f"the NVIDIA driver knows no device{why}"


def load(gpu: Gpu) -> Load:
    """Free memory of a device, and how fast its bus is; takes some tenths of a second. Raises GpuError."""
    device = Device(gpu.ordinal, driver_library())
    free, _ = device.memory()
    return Load(free, _bus(device) if free > 4 * _BUS_BYTES else None)


def _bus(device: Device) -> float | None:
    """Bytes a second of the best of some copies; None where memory can't be pinned."""
    host = np.zeros(_BUS_BYTES, np.uint8)
    try:
        device.pin_py(host)
    except GpuError:
        return None
    try:
        to = device.alloc_py(host.nbytes)
        times = []
        for _ in range(4):
            begun, ended = Event(device), Event(device)
            begun.record(COPY)
            device.upload_py(to, host, COPY)
            ended.record(COPY)
            device.finish_py(COPY)
            times.append(ended.since(begun) / 1e3)
        device.free_py(to)
        return host.nbytes / min(times) if min(times) > 0 else None
    finally:
        device.unpin_py(host)
