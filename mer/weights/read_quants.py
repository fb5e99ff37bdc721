"""Formats that are read, not written: what GGUF files of others are made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mer.weights.q4_k import unpack_scales

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def encoder(name: str) -> Callable[[Floats], Bytes]:
    """What says that `name` is not written. Raises ValueError when called."""

    def encode(values: Floats) -> Bytes:
        raise ValueError(f"{name} is only read, from GGUF files")

    return encode


def _f16(data: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(data[:, at : at + 2]).view(np.float16).astype(np.float32)


def _halves(data: Bytes) -> Bytes:
    """uint8 [n, 16] -> [n, 32]: low halves, then high ones."""
    return np.concatenate([data & 15, data >> 4], axis=1)


def _fifths(data: Bytes) -> Bytes:
    """uint8 [n, 4] -> [n, 32]: each bit, as 16 or 0."""
    bits: Bytes = np.unpackbits(data, axis=1, bitorder="little")
    return bits * np.uint8(16)


def _grouped(codes: NDArray[np.generic], scale: Floats) -> Floats:
    """codes [n, 256] times the scales [n, groups] of their groups."""
    groups = codes.astype(np.float32).reshape(len(codes), scale.shape[1], -1)
    return (scale[:, :, None] * groups).reshape(len(codes), -1)


def decode_q4_1(data: Bytes) -> Floats:
    """uint8 [n, 20] -> f32 [n, 32]: scale, least value, 32 x 4 bits."""
    return _f16(data, 0) * _halves(data[:, 4:]).astype(np.float32) + _f16(data, 2)


def decode_q5_0(data: Bytes) -> Floats:
    """uint8 [n, 22] -> f32 [n, 32]: scale, 32 fifth bits, 32 x 4 bits; less 16."""
    codes = (_halves(data[:, 6:]) | _fifths(data[:, 2:6])).astype(np.int8) - np.int8(16)
    return _f16(data, 0) * codes.astype(np.float32)


def decode_q5_1(data: Bytes) -> Floats:
    """uint8 [n, 24] -> f32 [n, 32]: scale, least value, 32 fifth bits, 32 x 4 bits."""
    codes = _halves(data[:, 8:]) | _fifths(data[:, 4:8])
    return _f16(data, 0) * codes.astype(np.float32) + _f16(data, 2)


def _quarters(data: Bytes) -> Bytes:
    """uint8 [n, 64] -> [n, 256]: of each 32 bytes the lowest two bits, then the next ..."""
    parts = data.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes: Bytes = (parts & np.uint8(3)).reshape(len(data), 256)
    return codes


def decode_q2_k(data: Bytes) -> Floats:
    """uint8 [n, 84] -> f32 [n, 256]: 16 x (scale, minimum), 256 x 2 bits, d, dmin."""
    scale = _f16(data, 80) * (data[:, :16] & 15).astype(np.float32)
    least = _f16(data, 82) * (data[:, :16] >> 4).astype(np.float32)
    return _grouped(_quarters(data[:, 16:80]), scale) - np.repeat(least, 16, axis=1)


def decode_q3_k(data: Bytes) -> Floats:
    """uint8 [n, 110] -> f32 [n, 256]: 256 third bits, 256 x 2 bits, 16 scales of 6 bits, d; less 4."""
    third = np.unpackbits(data[:, :32].reshape(-1, 1, 32), axis=1, bitorder="little")
    codes = (_quarters(data[:, 32:96]) | (third.reshape(len(data), 256) << 2)).astype(np.int8) - np.int8(4)
    packed = data[:, 96:108]
    high = packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    scale = (low | ((high & 3).reshape(len(data), 16) << 4)).astype(np.int8) - np.int8(32)
    return _grouped(codes, _f16(data, 108) * scale.astype(np.float32))


def decode_q5_k(data: Bytes) -> Floats:
    """uint8 [n, 176] -> f32 [n, 256]: d, dmin, 8 x (scale, minimum) of 6 bits, fifth bits, 256 x 4 bits."""
    scale, least = unpack_scales(data[:, 4:16])
    fifth = np.unpackbits(data[:, 16:48].reshape(-1, 1, 32), axis=1, bitorder="little") << 4
    low = data[:, 48:].reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    codes = (low & 15).reshape(len(data), 256) | fifth.reshape(len(data), 256)
    minimum = _f16(data, 2) * least.astype(np.float32)
    return _grouped(codes, _f16(data, 0) * scale.astype(np.float32)) - np.repeat(minimum, 32, axis=1)


def decode_q6_k(data: Bytes) -> Floats:
    """uint8 [n, 210] -> f32 [n, 256]: 256 x 4 bits, 256 x 2 bits, 16 scales (int8), d; less 32."""
    low = data[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    codes = (low & 15).reshape(len(data), 256) | (_quarters(data[:, 128:192]) << 4)
    scale = np.ascontiguousarray(data[:, 192:208]).view(np.int8).astype(np.float32)
    return _grouped(codes.astype(np.int8) - np.int8(32), _f16(data, 208) * scale)


def decode_iq4_nl(data: Bytes) -> Floats:
    """uint8 [n, 18] -> f32 [n, 32]: scale, 32 x 4 bits that choose one of sixteen values."""
    return _f16(data, 0) * _IQ4[_halves(data[:, 2:])]


def decode_iq4_xs(data: Bytes) -> Floats:
    """uint8 [n, 136] -> f32 [n, 256]: d, 8 scales of 6 bits (the upper two first), 256 x 4 bits as IQ4_NL."""
    high = np.ascontiguousarray(data[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = data[:, 4:8, None] >> np.array([0, 4], np.uint8)
    scale = (low & 15).reshape(len(data), 8) | ((high & 3) << 4).astype(np.uint8)
    scale = scale.astype(np.int8) - np.int8(32)
    codes = _halves(data[:, 8:].reshape(-1, 16)).reshape(len(data), 256)
    return _grouped(_IQ4[codes], _f16(data, 0) * scale.astype(np.float32))
