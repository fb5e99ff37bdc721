"""How an expert store's files are laid out: ordinary safetensors files with aligned data and checksums.

`experts-00001.safetensors` ... hold one U8 tensor per expert, `layers.L.experts.E`: gate, up and down in
their format, each starting on 64 bytes, all padded to a multiple of 4096. `dense.safetensors` holds the other
tensors under their own names; one in a block format is U8 [rows, row_bytes]. In both, the data starts on a
multiple of 4096: the header is padded with spaces, as the safetensors format allows. What safetensors itself
has no place for stands in `__metadata__`, as JSON strings:

    kind       "mer experts 1" or "mer dense 1"
    checksums  {tensor: BLAKE2b-128 of all its bytes, in hexadecimal}
    part       "1/3": this file among the expert files
    layers     {L: [[format, rows, cols, offset] of gate, of up, of down]}       (expert files)
    blocks     {tensor: [format, shape]} of the tensors in a block format         (the dense file)
    experts    "none", in the dense file of a model that has none: then it is the only file
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from attrs import frozen

from mer.weights.formats import Format

ALIGN: Final = 4096
MATRIX_ALIGN: Final = 64
KIND_EXPERTS: Final = "mer experts 1"
KIND_DENSE: Final = "mer dense 1"
NO_EXPERTS: Final = "none"
DENSE_FILE: Final = "dense.safetensors"
MAX_FILE: Final = 8 << 30
_NO_CHECKSUM: Final = "0" * 32
_NATIVE: Final = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def align(size: int, to: int = ALIGN) -> int:
    """The multiple of `to` at or above `size`."""
    return -(-size // to) * to


def new_checksum() -> Any:
    """A running checksum: feed it with update(), read it with hexdigest()."""
    return hashlib.blake2b(digest_size=16)


def expert_file(number: int) -> str:
    """File name of expert file 1, 2, ..."""
    return f"experts-{number:05d}.safetensors"


def expert_name(layer: int, expert: int) -> str:
    return f"layers.{layer}.experts.{expert}"


@frozen
class MatrixPlace:
    """A matrix inside an expert. offset: bytes from the expert's start."""

    format: Format
    rows: int
    cols: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.format.row_bytes(self.cols)


def place_matrices(shapes: Sequence[tuple[Format, int, int]]) -> tuple[MatrixPlace, ...]:
    """gate, up and down, one behind the other."""
    places: list[MatrixPlace] = []
    offset = 0
    for form, rows, cols in shapes:
        places.append(MatrixPlace(form, rows, cols, offset))
        offset = align(offset + places[-1].nbytes, MATRIX_ALIGN)
    return tuple(places)


def expert_bytes(places: Sequence[MatrixPlace]) -> int:
    """Bytes of the expert's tensor, padding included."""
    return align(places[-1].offset + places[-1].nbytes)


@frozen
class TensorPlace:
    """A tensor of one of the files. offset: bytes from where the data starts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@frozen(eq=False)
class FileLayout:
    """One file, before its checksums are known."""

    name: str
    tensors: tuple[TensorPlace, ...]
    metadata: Mapping[str, str]

    def header(self, checksums: Mapping[str, str]) -> bytes:
        """The bytes before the data, length included. Their number does not depend on the checksums."""
        sums = {tensor.name: checksums[tensor.name] for tensor in self.tensors}
        entries: dict[str, Any] = {"__metadata__": {**self.metadata, "checksums": _json(sums)}}
        for t in self.tensors:
            end = t.offset + t.nbytes
            entries[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.offset, end]}
        text = _json(entries).encode()
        length = align(8 + len(text)) - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    @property
    def data_start(self) -> int:
        return len(self.header({tensor.name: _NO_CHECKSUM for tensor in self.tensors}))

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def lay_out_experts(
    layers: Sequence[tuple[int, int, tuple[MatrixPlace, ...]]], max_file: int = MAX_FILE
) -> list[FileLayout]:
    """Files for layers of (number, experts, matrices): whole layers, a new file before max_file is passed."""
    groups: list[list[tuple[int, int, tuple[MatrixPlace, ...]]]] = []
    size = 0
    for layer in layers:
        nbytes = layer[1] * expert_bytes(layer[2])
        if not groups or size + nbytes > max_file:
            groups.append([])
            size = 0
        groups[-1].append(layer)
        size += nbytes
    files = []
    for part, group in enumerate(groups, 1):
        tensors: list[TensorPlace] = []
        described = {}
        offset = 0
        for number, n_experts, places in group:
            nbytes = expert_bytes(places)
            described[str(number)] = [[p.format.name, p.rows, p.cols, p.offset] for p in places]
            for e in range(n_experts):
                tensors.append(TensorPlace(expert_name(number, e), "U8", (nbytes,), offset, nbytes))
                offset += nbytes
        metadata = {"kind": KIND_EXPERTS, "part": f"{part}/{len(groups)}", "layers": _json(described)}
        files.append(FileLayout(expert_file(part), tuple(tensors), metadata))
    return files


def lay_out_dense(
    tensors: Mapping[str, tuple[Format, tuple[int, ...]]], *, experts: bool = True
) -> FileLayout:
    """The dense file for tensors of (format, shape in elements). experts: whether there are files of them.

    Wide types stand first, so that every tensor is aligned for its type, as the safetensors package does.
    """
    widths = {"f32": 0, "f16": 1, "bf16": 1}
    blocks = {}
    places: list[TensorPlace] = []
    offset = 0
    for name in sorted(tensors, key=lambda name: (widths.get(tensors[name][0].name, 2), name)):
        form, shape = tensors[name]
        cols = shape[-1] if shape else 1
        rows = math.prod(shape[:-1])
        nbytes = rows * form.row_bytes(cols)
        dtype, stored_shape = _NATIVE.get(form.name), shape
        if dtype is None:
            dtype, stored_shape = "U8", (rows, form.row_bytes(cols))
            blocks[name] = [form.name, shape]
        places.append(TensorPlace(name, dtype, stored_shape, offset, nbytes))
        offset += nbytes
    metadata = {"kind": KIND_DENSE, "blocks": _json(blocks)}
    if not experts:
        metadata["experts"] = NO_EXPERTS
    return FileLayout(DENSE_FILE, tuple(places), metadata)
