"""From tensor names to expert extents: the namings that checkpoints use."""

from __future__ import annotations

from collections.abc import Sequence

from mer.errors import CheckpointError
from mer.weights.extents import (
    ExpertExtents,
    Matrix,
    MoeLayerSource,
    Piece,
    Scales,
    SplitBlocks,
    Transposed,
)
from mer.weights.formats import F8_E8M0, MXFP4, Format
from mer.weights.tensors import Checkpoint, TensorInfo

__all__ = [
    "ExpertExtents", "Matrix", "MoeLayerSource", "Piece", "fused", "per_expert", "split_blocks", "stacked",
    "stored", "transposed",
]  # fmt: skip


def per_expert(checkpoint: Checkpoint, gate: str, up: str, down: str) -> ExpertExtents:
    """An expert of three tensors [I, H], [I, H] and [H, I]. Raises CheckpointError."""
    infos = [_matrix(checkpoint, name) for name in (gate, up, down)]
    i, h = infos[0].shape
    for info, wanted in zip(infos, ((i, h), (i, h), (h, i)), strict=True):
        if info.shape != wanted:
            raise _mismatch(checkpoint, info, wanted, infos[0])
    if any(info.layout is not None for info in infos):
        return _codes_and_scales(infos)
    return _extents([(t.file, t.offset, t.format, t.rows, t.cols, t.scales) for t in infos])


def _codes_and_scales(infos: Sequence[TensorInfo]) -> ExpertExtents:
    """gate, up and down where the scales of some of them lie apart."""
    pieces: list[Piece] = []
    matrices: list[Matrix] = []
    for t in infos:
        matrices.append(Matrix(len(pieces), 0, t.format, t.rows, t.cols, t.scales, t.layout))
        pieces.append(Piece(t.file, t.offset, t.nbytes))
        if t.layout is not None:
            pieces.append(Piece(t.layout.file, t.layout.offset, t.rows * t.layout.scale_row_bytes))
    return ExpertExtents(tuple(pieces), *matrices)


def fused(checkpoint: Checkpoint, gate_up: str, down: str, expert: int) -> ExpertExtents:
    """Expert number `expert` of two tensors of all experts: [E, 2I, H] (gate above up) and [E, H, I]."""
    a, b = (_matrix(checkpoint, name, 3) for name in (gate_up, down))
    n, twice, h = a.shape
    if twice % 2 or b.shape != (n, h, twice // 2):
        raise _mismatch(checkpoint, b, (n, h, twice // 2), a)
    if not 0 <= expert < n:
        raise CheckpointError(
            f"{checkpoint.files[a.file]}: tensor {a.name} has {n} experts, none is {expert}"
        )
    if a.scales or b.scales:
        raise CheckpointError(
            f"{checkpoint.files[a.file]}: tensor {a.name}: 8-bit floats are supported in one tensor per "
            "expert only, not fused"
        )
    inter = twice // 2
    row, down_row = a.format.row_bytes(h), b.format.row_bytes(inter)
    start = a.offset + expert * twice * row
    return _extents(
        [
            (a.file, start, a.format, inter, h, None),
            (a.file, start + inter * row, a.format, inter, h, None),
            (b.file, b.offset + expert * h * down_row, b.format, h, inter, None),
        ]
    )


def transposed(checkpoint: Checkpoint, gate_up: str, down: str, expert: int) -> ExpertExtents:
    """Expert number `expert` of [E, H, 2I] (columns of gate and up alternate) and [E, I, H]."""
    a, b = (_matrix(checkpoint, name, 3) for name in (gate_up, down))
    _, h, twice = a.shape
    inter, sizes = twice // 2, (a.nbytes // a.shape[0], b.nbytes // b.shape[0])
    pieces = tuple(
        Piece(t.file, t.offset + expert * size, size) for t, size in zip((a, b), sizes, strict=True)
    )
    return ExpertExtents(
        pieces,
        Matrix(0, 0, a.format, inter, h, layout=Transposed(twice, 0, 2)),
        Matrix(0, 0, a.format, inter, h, layout=Transposed(twice, 1, 2)),
        Matrix(1, 0, b.format, h, inter, layout=Transposed(h, 0, 1)),
    )


def split_blocks(checkpoint: Checkpoint, gate_up: str, down: str, expert: int) -> ExpertExtents:
    """Expert number `expert` of NAME_blocks [E, rows, cols / 32, 16] and NAME_scales, MXFP4.

    Rows of gate and up alternate in gate_up.
    """
    infos = [checkpoint.tensor(f"{name}_{part}") for name in (gate_up, down) for part in ("blocks", "scales")]
    pieces = tuple(
        Piece(t.file, t.offset + expert * (t.nbytes // t.shape[0]), t.nbytes // t.shape[0]) for t in infos
    )
    inter, h = infos[0].shape[1] // 2, infos[2].shape[1]

    def matrix(piece: int, rows: int, cols: int, first: int, step: int) -> Matrix:
        scales = pieces[piece + 1]
        layout = SplitBlocks(scales.file, scales.offset, first, step, F8_E8M0, cols // 32)
        return Matrix(piece, 0, MXFP4, rows, cols, layout=layout)

    return ExpertExtents(
        pieces, matrix(0, inter, h, 0, 2), matrix(0, inter, h, 1, 2), matrix(2, h, inter, 0, 1)
    )


def stacked(checkpoint: Checkpoint, gate: str, up: str, down: str, expert: int) -> ExpertExtents:
    """Expert number `expert` of three tensors of all experts: [E, I, H], [E, I, H] and [E, H, I].

    Raises CheckpointError.
    """
    infos = [_matrix(checkpoint, name, 3) for name in (gate, up, down)]
    n, i, h = infos[0].shape
    for info, wanted in zip(infos, ((n, i, h), (n, i, h), (n, h, i)), strict=True):
        if info.shape != wanted:
            raise _mismatch(checkpoint, info, wanted, infos[0])
    parts = []
    for info in infos:
        _, rows, cols = info.shape
        offset = info.offset + expert * rows * info.format.row_bytes(cols)
        parts.append((info.file, offset, info.format, rows, cols, None))
    return _extents(parts)


def stored(checkpoint: Checkpoint, layer: int, expert: int) -> ExpertExtents:
    """An expert of an expert store. Raises CheckpointError when the store has none of this number."""
    found = checkpoint.experts.get((layer, expert))
    if found is None:
        raise CheckpointError(
            f"{checkpoint.path}: the store has no expert {expert} of layer {layer}, which config.json "
            "asks for; run `mer convert` again"
        )
    return found.extents


def _matrix(checkpoint: Checkpoint, name: str, dims: int = 2) -> TensorInfo:
    info = checkpoint.tensor(name)
    if len(info.shape) != dims:
        raise CheckpointError(
            f"{checkpoint.files[info.file]}: tensor {name} has shape {list(info.shape)}; "
            f"experts need {dims} dimensions here"
        )
    return info


def _mismatch(
    checkpoint: Checkpoint, info: TensorInfo, wanted: tuple[int, ...], other: TensorInfo
) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.files[info.file]}: tensor {info.name} has shape {list(info.shape)}; "
        f"beside {other.name} {list(other.shape)} it must be {list(wanted)}"
    )


def _extents(
    parts: Sequence[tuple[int, int, Format, int, int, Scales | None]],
) -> ExpertExtents:
    """gate, up and down as (file, offset, format, rows, cols, scales); neighbours become one piece."""
    pieces: list[Piece] = []
    placed: dict[int, tuple[int, int]] = {}
    for n in sorted(range(3), key=lambda n: parts[n][:2]):
        file, offset, form, rows, cols, _ = parts[n]
        nbytes = rows * form.row_bytes(cols)
        last = pieces[-1] if pieces else None
        if last and last.file == file and last.offset + last.nbytes == offset:
            placed[n] = len(pieces) - 1, last.nbytes
            pieces[-1] = Piece(file, last.offset, last.nbytes + nbytes)
        else:
            placed[n] = len(pieces), 0
            pieces.append(Piece(file, offset, nbytes))

    def matrix(n: int) -> Matrix:
        _, _, form, rows, cols, scales = parts[n]
        return Matrix(*placed[n], form, rows, cols, scales)

    return ExpertExtents(tuple(pieces), matrix(0), matrix(1), matrix(2))
