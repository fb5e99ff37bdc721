"""Totals of an engine's steps, and what it has in a GPU's memory."""

from __future__ import annotations

from operator import add, attrgetter, sub
from typing import Final

from attrs import fields, frozen


@frozen
class StepStats:
    """Totals since the start; the difference of two is what happened in between.

    step_s: all of the steps; of it io_wait_s went by with nothing to compute because reads were not there
    yet, and expert_s with computing experts; the rest is attention, router, head and what lies between. All
    but step_s stays 0 in a dense model.
    prefetched: experts read ahead of their layer; prefetch_used: those of them that were wanted before they
    were evicted; prefetch_bytes and prefetch_used_bytes: of all and of those. guesses: what the next layer's
    router was expected to choose, asked a layer early; guesses_right: what of that it chose.
    vram_hits: experts found in a GPU's memory and computed there, which count neither as hits nor as misses;
    vram_passed: those of hits and misses that were copied there and computed there, for many tokens at once;
    vram_promotions: experts that were copied there to stay; bus_bytes: of all copies; gpu_wait_s: of step_s,
    with nothing to compute here, and the GPU not done. All 0 without one.
    """

    step_s: float = 0.0
    io_wait_s: float = 0.0
    expert_s: float = 0.0
    bytes_read: int = 0
    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    prefetch_used: int = 0
    prefetch_bytes: int = 0
    prefetch_used_bytes: int = 0
    guesses: int = 0
    guesses_right: int = 0
    vram_hits: int = 0
    vram_passed: int = 0
    vram_promotions: int = 0
    bus_bytes: int = 0
    gpu_wait_s: float = 0.0

    @property
    def on_gpu(self) -> float:
        """Which share of the experts a GPU computed."""
        return (self.vram_hits + self.vram_passed) / max(self.vram_hits + self.hits + self.misses, 1)

    def __sub__(self, other: StepStats) -> StepStats:
        return StepStats(*map(sub, _values(self), _values(other)))

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(*map(add, _values(self), _values(other)))


# Not attrs.astuple, which looks into every value: each request of each step adds up its own.
_values: Final = attrgetter(*(field.name for field in fields(StepStats)))


@frozen(kw_only=True)
class Vram:
    """What is in a GPU's memory at a moment. evictions: total. Sizes in bytes.

    device: its name; layers: whose dense part it has; dense_bytes: what that takes, with buffers, and the
    head where it is there; kv_bytes: keys and values of those layers; slots: how many experts there is room
    for; nbytes: what those take, with buffers; lost: why it was given up, after which all goes on without it;
    None: it works.
    """

    device: str
    layers: int
    dense_bytes: int
    kv_bytes: int
    slots: int
    nbytes: int
    resident: int
    evictions: int
    lost: str | None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes, by what takes them."""
        return {"experts": self.nbytes, "dense": self.dense_bytes, "kv": self.kv_bytes}

    def told(self, experts: int) -> str:
        """One line on what is there, of a model of so many experts."""
        dense = "dense layers with the CPU"
        if self.layers:
            dense = f"dense part of {self.layers} layers {_mib(self.dense_bytes)}, "
            dense += f"their keys and values {_mib(self.kv_bytes)}"
        found = (
            f"room for {self.slots:,} of {experts:,} experts {_mib(self.nbytes)}"
            if self.slots
            else "no experts"
        )
        return f"{self.device}: {dense}, {found}"


def _mib(size: int) -> str:
    return f"{-(-size // (1 << 20)):,} MiB"
