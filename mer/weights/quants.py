"""Q8_0, Q4_0 and MXFP4: blocks of 32 with one scale. Rounding and order of operations are those of GGUF."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Added before truncation, the largest float below a half rounds to nearest with ties away from zero; a half
# itself would also lift the float just below a tie.
_HALF = np.nextafter(np.float32(0.5), np.float32(0))


def _inverse(scale: Floats) -> Floats:
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _scaled(values: Floats, scale: Floats) -> Floats:
    """values / scale as GGUF computes it. What is not finite has no code of its own: it becomes 0."""
    scaled: Floats = values * _inverse(scale)
    if not np.isfinite(scaled).all():
        scaled[~np.isfinite(scaled)] = 0
    return scaled


def _scale_bytes(scale: Floats) -> Bytes:
    return scale.astype(np.float16).view(np.uint8)


def _scale_values(data: Bytes) -> Floats:
    return np.ascontiguousarray(data[:, :2]).view(np.float16).astype(np.float32)


def encode_q8_0(values: Floats) -> Bytes:
    """f32 [n, 32] -> uint8 [n, 34]: scale (largest magnitude / 127), then 32 x int8."""
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    scaled = _scaled(values, scale)
    scaled += np.copysign(_HALF, scaled)
    out = np.empty((len(values), 34), np.uint8)
    out[:, :2] = _scale_bytes(scale)
    out[:, 2:] = scaled.astype(np.int8).view(np.uint8)
    return out


def decode_q8_0(data: Bytes) -> Floats:
    """uint8 [n, 34] -> f32 [n, 32]."""
    values: Floats = data[:, 2:].view(np.int8).astype(np.float32)
    values *= _scale_values(data)
    return values


def encode_q4_0(values: Floats) -> Bytes:
    """f32 [n, 32] -> uint8 [n, 18]: scale (the value of largest magnitude is -8), then 32 x 4 bits.

    Byte i holds element i in its low half and element i + 16 in its high half.
    """
    high, low = values.max(axis=1, keepdims=True), values.min(axis=1, keepdims=True)
    # Of two values of equal magnitude GGUF takes the first.
    first = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    extreme = np.where(high == -low, first, np.where(high > -low, high, low))
    scale = (extreme / np.float32(-8)).astype(np.float32)
    # Where the inverse of a scale overflows, the scale itself is 0 in F16, and ggml's codes are 0.
    scaled = np.where(np.isfinite(_inverse(scale)), _scaled(values, scale), np.float32(-8))
    scaled += np.float32(8.5)
    codes = np.clip(scaled, 0, 15, out=scaled).astype(np.uint8)
    out = np.empty((len(values), 18), np.uint8)
    out[:, :2] = _scale_bytes(scale)
    out[:, 2:] = codes[:, :16] | (codes[:, 16:] << 4)
    return out


def decode_q4_0(data: Bytes) -> Floats:
    """uint8 [n, 18] -> f32 [n, 32]."""
    values = np.empty((len(data), 32), np.float32)
    values[:, :16] = data[:, 2:] & 15
    values[:, 16:] = data[:, 2:] >> 4
    values -= 8
    values *= _scale_values(data)
    return values


# Twice the values of MXFP4's codes: a sign, 2 bits of exponent, 1 of mantissa. Its scales are powers of two.
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
# Between two neighbours; a value that is just there gets the smaller one.
_BETWEEN = (_E2M1[:7] + _E2M1[1:8]) / 2


def _half_powers(exponents: Bytes) -> Floats:
    """2^(e - 128), exact down to e = 0."""
    bits = np.where(
        exponents < 2, 0x00200000 << exponents.astype(np.uint32), (exponents.astype(np.uint32) - 1) << 23
    )
    return bits.astype(np.uint32).view(np.float32)


def encode_mxfp4(values: Floats) -> Bytes:
    """f32 [n, 32] -> uint8 [n, 17]: exponent of the scale (from the largest magnitude), 32 codes as Q4_0."""
    top = np.abs(values).max(axis=1, keepdims=True)
    exponent = np.where(top > 0, np.floor(np.log2(top)) + np.float32(125), np.float32(0))
    exponent = np.clip(np.nan_to_num(exponent, posinf=0), 0, 254).astype(np.uint8)
    scaled = values / _half_powers(exponent)
    codes = np.searchsorted(_BETWEEN, np.abs(scaled)).astype(np.uint8)
    codes |= np.where((scaled < 0) & (codes > 0), np.uint8(8), np.uint8(0))
    out = np.empty((len(values), 17), np.uint8)
    out[:, :1] = exponent
    out[:, 1:] = codes[:, :16] | (codes[:, 16:] << 4)
    return out


def decode_mxfp4(data: Bytes) -> Floats:
    """uint8 [n, 17] -> f32 [n, 32]."""
    values = np.empty((len(data), 32), np.float32)
    values[:, :16] = _E2M1[data[:, 1:] & 15]
    values[:, 16:] = _E2M1[data[:, 1:] >> 4]
    values *= _half_powers(data[:, :1])
    return values
