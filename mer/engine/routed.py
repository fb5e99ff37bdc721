"""The routed experts of one model: their cache, their streamer, and what remembers the hot ones."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from mer._ext.cache import ExpertCache
from mer._ext.device import Device
from mer._ext.kernels import Kernels, Pool
from mer._ext.moe import ExpertStreamer
from mer._ext.uring import Reader
from mer.cluster.state import PeerState
from mer.config import EngineConfig
from mer.engine.budget import Budget
from mer.errors import ConfigError, GpuError, RequestError
from mer.model.mixture import fit
from mer.model.spec import ModelSpec
from mer.streaming.experts import ExpertTables, advice
from mer.streaming.warm import WarmStart
from mer.weights import formats
from mer.weights.checkpoint import Checkpoint

if TYPE_CHECKING:  # it brings gRPC, which only those need who have peers
    from mer._ext.remote import RemoteTier
    from mer.cluster.peers import Peers

# Bytes of the expert cache that are touched ahead of their use, in idle time.
_PREFAULT: Final = 1 << 30

_Biases = list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]


def idle_in_dense(config: EngineConfig) -> str | None:
    """What to tell whoever asked for a part of the experts, where there are none; None where nobody did."""
    asked = {"--cache-experts": config.cache_experts is not None, "--warm-start": config.warm_start}
    asked["--peer"] = bool(config.peers)
    asked["--expert-wire"] = config.expert_wire != "f32"
    names = [name for name, given in asked.items() if given]
    if not names:
        return None
    return f"{' and '.join(names)} did nothing: the model is dense, all of it is in memory; leave it out"


class RoutedExperts:
    """What a Runner has for a model with experts, and not for a dense one.

    The cache is there at once and its memory touched while dense weights are read; `connect` does the rest.
    """

    streamer: ExpertStreamer
    _tier: RemoteTier

    def __init__(self, spec: ModelSpec, tables: ExpertTables, budget: Budget, config: EngineConfig) -> None:
        self._spec, self._tables, self._budget, self._config = spec, tables, budget, config
        self._most = budget.slots if config.cache_experts is not None else tables.total
        self._warm: WarmStart | None = None
        self._peers: Peers | None = None
        self._pinning = threading.Lock()
        self.pinned: frozenset[int] = frozenset()
        self._arena_registered = self._resized = False
        try:
            self.cache = self._make_cache(self._most)
        except MemoryError:  # addresses are limited (ulimit -v): it can shrink then, and not grow
            self._most = budget.slots
            self.cache = self._make_cache(self._most)
        self.cache.prefault(_PREFAULT)

    def _make_cache(self, most: int) -> ExpertCache:
        return ExpertCache(
            self._tables.total, self._budget.slots, self._budget.slot, max_slots=most,
            policy=self._config.cache_policy, n_layers=self._spec.n_moe_layers,
        )  # fmt: skip

    @property
    def most_slots(self) -> int:
        """To how many the cache can grow."""
        return self._most

    def resize(self, budget: Budget) -> Budget:
        """Give slots of the cache back to the system, or take more; between layers, by the thread of steps.

        More than `budget.slots` may be left where experts are in use or pinned: what is returned says so.
        """
        self._resized = True
        if self._arena_registered:  # the ring would hold on to the pages, and read into them later
            self._arena_registered = False
            self._reader.drop_buffers()
        self.streamer.settle()
        with self._pinning:
            slots = max(budget.slots, min(len(self.pinned) + budget.least_slots, self._most))
            self._budget = evolve(budget, slots=self.cache.resize(slots))
        return self._budget

    @property
    def advice(self) -> str | None:
        """What would make experts faster to read; None where nothing would, or where all are in memory."""
        return advice(self._tables) if self._budget.slots < self._tables.total else None

    def connect(
        self, checkpoint: Checkpoint, reader: Reader, kernels: Kernels, pool: Pool, biases: _Biases
    ) -> None:
        """Make the streamer. biases: of each MoE layer, where the experts have such."""
        tables, spec, config = self._tables, self._spec, self._config
        self._reader = reader
        self.streamer = ExpertStreamer(
            self.cache, reader, kernels, pool, tables.layers, tables.reads, tables.matrices,
            spec.top_k, self._budget.step_tokens, min(config.prefetch, tables.total),
        )  # fmt: skip
        fit(self.streamer, spec, biases)
        if config.warm_start:
            self._warm = WarmStart(checkpoint, tables, self.cache, reader)

    def use_gpu(self, device: Device, nbytes: int, isa: str) -> None:
        """Have experts computed in a GPU's memory, too. isa: of the kernels that compute the others.

        Raises GpuError, GpuMemoryError where that can't be.
        """
        blocks = formats.F32.id, formats.F16.id, formats.BF16.id
        if isa == "scalar" and np.isin(self._tables.layers[:, :3], blocks).any():
            raise GpuError("plain C adds up products of floats in another order than a GPU does")
        self.streamer.use_vram(device, nbytes)

    def use_peers(self, checkpoint: Checkpoint, isa: str) -> None:
        """Have other machines compute what they hold in memory. isa: of the kernels here.

        Raises ConfigError, DeviceReadError or CheckpointError.
        """
        from mer.cluster.identity import identify
        from mer.cluster.members import Local
        from mer.cluster.peers import PATIENCE_NS, Peers

        tables, budget = self._tables, self._budget
        # Some slots are for what passes.
        kept = (budget.slots - budget.least_slots) * 3 // 4
        local = Local(len(tables.layers), tables.n_experts, int(tables.layers[:, 3].max()), kept)
        peers = Peers(self._config, identify(checkpoint, tables, self.streamer, isa), local)
        self._tier = self.streamer.use_peers(peers, PATIENCE_NS)
        if self._warm is not None:
            self._tier.remember(self._warm.heat)
        peers.begin(self._tier)
        self._peers = peers

    @property
    def peers(self) -> tuple[PeerState, ...]:
        """Other machines that hold experts."""
        return self._peers.states() if self._peers is not None else ()

    def exchange_peers(self, addresses: Sequence[str]) -> None:
        """See `Engine.exchange_peers`."""
        if self._peers is None:
            raise ConfigError("this engine was opened without peers; open it with at least one")
        self._peers.exchange(addresses)

    def begin(self) -> None:
        """Everything is made: round as is asked for, and read back what was remembered, if that is, too."""
        self.streamer.mixture.round_to(formats.by_name(self._config.expert_wire).id)
        if self._warm is not None:
            self._warm.begin()

    def end(self, *, used: bool) -> None:
        """Before the reader is closed. used: whether steps were computed."""
        heat = None
        if self._peers is not None:
            self._peers.close()
            heat, _ = self._tier.heats()
        if self._warm is not None:
            self._warm.end(used=used, heat=heat)

    def pin(self, layer: int, expert: int | None, *, on: bool) -> int:
        """See `Engine.pin`."""
        layers, experts = self.cache.n_layers, self.cache.n_experts // self.cache.n_layers
        if not 0 <= layer < layers:
            raise RequestError(f"layer {layer}: the model has {layers} layers with experts, from 0", "layer")
        if expert is not None and not 0 <= expert < experts:
            raise RequestError(f"expert {expert}: a layer has {experts}, from 0", "expert")
        first = layer * experts
        named = range(first, first + experts) if expert is None else [first + expert]
        with self._pinning:
            pinned = self.pinned.union(named) if on else self.pinned.difference(named)
            # What the largest step of one token needs must find room beside them.
            room = self._budget.slots - self._budget.least_slots
            if on and len(pinned) > room and self._budget.slots < self._budget.experts:
                raise RequestError(
                    f"{len(pinned)} experts would be pinned; of the cache's {self._budget.slots} slots "
                    f"{room} can be",
                    "layer" if expert is None else "expert",
                )
            (self.cache.pin_set if on else self.cache.unpin_set)(named)
            self.pinned = pinned
        return len(pinned)

    @property
    def look_ahead(self) -> bool:
        """Whether reading ahead could be of use."""
        return self._config.prefetch > 0 and self._budget.slots < self._budget.experts

    def begin_step(self) -> None:
        self.cache.hold_prefault_py(True)

    def end_step(self) -> None:
        self.cache.hold_prefault_py(False)
        self._register_arena()

    def _register_arena(self) -> None:
        """Make the cache's arena fixed buffers of the ring, once it is full: a read takes less CPU time then.

        Not before: registering touches all of it, which would delay the first token. Not where the cache has
        changed its size, and its slots no longer are its arena's first ones.
        """
        if self._arena_registered or self._resized or self._budget.slots == self._budget.experts:
            return
        stats = self.streamer.stats()
        if stats["misses"] + stats["prefetched"] >= self._budget.slots:
            self._arena_registered = True
            self._reader.add_buffer(self.cache.arena_address, self._budget.cache)
