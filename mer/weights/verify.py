"""Reading a whole checkpoint to see whether it is intact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from attrs import frozen

from mer.errors import CheckpointError
from mer.weights.rows import dense_rows
from mer.weights.store_layout import new_checksum
from mer.weights.tensors import Checkpoint, TensorInfo

_CHUNK: Final = 8 << 20


@frozen
class Damage:
    """A tensor that is not as it should be."""

    file: Path
    tensor: str
    what: str


def verify(
    checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None, *, most: int | None = None
) -> list[Damage]:
    """Read every tensor, in the order of the files; returns the damaged ones.

    Of an expert store the checksums are compared. A Hugging Face directory has none: then every tensor must
    be readable, and no weight NaN or infinite. `progress` is called with (bytes done, bytes in all).
    most: bytes of experts, and of tensors without a checksum, that are looked at, spread over all of them;
    None: all.
    """
    found: list[Damage] = []
    done = 0
    tasks = sorted(_tasks(checkpoint), key=lambda task: task[:2])
    if most is not None:
        tasks = _sample(checkpoint, tasks, most)
    total = sum(nbytes for _, _, nbytes, *_ in tasks)
    for file, offset, nbytes, name, checksum in tasks:
        try:
            what = _check(checkpoint, file, offset, nbytes, name, checksum)
        except CheckpointError as error:
            what = str(error)
        if what:
            found.append(Damage(checkpoint.files[file], name, what))
        done += nbytes
        if progress:
            progress(done, total)
    return found


_Task = tuple[int, int, int, str, str | None]


def _tasks(checkpoint: Checkpoint) -> Iterator[_Task]:
    """(file, offset, nbytes, name, checksum) of every tensor."""
    for info in checkpoint.tensors.values():
        yield info.file, info.offset, info.nbytes, info.name, checkpoint.checksums.get(info.name)
    for expert in checkpoint.experts.values():
        (piece,) = expert.extents.pieces
        yield piece.file, piece.offset, piece.nbytes, expert.name, expert.checksum


def _sample(checkpoint: Checkpoint, tasks: list[_Task], most: int) -> list[_Task]:
    """Dense tensors with a checksum, and `most` bytes of the others."""
    whole = [task for task in tasks if task[3] in checkpoint.checksums]
    others = [task for task in tasks if task[3] not in checkpoint.checksums]
    step = max(1, -(-sum(task[2] for task in others) // most))
    return whole + others[::step]


def _check(
    checkpoint: Checkpoint, file: int, offset: int, nbytes: int, name: str, checksum: str | None
) -> str | None:
    if checksum is None:
        return _check_values(checkpoint, checkpoint.tensors[name])
    running = new_checksum()
    for start in range(0, nbytes, _CHUNK):
        size = min(_CHUNK, nbytes - start)
        running.update(checkpoint.read_bytes(file, offset + start, size, f"tensor {name}").data)
    if running.hexdigest() == checksum:
        return None
    return f"its checksum is {running.hexdigest()}, it was written with {checksum}"


def _check_values(checkpoint: Checkpoint, info: TensorInfo) -> str | None:
    if info.weights is None:
        checkpoint.read(info.name)
        return None
    rows = dense_rows(checkpoint, info)
    step = max(1, _CHUNK // 4 // max(1, info.cols))
    for start in range(0, info.rows, step):
        raw = rows.raw(start, min(info.rows, start + step))
        if not np.isfinite(info.weights.dequantize(raw)).all():
            return "it holds NaN or infinity"
    return None
