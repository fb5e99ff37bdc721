"""How many reads the device is given at once: measured on a model's own files, when it is opened.

Too few, and it has nothing to do while the computing thread does not look. Too many, and a demand read waits
behind prefetches, for what the kernel has been given is not overtaken any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mer.config import EngineConfig
from mer.errors import MerError
from mer.streaming.experts import ExpertTables
from mer.streaming.probe import DEPTHS, DepthRate, enough, measure_rates
from mer.streaming.reader import Reader, aligned_empty

_log = logging.getLogger("mer")

# What readers are opened with where it is to be measured.
_MOST_READS: Final = DEPTHS[-1]
_MOST_THREADS: Final = 16
# Of the back ends with threads, where nothing was measured.
_THREADS: Final = 4
# Experts of fewer bytes in all are read sooner than a measurement is worth it.
_SMALL: Final = 512 << 20
# Seconds of each of two rounds at a depth, and of all together.
_SLICE: Final = 0.01
_BUDGET: Final = 0.2
# Bytes on their way at a time: more than what any drive has in a millisecond. And of one read.
_IN_FLIGHT: Final = 16 << 20
_BLOCK: Final = 4 << 20
_HUGE_PAGE: Final = 2 << 20
# So many experts are looked for in the page cache.
_SAMPLE: Final = 16


def open_reader(files: Iterable[Path], config: EngineConfig) -> Reader:
    """A reader of these files, as deep as it may become. Raises as Reader does."""
    most = config.queue_depth or _MOST_READS
    return Reader(files, backend=config.io_backend, queue_depth=most, threads=min(most, _MOST_THREADS))


def settle_depth(reader: Reader, tables: ExpertTables, slots: int, asked: int | None) -> str:
    """Set the queue depth to what the device needs, unless one was asked for; in words, why it is what it is.

    reader: from open_reader(). slots: experts that there is room for in memory. It takes some 0.2 s; where it
    would be of no use nothing is measured.
    """
    if asked is not None:
        return "as asked for"
    depth = _MOST_READS if reader.backend == "uring" else _THREADS
    why = _useless(reader, tables, slots)
    if why is not None:
        why = f"not measured: {why}"
    else:
        try:
            depth, why = _measured(reader, tables)
        except MerError as error:  # whoever needs what can't be read is told
            why = f"could not be measured: {error}"
        _log.info("reads: %d at once; %s", depth, why)
    reader.set_queue_depth(depth)
    return why


def _useless(reader: Reader, tables: ExpertTables, slots: int) -> str | None:
    if slots >= tables.total:
        return "all weights have room in memory"
    if tables.reads[:, :, 2].sum() < _SMALL:
        return "all experts are read in no time"
    if reader.alignment == 1:
        return "reads go by way of the page cache"
    order = np.random.default_rng().permutation(tables.total)[:_SAMPLE]
    found = [reader.cached(int(r[0]), int(r[1]), int(r[3])) for r in tables.reads[order, 0]]
    return "the page cache holds the experts" if 2 * sum(found) > len(found) else None


def _measured(reader: Reader, tables: ExpertTables) -> tuple[int, str]:
    file, size = _typical(tables.reads)
    block = min(size, _BLOCK)
    most = _MOST_READS if reader.backend == "uring" else _MOST_THREADS
    depths = [depth for depth in DEPTHS if depth <= most and depth * block <= max(_IN_FLIGHT, 2 * block)]
    # Whole huge pages, as experts are read into: beside them a read is many small parts, and slower.
    memory = aligned_empty(max(block, _IN_FLIGHT) + _HUGE_PAGE)
    memory = memory[-memory.ctypes.data % _HUGE_PAGE :]
    memory.fill(0)  # its pages are there before the clock runs
    rates = measure_rates(reader, file, block, depths, _SLICE, into=memory, until=time.monotonic() + _BUDGET)
    depth = min(most, enough(rates, block, size))
    return depth, f"measured: {_told(rates)} in reads of {block >> 10} KiB"


def _told(rates: tuple[DepthRate, ...]) -> str:
    return ", ".join(f"{rate.bytes_per_second / 1e9:.2f} GB/s with {rate.depth}" for rate in rates)


def _typical(reads: NDArray[np.int64]) -> tuple[int, int]:
    """The file that has most of the experts' bytes, and the mean size of a read there, in blocks of 4096."""
    each = reads.reshape(-1, 5)
    each = each[each[:, 2] > 0]
    file = int(np.argmax(np.bincount(each[:, 0], weights=each[:, 2])))
    mean = int(each[each[:, 0] == file, 2].mean())
    return file, -(-mean // 4096) * 4096
