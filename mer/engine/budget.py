"""Who gets which part of `--ram`: everything but the expert cache has its size, the cache gets the rest."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from mer._ext.acceptance import MOST_DRAFTED
from mer._ext.cpus import usable_cpus
from mer._ext.mixture import rounding_bytes
from mer._ext.moe import scratch_bytes
from mer._ext.remote import table_bytes
from mer._ext.vram import host_bytes
from mer.config import EngineConfig
from mer.engine.blocks import blocks_for
from mer.engine.constraint import constraint_bytes
from mer.engine.draft import DraftShape, DraftSource
from mer.engine.likely import LikelyExperts
from mer.engine.prefix_store import buffer_bytes
from mer.engine.states import IMAGES
from mer.errors import BudgetError, ConfigError
from mer.gpu import uses_gpu
from mer.model import device_scratch
from mer.model.dense import dense_bytes
from mer.model.families import Architecture
from mer.model.forward import Forward
from mer.model.kv import BLOCK, KVCache, KVDtype
from mer.model.placement import ON_THE_CPU, Placement
from mer.model.spec import ModelSpec
from mer.model.state import StateCache, replay_shape
from mer.streaming.experts import ExpertTables
from mer.streaming.machine import memory
from mer.weights.checkpoint import Checkpoint

# Tokens of a request at the most where no context is given; and of the KV cache, unless memory is left.
DEFAULT_CONTEXT: Final = 4096
# Of what is free, this much is left to others where no --ram is given.
_LEFT_FREE: Final = (512 << 20, 0.1)
# What grows while running and is not counted below: the interpreter's heap, thread stacks, sampling.
_MARGIN: Final = 48 << 20
# What the interpreter holds differs by less than this from one start of the same command to the next.
_DRIFT: Final = 4 << 20
# A page-table entry takes 8 bytes for 4096, and the kernel charges them to the process's control group.
_PAGE_TABLES: Final = 512
# Of what is left for the expert cache, recurrent states may take this much: fewer requests are computed at
# the same time then, but one always is.
_STATES: Final = 0.25


@frozen
class Budget:
    """How memory is divided. All sizes in bytes; they add up to `total`, which is at most `ram`."""

    ram: int
    interpreter: int  # what the process held when this was made: Python, libraries, tokenizer, tables
    dense: int
    kv: int
    states: int  # images of recurrent states
    buffers: int  # of one step, and what grows
    drafting: int  # all that draft engines take
    slot: int
    slots: int
    experts: int  # of all layers
    least_slots: int
    kv_blocks: int
    longest: int  # tokens that one request may have, if the model takes that many
    kv_dtype: KVDtype
    step_tokens: int
    max_running: int  # requests that are computed at the same time
    rows: int  # tokens of a step whose logits are wanted: one of each request, and those of drafts
    state_images: int
    threads: int

    @property
    def cache(self) -> int:
        """The expert cache's arena."""
        return self.slot * self.slots

    @property
    def fixed(self) -> int:
        """Everything but the cache."""
        return self.interpreter + self.dense + self.kv + self.states + self.buffers + self.drafting

    @property
    def total(self) -> int:
        return self.fixed + self.cache

    @property
    def fits(self) -> bool:
        """Whether `ram` is enough to run."""
        return self.slots >= self.least_slots and self.total <= usable(self.ram)

    @property
    def least(self) -> int:
        """A `ram` that is enough, and hardly more than the smallest that is; see `enough_for`."""
        return self.enough_for(self.least_slots)

    def enough_for(self, slots: int) -> int:
        """A `ram` with which the cache has so many slots, also at the next start.

        For one request at a time, where recurrent states take memory.
        """
        fixed = self.fixed - self.states + self.states // self.max_running
        return with_page_tables(fixed + self.slot * slots + _DRIFT)

    @property
    def floor(self) -> int:
        """The smallest `ram` that the cache of a running engine can shrink to."""
        return with_page_tables(self.fixed + self.slot * self.least_slots)

    def resized(self, ram: int, most: int) -> Budget:
        """With another `ram` and a cache, of at most `most` slots, that goes by it. Raises BudgetError."""
        room = (usable(ram) - self.fixed) // self.slot if self.slot else 0
        budget = evolve(self, ram=ram, slots=max(0, min(most, room)))
        if not budget.fits:
            raise BudgetError(
                f"ram {mib(ram)} is too little for the model that is running: everything but its expert "
                f"cache, and the {self.least_slots} experts of one layer of a token, take {mib(self.floor)}"
            )
        return budget

    def without_gpu(self, checkpoint: Checkpoint, architecture: Architecture) -> Budget:
        """With all dense weights, keys and values in memory. The cache has not made room for them yet."""
        spec = architecture.spec
        there = device_scratch.host_bytes(spec, self.step_tokens, self.rows, self.kv_blocks)
        return evolve(
            self,
            dense=dense_bytes(checkpoint, architecture),
            kv=self.kv_blocks * KVCache.bytes_per_block(spec, self.kv_dtype),
            buffers=self.buffers - there,
        )

    @property
    def draft_shape(self) -> DraftShape:
        """What draft engines must be able to hold."""
        return DraftShape(self.context, self.step_tokens, self.max_running, self.threads)

    @property
    def context(self) -> int:
        """Tokens that the KV cache holds."""
        return self.kv_blocks * BLOCK


def with_page_tables(size: int) -> int:
    """The least `ram` of which `usable` leaves `size`."""
    return size + -(-size // (_PAGE_TABLES - 1))


def usable(ram: int) -> int:
    """What page tables leave of it."""
    return ram - ram // _PAGE_TABLES


def resident_bytes() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def default_ram() -> int:
    """What this process holds and what the machine or its control group has free, less a margin."""
    free = memory().available
    return resident_bytes() + free - int(max(_LEFT_FREE[0], _LEFT_FREE[1] * free))


def plan(
    checkpoint: Checkpoint,
    architecture: Architecture,
    tables: ExpertTables,
    config: EngineConfig,
    drafting: Iterable[DraftSource] = (),
    process: int | None = None,
    placement: Placement = ON_THE_CPU,
) -> Budget:
    """Divide `config.ram`. Raises BudgetError, with the least that works and what takes it, if too small.

    Also ConfigError for a context or a number of cached experts that makes no sense for this model.
    process: bytes that it holds without any engine; None: what it holds now. placement: what a GPU has.
    """
    budget = measure(checkpoint, architecture, tables, config, drafting, process, placement)
    if not budget.fits:
        raise BudgetError(_too_small(budget))
    wanted = _wanted_slots(config, budget.experts)
    if wanted is not None and budget.slots < wanted:
        raise BudgetError(
            f"cache_experts {_as_written(config.cache_experts)}: {wanted} experts take "
            f"{mib(wanted * budget.slot)}, but ram {mib(budget.ram)} has room for {budget.slots} "
            f"({mib(budget.cache)}); ask for fewer, or raise --ram"
        )
    return budget


def measure(
    checkpoint: Checkpoint,
    architecture: Architecture,
    tables: ExpertTables,
    config: EngineConfig,
    drafting: Iterable[DraftSource] = (),
    process: int | None = None,
    placement: Placement = ON_THE_CPU,
    *,
    alone: bool = False,
    kv_tokens: int | None = None,
) -> Budget:
    """The same division, which does not fit where `config.ram` is too small.

    alone: nobody else will want what `ram` has left, so that keys and values may have half of it. kv_tokens:
    how many there are to be, where `config` leaves that open; None: as many as `ram` says.
    """
    spec = architecture.spec
    most = blocks_for(spec.max_positions) * BLOCK * config.max_running
    if config.context is not None and config.context > most:
        raise ConfigError(
            f"context {config.context}: {config.max_running} requests of this model's {spec.max_positions} "
            f"positions never fill more than {most}; ask for less"
        )
    ram = config.ram or default_ram()
    interpreter = resident_bytes() if process is None else process
    divide = partial(
        _divide, checkpoint, architecture, tables, config, tuple(drafting), ram, interpreter, placement
    )
    one = divide(config.context or min(spec.max_positions, DEFAULT_CONTEXT))
    if config.context is not None:
        return one
    found = one
    if min(most, DEFAULT_CONTEXT) > one.context:
        # Room for as many requests as another model has by default, but never at the price of experts.
        several = divide(min(most, DEFAULT_CONTEXT))
        found = several if _keeps(several, one) else one
    if kv_tokens is not None:
        found = divide(kv_tokens)
    elif alone and found.slots == found.experts and not uses_gpu(config):
        found = _with_the_rest(divide, found, found.max_running * one.context)
    return evolve(found, longest=one.context)


def _with_the_rest(divide: Callable[[int], Budget], found: Budget, wanted: int) -> Budget:
    """With a KV cache of up to `wanted` tokens, in half of the memory that is left."""
    if wanted <= found.context:
        return found
    more, room = divide(wanted), (usable(found.ram) - found.total) // 2
    taken = (more.kv + more.buffers + more.drafting) - (found.kv + found.buffers + found.drafting)
    tokens = min(wanted, found.context + int((wanted - found.context) * room / taken))
    larger = divide(tokens // BLOCK * BLOCK)
    return larger if larger.context > found.context and _keeps(larger, found) else found


def _keeps(larger: Budget, than: Budget) -> bool:
    """Whether it costs neither experts nor requests that run at a time."""
    return larger.fits and (larger.slots, larger.max_running) == (than.slots, than.max_running)


def _divide(
    checkpoint: Checkpoint,
    architecture: Architecture,
    tables: ExpertTables,
    config: EngineConfig,
    drafting: tuple[DraftSource, ...],
    ram: int,
    interpreter: int,
    placement: Placement,
    limit: int,
) -> Budget:
    """The division with a KV cache of `limit` tokens."""
    spec = architecture.spec
    threads = config.threads or usable_cpus()
    step = min(config.step_tokens, blocks_for(limit) * BLOCK)
    rows = min(config.max_running + (MOST_DRAFTED if drafts(config) else 0), step)
    dtype = kv_dtype(checkpoint, architecture, config)
    buffers = (
        Forward.scratch_bytes(spec, step, rows, threads)
        + (scratch_bytes(tables.layers, tables.reads, spec.top_k, step) if tables.total else 0)
        + tables.total * (tables.n_experts + 64)  # what the cache's policy knows of each expert
        + (LikelyExperts.nbytes(spec) if tables.total and drafts(config) else 0)
        + (_beside_gpu(spec, tables, step) if tables.total and uses_gpu(config) else 0)
        + (rounding_bytes(tables.layers, step) if tables.total and config.expert_wire != "f32" else 0)
        + (_beside_peers(spec, tables, step) if tables.total and config.peers else 0)
        + _of_process(spec)
    )
    block = KVCache.bytes_per_block(spec, dtype, placement.layers)
    if placement.layers:
        buffers += device_scratch.host_bytes(spec, step, rows, blocks_for(limit))
    kv = blocks_for(limit) * block
    if config.prefix_store is not None:
        buffers += buffer_bytes(KVCache.bytes_per_block(spec, dtype))
    shape = DraftShape(blocks_for(limit) * BLOCK, step, config.max_running, threads)
    draft = sum(source.nbytes(shape) for source in drafting)
    least_slots = min(spec.top_k, tables.total)
    dense = dense_bytes(checkpoint, architecture, placement)
    left = usable(ram) - (interpreter + dense + kv + buffers + draft)
    running, image = config.max_running, IMAGES * StateCache.bytes_per_image(spec)
    if image:
        # Of what a step with drafts leaves, that states can be set back.
        replayed = 4 * math.prod(replay_shape(spec, 1)) if drafts(config) else 0
        left -= MOST_DRAFTED * replayed
        room = min(_STATES * left, left - least_slots * tables.slot_bytes)
        running = min(running, max(1, int(room) // (image + replayed)))
        left -= running * (image + replayed)
        rows = min(rows, running + MOST_DRAFTED)
        buffers += (running + MOST_DRAFTED) * replayed
    slots = max(0, min(tables.total, left // tables.slot_bytes)) if tables.total else 0
    wanted = _wanted_slots(config, tables.total)
    if wanted is not None:
        if wanted < least_slots:
            raise ConfigError(
                f"cache_experts {_as_written(config.cache_experts)}: {wanted} of {tables.total} experts; "
                f"one layer of one token needs {least_slots}"
            )
        slots = min(slots, wanted)
    return Budget(
        ram=ram,
        interpreter=interpreter,
        dense=dense,
        kv=kv,
        states=running * image,
        buffers=buffers,
        drafting=draft,
        slot=tables.slot_bytes,
        slots=slots,
        experts=tables.total,
        least_slots=least_slots,
        kv_blocks=blocks_for(limit),
        longest=blocks_for(limit) * BLOCK,
        kv_dtype=dtype,
        step_tokens=step,
        max_running=running,
        rows=rows,
        state_images=IMAGES * running if image else 0,
        threads=threads,
    )


def _beside_gpu(spec: ModelSpec, tables: ExpertTables, step: int) -> int:
    """Of the buffers, those by which experts and activations go to a GPU."""
    return host_bytes(tables.layers, tables.n_experts, spec.top_k, step, tables.slot_bytes)


def _beside_peers(spec: ModelSpec, tables: ExpertTables, step: int) -> int:
    """Of the buffers, what other machines are asked and answer: as bytes, as messages, as sent."""
    import mer.cluster.peers  # noqa: F401 - what it takes itself is counted with the program

    pairs, row = step * spec.top_k, 4 * int(tables.layers[:, 3].max())
    return 3 * (step + pairs) * row + table_bytes(tables.total, tables.n_experts, pairs)


def beside(budget: Budget, spec: ModelSpec) -> int:
    """What a model with this budget takes where another one is in memory already."""
    return budget.total - budget.interpreter - _of_process(spec)


def _of_process(spec: ModelSpec) -> int:
    """Of the buffers, those that there are once, however many models."""
    # Sampling copies a row of logits some times.
    return 48 * spec.vocab + constraint_bytes(spec.vocab) + _MARGIN


def drafts(config: EngineConfig) -> bool:
    """Whether next tokens are drafted. Not with a trace, which is of the tokens that there were."""
    return config.speculate != "off" and config.trace is None


def kv_dtype(checkpoint: Checkpoint, architecture: Architecture, config: EngineConfig) -> KVDtype:
    """The precision of keys and values: with `auto` nothing is rounded unless weights were."""
    if config.kv_dtype != "auto":
        return config.kv_dtype
    weights = {checkpoint.tensors[name].format for name in architecture.dense.values()}
    weights |= {m.format for source in architecture.experts for m in source.experts[0].matrices}
    return "f16" if any(form.block > 1 for form in weights) else "f32"


def _wanted_slots(config: EngineConfig, total: int) -> int | None:
    wanted = config.cache_experts
    if isinstance(wanted, float):
        wanted = max(round(wanted * total), 1)
    return None if wanted is None else min(wanted, total)


def _as_written(share: int | float | None) -> str:
    return f"{100 * share:g}%" if isinstance(share, float) else str(share)


def mib(size: int) -> str:
    """Bytes for people, rounded up."""
    return f"{-(-size // (1 << 20)):,} MiB"


def _too_small(b: Budget) -> str:
    parts = (
        f"dense weights {mib(b.dense)}, KV cache of {b.context} tokens {mib(b.kv)}, buffers "
        f"{mib(b.buffers)}, the program itself {mib(b.interpreter)}"
    )
    if b.states:
        parts += f", recurrent states {mib(b.states)}"
    why, advice = "", "raise --ram, or lower --context"
    if b.drafting:
        advice += ", or leave out --draft-model, all of which is kept in memory"
    if b.drafting:
        parts += f", drafting {mib(b.drafting)}"
    if b.experts:
        parts += f", {b.least_slots} experts {mib(b.slot * b.least_slots)}"
    else:
        why = "It is a dense model: every token needs all weights, there is nothing to stream from disk; "
        advice += ", or take weights of fewer bits (mer convert --dense q4_k)"
    return (
        f"ram {mib(b.ram)} is too little for this model: it needs at least {mib(b.least)} "
        f"({parts}). {why}{advice}"
    )
