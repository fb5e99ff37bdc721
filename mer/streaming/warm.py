"""Warm start: experts that were in memory when a model was closed are read back when it is opened again."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mer._ext.cache import ExpertCache
from mer._ext.sweep import Sweep
from mer._ext.uring import Reader
from mer.config import cache_dir
from mer.streaming.experts import ExpertTables
from mer.weights.checkpoint import Checkpoint

_log = logging.getLogger("mer")

_VERSION: Final = 1


class WarmStart:
    """Remembers a model's hot experts in a small file, and reads them back on a thread of its own.

    A file that can't be read or used is as good as none: it costs a line in the log.
    """

    def __init__(
        self, checkpoint: Checkpoint, tables: ExpertTables, cache: ExpertCache, reader: Reader
    ) -> None:
        self._tables = tables
        self._cache = cache
        place = checkpoint.path.resolve()
        self._name = f"hot/{place.name}-{_digest([str(place)])[:16]}.json"
        stats = [(file.name, file.stat()) for file in checkpoint.files]
        self._weights = _digest([f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats])
        self._sweep = Sweep(cache, reader, tables.reads)
        self._thread: threading.Thread | None = None
        self._experts: list[tuple[int, float]] = []
        self._heat: list[tuple[int, float]] = []
        self._recall()

    @property
    def heat(self) -> NDArray[np.float32]:
        """f32 [experts]: how hot each was, on whatever machine; 0 where nothing was remembered."""
        found = np.zeros(self._tables.total, np.float32)
        for key, share in self._heat or self._experts:
            found[key] = share
        return found

    def _recall(self) -> None:
        try:
            file = cache_dir() / self._name
            text = file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("warm start: %s; starting cold", error)
            return
        try:
            self._experts, self._heat = self._parse(text)
        except (ValueError, RecursionError) as error:
            _log.warning("warm start: %s: %s; ignored", file, error)

    def begin(self) -> None:
        """Read back what was remembered: the hottest that fit, in the order in which they lie on disk."""
        if not self._experts:
            return
        for key, chance in self._experts:
            self._cache.remember(key, chance)
        experts = sorted(self._experts, key=lambda each: -each[1])
        keys = np.array([key for key, _ in experts[: self._cache.n_slots]], np.int64)
        order = np.lexsort((self._tables.reads[keys, 0, 1], self._tables.reads[keys, 0, 0]))
        self._thread = threading.Thread(target=self._run, args=(keys[order],), name="mer-warm", daemon=True)
        self._thread.start()

    def _run(self, keys: NDArray[np.int64]) -> None:
        start = time.monotonic()
        self._sweep.run(keys)
        mib, seconds = self._sweep.nbytes / (1 << 20), time.monotonic() - start
        _log.info("warm start: %d experts, %.0f MiB, in %.2f s", self._sweep.experts, mib, seconds)

    def end(self, *, used: bool, heat: NDArray[np.float32] | None = None) -> None:
        """Stop reading; remember what is in memory, if the model was used. Before the reader is closed.

        heat: f32 [experts], how hot each is, where other machines hold some.
        """
        self._sweep.stop()
        if self._thread is not None:
            self._thread.join()
        if not used:
            return
        chances = self._cache.chances()
        content: dict[str, Any] = {"version": _VERSION, "weights": self._weights, "experts": _pairs(chances)}
        if heat is not None:
            content["heat"] = _pairs(heat)
        try:
            file = cache_dir() / self._name
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(content))
            part.replace(file)
        except OSError as error:
            _log.warning("warm start: nothing was remembered: %s", error)

    def _parse(self, text: bytes) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """(number in the cache, chance) of each expert, and (number, heat). Raises ValueError."""
        content: Any = json.loads(text)
        if not isinstance(content, dict) or content.get("version") != _VERSION:
            raise ValueError("not of this version of mer")
        if content.get("weights") != self._weights:
            raise ValueError("made with other weights")
        return self._numbers(content.get("experts")), self._numbers(content.get("heat", []))

    def _numbers(self, experts: Any) -> list[tuple[int, float]]:
        if not isinstance(experts, list) or not all(self._is_expert(each) for each in experts):
            raise ValueError("not a list of this model's experts")
        if len({key for key, _ in experts}) != len(experts):
            raise ValueError("an expert is in it twice")
        return [(key, chance) for key, chance in experts]

    def _is_expert(self, each: Any) -> bool:
        if not isinstance(each, list) or [type(part) for part in each] != [int, float]:
            return False
        key, chance = each
        return 0 <= key < self._tables.total and math.isfinite(chance) and 0 < chance <= 1


def _pairs(values: NDArray[np.floating]) -> list[tuple[int, float]]:
    return [(int(key), float(f"{values[key]:.6g}")) for key in np.nonzero(values > 0)[0]]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
