"""One model in memory, ready to compute steps; memory, files and threads are taken and given back here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from attrs import define, evolve, field
from numpy.typing import NDArray

from mer._ext.cpus import numa_nodes
from mer._ext.device import Device
from mer._ext.kernels import Kernels, Pool, interleave
from mer._ext.prefetch import Prefetcher
from mer._ext.routes import extra_experts
from mer._ext.uring import Reader
from mer.config import EngineConfig
from mer.engine import budget as budgets
from mer.engine import placing
from mer.engine.budget import Budget
from mer.engine.draft import DraftSource
from mer.engine.likely import LikelyExperts
from mer.engine.placing import ALONE, OnDevice
from mer.engine.routed import RoutedExperts
from mer.engine.scheduler import Chunk
from mer.engine.stats import StepStats, Vram
from mer.errors import BudgetError, ConfigError, GpuError
from mer.model.batch import Batch
from mer.model.block_copies import BlockCopies
from mer.model.dense import DenseWeights, load_dense
from mer.model.families import Architecture, load
from mer.model.forward import Forward
from mer.model.kv import KVCache
from mer.model.placement import ON_THE_CPU, Placement
from mer.model.spec import ModelSpec
from mer.model.state import StateCache
from mer.streaming.depth import open_reader, settle_depth
from mer.streaming.experts import ExpertTables, expert_tables
from mer.streaming.profile import Profile
from mer.streaming.trace import TraceWriter
from mer.weights import formats
from mer.weights.checkpoint import Checkpoint, open_checkpoint, require_streamable
from mer.weights.hub import title
from mer.weights.unchanged import Unchanged

_log = logging.getLogger("mer")

# In so many steps behind a draft what tokens wanted is noted: that takes some 25 us, a hundredth of a small
# model's step, and is of use to drafts alone.
_LEARNING: Final = 32


@define(eq=False)
class Runner:
    """Computes steps of one model. One thread at a time.

    experts: None in a dense model. device: the GPU that computes, too; None: there is none. placement: what
    of the dense part is there.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    budget: Budget
    reader: Reader
    experts: RoutedExperts | None
    isa: str
    pool: Pool
    _architecture: Architecture = field(alias="architecture")
    _forward: Forward = field(alias="forward")
    _unchanged: Unchanged = field(alias="unchanged")
    profile: Profile | None = None
    device: Device | None = None
    placement: Placement = ON_THE_CPU
    _likely: LikelyExperts | None = field(default=None, alias="likely")
    _depth_why: str = field(default="", alias="depth_why")
    _learning: int = field(default=0, init=False)  # steps that still note what tokens wanted
    _step_s: float = field(default=0.0, init=False)
    _left: str | None = field(default=None, init=False)  # why its dense part left the GPU
    _told: bool = field(default=False, init=False)  # that the GPU was lost
    _reads: int = field(default=0, init=False)  # that were there at the last look at the files

    @classmethod
    def open(
        cls,
        path: Path,
        config: EngineConfig,
        prepare: Callable[[Checkpoint, Architecture], Iterable[DraftSource]] = lambda *_: (),
        process: int | None = None,
        *,
        alone: bool = False,
        kv_tokens: int | None = None,
    ) -> Runner:
        """Open the model at `path` and load its dense weights.

        `prepare` is called before memory is divided: what it loads is counted, and so is what it returns,
        which is loaded later. process: bytes of the process without any engine, where there are others; None:
        what it holds now. alone, kv_tokens: see budget.measure. Raises CheckpointError,
        UnsupportedModelError, BudgetError, ConfigError or DeviceReadError.
        """
        checkpoint = open_checkpoint(path)
        require_streamable(checkpoint)
        architecture = load(checkpoint)
        tables = expert_tables(architecture.experts, path)
        sources = prepare(checkpoint, architecture)
        sizes = budgets.measure(
            checkpoint, architecture, tables, config, sources, process, alone=alone, kv_tokens=kv_tokens
        )
        held = budgets.resident_bytes()
        gpu = placing.place(checkpoint, architecture, tables, sizes, config)
        if process is not None:  # what the GPU's driver holds, where no other engine has opened it before
            process += max(0, budgets.resident_bytes() - held)
        config = evolve(config, context=sizes.context)  # which layers a GPU has went by it

        def opened(gpu: OnDevice) -> Runner:
            budget = budgets.plan(checkpoint, architecture, tables, config, sources, process, gpu.placement)
            budget = evolve(budget, longest=sizes.longest)
            return cls.load(checkpoint, architecture, tables, budget, config, gpu=gpu)

        try:
            return opened(gpu)
        except GpuError as error:  # another program was quicker to take its memory, or it failed
            if config.device != "auto" or config.gpu_layers != "auto":
                raise ConfigError(f"device {config.device}: {error}; --gpu-layers 0 may do") from None
            _log.warning("no dense layer is computed by the GPU: %s", str(error))
        return opened(gpu.experts_alone())

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        architecture: Architecture,
        tables: ExpertTables,
        budget: Budget,
        config: EngineConfig,
        pool: Pool | None = None,
        gpu: OnDevice = ALONE,
    ) -> Runner:
        """The same, once memory is divided. pool: threads of another Runner, which computes at other times.

        Raises CheckpointError, ConfigError, DeviceReadError or GpuError.
        """
        profile: Profile | None = None
        likely: LikelyExperts | None = None
        kernels, pool = _kernels(checkpoint, gpu.device), pool or Pool(budget.threads)
        spec = architecture.spec
        spec = spec.reaching(min(spec.max_positions, budget.longest))
        unchanged = Unchanged(checkpoint.files)
        try:
            reader = open_reader(checkpoint.files, config)
        except BaseException:
            unchanged.close()
            raise
        try:
            experts = RoutedExperts(spec, tables, budget, config) if spec.router else None
            dense = load_dense(checkpoint, architecture, reader, gpu.placement)
            unchanged.check()
            kv = KVCache(spec, budget.kv_blocks, budget.kv_dtype, gpu.placement.layers)
            states = StateCache(spec, budget.state_images)
            _spread(numa_nodes(), dense, [*kv.layers, *states.layers], experts)
            if experts is not None:
                experts.connect(checkpoint, reader, kernels, pool, dense.expert_biases())
                if gpu.device is not None:
                    _use_gpu(experts, gpu.device, gpu.experts, config, kernels.isa)
            forward = Forward(
                spec, dense, experts.streamer if experts else None, kv, states, pool, kernels,
                max_tokens=budget.step_tokens, max_rows=budget.rows,
                device=gpu.device, placement=gpu.placement,
            )  # fmt: skip
            unchanged.check()
            if budgets.drafts(config):
                forward.keep_inputs(budget.rows)
            if spec.router and budgets.drafts(config):
                forward.routes = np.zeros((spec.n_moe_layers, budget.rows, spec.top_k), np.int32)
                likely = LikelyExperts(spec)
            if config.trace is not None:
                if spec.router is None:
                    raise ConfigError("trace: this is a dense model, no token chooses experts; leave it out")
                forward.trace = TraceWriter(
                    config.trace, model=title(checkpoint.path), n_layers=spec.n_moe_layers,
                    n_experts=spec.n_experts, top_k=spec.top_k,
                )  # fmt: skip
            if config.profile is not None:
                profile = Profile(config.profile, model=title(checkpoint.path), n_experts=spec.n_experts)
                forward.profile(profile)
            depth_why = settle_depth(reader, tables, budget.slots, config.queue_depth)
            if experts is not None:
                forward.look_ahead = experts.look_ahead
                if profile is not None:
                    experts.streamer.record(profile.recorder)
                if config.peers:
                    experts.use_peers(checkpoint, kernels.isa)
                experts.begin()
        except BaseException:
            reader.close()
            unchanged.close()
            raise
        made = cls(
            checkpoint, spec, budget, reader, experts, kernels.isa, pool, architecture, forward,
            unchanged, profile, gpu.device, gpu.placement, likely, depth_why,
        )  # fmt: skip
        if (vram := made.vram) is not None:
            _log.info("on the GPU, %s", vram.told(budget.experts))
        return made

    def between_layers(self, work: Callable[[], None]) -> None:
        """Have this called before each layer of every step; it may call `resize`."""
        self._forward.between = work

    def resize(self, ram: int) -> Budget:
        """Have the expert cache shrink or grow so that the process keeps to `ram` bytes; between two layers.

        Its slots may still be more than fit, see RoutedExperts.resize. Raises BudgetError.
        """
        experts = self.experts
        budget = self.budget.resized(ram, experts.most_slots if experts else 0)
        if experts is not None and budget.slots != experts.cache.n_slots:
            budget = experts.resize(budget)
            self._forward.look_ahead = experts.look_ahead
        self.budget = budget
        return budget

    def leave_gpu(self, why: str) -> None:
        """Have the dense part of all layers computed by the CPU, since the GPU failed; between steps.

        Keys and values are lost. The expert cache makes room for weights that are read now. Raises
        BudgetError where `ram` is too little for them, and DeviceReadError; nothing has changed then, but
        that the cache may be smaller.
        """
        began, layers = time.monotonic(), self.placement.layers
        whole = self.budget.without_gpu(self.checkpoint, self._architecture)
        try:
            budget = whole.resized(whole.ram, self.experts.most_slots if self.experts else 0)
        except BudgetError as error:
            raise BudgetError(
                f"the GPU, which had the dense part of {layers} layers, failed ({why}), and {error}; "
                "or reload the model once the GPU works"
            ) from None
        if self.experts is not None and budget.slots != self.experts.cache.n_slots:
            budget = self.experts.resize(budget)
            self._forward.look_ahead = self.experts.look_ahead
        self._forward.leave_device()
        _spread(numa_nodes(), self._forward.dense, self._forward.kv.layers, None)
        self.budget, self.placement, self._left = budget, ON_THE_CPU, why
        _log.warning(
            "the dense part of %d layers is with the CPU from now on, read again in %.1f s; all requests "
            "that had begun are computed again: %s", layers, time.monotonic() - began, why,
        )  # fmt: skip

    def close(self) -> None:
        """Give the files back; no step may be under way."""
        # What was called belongs to who has this one: a cycle, and all would stay until a garbage collection.
        self.between_layers(lambda: None)
        if self.experts is not None:
            self.experts.end(used=self._step_s > 0)
        self.reader.close()
        self._unchanged.close()
        try:
            if self._forward.trace is not None:
                self._forward.trace.close()
        finally:
            if self.profile is not None:
                self.profile.close()

    @property
    def stats(self) -> StepStats:
        if self.experts is None:
            return StepStats(step_s=self._step_s)
        s = self.experts.streamer.stats()
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
            vram_hits=int(s["vram_hits"]),
            vram_passed=int(s["vram_passed"]),
            vram_promotions=int(s["vram_promotions"]),
            bus_bytes=int(s["bus_bytes"]),
            gpu_wait_s=float(s["gpu_wait_s"]),
        )

    def facts(self) -> dict[str, Any]:
        """See Engine.facts."""
        reader, budget = self.reader, self.budget
        return {
            "io_backend": reader.backend,
            "io_backend_why": reader.why,
            "queue_depth": reader.queue_depth,
            "queue_depth_why": self._depth_why,
            "isa": self.isa,
            "device": self.device.name if self.device else "cpu",
            "threads": budget.threads,
            "cache_slots": budget.slots,
            "experts": budget.experts,
            "kv_dtype": budget.kv_dtype,
            "prefetch_depth": self.prefetch_depth,
        }

    @property
    def vram(self) -> Vram | None:
        """What is in the GPU's memory; None: nothing ever was."""
        found: Mapping[str, Any] = self.experts.streamer.stats() if self.experts else {}
        layers, slots = self.placement.layers, int(found.get("vram_slots", 0))
        dense, kv = self._forward.device_bytes
        if self.device is None:
            return None
        lost = found.get("lost") or self.device.lost or (None if slots else self._left)
        if not (layers or slots or lost):
            return None
        return Vram(
            device=self.device.name,
            layers=layers,
            dense_bytes=dense,
            kv_bytes=kv,
            slots=slots,
            nbytes=int(found.get("vram_bytes", 0)),
            resident=int(found.get("vram_resident", 0)),
            evictions=int(found.get("vram_evictions", 0)),
            lost=lost,
        )

    @property
    def prefetch_depth(self) -> int:
        """How many guesses of a token are read ahead now: 0 where that does not pay."""
        return int(self.experts.streamer.stats()["prefetch_depth"]) if self.experts else 0

    def step(self, chunks: list[Chunk]) -> NDArray[np.float32]:
        """Compute the chunks: f32 [R, vocab], the logits after the last `rows` tokens of each, in order.

        Overwritten by the next step. Raises DeviceReadError or CheckpointError when an expert can't be read;
        the chunks can then be computed again. Also CheckpointError once files were written over in place, for
        what was read meanwhile may be half of each.
        """
        started = time.monotonic_ns()
        if self.experts is not None:
            self.experts.begin_step()
        batch = Batch.of(
            [(each.tokens, each.start, each.rows, each.sequence.blocks) for each in chunks],
            [each.sequence.images.move(each.start) for each in chunks] if self.budget.state_images else None,
        )
        try:
            learns = self._learning > 0
            self._forward.keep_routes = learns or any(chunk.draft for chunk in chunks)
            logits = self._forward.step(batch)
            if learns:
                self._learning -= 1
                self._learn(batch.tokens)
            reads = self.reader.stats()["ops"]
            if reads != self._reads:
                self._unchanged.check()
                self._reads = reads
            return logits
        finally:
            if self.experts is not None:
                self.experts.end_step()
            if self.device is not None and not self._told and self.device.lost:
                self._told = True
                _log.warning("%s is given up: %s", self.device.name, self.device.lost)
            self._step_s += (time.monotonic_ns() - started) / 1e9
            if self.profile is not None:
                self.profile.step(started, len(batch.tokens), len(chunks))

    def expect(self, tokens: list[int]) -> None:
        """The next step will compute these, the surest first: read ahead what they probably want."""
        prefetcher = self._early_reader
        if self._likely is not None and prefetcher is not None:
            self._learning = _LEARNING
            prefetcher.read_likely(self._likely.of(tokens, prefetcher.early_layers))

    def _learn(self, tokens: NDArray[np.int32]) -> None:
        likely, routes = self._likely, self._forward.routes
        if likely is not None and routes is not None and len(tokens) <= routes.shape[1]:
            likely.learn(tokens, routes)

    @property
    def _early_reader(self) -> Prefetcher | None:
        """What reads experts before a step; None where that is not worth it, or all are in memory."""
        experts = self.experts
        if experts is None or not experts.look_ahead:
            return None
        prefetcher = experts.streamer.prefetcher
        return prefetcher if prefetcher is not None and prefetcher.early_layers else None

    def replay(self, spans: list[tuple[int, int, int, int]]) -> None:
        """Of the last step, take some tokens of some sequences into their recurrent states again.

        Each: (place of the first one in the step, how many, the image behind what is before them, the image
        to write).
        """
        rows = [row for first, count, *_ in spans for row in range(first, first + count)]
        offsets = np.cumsum([0, *(count for _, count, *_ in spans)])
        moves = [(before, after, -1, 0) for *_, before, after in spans]
        self._forward.replay(np.array(rows, np.int32), offsets.astype(np.int32), np.array(moves, np.int32))

    def draft_experts(self, chunks: list[Chunk]) -> tuple[list[int], int]:
        """Of the step that computed these: experts that drafted tokens alone wanted, by chunk and in all."""
        routes = self._forward.routes
        if routes is None:
            return [0] * len(chunks), 0
        return extra_experts(
            routes, self.spec.n_experts, [(chunk.count, len(chunk.draft)) for chunk in chunks]
        )

    @property
    def kv(self) -> KVCache:
        """Keys and values."""
        return self._forward.kv

    @property
    def copies(self) -> BlockCopies:
        """Of their blocks, out and in."""
        return self._forward.copies

    @property
    def dense(self) -> DenseWeights:
        """The weights that are always in memory."""
        return self._forward.dense

    def hidden(self) -> NDArray[np.float32]:
        """f32 [T, hidden]: of each token of the last step, after the final norm; overwritten by the next."""
        return self._forward.hidden()

    def states(self, streams: bool) -> NDArray[np.float32]:
        """What a draft head reads: `hidden`, or f32 [T, streams * hidden] from before what makes them one."""
        return self._forward.streams() if streams else self._forward.hidden()


def _kernels(checkpoint: Checkpoint, device: Device | None) -> Kernels:
    """The best there are; with a GPU, those that add up BF16 in its order, as AMX does not."""
    kernels = Kernels()
    bf16 = any(info.format is formats.BF16 for info in checkpoint.tensors.values())
    if device is not None and kernels.isa == "amx" and bf16:
        return Kernels("avx512")
    return kernels


def _use_gpu(experts: RoutedExperts, device: Device, nbytes: int, config: EngineConfig, isa: str) -> None:
    """Have experts in so much of a GPU's memory.

    Raises ConfigError where that can't be, and the GPU was asked for by name.
    """
    try:
        experts.use_gpu(device, nbytes, isa)
    except GpuError as error:
        if config.device != "auto":
            raise ConfigError(f"device {config.device}: {error}") from None
        _log.warning("no expert is computed by the GPU: %s", str(error))


def _spread(
    nodes: dict[int, list[int]],
    dense: DenseWeights,
    caches: list[NDArray[Any]],
    experts: RoutedExperts | None,
) -> None:
    """Over all memory nodes, where there are several: every thread reads all of it."""
    if len(nodes) < 2:
        return
    arrays = (*caches, *dense.matrices())
    places = [(array.ctypes.data, array.nbytes) for array in arrays if array.nbytes]
    if experts is not None:
        places.append((experts.cache.arena_address, experts.cache.arena_bytes))
    for address, nbytes in places:
        interleave(address, nbytes, nodes)
