"""Weight formats, bit for bit as GGUF defines them: the specification that the kernels are tested against.

A matrix [rows, cols] is stored row after row, each row encoded by itself as whole blocks along the columns.
Ids are ggml's type numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from mer.errors import UnsupportedModelError
from mer.weights import quants, read_quants
from mer.weights.q4_k import decode_q4_k, encode_q4_k

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Elements coded at a time: the temporaries of one piece stay in the processor's cache.
_PIECE = 1 << 16


@frozen(eq=False)
class Format:
    """How numbers are stored. block: elements of a block; block_bytes: bytes that they take."""

    name: str
    id: int
    block: int
    block_bytes: int
    # f32 [n, block] -> uint8 [n, block_bytes], and back.
    _encode: Callable[[Floats], Bytes] = field(repr=False)
    _decode: Callable[[Bytes], Floats] = field(repr=False)

    def fits(self, cols: int) -> bool:
        """Whether rows of `cols` elements are whole blocks."""
        return cols % self.block == 0

    def row_bytes(self, cols: int) -> int:
        """Bytes of one row. Raises ValueError when `cols` is no multiple of the block."""
        if not self.fits(cols):
            raise ValueError(f"{self.name} stores blocks of {self.block}, a row of {cols} does not divide")
        return cols // self.block * self.block_bytes

    def quantize(self, values: NDArray[Any]) -> Bytes:
        """f32 [..., cols] -> uint8 [..., row_bytes]. The same row always becomes the same bytes."""
        values = np.ascontiguousarray(values, np.float32)
        out = np.empty((*values.shape[:-1], self.row_bytes(values.shape[-1])), np.uint8)
        _in_pieces(
            self._encode, values.reshape(-1, self.block), out.reshape(-1, self.block_bytes), self.block
        )
        return out

    def dequantize(self, data: NDArray[np.uint8]) -> Floats:
        """uint8 [..., row_bytes] -> f32 [..., cols]."""
        blocks, rest = divmod(data.shape[-1], self.block_bytes)
        if rest:
            raise ValueError(f"{data.shape[-1]} bytes are no whole {self.name} blocks of {self.block_bytes}")
        data = np.ascontiguousarray(data)
        out = np.empty((*data.shape[:-1], blocks * self.block), np.float32)
        _in_pieces(self._decode, data.reshape(-1, self.block_bytes), out.reshape(-1, self.block), self.block)
        return out


def _in_pieces(code: Callable[[Any], Any], source: NDArray[Any], out: NDArray[Any], block: int) -> None:
    step = max(1, _PIECE // block)
    with np.errstate(all="ignore"):
        for start in range(0, len(source), step):
            out[start : start + step] = code(source[start : start + step])


def _encode_f32(values: Floats) -> Bytes:
    return values.view(np.uint8)


def _decode_f32(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view(np.float32)


def _encode_f16(values: Floats) -> Bytes:
    return values.astype(np.float16).view(np.uint8)


def _decode_f16(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _encode_bf16(values: Floats) -> Bytes:
    """Round to nearest, ties to even; a NaN stays one (quiet)."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nan = np.isnan(values)
    if nan.any():
        rounded = np.where(nan, (bits >> 16) | 0x40, rounded)
    return rounded.astype(np.uint16).view(np.uint8)


def _decode_bf16(data: Bytes) -> Floats:
    wide = np.ascontiguousarray(data).view(np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _e4m3_values() -> Floats:
    """Value of each byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F and 0xFF are NaN."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    size = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    size[(byte & 127) == 127] = np.nan
    return np.where(byte < 128, size, -size).astype(np.float32)


_E4M3: Final = _e4m3_values()


def _decode_e4m3(data: Bytes) -> Floats:
    return _E4M3[data]


def _encode_e4m3(values: Floats) -> Bytes:
    raise ValueError("F8_E4M3 is only read, with its scales, from checkpoints published in it")


def _decode_e8m0(data: Bytes) -> Floats:
    """2^(byte - 127); 255 is NaN."""
    return np.where(data == 255, np.float32(np.nan), np.ldexp(np.float32(1), data.astype(np.int32) - 127))


def _encode_e8m0(values: Floats) -> Bytes:
    raise ValueError("F8_E8M0 is only read: the scales of checkpoints published with them")


def _decode_i32(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<i4").astype(np.float32)


def _decode_i64(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<i8").astype(np.float32)


def _encode_integers(values: Floats) -> Bytes:
    raise ValueError("integers are only read")


F32: Final = Format("f32", 0, 1, 4, _encode_f32, _decode_f32)
F16: Final = Format("f16", 1, 1, 2, _encode_f16, _decode_f16)
Q4_0: Final = Format("q4_0", 2, 32, 18, quants.encode_q4_0, quants.decode_q4_0)
Q8_0: Final = Format("q8_0", 8, 32, 34, quants.encode_q8_0, quants.decode_q8_0)
Q4_K: Final = Format("q4_k", 12, 256, 144, encode_q4_k, decode_q4_k)
BF16: Final = Format("bf16", 30, 1, 2, _encode_bf16, _decode_bf16)
MXFP4: Final = Format("mxfp4", 39, 32, 17, quants.encode_mxfp4, quants.decode_mxfp4)

# What `mer convert` writes.
WRITTEN: Final = (F32, F16, BF16, Q8_0, Q4_0, Q4_K, MXFP4)


def _read_only(name: str, id: int, block: int, block_bytes: int) -> Format:
    decode = getattr(read_quants, f"decode_{name}")
    return Format(name, id, block, block_bytes, read_quants.encoder(name), decode)


Q6_K: Final = _read_only("q6_k", 14, 256, 210)
# What the kernels multiply.
FORMATS: Final = (
    *WRITTEN,
    _read_only("q4_1", 3, 32, 20),
    _read_only("q5_0", 6, 32, 22),
    _read_only("q5_1", 7, 32, 24),
    _read_only("q2_k", 10, 256, 84),
    _read_only("q3_k", 11, 256, 110),
    _read_only("q5_k", 13, 256, 176),
    Q6_K,
    _read_only("iq4_nl", 20, 32, 18),
    _read_only("iq4_xs", 23, 256, 136),
)

# Known only as a source of conversion: ggml has no number for it, and no kernel reads it.
F8_E4M3: Final = Format("f8_e4m3", -1, 1, 1, _encode_e4m3, _decode_e4m3)

# Scales that are powers of two, of 8-bit floats and of MXFP4.
F8_E8M0: Final = Format("f8_e8m0", -3, 1, 1, _encode_e8m0, _decode_e8m0)

# Numbers that are no weights: which experts a token takes. A conversion makes F32 of them, exact below 2^24.
INTEGERS: Final = (
    Format("i32", 26, 1, 4, _encode_integers, _decode_i32),
    Format("i64", 27, 1, 8, _encode_integers, _decode_i64),
)

_BY_NAME: Final = {each.name: each for each in (*FORMATS, F8_E4M3)}
_BY_ID: Final = {each.id: each for each in FORMATS}


def by_name(name: str) -> Format:
    """The format called `name` ('q4_k', in either case). Raises UnsupportedModelError."""
    try:
        return _BY_NAME[name.lower()]
    except KeyError:
        known = ", ".join(each.name for each in FORMATS)
        raise UnsupportedModelError(f"the weight format {name!r} is not known; known are {known}") from None


def by_id(number: int) -> Format:
    """The format of ggml's type number. Raises UnsupportedModelError."""
    try:
        return _BY_ID[number]
    except KeyError:
        known = ", ".join(f"{each.id} ({each.name})" for each in FORMATS)
        raise UnsupportedModelError(
            f"the weight format number {number} is not known; known are {known}"
        ) from None
