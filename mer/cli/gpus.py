"""What `mer doctor` and a support file say of GPUs."""

from __future__ import annotations

from typing import Any

from attrs import asdict

from mer.cli.common import rate, size
from mer.config import EngineConfig
from mer.errors import ConfigError, GpuError
from mer.gpu.compile import cuda
from mer.gpu.opening import chosen, unclaimed
from mer.gpu.probe import Gpu, gpus, load


def survey(*, measure: bool) -> dict[str, Any]:
    """Facts: `devices`, and `why` there are none. measure: also their free memory and how fast the bus is."""
    try:
        found = gpus()
    except GpuError as error:
        return {"devices": [], "why": str(error)}
    return {"devices": [_facts(gpu, measure=measure) for gpu in found], "why": None}


def _facts(gpu: Gpu, *, measure: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {**asdict(gpu), "free": None, "bus_bytes_per_second": None}
    if measure and gpu.refusal is None:
        try:
            facts |= asdict(load(gpu))
        except GpuError as error:
            facts["refusal"] = str(error)
    return facts


def used(facts: dict[str, Any], config: EngineConfig) -> dict[str, Any]:
    """What is used with these facts: `device` ('cpu' or 'cuda:0'), `why`, and bytes of `vram`.

    Raises ConfigError where a device is asked for that is not there.
    """
    if config.device == "cpu":
        return {"device": "cpu", "why": "--device cpu", "vram": 0}
    try:
        if not facts["devices"]:
            raise GpuError(facts["why"])
        gpu = facts["devices"][chosen(config.device).ordinal]
        if gpu["refusal"] is not None:
            raise GpuError(f"{gpu['name']}: {gpu['refusal']}")
    except GpuError as error:
        if config.device != "auto":
            raise ConfigError(f"device {config.device}: {error}") from None
        return {"device": "cpu", "why": str(error), "vram": 0}
    vram = config.vram or unclaimed(gpu["free"])
    return {"device": f"cuda:{gpu['ordinal']}", "why": gpu["name"], "vram": vram}


def row(facts: dict[str, Any]) -> str:
    """The same for people, a line a device."""
    if facts["why"] is not None:
        return f"none: {facts['why']}"
    return "\n".join(map(_line, facts["devices"]))


def _line(gpu: dict[str, Any]) -> str:
    major, minor = gpu["capability"]
    known = f"cuda:{gpu['ordinal']}: {gpu['name']}, {major}.{minor}, {size(gpu['total'])}"
    if gpu["refusal"] is not None:
        return f"{known}; can't be used: {gpu['refusal']}"
    bus = gpu["bus_bytes_per_second"]
    speed = "" if bus is None else f", {rate(bus)} over the bus"
    return f"{known} ({size(gpu['free'])} free){speed}, driver of CUDA {cuda(gpu['driver'])}"


def use(uses: dict[str, Any]) -> str:
    """What is made of it."""
    if uses["device"] == "cpu":
        return f"none: {uses['why']}"
    return f"{uses['why']}, {size(uses['vram'])} of its memory"
