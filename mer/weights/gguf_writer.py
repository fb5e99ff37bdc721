"""Writing a GGUF file: metadata and tensors of any size, a piece at a time, complete or not there at all."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer.errors import ConfigError, MerError
from mer.weights.formats import Format
from mer.weights.gguf import ARRAY, MAGIC, STRING, Raw

_VERSION: Final = 3
_ALIGN: Final = 32  # GGUF's own default
_BOOL, _INT32, _UINT32, _FLOAT32 = 7, 5, 4, 6

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str] | Raw
Pieces = Iterator[NDArray[np.uint8]]
Progress = Callable[[int, int], None]


@frozen(eq=False)
class Entry:
    """A tensor to write. shape: in elements, a row's length last. pieces: makes its bytes when asked."""

    name: str
    shape: tuple[int, ...]
    format: Format
    pieces: Callable[[], Pieces]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])


def write_gguf(
    path: Path, metadata: Mapping[str, Value], entries: Sequence[Entry], progress: Progress | None = None
) -> int:
    """Write the file `path`; returns its bytes. `progress` is called with (bytes done, bytes in all).

    All is written to `path`.partial, made durable, and only then called `path`; when something goes wrong,
    nothing is left. Raises ConfigError when `path` exists, MerError when writing fails.
    """
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists already; name a new file, or remove it first")
    header, places = lay_out(metadata, entries)
    total = len(header) + places[-1] + _padded(entries[-1].nbytes) if entries else len(header)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("ab")
    except OSError as error:
        raise ConfigError(f"{partial}: can't be written: {error.strerror}; name another place") from error
    with file, _explained(partial):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{partial}: another conversion is writing here; wait for it to end") from None
        try:
            file.truncate(0)
            _check_room(partial, total)
            _write(file, header, entries, progress or (lambda done, total: None))
            file.flush()
            os.fsync(file.fileno())
            os.rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _fsync_directory(path.parent)
    return total


def lay_out(metadata: Mapping[str, Value], entries: Sequence[Entry]) -> tuple[bytes, list[int]]:
    """The header, padded to where the data starts, and each tensor's offset from there."""
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _encoded(value)]
    places: list[int] = []
    position = 0
    for entry in entries:
        dims = struct.pack(f"<{len(entry.shape)}Q", *entry.shape[::-1])
        parts += [_text(entry.name), struct.pack("<I", len(entry.shape)), dims]
        parts.append(struct.pack("<IQ", entry.format.id, position))
        places.append(position)
        position += _padded(entry.nbytes)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header)), places


def _write(file: BinaryIO, header: bytes, entries: Sequence[Entry], progress: Progress) -> None:
    total = sum(entry.nbytes for entry in entries)
    done = 0
    file.write(header)
    for entry in entries:
        end = done + entry.nbytes
        for piece in entry.pieces():
            file.write(piece.reshape(-1).data)
            done += piece.nbytes
            progress(done, total)
        assert done == end, f"{entry.name}: {done - end + entry.nbytes} bytes of {entry.nbytes}"
        file.write(bytes(_padded(entry.nbytes) - entry.nbytes))


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _encoded(value: Value) -> bytes:
    """A value behind the number of its type. Whole numbers are 32 bits wide, in lists with a sign."""
    if isinstance(value, Raw):
        return struct.pack("<I", value.kind) + value.data
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    kind, items = _items(value)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + items


def _items(values: Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[str]) -> tuple[int, bytes]:
    kinds = set(map(type, values)) or {str}
    if kinds == {str}:
        return STRING, b"".join(map(_text, map(str, values)))
    if kinds == {bool}:
        return _BOOL, np.array(values, np.uint8).tobytes()
    if kinds == {int}:
        return _INT32, np.array(values, "<i4").tobytes()
    return _FLOAT32, np.array(values, "<f4").tobytes()


def _check_room(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise MerError(
            f"{partial}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; make room, or name "
            "another place"
        )


@contextmanager
def _explained(partial: Path) -> Iterator[None]:
    """An OSError of the writing side becomes a MerError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room, or name another place" if full else "name another place"
        raise MerError(f"{partial}: writing failed: {error.strerror}; {advice}") from error


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
