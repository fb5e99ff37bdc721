"""Encoding matrices in a format, slab by slab, by several threads: what every conversion does."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from mer.errors import CheckpointError
from mer.weights.formats import Format
from mer.weights.reordered import Source

# Elements of a slab: with the slabs in flight and numpy's temporaries, memory stays below some 200 MB.
_SLAB: Final = 2 << 20


class Encoder:
    """A few threads that read and encode ahead of whoever writes."""

    def __init__(self) -> None:
        self._workers = max(1, min(4, len(os.sched_getaffinity(0))))
        self._pool = ThreadPoolExecutor(self._workers, "mer-convert")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def slabs(self, sources: Iterable[Source], form: Format) -> Iterator[NDArray[np.uint8]]:
        """The rows of all sources in this format, in order, some at a time: uint8 [rows, row_bytes].

        Bytes are untouched where the format stays. Raises CheckpointError for a source that can't be read or
        holds NaN or infinity.
        """
        running: deque[Future[NDArray[np.uint8]]] = deque()
        try:
            for source in sources:
                rows, step = source.rows, max(1, _SLAB // max(1, source.cols))
                for start in range(0, rows, step):
                    if len(running) > self._workers:
                        yield running.popleft().result()
                    running.append(self._pool.submit(_encode, source, form, start, min(rows, start + step)))
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _encode(source: Source, form: Format, start: int, stop: int) -> NDArray[np.uint8]:
    if form is source.format:
        return source.raw(start, stop)
    values = source.read(start, stop)
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{source.origin}: {source.name} holds NaN or infinity, which no weight may be; "
            "the file is damaged, fetch it again"
        )
    return form.quantize(values)
