"""Expert tables: what to read for each expert, and where gate, up and down land in its slot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights import formats
from mer.weights.extents import ExpertExtents, MoeLayerSource

_ALIGN: Final = 4096
# Bytes of a read. Three of 128 KiB or less took 1.2 to 1.4 times as long as one of three times the size;
# three of 256 KiB or more just as long (by hand: docs/performance.md, Reads).
_SMALL_READ: Final = 192 << 10


@frozen(eq=False)
class ExpertTables:
    """The arrays that `mer._ext.moe.ExpertStreamer` takes; expert e of MoE layer l is row l * n_experts + e.

    slot_bytes: what the largest expert needs, a multiple of 4096. layers i64 [n_layers, 5], reads i64
    [n_layers * n_experts, max_reads, 5], matrices i64 [n_layers * n_experts, 3]. Of a dense model all is 0
    or empty.
    """

    n_experts: int
    slot_bytes: int
    layers: NDArray[np.int64]
    reads: NDArray[np.int64]
    matrices: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return len(self.reads)


def slot_bytes(extents: ExpertExtents) -> int:
    """Bytes of the aligned supersets of all pieces of an expert."""
    return sum(_aligned(piece.offset, piece.nbytes)[1] for piece in extents.pieces)


def expert_tables(sources: Sequence[MoeLayerSource], path: Path | None = None) -> ExpertTables:
    """Tables of every MoE layer, in order; reads no weights. path: the model's, for errors to name.

    Raises UnsupportedModelError for a format without a kernel, or where only one of gate and up is in blocks,
    CheckpointError when the experts of a layer differ in format or shape.
    """
    where = f"{path}: " if path is not None else ""
    n_experts = len(sources[0].experts) if sources else 0
    max_reads = max((len(e.pieces) for source in sources for e in source.experts), default=0)
    layers = np.zeros((len(sources), 5), np.int64)
    reads = np.zeros((len(sources) * n_experts, max_reads, 5), np.int64)
    matrices = np.zeros((len(sources) * n_experts, 3), np.int64)
    largest = 0
    for index, source in enumerate(sources):
        layers[index] = _layer(source, f"{where}layer {source.layer}")
        for e, extents in enumerate(source.experts):
            row = index * n_experts + e
            starts, at = [], 0
            for i, piece in enumerate(extents.pieces):
                start, length = _aligned(piece.offset, piece.nbytes)
                inside = piece.offset - start
                reads[row, i] = (piece.file, start, length, inside + piece.nbytes, at)
                starts.append(at + inside)
                at += length
            matrices[row] = [starts[m.piece] + m.offset for m in extents.matrices]
            largest = max(largest, at)
    return ExpertTables(n_experts, largest, layers, reads, matrices)


def advice(tables: ExpertTables) -> str | None:
    """What would make the experts faster to read; None where nothing would."""
    lengths = tables.reads[:, :, 2]
    count, nbytes = np.count_nonzero(lengths), int(lengths.sum())
    if count <= tables.total or nbytes / count >= _SMALL_READ:
        return None
    return (
        f"an expert is {count / tables.total:.0f} reads of some {nbytes / count / 1024:.0f} KiB here, in an "
        "expert store one, which is faster for reads so small: mer convert MODEL NEW_DIRECTORY --format same"
    )


def _aligned(offset: int, nbytes: int) -> tuple[int, int]:
    """(start, length) of the aligned superset of an extent."""
    start = offset // _ALIGN * _ALIGN
    return start, -(-(offset + nbytes) // _ALIGN) * _ALIGN - start


def _layer(source: MoeLayerSource, where: str) -> tuple[int, int, int, int, int]:
    first = source.experts[0]
    for e, extents in enumerate(source.experts):
        for name, m, wanted in zip(("gate", "up", "down"), extents.matrices, first.matrices, strict=True):
            if (m.format, m.rows, m.cols) != (wanted.format, wanted.rows, wanted.cols):
                raise CheckpointError(
                    f"{where}: {name} of expert {e} is {m.format.name} {m.rows} x {m.cols}, "
                    f"that of expert 0 {wanted.format.name} {wanted.rows} x {wanted.cols}; "
                    "fetch or convert the model again"
                )
    if any(m.layout is not None for m in first.matrices):
        raise CheckpointError(
            f"{where}: rows, or codes and their scales, are in an order here that is not run in place; "
            "convert the model first: mer convert MODEL NEW_DIRECTORY"
        )
    for m in first.matrices:
        if m.format not in formats.FORMATS:
            raise UnsupportedModelError(
                f"{where}: experts in {m.format.name} can't be multiplied where they lie; "
                "make a store of this checkpoint with `mer convert`"
            )
    gate, up = first.gate.format, first.up.format
    if gate is not up and 1 in (gate.block, up.block):
        raise UnsupportedModelError(
            f"{where}: gate is {gate.name} and up {up.name}; beside one of these the other "
            "must be in the same format: convert the model's original weights with `mer convert`"
        )
    return gate.id, up.id, first.down.format.id, first.gate.cols, first.gate.rows
