"""Rows of a stored matrix, as bytes or as f32, a slab at a time: what conversion reads."""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer.errors import UnsupportedModelError
from mer.weights.extents import ExpertExtents, Matrix, Scales, SplitBlocks, Transposed
from mer.weights.formats import F8_E4M3, Format
from mer.weights.tensors import Checkpoint, TensorInfo


@frozen(eq=False)
class Rows:
    """A matrix [rows, cols] of a checkpoint. name: for messages. file, offset: where row 0 lies."""

    checkpoint: Checkpoint
    name: str
    file: int
    offset: int
    format: Format
    rows: int
    cols: int
    scales: Scales | None
    layout: Transposed | SplitBlocks | None = None

    @property
    def origin(self) -> str:
        """The file, for messages."""
        return str(self.checkpoint.files[self.file])

    def raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows start..stop in their format: uint8 [stop - start, row_bytes]. Raises CheckpointError."""
        if isinstance(self.layout, Transposed):
            with _turning:  # slabs of one matrix are read at once, and one of them turns it
                whole = _turned(
                    self.checkpoint, self.file, self.offset, self.cols, self.layout.width, self.format
                )
            return whole[self.layout.first :: self.layout.step][start:stop]
        if isinstance(self.layout, SplitBlocks):
            return self._join_blocks(self.layout, start, stop)
        size = self.format.row_bytes(self.cols)
        data = self.checkpoint.read_bytes(
            self.file, self.offset + start * size, (stop - start) * size, self.name
        )
        return data.reshape(stop - start, size)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as f32 [stop - start, cols]. Raises CheckpointError."""
        values = self.format.dequantize(self.raw(start, stop))
        if self.format is F8_E4M3:
            self._scale(values, start, stop)
        return values

    def _join_blocks(self, layout: SplitBlocks, start: int, stop: int) -> NDArray[np.uint8]:
        first, blocks = layout.first + layout.step * start, self.cols // 32
        rows = layout.step * (stop - start - 1) + 1

        def read(file: int, offset: int, size: int) -> NDArray[np.uint8]:
            data = self.checkpoint.read_bytes(file, offset + first * size, rows * size, self.name)
            return data.reshape(rows, size)[:: layout.step]

        codes = read(self.file, self.offset, 16 * blocks).reshape(-1, blocks, 16)
        each = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, blocks, 32)
        out = np.empty((stop - start, blocks, 17), np.uint8)
        out[:, :, 0] = read(layout.file, layout.offset, blocks)
        out[:, :, 1:] = each[:, :, :16] | (each[:, :, 16:] << 4)
        return out.reshape(stop - start, 17 * blocks)

    def _scale(self, values: NDArray[np.float32], start: int, stop: int) -> None:
        s = self.scales
        if s is None:
            raise UnsupportedModelError(
                f"{self.checkpoint.files[self.file]}: {self.name} is F8_E4M3 without a matching "
                "weight_scale_inv; only FP8 with block scales, as DeepSeek publishes it, is supported"
            )
        first, last = start // s.block_rows, -(-stop // s.block_rows)
        size = s.format.row_bytes(s.cols)
        data = self.checkpoint.read_bytes(
            s.file, s.offset + first * size, (last - first) * size, f"scales of {self.name}"
        )
        grid = s.format.dequantize(data.reshape(last - first, size))
        wide = np.repeat(grid, s.block_cols, axis=1)[:, : self.cols]
        for row in range(first, last):
            lower, upper = max(row * s.block_rows, start) - start, min((row + 1) * s.block_rows, stop) - start
            values[lower:upper] *= wide[row - first]


_turning = threading.Lock()


@lru_cache(maxsize=1)
def _turned(
    checkpoint: Checkpoint, file: int, offset: int, rows: int, width: int, form: Format
) -> NDArray[np.uint8]:
    """A stored matrix [rows, width] with its columns as rows: uint8 [width, rows * bytes of an element]."""
    data = checkpoint.read_bytes(file, offset, rows * form.row_bytes(width), "the experts")
    elements = data.view(f"u{form.block_bytes}").reshape(rows, width)
    return np.ascontiguousarray(elements.T).view(np.uint8)


def dense_rows(checkpoint: Checkpoint, info: TensorInfo) -> Rows:
    """A tensor as a matrix whose rows are its last dimension."""
    what = f"tensor {info.name}"
    return Rows(checkpoint, what, info.file, info.offset, info.format, info.rows, info.cols, info.scales)


def expert_rows(checkpoint: Checkpoint, extents: ExpertExtents, matrix: Matrix, name: str) -> Rows:
    """One matrix of an expert."""
    piece = extents.pieces[matrix.piece]
    place = piece.offset + matrix.offset
    return Rows(
        *(checkpoint, name, piece.file, place, matrix.format, matrix.rows, matrix.cols),
        *(matrix.scales, matrix.layout),
    )
