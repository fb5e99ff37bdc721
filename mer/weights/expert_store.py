"""Opening an expert store, the output of `mer convert`: every header is checked, no weights are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mer.errors import CheckpointError, MerError
from mer.weights import formats
from mer.weights.extents import ExpertExtents, Matrix, Piece
from mer.weights.safetensors import Header, RawTensor, read_header
from mer.weights.store_layout import (
    ALIGN,
    DENSE_FILE,
    KIND_DENSE,
    KIND_EXPERTS,
    NO_EXPERTS,
    MatrixPlace,
    expert_bytes,
    expert_file,
)
from mer.weights.tensors import Checkpoint, StoredExpert, TensorInfo, format_of_dtype

_NAME: Final = re.compile(r"layers\.(\d+)\.experts\.(\d+)")
_CHECKSUM: Final = re.compile(r"[0-9a-f]{32}")


def is_store(path: Path) -> bool:
    """Whether the directory looks like a store, a damaged one included."""
    return (path / DENSE_FILE).exists() or (path / expert_file(1)).exists()


def open_store(path: Path, config: dict[str, Any]) -> Checkpoint:
    """Raises CheckpointError that names the file, and the tensor if it is one tensor's fault."""
    files = [path / DENSE_FILE]
    dense = _StoreFile(files[0], KIND_DENSE)
    tensors = {raw.name: dense.tensor(raw) for raw in dense.header.tensors}
    if dense.header.metadata.get("experts") == NO_EXPERTS:
        return Checkpoint(path, "store", config, files, tensors, {}, dense.checksums)
    files.append(path / expert_file(1))
    first = _StoreFile(files[1], KIND_EXPERTS)
    total = first.part(1)
    files += [path / expert_file(n) for n in range(2, total + 1)]
    experts: dict[tuple[int, int], StoredExpert] = {}
    for number in range(1, total + 1):
        file = first if number == 1 else _StoreFile(files[number], KIND_EXPERTS)
        if file.part(number) != total:
            raise file.wrong("it is of another conversion than the other expert files")
        layers = file.layers()
        for raw in file.header.tensors:
            key, expert = file.expert(raw, number, layers)
            if key in experts:
                raise file.wrong(f"the tensor {raw.name} is in another expert file, too")
            experts[key] = expert
    return Checkpoint(path, "store", config, files, tensors, experts, dense.checksums)


class _StoreFile:
    """One file's header and what its metadata says."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: the expert store is incomplete; copy it again or convert again"
            )
        self.header: Header = read_header(path)
        if self.header.metadata.get("kind") != kind:
            raise self.wrong(f"its metadata does not say {kind!r}")
        self.checksums: dict[str, str] = self._json("checksums")
        for raw in self.header.tensors:
            value = self.checksums.get(raw.name)
            if not isinstance(value, str) or not _CHECKSUM.fullmatch(value):
                raise self.wrong(f"the tensor {raw.name} has no checksum")
        self._blocks = self._json("blocks") if kind == KIND_DENSE else {}

    def wrong(self, text: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {text}; the expert store is damaged: copy it again or convert again"
        )

    def _json(self, key: str) -> dict[str, Any]:
        try:
            value = json.loads(self.header.metadata[key])
            if not isinstance(value, dict):
                raise ValueError
        except (KeyError, ValueError, RecursionError):
            raise self.wrong(f"its metadata has no valid {key}") from None
        return value

    def part(self, number: int) -> int:
        """How many expert files there are; this one must be `number`."""
        found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", self.header.metadata.get("part", ""))
        if not found or int(found[1]) != number:
            raise self.wrong(
                f"it should be expert file {number}, it says {self.header.metadata.get('part')!r}"
            )
        return int(found[2])

    def layers(self) -> dict[int, tuple[MatrixPlace, ...]]:
        """gate, up and down of each layer's experts."""

        def read(value: Any) -> tuple[MatrixPlace, ...]:
            places = tuple(
                MatrixPlace(formats.by_name(form), int(rows), int(cols), int(offset))
                for form, rows, cols, offset in value
            )
            gate, up, down = places
            sizes = [(p.rows, p.cols) for p in places]
            if min(map(min, sizes)) < 1 or sizes[0] != sizes[1] or sizes[2] != sizes[0][::-1]:
                raise ValueError(f"shapes {sizes}")
            if gate.offset or gate.nbytes > up.offset or up.offset + up.nbytes > down.offset:
                raise ValueError("matrices overlap")
            return places

        return {int(n): self._checked(f"layer {n}", read, v) for n, v in self._json("layers").items()}

    def _checked(self, what: str, read: Callable[[Any], Any], value: Any) -> Any:
        try:
            return read(value)
        except (ValueError, TypeError, AttributeError, IndexError, MerError) as error:
            raise self.wrong(f"the description of {what} makes no sense ({error})") from error

    def expert(
        self, raw: RawTensor, file: int, layers: dict[int, tuple[MatrixPlace, ...]]
    ) -> tuple[tuple[int, int], StoredExpert]:
        """((layer, expert), what it is)."""
        found = _NAME.fullmatch(raw.name)
        places = layers.get(int(found[1])) if found else None
        if not found or places is None:
            raise self.wrong(f"the tensor {raw.name} is of no layer that its metadata describes")
        if raw.dtype != "U8" or raw.nbytes != expert_bytes(places) or raw.offset % ALIGN:
            raise self.wrong(
                f"the tensor {raw.name} ({raw.dtype}, {raw.nbytes} bytes at {raw.offset}) is not as its "
                f"layer's description says: U8, {expert_bytes(places)} bytes, at a multiple of {ALIGN}"
            )
        gate, up, down = (Matrix(0, p.offset, p.format, p.rows, p.cols) for p in places)
        extents = ExpertExtents((Piece(file, raw.offset, raw.nbytes),), gate, up, down)
        key = int(found[1]), int(found[2])
        return key, StoredExpert(raw.name, extents, self.checksums[raw.name])

    def tensor(self, raw: RawTensor) -> TensorInfo:
        """A dense tensor, with the format and the shape that a block format hides."""
        block = self._blocks.get(raw.name)
        if block is None:
            form = format_of_dtype(raw.dtype)
            return TensorInfo(raw.name, 0, raw.offset, raw.nbytes, raw.shape, raw.dtype, form)

        def read(value: Any) -> tuple[formats.Format, tuple[int, ...]]:
            form, shape = formats.by_name(value[0]), tuple(map(int, value[1]))
            if raw.shape != (math.prod(shape[:-1]), form.row_bytes(shape[-1])):
                raise ValueError(f"{value} does not fit {list(raw.shape)} bytes")
            return form, shape

        form, shape = self._checked(f"tensor {raw.name}", read, block)
        return TensorInfo(raw.name, 0, raw.offset, raw.nbytes, shape, form.name, form)
