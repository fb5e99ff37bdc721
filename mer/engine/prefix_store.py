"""Blocks of keys and values on disk: what falls out of memory, kept across restarts.

Two files in a directory: `prefix.blocks`, slots of one block each (of all layers, one after the other, padded
to 4096 bytes), and `prefix.index`, which says whose keys and values stand in which slot. The index is a
journal that nobody waits for: a checksum tells whether a slot really holds what it says, so whatever a crash,
another program or the device did to either file, it is at worst a miss.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Final

import numpy as np
from attrs import define
from numpy.typing import NDArray

from mer.errors import ConfigError, MerError
from mer.model.block_copies import BlockCopies
from mer.streaming.reader import DIRECT_ALIGNMENT, Reader, aligned_empty

_log = logging.getLogger("mer")

_MAGIC: Final = b"mer prefixes 1\n\0"
# Whose store it is: magic, fingerprint, bytes of a slot.
_HEADER: Final = struct.Struct("<16s16sQ")
# Key, slot, checksum of key and content.
_ENTRY: Final = struct.Struct("<16sII")
# Blocks on their way to the disk, and blocks that are read at once.
_WRITES: Final = 8
_READS: Final = 4
# A write takes milliseconds, the computation that asks for its memory many more.
_PATIENCE_S: Final = 0.05


def slot_bytes(block_bytes: int) -> int:
    """What a block of this size takes on disk."""
    return -(-block_bytes // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT


def buffer_bytes(block_bytes: int) -> int:
    """Memory that a store of such blocks takes."""
    return (_WRITES + _READS) * (slot_bytes(block_bytes) + 2 * DIRECT_ALIGNMENT)


def slots_within(size: int, block_bytes: int) -> int:
    """How many blocks of this size so many bytes of disk hold. Raises ConfigError where that is none."""
    one = slot_bytes(block_bytes)
    if size < one:
        raise ConfigError(f"prefix_store_size {size}: a block of 16 tokens takes {one} bytes; ask for more")
    return size // one


@define
class _Slot:
    number: int
    checksum: int


class PrefixStore:
    """Blocks by key, the least recently used give way. A thread of its own writes and reads.

    `spill` and `fetch` are for one other thread; what a fetch fills belongs to the store until it is done.
    """

    def __init__(
        self, directory: Path, size: int, copies: BlockCopies, fingerprint: bytes, *, backend: str = "auto"
    ) -> None:
        """Go on with what is in `directory` if it is of this fingerprint (16 bytes), else begin anew.

        size: most bytes of `prefix.blocks`. Raises ConfigError for a directory that can't be used, or is in
        use, or a size below one block's.
        """
        self.fingerprint = fingerprint
        self._copies = copies
        self._slot_bytes = slot_bytes(copies.block_bytes)
        self._n_slots = slots_within(size, copies.block_bytes)
        self._path = directory / "prefix.index"
        self._header = _HEADER.pack(_MAGIC, fingerprint, self._slot_bytes)
        self._slots: OrderedDict[bytes, _Slot] = OrderedDict()
        self._free: list[int] = []
        self._fd = -1
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._fd = _open(directory / "prefix.blocks")
            self._load()
            self._journal = open(self._path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            self._close_file()
            why = "another process uses it" if isinstance(error, BlockingIOError) else error.strerror
            raise ConfigError(
                f"prefix_store {directory}: {why}; name another directory, or leave it out"
            ) from error
        self._reader = Reader([directory / "prefix.blocks"], backend=backend, queue_depth=_READS)
        self._blank = [aligned_empty(self._slot_bytes) for _ in range(_WRITES)]
        self._staging = [aligned_empty(self._slot_bytes) for _ in range(_READS)]
        copies.pin([*self._blank, *self._staging])
        self._writes: deque[tuple[bytes, NDArray[np.uint8], Callable[[], bool]]] = deque()
        self._reads: deque[tuple[list[bytes], list[int], Callable[[int], None]]] = deque()
        self._pending: set[bytes] = set()
        self._closing = self._broken = self._late = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mer-prefixes", daemon=True)
        self._thread.start()

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def spill(self, key: bytes, block: int, *, patient: bool = False) -> None:
        """Keep a copy of a block of the KV cache; a disk that does not keep up loses it, unless `patient`."""
        with self._changed:
            if key in self._slots:
                self._slots.move_to_end(key)
                return
            patience = None if patient else 0.0 if self._late else _PATIENCE_S
            self._late = not self._changed.wait_for(lambda: self._blank or self._broken, patience)
            if key in self._pending or not self._blank or self._broken or self._closing:
                return
            self._pending.add(key)
            buffer = self._blank.pop()
        buffer[self._copies.block_bytes :] = 0
        there = self._copies.take(block, buffer)
        with self._changed:
            if there is None:
                self._give_back(key, buffer)
            else:
                self._writes.append((key, buffer, there))
            self._changed.notify_all()

    def fetch(self, keys: Iterable[bytes], blocks: Iterable[int], done: Callable[[int], None]) -> None:
        """Read the blocks with these keys into these blocks of the KV cache.

        `done(n)` is called on the store's thread: the first n are there, the others are not.
        """
        with self._changed:
            self._reads.append((list(keys), list(blocks), done))
            self._changed.notify_all()

    def close(self) -> None:
        """Write what is waiting, and the index in the order of use."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._copies.unpin()
        self._reader.close()
        self._journal.close()
        try:
            self._write_index()
        except OSError as error:
            _log.warning("%s: can't be written: %s", self._path, error.strerror)
        self._close_file()

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _load(self) -> None:
        """The index, if it is of this model; files that are as long as they may be."""
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        content = self._path.read_bytes() if self._path.exists() else b""
        if content[: _HEADER.size] == self._header:
            usable = (len(content) - _HEADER.size) // _ENTRY.size * _ENTRY.size
            owners: dict[int, bytes] = {}
            for key, number, checksum in _ENTRY.iter_unpack(content[_HEADER.size :][:usable]):
                if number < self._n_slots:
                    self._slots.pop(owners.pop(number, b""), None)
                    if key in self._slots:
                        owners.pop(self._slots.pop(key).number, None)
                    self._slots[key] = _Slot(number, checksum)
                    owners[number] = key
        used = {slot.number for slot in self._slots.values()}
        end = max(used, default=-1) + 1
        os.ftruncate(self._fd, end * self._slot_bytes)
        self._free = sorted(set(range(end)) - used, reverse=True)
        self._next = end
        self._write_index()

    def _write_index(self) -> None:
        """Anew, the least recently used first: a journal would grow for ever."""
        new = self._path.with_suffix(".new")
        with open(new, "wb") as file:
            file.write(self._header)
            for key, slot in self._slots.items():
                file.write(_ENTRY.pack(key, slot.number, slot.checksum))
        os.replace(new, self._path)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._reads or self._writes or self._closing)
                read = self._reads.popleft() if self._reads else None
                write = self._writes.popleft() if self._writes and not read else None
            if read is not None:
                keys, blocks, done = read
                done(0 if self._closing else self._fill(keys, blocks))
            elif write is not None:
                key, buffer, there = write
                try:
                    if there():
                        self._write(key, buffer)
                except OSError as error:
                    self._broken = True
                    _log.warning("%s: nothing more is stored: %s", self._path.parent, error.strerror)
                with self._changed:
                    self._give_back(key, buffer)
                    self._changed.notify_all()
            else:
                return

    def _give_back(self, key: bytes, buffer: NDArray[np.uint8]) -> None:
        self._pending.discard(key)
        self._blank.append(buffer)

    def _write(self, key: bytes, buffer: NDArray[np.uint8]) -> None:
        if self._broken:
            return
        with self._changed:
            number = self._take_slot()
        checksum = zlib.crc32(buffer.data, zlib.crc32(key))
        done = 0
        while done < len(buffer):
            done += os.pwrite(self._fd, buffer[done:].data, number * self._slot_bytes + done)
        self._journal.write(_ENTRY.pack(key, number, checksum))
        with self._changed:
            self._slots[key] = _Slot(number, checksum)

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        if self._next < self._n_slots:
            self._next += 1
            return self._next - 1
        _, slot = self._slots.popitem(last=False)
        return slot.number

    def _fill(self, keys: list[bytes], blocks: list[int]) -> int:
        """How many, from the first on, were read and are what they should be."""
        for start in range(0, len(keys), _READS):
            some = keys[start : start + _READS]
            with self._changed:
                there = [self._slots[key] for key in takewhile(self._slots.__contains__, some)]
            try:
                self._reader.read_into(
                    (0, slot.number * self._slot_bytes, self._slot_bytes, buffer, 0)
                    for slot, buffer in zip(there, self._staging, strict=False)
                )
            except (MerError, OSError) as error:
                _log.warning("%s: can't be read back: %s", self._path.parent, error)
                self._forget(some)
                return start
            for i, slot in enumerate(there):
                if zlib.crc32(self._staging[i].data, zlib.crc32(some[i])) != slot.checksum:
                    self._forget(some[i : i + 1])
                    return start + i
                if not self._copies.put(blocks[start + i], self._staging[i]):
                    return start + i
                with self._changed:
                    self._slots.move_to_end(some[i])
            if len(there) < len(some):
                return start + len(there)
        return len(keys)

    def _forget(self, keys: list[bytes]) -> None:
        with self._changed:
            for key in keys:
                slot = self._slots.pop(key, None)
                if slot is not None:
                    self._free.append(slot.number)


def _open(path: Path) -> int:
    """For writing without the page cache, where the file system can do that."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_DIRECT, 0o600)
    except OSError:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
