"""Reading the header of a GGUF file: metadata, and which tensor lies where. No tensor data is read.

The gguf package maps whole files and makes arrays of every token at once; here a file of any size is opened
in the time that its header takes to read, and a list of 150,000 tokens is decoded when somebody asks for it.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from attrs import frozen

from mer._ext import strings
from mer.errors import CheckpointError

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_NAME: Final = 1 << 16  # bytes of a key or of a tensor's name
_MAX_DIMS: Final = 4
_MAX_DEPTH: Final = 4  # of arrays in arrays
_ALIGN: Final = 32  # where general.alignment does not say
_READ: Final = 1 << 20
SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

# GGUF's numbers of value types: the fixed ones with their struct codes.
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SIZES: Final = {kind: struct.calcsize(f"<{code}") for kind, code in _SCALARS.items()}
STRING, ARRAY = 8, 9

# ggml's tensor types: name, elements of a block, bytes of a block.
TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 9: ("q8_1", 32, 40), 10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144), 13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292), 16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136), 24: ("i8", 1, 1), 25: ("i16", 1, 2), 26: ("i32", 1, 4), 27: ("i64", 1, 8),
    28: ("f64", 1, 8), 29: ("iq1_m", 256, 56), 30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17), 40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18),
}  # fmt: skip


@frozen
class GGUFTensor:
    """One entry. shape: in elements, a row's length last. type: ggml's number. offset: in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


@frozen(eq=False)
class GGUFFile:
    """What a file holds. metadata: decoded when asked for."""

    path: Path
    metadata: Metadata
    tensors: list[GGUFTensor]


@frozen
class Raw:
    """A value as a file holds it. kind: the number of its type; data: what follows that."""

    kind: int
    data: bytes


@frozen(eq=False)
class _Value:
    """Where a value lies in the header. count: of an array's items, -1 for a value that is no array."""

    kind: int
    count: int
    start: int
    end: int


class Metadata(Mapping[str, Any]):
    """Keys and values of one file: int, float, bool, str, or a list of them. Raises CheckpointError for a
    string that is not UTF-8."""

    def __init__(self, path: Path, values: dict[str, _Value]) -> None:
        self.path = path
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value, data = self._values[key], self._bytes(key)
        try:
            return _decode(value.kind, value.count, data)
        except UnicodeDecodeError as error:
            raise _damaged(self.path, f"the value of {key} is not UTF-8: {error}") from None
        except (IndexError, struct.error):
            raise _damaged(self.path, f"it was changed while it was open; {key} is cut off") from None

    def raw(self, key: str) -> Raw:
        """The value as it is, for another file. Raises CheckpointError."""
        value, data = self._values[key], self._bytes(key)
        if value.count < 0:
            return Raw(value.kind, data)
        return Raw(ARRAY, struct.pack("<IQ", value.kind, value.count) + data)

    def _bytes(self, key: str) -> bytes:
        value = self._values[key]
        with self.path.open("rb") as file:
            file.seek(value.start)
            data = file.read(value.end - value.start)
        if len(data) < value.end - value.start:
            raise _damaged(self.path, f"it was cut off while it was open; {key} is missing")
        return data

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header of `path`. Raises CheckpointError that names the file and what is wrong."""
    try:
        with path.open("rb") as file:
            return _Header(path, file.fileno()).read()
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: is no sound GGUF file: {what}; fetch it again")


class _Header:
    """Walks over a header, a megabyte at a time; every length is checked before it is used."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size
        self._buffer = b""
        self._start = 0  # where in the file the buffer begins
        self._at = 0  # in the buffer

    def read(self) -> GGUFFile:
        if self._take(4) != MAGIC:
            self._refuse("it does not begin with GGUF")
        version = self._integer("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in _VERSIONS:
                raise CheckpointError(
                    f"{self._path}: is a GGUF file of big-endian numbers, which is not read here; take the "
                    "little-endian one"
                )
            raise CheckpointError(
                f"{self._path}: is GGUF version {version}; mer reads versions 2 and 3: write it anew with a "
                "recent llama.cpp, or take a newer mer"
            )
        n_tensors, n_values = self._integer("Q"), self._integer("Q")
        # Each takes at least so many bytes: a name's length, a type, and what a type has at least.
        self._check_count(n_values, 13, "metadata values")
        self._check_count(n_tensors, 24, "tensors")
        values: dict[str, _Value] = {}
        for _ in range(n_values):
            key = self._name("a metadata key")
            if key in values:
                self._refuse(f"the metadata key {key!r} is there twice")
            values[key] = self._value(key)
        metadata = Metadata(self._path, values)
        entries = [self._entry() for _ in range(n_tensors)]
        return GGUFFile(self._path, metadata, self._place(entries, self._alignment(metadata)))

    def _place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> list[GGUFTensor]:
        """Offsets from where the data starts, made into such from the file's start, and checked."""
        data = -(-self._tell() // alignment) * alignment
        tensors: list[GGUFTensor] = []
        names: set[str] = set()
        for name, shape, kind, offset in entries:
            if name in names:
                self._refuse(f"the tensor {name} is there twice")
            names.add(name)
            if kind not in TYPES:
                raise CheckpointError(
                    f"{self._path}: tensor {name} has type number {kind}, which mer does not know; take a "
                    "file in other formats, or a newer mer"
                )
            title, block, block_bytes = TYPES[kind]
            row = shape[-1] if shape else 1
            if row % block:
                self._refuse(f"tensor {name} is {title}, but its rows of {row} are no multiple of {block}")
            nbytes = math.prod(shape) // block * block_bytes
            if offset % alignment:
                self._refuse(f"tensor {name} lies at {offset}, which is no multiple of {alignment}")
            if data + offset + nbytes > self._size:
                raise CheckpointError(
                    f"{self._path}: tensor {name} ends at {data + offset + nbytes:,}, but the file has "
                    f"{self._size:,} bytes: the download is incomplete, fetch it again"
                )
            tensors.append(GGUFTensor(name, shape, kind, data + offset, nbytes))
        return tensors

    def _alignment(self, metadata: Metadata) -> int:
        value = metadata.get("general.alignment", _ALIGN)
        if type(value) is not int or not 0 < value <= 1 << 20 or value & (value - 1):
            self._refuse(f"general.alignment is {value!r}, it must be a power of two")
        return value

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("a tensor's name")
        n_dims = self._integer("I")
        if n_dims > _MAX_DIMS:
            self._refuse(f"tensor {name} has {n_dims} dimensions, {_MAX_DIMS} is the most")
        shape = tuple(self._integer("Q") for _ in range(n_dims))[::-1]
        if not all(shape):
            self._refuse(f"tensor {name} has shape {list(shape)}: a dimension of none")
        return name, shape, self._integer("I"), self._integer("Q")

    def _value(self, key: str) -> _Value:
        kind = self._integer("I")
        if kind != ARRAY:
            start = self._tell()
            self._skip(kind, key)
            return _Value(kind, -1, start, self._tell())
        kind, count = self._integer("I"), self._integer("Q")
        start = self._tell()
        self._skip_items(kind, count, key, 1)
        return _Value(kind, count, start, self._tell())

    def _skip(self, kind: int, key: str) -> None:
        if kind == STRING:
            self._skip_bytes(self._integer("Q"), key)
        elif kind in _SIZES:
            self._skip_bytes(_SIZES[kind], key)
        else:
            self._refuse(f"the value of {key} has the unknown type number {kind}")

    def _skip_items(self, kind: int, count: int, key: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            self._refuse(f"the value of {key} has arrays in arrays more than {_MAX_DEPTH} deep")
        if kind in _SIZES:
            self._skip_bytes(_SIZES[kind] * count, key)
            return
        self._check_count(count, 12 if kind == ARRAY else 8, f"items of {key}")
        if kind == STRING:
            self._skip_strings(count, key)
        else:
            for _ in range(count):
                if kind != ARRAY:
                    self._skip(kind, key)
                else:
                    self._skip_items(self._integer("I"), self._integer("Q"), key, depth + 1)

    def _skip_strings(self, count: int, key: str) -> None:
        while True:
            self._at, passed = strings.skip(self._buffer, self._at, count)
            count -= passed
            if not count:
                return
            # One that is not whole in the buffer.
            self._skip(STRING, key)
            count -= 1

    def _check_count(self, count: int, least: int, what: str) -> None:
        if count * least > self._size - self._tell():
            self._refuse(f"{count:,} {what} do not fit into its {self._size:,} bytes")

    def _name(self, what: str) -> str:
        length = self._integer("Q")
        if not 0 < length <= _MAX_NAME:
            self._refuse(f"the length of {what} is {length:,}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self._refuse(f"{what} is not UTF-8")

    def _integer(self, code: str) -> int:
        data = self._take(struct.calcsize(f"<{code}"))
        return int.from_bytes(data, "little")

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._buffer):
            self._fill(size)
        self._at += size
        return self._buffer[self._at - size : self._at]

    def _skip_bytes(self, size: int, key: str) -> None:
        if size > self._size - self._tell():
            self._refuse(f"the value of {key} is longer than the file")
        self._at += size

    def _fill(self, size: int) -> None:
        """Make the next `size` bytes, which may be none of the buffer's, stand in it."""
        start = self._tell()
        if size > self._size - start:
            self._refuse(f"the header is cut off after {self._size:,} bytes")
        self._buffer = os.pread(self._descriptor, max(size, _READ), start)
        self._start, self._at = start, 0
        if len(self._buffer) < size:
            self._refuse("the header was cut off while it was read")

    def _tell(self) -> int:
        return self._start + self._at

    def _refuse(self, what: str) -> NoReturn:
        raise _damaged(self._path, what)


def _decode(kind: int, count: int, data: bytes) -> Any:
    if count < 0:
        return data[8:].decode() if kind == STRING else struct.unpack(f"<{_SCALARS[kind]}", data)[0]
    return _items(kind, count, data, 0)[0]


def _items(kind: int, count: int, data: bytes, at: int) -> tuple[list[Any], int]:
    """The items of an array that lie from `at` on, and where they end."""
    if kind in _SIZES:
        end = at + count * _SIZES[kind]
        return np.frombuffer(data[at:end], np.dtype(f"<{_SCALARS[kind]}")).tolist(), end
    if kind == STRING:
        return strings.decode(data, at, count)
    found: list[Any] = []
    for _ in range(count):
        inner, inner_count = struct.unpack_from("<IQ", data, at)
        item, at = _items(inner, inner_count, data, at + 12)
        found.append(item)
    return found, at
