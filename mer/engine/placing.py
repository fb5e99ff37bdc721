"""What of a model goes into a GPU's memory: dense layers, which every token needs, come before experts."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Final

from attrs import frozen

from mer._ext.device import Device
from mer._ext.vram import slots_in
from mer.config import EngineConfig
from mer.engine.budget import Budget, measure, mib
from mer.engine.stats import Vram
from mer.errors import BudgetError, ConfigError, GpuError
from mer.gpu import open_device, vram_budget
from mer.model import device_scratch
from mer.model.dense import device_bytes
from mer.model.families import Architecture, load
from mer.model.kv import layer_bytes
from mer.model.placement import ON_THE_CPU, Placement, refusal
from mer.streaming.experts import ExpertTables, expert_tables
from mer.weights.checkpoint import Checkpoint, open_checkpoint, require_streamable

_log = logging.getLogger("mer")

# The driver gives memory out in pieces of this size.
_PIECE: Final = 2 << 20
# Experts of so many tokens, and buffers for those on their way, are to have room beside dense layers.
_TOKENS: Final = 4
_UNDER_WAY: Final = 16


@frozen
class OnDevice:
    """A GPU, and what an engine has there. All sizes in bytes; device None: the CPU computes alone."""

    device: Device | None = None
    placement: Placement = ON_THE_CPU
    vram: int = 0  # that may be used
    dense: int = 0  # of it, by the placement

    @property
    def experts(self) -> int:
        """What is left for experts."""
        return self.vram - self.dense

    def experts_alone(self) -> OnDevice:
        """The same without layers, and with no more room for experts."""
        return OnDevice(self.device, vram=self.experts)


ALONE: Final = OnDevice()


def place(
    checkpoint: Checkpoint,
    architecture: Architecture,
    tables: ExpertTables,
    budget: Budget,
    config: EngineConfig,
) -> OnDevice:
    """Open the GPU that `config` asks for and choose. budget: of the same model without a GPU.

    Raises ConfigError, BudgetError or GpuError where something was asked for that can't be.
    """
    device = open_device(config)
    if device is None:
        if config.gpu_layers not in ("auto", 0):
            raise ConfigError(
                f"gpu_layers {config.gpu_layers}: there is no GPU that can be used; leave it out"
            )
        return ALONE
    try:
        vram = vram_budget(device, config)
    except GpuError as error:
        if config.device != "auto":
            raise
        _log.warning("no GPU is used: %s", error)
        return ALONE
    placement, taken = choose(checkpoint, architecture, tables, budget, config, vram)
    return OnDevice(device, placement, vram, taken)


@frozen
class Planned:
    """What a GPU would have, of a model of so many layers and experts; head: the head, too."""

    vram: Vram
    layers: int
    experts: int
    head: bool

    @property
    def told(self) -> str:
        """One line."""
        return f"{self.vram.told(self.experts)}; the model has {self.layers} layers"


def planned(path: Path, config: EngineConfig) -> Planned | None:
    """What of the model at `path` an engine would put on the GPU, which is opened; None: there is none.

    Bytes are those that are set aside. Raises what `place` and opening a checkpoint raise.
    """
    checkpoint = open_checkpoint(path)
    require_streamable(checkpoint)
    architecture = load(checkpoint)
    tables = expert_tables(architecture.experts, path)
    budget = measure(checkpoint, architecture, tables, config)
    gpu = place(checkpoint, architecture, tables, budget, config)
    if gpu.device is None:
        return None
    spec, slots = architecture.spec, 0
    if tables.total:
        with suppress(GpuError):
            shape = tables.layers, tables.n_experts, spec.top_k, budget.step_tokens, tables.slot_bytes
            slots = slots_in(gpu.experts, *shape)
    kv = sum(layer_bytes(spec, budget.kv_dtype)[: gpu.placement.layers]) * budget.kv_blocks
    vram = Vram(
        device=gpu.device.name, layers=gpu.placement.layers, dense_bytes=max(0, gpu.dense - kv), kv_bytes=kv,
        slots=slots, nbytes=slots * tables.slot_bytes, resident=0, evictions=0, lost=None,
    )  # fmt: skip
    return Planned(vram, spec.n_layers, tables.total, gpu.placement.head)


def choose(
    checkpoint: Checkpoint,
    architecture: Architecture,
    tables: ExpertTables,
    budget: Budget,
    config: EngineConfig,
    vram: int,
) -> tuple[Placement, int]:
    """The layers that have room in `vram` bytes, or those that were asked for, and what they take."""
    spec = architecture.spec
    wanted, why = config.gpu_layers, refusal(spec)
    if wanted == 0 or (wanted == "auto" and why is not None):
        return ON_THE_CPU, 0
    if why is not None:
        raise ConfigError(
            f"gpu_layers {wanted}: of this model only experts can be on a GPU, {why}; leave it out"
        )
    layers, head = device_bytes(checkpoint, architecture)
    kv = [each * budget.kv_blocks for each in layer_bytes(spec, budget.kv_dtype)]
    costs = [_pieces(a) + _pieces(b) for a, b in zip(layers, kv, strict=True)] + [_pieces(head)]
    taken = _pieces(device_scratch.total_bytes(spec, budget.step_tokens, budget.rows, budget.kv_blocks))
    room = vram
    if wanted == "auto":
        # Experts never take more than half of it from dense layers.
        room -= min((_TOKENS * spec.top_k + _UNDER_WAY) * tables.slot_bytes if tables.total else 0, vram // 2)
    most = len(costs) if wanted == "auto" else min(wanted, len(costs))
    if wanted != "auto" and taken + sum(costs[:most]) > room:
        raise BudgetError(
            f"gpu_layers {wanted}: with keys, values and buffers they take {mib(taken + sum(costs[:most]))} "
            f"of the GPU's memory, and {mib(vram)} may be used: ask for fewer, raise --vram, lower --context"
        )
    count = 0
    while count < most and taken + costs[count] <= room:
        taken += costs[count]
        count += 1
    if not count:
        return ON_THE_CPU, 0
    return Placement(min(count, spec.n_layers), count > spec.n_layers), taken


def _pieces(nbytes: int) -> int:
    return -(-nbytes // _PIECE) * _PIECE
