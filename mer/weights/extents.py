"""Where weights lie on disk: what everything above this layer sees of a routed expert."""

from __future__ import annotations

from attrs import frozen

from mer.weights.formats import Format


@frozen
class Piece:
    """A run of bytes. file: index into Checkpoint.files; offset (from the file's start) and nbytes: bytes."""

    file: int
    offset: int
    nbytes: int


@frozen
class Scales:
    """The scales of an F8_E4M3 matrix: one number for each block of block_rows x block_cols elements."""

    file: int
    offset: int
    format: Format
    rows: int
    cols: int
    block_rows: int
    block_cols: int


@frozen
class Transposed:
    """Element (r, c) is element (c, first + step * r) of what is stored, which has `width` columns."""

    width: int
    first: int
    step: int


@frozen
class SplitBlocks:
    """MXFP4 or Q4_0 with codes [n, cols / 2] and scales [n, scale_cols] apart; row r is row first + step * r.

    A byte of codes is two neighbours, the first one in its low half. file, offset: where the scales lie; as
    many columns as one of them is for are whole blocks.
    """

    file: int
    offset: int
    first: int
    step: int
    scale_format: Format
    scale_cols: int

    @property
    def scale_row_bytes(self) -> int:
        """Bytes of a row of scales."""
        return self.scale_format.row_bytes(self.scale_cols)


@frozen
class Matrix:
    """A matrix [rows, cols], row-major unless `layout` says otherwise.

    piece: index into ExpertExtents.pieces; offset: bytes inside it.
    """

    piece: int
    offset: int
    format: Format
    rows: int
    cols: int
    scales: Scales | None = None
    layout: Transposed | SplitBlocks | None = None

    @property
    def nbytes(self) -> int:
        return self.rows * self.format.row_bytes(self.cols)


@frozen
class ExpertExtents:
    """One routed expert: the pieces to read, and where gate [I, H], up [I, H] and down [H, I] are in them."""

    pieces: tuple[Piece, ...]
    gate: Matrix
    up: Matrix
    down: Matrix

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix]:
        """gate, up, down."""
        return self.gate, self.up, self.down


@frozen(eq=False)
class MoeLayerSource:
    """The routed experts of one layer. layer: its number in the model, plain layers counted."""

    layer: int
    experts: list[ExpertExtents]
