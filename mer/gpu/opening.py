"""The device that an engine's settings ask for, and how much of its memory."""

from __future__ import annotations

import logging
from typing import Final

from mer._ext.device import Device
from mer.config import EngineConfig
from mer.errors import BudgetError, ConfigError, GpuError
from mer.gpu.compile import kernels
from mer.gpu.probe import Gpu, driver_library, gpus, simulated

_log = logging.getLogger("mer")

# What a simulated device takes for its kernels: it has them.
_SIMULATED: Final = b"simulated"
# Of what is free, this much is left to others where no --vram is given.
_LEFT_FREE: Final = (512 << 20, 0.1)


def open_device(config: EngineConfig) -> Device | None:
    """The GPU of `config.device` with its kernels loaded, compiled now or earlier; None: the CPU alone.

    Raises ConfigError, saying what is missing, where a GPU was asked for by name.
    """
    if config.device == "cpu":
        return None
    try:
        return _open(chosen(config.device))
    except GpuError as error:
        if config.device != "auto":
            raise ConfigError(f"device {config.device}: {error}") from None
        _log.debug("no GPU is used: %s", error)
        return None


def uses_gpu(config: EngineConfig) -> bool:
    """Whether `open_device` will find one."""
    if config.device == "cpu":
        return False
    try:
        chosen(config.device)
    except GpuError:
        return False
    return True


def chosen(device: str) -> Gpu:
    """What auto, cuda or cuda:N is here. Raises GpuError where there is none, or it can't be used."""
    found = gpus()
    ordinal = int(device.partition(":")[2] or 0)
    if ordinal >= len(found):
        names = ", ".join(f"cuda:{gpu.ordinal} ({gpu.name})" for gpu in found)
        raise GpuError(f"there is no such device; those here are {names}")
    gpu = found[ordinal]
    if gpu.refusal is not None:
        raise GpuError(f"{gpu.name}: {gpu.refusal}")
    return gpu


def _open(gpu: Gpu) -> Device:
    image = _SIMULATED if simulated() else kernels(gpu.target)
    device = Device(gpu.ordinal, driver_library())
    device.load(image)
    return device


def vram_budget(device: Device, config: EngineConfig) -> int:
    """Bytes of the device's memory that the engine may take: `config.vram`, or what is free less a margin.

    Raises BudgetError for more than is free, GpuError where the device does not say.
    """
    free, total = device.memory()
    if config.vram is None:
        return unclaimed(free)
    if config.vram > free:
        raise BudgetError(
            f"vram {_mib(config.vram)}: of {device.name}'s {_mib(total)}, {_mib(free)} are free; ask for less"
        )
    return config.vram


def unclaimed(free: int) -> int:
    """What is taken of so many bytes that are free, where nobody says how much."""
    return max(0, free - int(max(_LEFT_FREE[0], _LEFT_FREE[1] * free)))


def _mib(size: int) -> str:
    return f"{size >> 20:,} MiB"
