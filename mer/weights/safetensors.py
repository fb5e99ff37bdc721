"""Reading the header of a safetensors file: which tensor lies where. No tensor data is read.

The header is parsed here, not by the safetensors package, because experts are read by file offset (which
the package does not tell) and because an error must name the tensor and the advice.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from mer.errors import CheckpointError

# The safetensors package refuses more than this, too.
MAX_HEADER: Final = 100_000_000

DTYPE_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@frozen
class RawTensor:
    """One entry of a header. offset: bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@frozen
class Header:
    """What a file holds, in the order of the data. metadata: the file's own strings."""

    tensors: list[RawTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Parse and check the header of `path`. Raises CheckpointError that names the file and the tensor."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > size - 8:
                raise _damaged(path, f"the header is cut off ({size} bytes in all)", first)
            if not 2 <= length <= MAX_HEADER:
                raise _damaged(path, f"a header of {length} bytes is absurd", first)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    try:
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is not valid JSON: {error}", first) from error
    if not isinstance(entries, dict):
        raise _damaged(path, "the header is no JSON object", first)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__ must map names to strings", first)
    tensors = [_tensor(path, name, entry, 8 + length, size) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    for before, after in itertools.pairwise(tensors):
        if before.offset + before.nbytes > after.offset:
            raise CheckpointError(
                f"{path}: the tensors {before.name} and {after.name} overlap; the file is damaged, "
                "download or write it again"
            )
    return Header(tensors, metadata)


def _damaged(path: Path, what: str, first: bytes) -> CheckpointError:
    hint = "it is damaged or still being downloaded; fetch it again"
    if first.startswith(b"version "):
        hint = "it is a Git LFS pointer, not the file itself; run `git lfs pull`"
    elif first.startswith(b"GGUF"):
        hint = "it is a GGUF file under another name"
    return CheckpointError(f"{path}: no valid safetensors file: {what}; {hint}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> RawTensor:
    """Check one header entry: data is where the tensors begin, size the file's bytes."""

    def wrong(text: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name}: {text}")

    if not isinstance(entry, dict):
        raise wrong("its header entry is no object; the file is damaged, fetch it again")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f"the dtype {dtype!r} is not known; known are {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape):
        raise wrong(f"the shape {shape!r} is no list of sizes; the file is damaged, fetch it again")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise wrong(f"data_offsets {offsets!r} are no two positions; the file is damaged, fetch it again")
    begin, end = offsets
    bits = DTYPE_BITS[dtype]
    for n in shape:
        bits *= n
    if 8 * (end - begin) != bits:
        raise wrong(
            f"{dtype} {shape} takes {bits / 8:.15g} bytes, but its data_offsets {offsets} hold "
            f"{end - begin}; the file is damaged, fetch it again"
        )
    if data + end > size:
        raise wrong(
            f"its data ends at byte {data + end}, the file at {size}: the file is truncated, fetch it again"
        )
    return RawTensor(name, dtype, tuple(shape), data + begin, end - begin)
