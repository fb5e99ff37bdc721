"""A store that is being written: `DST.partial`, its journal, its move to the final name."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from mer.errors import ConfigError, MerError
from mer.weights.store_layout import FileLayout, TensorPlace, new_checksum

JOURNAL: Final = "conversion.journal"
_CHUNK: Final = 8 << 20


class PartialStore:
    """Writes the files of `layouts` below `DST.partial`; `finish` gives the directory its final name.

    A tensor is in the journal, with its checksum, once all its bytes are written. A conversion that was
    killed finds it there, checks the bytes and goes on. identity: which source this is a conversion of; only
    the same source and the same layout may go on. Raises ConfigError when DST exists or DST.partial is
    another conversion's.
    """

    def __init__(self, dst: Path, layouts: list[FileLayout], identity: dict[str, Any]) -> None:
        self.dst = dst
        self.path = dst.with_name(dst.name + ".partial")
        self.done: dict[tuple[str, str], str] = {}
        self._layouts = {layout.name: layout for layout in layouts}
        self._files: dict[str, int] = {}
        if dst.exists() or dst.is_symlink():
            raise ConfigError(f"{dst} exists already; name a new directory, or remove it first")
        headers = [layout.header({t.name: "0" * 32 for t in layout.tensors}) for layout in layouts]
        layout_sum = hashlib.blake2b(b"".join(headers), digest_size=16).hexdigest()
        first = json.dumps({**identity, "layout": layout_sum}, sort_keys=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path}: can't be made: {error.strerror}; name another place") from error
        with self.explained():
            self._journal = (self.path / JOURNAL).open("a+b", buffering=0)
        try:
            self._open(first.encode() + b"\n")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what is unfinished stays, to be resumed."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._journal.close()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An OSError of the writing side becomes a MerError that says what to do."""
        try:
            yield
        except OSError as error:
            advice = f"what is done so far is kept in {self.path}: run the same command again to go on"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                advice = f"make room; {advice}, or remove it"
            raise MerError(
                f"{error.filename or self.path}: writing failed: {error.strerror}; {advice}"
            ) from error

    def _open(self, identity: bytes) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{self.path}: another conversion is writing here; wait for it to end"
            ) from None
        self._journal.seek(0)
        lines = self._journal.readlines()
        fresh = not lines or not lines[0].endswith(b"\n")
        if not fresh and lines[0] != identity:
            raise ConfigError(
                f"{self.path}: an unfinished conversion of another source or with other formats; "
                "remove it, or use --restart"
            )
        with self.explained():
            self._check_room(0 if fresh else self._written())
            for name, layout in self._layouts.items():
                self._files[name] = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._files[name], layout.data_start + layout.data_bytes)
            if fresh:
                self._journal.truncate(0)
                self._append(identity)
                return
            self._resume(lines[1:])

    def _written(self) -> int:
        return sum(512 * file.stat().st_blocks for file in self.path.iterdir())

    def _check_room(self, written: int) -> None:
        needed = sum(layout.data_start + layout.data_bytes for layout in self._layouts.values()) - written
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise MerError(
                f"{self.path}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; make room, "
                "or name another place"
            )

    def _resume(self, lines: list[bytes]) -> None:
        """Take over what the journal says is done and still has the checksum that it says."""
        places = {(file.name, t.name): t for file in self._layouts.values() for t in file.tensors}
        good: list[bytes] = []
        for line in lines:
            try:
                file, name, checksum = json.loads(line)
                place = places[file, name]
            except (ValueError, KeyError, TypeError):
                continue  # the last line was cut off, or it is damage: the tensor is written again
            if line.endswith(b"\n") and self._checksum(file, place) == checksum:
                self.done[file, name] = checksum
                good.append(line)
        if len(good) == len(lines):
            return
        self._journal.seek(0)
        first = self._journal.readline()
        self._journal.truncate(0)
        self._append(first + b"".join(good))

    def _append(self, text: bytes) -> None:
        if self._journal.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _checksum(self, file: str, place: TensorPlace) -> str:
        checksum = new_checksum()
        start = self._layouts[file].data_start + place.offset
        for offset in range(0, place.nbytes, _CHUNK):
            size = min(_CHUNK, place.nbytes - offset)
            checksum.update(os.pread(self._files[file], size, start + offset))
        return str(checksum.hexdigest())

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Bytes at `offset` from where the data of `file` starts."""
        place = self._layouts[file].data_start + offset
        with self.explained():
            while data:
                count = os.pwrite(self._files[file], data, place)
                data, place = data[count:], place + count

    def record(self, file: str, name: str, checksum: str) -> None:
        """All bytes of the tensor `name` are written."""
        self.done[file, name] = checksum
        with self.explained():
            self._append(json.dumps([file, name, checksum]).encode() + b"\n")

    def finish(self, extra: Mapping[str, bytes]) -> None:
        """Write the headers and the files `extra`, make all of it durable, and give it the name DST."""
        with self.explained():
            for name, layout in self._layouts.items():
                sums = {tensor.name: self.done[name, tensor.name] for tensor in layout.tensors}
                descriptor = self._files[name]
                header = layout.header(sums)
                if os.pwrite(descriptor, header, 0) != len(header):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            for name, data in extra.items():
                (self.path / name).write_bytes(data)
                _fsync(self.path / name)
            _fsync(self.path)
            os.rename(self.path, self.dst)
            # The journal goes last: killed before this line, the store is complete and has one file too many.
            (self.dst / JOURNAL).unlink()
            _fsync(self.dst)
            _fsync(self.dst.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
