"""Experts of one model in this machine's memory, computed for engines on other machines."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from math import inf
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mer._ext.cache import ExpertCache
from mer._ext.cpus import usable_cpus
from mer._ext.kernels import Kernels, Pool
from mer._ext.moe import ExpertStreamer, scratch_bytes
from mer._ext.sweep import Sweep
from mer._ext.uring import Reader
from mer.cluster.identity import Identity, identify
from mer.cluster.wire import MOST_ROWS, most_bytes
from mer.errors import BudgetError, ConfigError, MerError
from mer.model.dense import load_expert_biases
from mer.model.families import load
from mer.model.mixture import fit
from mer.streaming.experts import expert_tables
from mer.weights.checkpoint import open_checkpoint, require_streamable
from mer.weights.unchanged import Unchanged

_log = logging.getLogger("mer")

# What grows while running: the interpreter's heap, thread stacks, gRPC's buffers.
_MARGIN: Final = 64 << 20
# Engines at a time; each has a thread, which sleeps while it is asked nothing.
MOST_ENGINES: Final = 16
# Of the largest rows of each, copies that are in memory at a time: as they came and were taken apart, as they
# are computed, and as the answer is put together and sent (measured: 230 MiB with rows of 2048).
_COPIES: Final = 7
# Seconds between two looks at whether the files are as they were.
_LOOK: Final = 1.0
# What could not be read is tried again: seconds, doubled with each time.
_AGAIN: Final = 1.0
_LONGEST: Final = 60.0


class LateError(MerError):
    """Nobody wants any more what was to be computed."""


class Shard:
    """At most `capacity` experts; which, is told by `assign`, and they are read in the background.

    May be used by several threads.
    """

    def __init__(
        self,
        path: Path,
        ram: int,
        process: int,
        *,
        most: int | None = None,
        threads: int | None = None,
        io_backend: str = "auto",
    ) -> None:
        """ram: bytes that the process may hold; process: those that it holds already. most: of experts.

        Raises BudgetError, CheckpointError, UnsupportedModelError, ConfigError or DeviceReadError.
        """
        checkpoint = open_checkpoint(path)
        require_streamable(checkpoint)
        architecture = load(checkpoint)
        spec = architecture.spec
        if not spec.router:
            raise ConfigError(
                f"{path}: this is a dense model: it has no experts that could be held elsewhere"
            )
        self._tables = tables = expert_tables(architecture.experts, path)
        self.hidden = [int(hidden) for hidden in tables.layers[:, 3]]
        self.n_experts = tables.n_experts
        self.most_bytes = most_bytes(max(self.hidden), tables.total)
        fixed = process + scratch_bytes(tables.layers, tables.reads, 1, MOST_ROWS) + _MARGIN
        fixed += MOST_ENGINES * _COPIES * MOST_ROWS * max(self.hidden) * 4
        slots = min((ram - ram // 512 - fixed) // tables.slot_bytes, most or tables.total, tables.total)
        if slots < 1:
            raise BudgetError(
                f"ram {ram >> 20} MiB is too little: one expert and what is needed beside it take "
                f"{((fixed + tables.slot_bytes) >> 20) + 2} MiB; raise --ram"
            )
        self._unchanged = Unchanged(checkpoint.files)
        try:
            self._reader = Reader(checkpoint.files, backend=io_backend)
        except BaseException:
            self._unchanged.close()
            raise
        try:
            kernels = Kernels()
            self._cache = ExpertCache(tables.total, slots, tables.slot_bytes)
            # Every pair of a token and an expert is a row of its own.
            self._streamer = ExpertStreamer(
                self._cache, self._reader, kernels, Pool(threads or usable_cpus()), tables.layers,
                tables.reads, tables.matrices, 1, MOST_ROWS,
            )  # fmt: skip
            biases = load_expert_biases(checkpoint, architecture, self._reader) if spec.expert_bias else []
            fit(self._streamer, spec, biases)
            self.identity: Identity = identify(checkpoint, tables, self._streamer, kernels.isa)
            self._unchanged.check()
            self._cache.clear()
        except BaseException:
            self._reader.close()
            self._unchanged.close()
            raise
        self.ram, self.capacity = ram, self._cache.n_slots
        self._assigned: frozenset[int] = frozenset()
        #: Whether it computes nothing any more, since its files were changed under it.
        self.failed = False
        self._lock = threading.Lock()  # of what is computed, and which experts are here
        self._told = threading.Condition()
        self._sweep: Sweep | None = None
        self._generation = 0
        self._closed = False
        self._loader = threading.Thread(target=self._load, name="mer-shard", daemon=True)
        self._loader.start()

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return self._tables.total

    def assign(self, experts: Iterable[int]) -> None:
        """Hold these from now on, and no others. Raises ConfigError for too many, or an unknown one."""
        wanted = frozenset(experts)
        if len(wanted) > self.capacity or not all(0 <= key < self.total for key in wanted):
            raise ConfigError(
                f"{len(wanted)} of {self.total} experts can't be held: {self.capacity} have room"
            )
        with self._lock:
            if wanted == self._assigned:
                return
            leaving = self._assigned - wanted
            self._cache.unpin_set(leaving)
            for key in leaving:
                self._cache.drop_py(key)
            self._cache.pin_set(wanted)
            self._assigned = wanted
        with self._told:
            self._generation += 1
            if self._sweep is not None:
                self._sweep.stop()
            self._told.notify()

    def held(self) -> list[int]:
        """Those that are in memory."""
        here = np.flatnonzero(self._cache.chances() >= 0)
        return [int(key) for key in here if int(key) in self._assigned]

    def compute(
        self,
        layer: int,
        x: NDArray[np.float32],
        experts: NDArray[np.int32],
        weights: NDArray[np.float32],
        until: float = inf,
    ) -> NDArray[np.float32] | None:
        """f32 [pairs, hidden]: what each expert makes of its row of x, weighted. None: some are not here.

        x f32 [pairs, hidden], experts i32 and weights f32 [pairs, 1], at most MOST_ROWS pairs. until: of the
        monotonic clock; raises LateError where the turn of this comes later, behind what other engines want.
        """
        with self._lock:
            if time.monotonic() > until:
                raise LateError("nobody wants it any more")
            for expert in set(experts.ravel().tolist()):
                key = layer * self.n_experts + expert
                if key not in self._assigned or self._cache.state_py(key) != "resident":
                    return None
            out = np.empty_like(x)
            self._streamer.forward(layer, x, experts, weights, out)
            return out

    def _load(self) -> None:
        """Reads what is assigned, in the order in which it lies on disk, whenever that has changed.

        What could not be read is tried again now and then.
        """
        done, due, pause = 0, inf, _AGAIN
        while True:
            with self._told:
                if self._generation == done and not self._closed:
                    self._told.wait(min(_LOOK, max(due - time.monotonic(), 0)))
                if self._closed:
                    return
                if self._generation != done:
                    done, due, pause = self._generation, 0.0, _AGAIN
                wanted = time.monotonic() >= due
                sweep = self._sweep = Sweep(self._cache, self._reader, self._tables.reads) if wanted else None
            keys = np.array(sorted(self._assigned), np.int64)
            if sweep is not None:
                with self._lock:
                    self._cache.clear()  # what was on its way when it left what is assigned
                order = np.lexsort((self._tables.reads[keys, 0, 1], self._tables.reads[keys, 0, 0]))
                sweep.run(keys[order])
            try:
                self._unchanged.check()
            except MerError as error:
                _log.error("%s: this shard computes nothing any more", error)
                with self._lock:
                    self._cache.unpin_set(self._assigned)
                    self._assigned = frozenset()
                    self.failed = True
                return
            if sweep is not None:
                missing = len(keys) - len(self.held())
                _log.info("%d of %d assigned experts are in memory", len(keys) - missing, len(keys))
                if missing and done == self._generation:
                    _log.warning("%d experts could not be read; again in %g s", missing, pause)
                due = time.monotonic() + pause if missing else inf
                pause = min(2 * pause, _LONGEST)

    def close(self) -> None:
        """Give everything back; nothing may be computed any more."""
        with self._told:
            self._closed = True
            if self._sweep is not None:
                self._sweep.stop()
            self._told.notify()
        self._loader.join()
        with self._lock:
            self._reader.close()
            self._unchanged.close()
