"""One model in memory, ready to compute steps; memory, files and threads are taken and given back here."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from attrs import astuple, define, field, frozen
from numpy.typing import NDArray

from mer._ext.cache import ExpertCache
from mer._ext.cpus import numa_nodes
from mer._ext.kernels import Kernels, Pool, interleave
from mer._ext.moe import ExpertStreamer
from mer._ext.uring import Reader
from mer.config import EngineConfig
from mer.engine import budget as budgets
from mer.engine.budget import Budget
from mer.engine.scheduler import Chunk
from mer.model.batch import Batch
from mer.model.dense import DenseWeights, load_dense
from mer.model.families import load
from mer.model.forward import Forward
from mer.model.kv import KVCache
from mer.model.spec import ModelSpec
from mer.streaming.experts import expert_tables
from mer.streaming.profile import Profile
from mer.streaming.trace import TraceWriter
from mer.streaming.warm import WarmStart
from mer.weights.checkpoint import Checkpoint, open_checkpoint, require_streamable

# Bytes of the expert cache that are touched ahead of their use, in idle time.
_PREFAULT: Final = 1 << 30


@frozen
class StepStats:
    """Totals since the start; the difference of two is what happened in between.

    step_s: all of the steps; of it io_wait_s went by with nothing to compute because reads were not there
    yet, and expert_s with computing experts; the rest is attention, router, head and what lies between.
    prefetched: experts read ahead of their layer; prefetch_used: those of them that were wanted before they
    were evicted; prefetch_bytes and prefetch_used_bytes: of all and of those. guesses: what the next layer's
    router was expected to choose, asked a layer early; guesses_right: what of that it chose.
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

    def __sub__(self, other: StepStats) -> StepStats:
        return StepStats(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __add__(self, other: StepStats) -> StepStats:
        return StepStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@define(eq=False)
class Runner:
    """Computes steps of one model. One thread at a time."""

    checkpoint: Checkpoint
    spec: ModelSpec
    budget: Budget
    reader: Reader
    cache: ExpertCache
    isa: str
    _forward: Forward = field(alias="forward")
    _streamer: ExpertStreamer = field(alias="streamer")
    profile: Profile | None = None
    _warm: WarmStart | None = field(default=None, alias="warm")
    _step_s: float = field(default=0.0, init=False)
    _arena_registered: bool = field(default=False, init=False)

    @classmethod
    def open(
        cls,
        path: Path,
        config: EngineConfig,
        prepare: Callable[[Checkpoint, ModelSpec], None] = lambda checkpoint, spec: None,
    ) -> Runner:
        """Open the model at `path` and load its dense weights.

        `prepare` is called before memory is divided: what it loads is counted. Raises CheckpointError,
        UnsupportedModelError, BudgetError, ConfigError or DeviceReadError.
        """
        profile: Profile | None = None
        warm: WarmStart | None = None
        checkpoint = open_checkpoint(path)
        require_streamable(checkpoint)
        architecture = load(checkpoint)
        spec = architecture.spec
        tables = expert_tables(architecture.experts, path)
        prepare(checkpoint, spec)
        kernels = Kernels()
        budget = budgets.plan(checkpoint, architecture, tables, config)
        reader = Reader(checkpoint.files, backend=config.io_backend, queue_depth=config.queue_depth)
        try:
            cache = ExpertCache(
                tables.total, budget.slots, budget.slot,
                policy=config.cache_policy, n_layers=spec.n_moe_layers,
            )  # fmt: skip
            cache.prefault(_PREFAULT)
            dense = load_dense(checkpoint, architecture, reader)
            pool = Pool(budget.threads)
            kv = KVCache(spec, budget.kv_blocks, budget.kv_dtype)
            streamer = ExpertStreamer(
                cache, reader, kernels, pool, tables.layers, tables.reads, tables.matrices,
                spec.router.top_k, budget.step_tokens, config.prefetch,
            )  # fmt: skip
            _spread(numa_nodes(), dense, kv, cache)
            if spec.expert_bias:
                streamer.add_biases(dense.expert_biases())
            if spec.clamp is not None:
                streamer.clamp(spec.clamp.alpha, spec.clamp.limit)
            forward = Forward(
                spec, dense, streamer, kv, pool, kernels,
                max_tokens=budget.step_tokens, max_rows=min(config.max_running, budget.step_tokens),
            )  # fmt: skip
            forward.look_ahead = config.prefetch > 0 and budget.slots < budget.experts
            if config.trace is not None:
                forward.trace = TraceWriter(
                    config.trace, model=path.name, n_layers=spec.n_moe_layers,
                    n_experts=tables.n_experts, top_k=spec.router.top_k,
                )  # fmt: skip
            if config.profile is not None:
                profile = Profile(config.profile, model=path.name, n_experts=tables.n_experts)
                forward.profile(profile)
                streamer.record(profile.recorder)
            if config.warm_start:
                warm = WarmStart(checkpoint, tables, cache, reader)
                warm.begin()
        except BaseException:
            reader.close()
            raise
        return cls(checkpoint, spec, budget, reader, cache, kernels.isa, forward, streamer, profile, warm)

    def close(self) -> None:
        """Give the files back; no step may be under way."""
        if self._warm is not None:
            self._warm.end(used=self._step_s > 0)
        self.reader.close()
        if self._forward.trace is not None:
            self._forward.trace.close()
        if self.profile is not None:
            self.profile.close()

    @property
    def stats(self) -> StepStats:
        s = self._streamer.stats()
        return StepStats(
            step_s=self._step_s,
            io_wait_s=s["io_wait_s"],
            expert_s=s["compute_s"],
            bytes_read=int(s["bytes_read"]),
            hits=int(s["hits"]),
            misses=int(s["misses"]),
            prefetched=int(s["prefetched"]),
            prefetch_used=int(s["prefetch_used"]),
            prefetch_bytes=int(s["prefetch_bytes"]),
            prefetch_used_bytes=int(s["prefetch_used_bytes"]),
            guesses=int(s["guesses"]),
            guesses_right=int(s["guesses_right"]),
        )

    @property
    def prefetch_depth(self) -> int:
        """How many guesses of a token are read ahead now: 0 where that does not pay."""
        return int(self._streamer.stats()["prefetch_depth"])

    def step(self, chunks: list[Chunk]) -> NDArray[np.float32]:
        """Compute the chunks: f32 [R, vocab], the logits after the last `rows` tokens of each, in order.

        Overwritten by the next step. Raises DeviceReadError or CheckpointError when an expert can't be read;
        the chunks can then be computed again.
        """
        started = time.monotonic_ns()
        self.cache.hold_prefault_py(True)
        tokens: list[int] = []
        positions: list[NDArray[np.int32]] = []
        offsets: list[int] = [0]
        rows: list[int] = []
        tables = np.zeros((len(chunks), max(len(c.sequence.blocks) for c in chunks)), np.int32)
        for row, chunk in zip(tables, chunks, strict=True):
            sequence = chunk.sequence
            start, end = sequence.computed, sequence.computed + chunk.count
            tokens += sequence.tokens[start:end]
            positions.append(np.arange(start, end, dtype=np.int32))
            offsets.append(len(tokens))
            row[: len(sequence.blocks)] = sequence.blocks
            rows += range(len(tokens) - chunk.rows, len(tokens))
        batch = Batch(
            tokens=np.array(tokens, np.int32),
            positions=np.concatenate(positions),
            query_offsets=np.array(offsets, np.int32),
            block_tables=tables,
            logit_rows=np.array(rows, np.int32),
        )
        try:
            return self._forward.step(batch)
        finally:
            self.cache.hold_prefault_py(False)
            self._register_arena()
            self._step_s += (time.monotonic_ns() - started) / 1e9
            if self.profile is not None:
                self.profile.step(started, len(tokens), len(chunks))

    @property
    def kv(self) -> KVCache:
        """Keys and values."""
        return self._forward.kv

    def hidden(self) -> NDArray[np.float32]:
        """f32 [T, hidden]: of each token of the last step, after the final norm; overwritten by the next."""
        return self._forward.hidden()

    def _register_arena(self) -> None:
        """Make the cache's arena fixed buffers of the ring, once it is full: a read takes less CPU time then.

        Not before: registering touches all of it, which would delay the first token.
        """
        if self._arena_registered or self.budget.slots == self.budget.experts:
            return
        stats = self._streamer.stats()
        if stats["misses"] + stats["prefetched"] >= self.budget.slots:
            self._arena_registered = True
            self.reader.add_buffer(self.cache.arena_address, self.cache.arena_bytes)


def _spread(nodes: dict[int, list[int]], dense: DenseWeights, kv: KVCache, cache: ExpertCache) -> None:
    """Over all memory nodes, where there are several: every thread reads all of it."""
    if len(nodes) < 2:
        return
    arrays = [*kv.layers, *dense.matrices()]
    for address, nbytes in [(a.ctypes.data, a.nbytes) for a in arrays] + [
        (cache.arena_address, cache.arena_bytes)
    ]:
        interleave(address, nbytes, nodes)
