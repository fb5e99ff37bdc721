"""Rows of a stored matrix, as bytes or as f32, a slab at a time: what conversion reads."""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights.extents import ExpertExtents, Matrix, Scales, SplitBlocks, Transposed
from mer.weights.formats import F8_E4M3, MXFP4, Q4_0, Format
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
        if isinstance(self.layout, SplitBlocks) and self.format is Q4_0:
            codes, raw = self._split(self.layout, start, stop)
            scales = self.layout.scale_format.dequantize(raw)[:, :, None]
            values = codes.reshape(len(codes), scales.shape[1], -1).astype(np.float32) - np.float32(8)
            return (values * scales).reshape(len(codes), -1)
        values = self.format.dequantize(self.raw(start, stop))
        if self.format is F8_E4M3:
            self._scale(values, start, stop)
        return values

    def _split(
        self, layout: SplitBlocks, start: int, stop: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Rows start..stop: codes, uint8 [n, blocks, 32], and the bytes of their scales, uint8 [n, bytes]."""
        first, blocks = layout.first + layout.step * start, self.cols // 32
        rows = layout.step * (stop - start - 1) + 1

        def read(file: int, offset: int, size: int) -> NDArray[np.uint8]:
            data = self.checkpoint.read_bytes(file, offset + first * size, rows * size, self.name)
            return data.reshape(rows, size)[:: layout.step]

        codes = read(self.file, self.offset, 16 * blocks).reshape(-1, blocks, 16)
        each = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, blocks, 32)
        return each, np.ascontiguousarray(read(layout.file, layout.offset, layout.scale_row_bytes))

    def _join_blocks(self, layout: SplitBlocks, start: int, stop: int) -> NDArray[np.uint8]:
        codes, raw = self._split(layout, start, stop)
        if self.format is MXFP4:
            if (raw == 255).any():
                raise self._damaged("a scale is NaN")
            scales = raw[:, :, None]
        else:
            scales = self._halves(codes, layout.scale_format.dequantize(raw))
        out = np.empty((*codes.shape[:2], self.format.block_bytes), np.uint8)
        out[:, :, :-16] = scales
        out[:, :, -16:] = codes[:, :, :16] | (codes[:, :, 16:] << 4)
        return out.reshape(stop - start, -1)

    def _halves(self, codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The scales of Q4_0's blocks, which are F16: uint8 [n, blocks, 2]. Not one may be rounded."""
        wide = np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)
        wide[(codes == 8).all(axis=2)] = 0  # times zeros: any scale will do
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        rounded = half.astype(np.float32) != wide
        if rounded.any():
            if not np.isfinite(wide).all():
                raise self._damaged("a scale is NaN or infinity")
            raise UnsupportedModelError(
                f"{self.origin}: {self.name} has the scale {wide[rounded][0]:.9g}, which Q4_0's 16 bits "
                "would round: convert to another format, --experts q8_0 or --experts bf16"
            )
        return half[:, :, None].view(np.uint8)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.origin}: {self.name}: {what}, which none may be; the file is damaged, fetch it again"
        )

    def _scale(self, values: NDArray[np.float32], start: int, stop: int) -> None:
        s = self.scales
        if s is None:
            raise UnsupportedModelError(
                f"{self.checkpoint.files[self.file]}: {self.name} is F8_E4M3 without scales "
                "(weight_scale_inv, weight_scale or scale); take the model's original weights"
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
    return Rows(
        *(checkpoint, what, info.file, info.offset, info.format, info.rows, info.cols),
        *(info.scales, info.layout),
    )


def expert_rows(checkpoint: Checkpoint, extents: ExpertExtents, matrix: Matrix, name: str) -> Rows:
    """One matrix of an expert."""
    piece = extents.pieces[matrix.piece]
    place = piece.offset + matrix.offset
    return Rows(
        *(checkpoint, name, piece.file, place, matrix.format, matrix.rows, matrix.cols),
        *(matrix.scales, matrix.layout),
    )
