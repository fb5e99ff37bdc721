"""Q4_K: blocks of 256 as 8 sub-blocks of 32, each value = d * scale * code - dmin * minimum.

d and dmin are F16 for the block, scale and minimum 6 bits for each sub-block, codes 4 bits. Layout and
dequantising are GGUF's, bit for bit. How to choose the numbers is the quantiser's, and this one gives the
bytes of ggml's reference as built for x86-64: for each sub-block try a range of step sizes, fit scale and
minimum to the codes by weighted least squares, keep the best fit. Every operation is the reference's, in
float32 and in its order, its oddities with it: a better fit moves the minimum from which the next codes are
counted.

Sums run over the first axis, element after element, and no product is fused with a sum: the result is the
same on every machine.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_ZERO, _ONE, _TOP, _SIX_BITS = (np.float32(n) for n in (0, 1, 15, 63))
# Step sizes tried: the range of a sub-block is divided into 14.0, 14.1, ... 16.0 steps.
_STEPS: Final = tuple(np.float32(-1) + np.float32(0.1) * np.float32(i) + _TOP for i in range(21))
# Added to a float below 2**22 this leaves the nearest integer (ties to even) in the low bits of the sum.
_ROUNDER: Final = np.float32(3 << 22)


def _nearest(values: Floats) -> NDArray[np.int32]:
    """The nearest integers, as ggml takes them from the bits: what is not finite gives 0 or less."""
    bits = (values + _ROUNDER).view(np.int32)
    bits &= (1 << 23) - 1
    bits -= 1 << 22
    return bits


def _fit(values: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Sub-blocks [32, n] -> their scale and lowest value (not above 0), inverse and start, each [n].

    Large values count more: the weight of x is |x| plus the root mean square of its sub-block. The codes that
    were fitted are the nearest integers to (x - start) * inverse.
    """
    weight = np.abs(values)
    weight += np.sqrt((values * values).sum(axis=0) / np.float32(32))
    low, high = np.minimum(values.min(axis=0), _ZERO), values.max(axis=0)
    code, work, product = (np.empty_like(values) for _ in range(3))
    sum_w, sum_x = weight.sum(axis=0), np.multiply(weight, values, out=work).sum(axis=0)

    def codes(inverse: Floats) -> None:
        np.subtract(values, low, out=code)
        np.multiply(code, inverse, out=code)
        np.clip(np.rint(code, out=code), 0, 15, out=code)
        if not (usual := np.isfinite(inverse) & (inverse > 0)).all():
            code[:, ~usual] = 0  # a range that float32 cannot divide by, nor 15 by it

    def error(scale: Floats, least: Floats) -> Floats:
        np.multiply(code, scale, out=work)
        np.add(work, least, out=work)
        np.subtract(work, values, out=work)
        np.multiply(work, work, out=work)
        total: Floats = np.multiply(work, weight, out=work).sum(axis=0)
        return total

    inverse = _TOP / (high - low)
    scale = _ONE / inverse
    codes(inverse)
    best = error(scale, low)
    best_inverse, start = inverse, low
    for steps in _STEPS:
        inverse = steps / (high - low)
        codes(inverse)
        sum_l = np.multiply(weight, code, out=work).sum(axis=0)
        sum_l2 = np.multiply(work, code, out=product).sum(axis=0)
        sum_xl = np.multiply(work, values, out=work).sum(axis=0)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        # The minimum may not rise above zero: it is stored without a sign.
        above = new_low > 0
        new_low[above] = 0
        new_scale = np.where(above, sum_xl / sum_l2, new_scale)
        now = error(new_scale, new_low)
        better = (determinant > 0) & (now < best)
        best = np.where(better, now, best)
        best_inverse, start = np.where(better, inverse, best_inverse), np.where(better, low, start)
        scale = np.where(better, new_scale, scale)
        low = np.where(better, new_low, low)
    return scale, low, best_inverse, start


def _six_bits(values: Floats) -> tuple[NDArray[np.float16], Bytes]:
    """Not negative [8, n] -> F16 unit [n] and codes [8, n] of at most 63."""
    largest = np.fmax.reduce(values, axis=0, initial=0) + _ZERO
    inverse = np.where(largest > 0, _SIX_BITS / largest, _ZERO)
    codes = _nearest(inverse * values).astype(np.uint8)
    return (largest / _SIX_BITS).astype(np.float16), np.minimum(codes, np.uint8(63))


def encode_q4_k(values: Floats) -> Bytes:
    """f32 [n, 256] -> uint8 [n, 144]. What is not finite becomes 0: it has no code."""
    n = len(values)
    if not np.isfinite(values).all():
        values = np.where(np.isfinite(values), values, _ZERO)
    parts = np.ascontiguousarray(values.reshape(n * 8, 32).T)
    scale, low, inverse, start = _fit(parts)
    d, scale_code = _six_bits(np.ascontiguousarray(scale.reshape(n, 8).T))
    dmin, minimum_code = _six_bits(np.ascontiguousarray(-low.reshape(n, 8).T))
    # Codes are chosen for the scale and minimum as they are stored, not as they were wished.
    step = (d.astype(np.float32) * scale_code).T.reshape(-1)
    minimum = (dmin.astype(np.float32) * minimum_code).T.reshape(-1)
    nearest = _nearest((parts + minimum) / step)
    if (flat := step == 0).any():  # such codes count for nothing; ggml leaves those of the fit
        nearest[:, flat] = _nearest((parts[:, flat] - start[flat]) * inverse[flat])
    code = np.clip(nearest, 0, 15, out=nearest).astype(np.uint8)
    out = np.empty((n, 144), np.uint8)
    out[:, 0:2] = d.reshape(n, 1).view(np.uint8)
    out[:, 2:4] = dmin.reshape(n, 1).view(np.uint8)
    out[:, 4:16] = _pack_scales(scale_code, minimum_code)
    # 32 bytes hold two neighbouring sub-blocks: the first in the low halves, the second in the high ones.
    pairs = code.reshape(32, n, 4, 2)
    out[:, 16:] = (pairs[..., 0] | (pairs[..., 1] << 4)).transpose(1, 2, 0).reshape(n, 128)
    return out


def _pack_scales(scale: Bytes, minimum: Bytes) -> Bytes:
    """[8, n] and [8, n] of 6 bits -> [n, 12]: the upper two bits of 4..7 ride on top of 0..3."""
    packed = [scale[:4] | ((scale[4:] >> 4) << 6), minimum[:4] | ((minimum[4:] >> 4) << 6)]
    packed.append((scale[4:] & 15) | ((minimum[4:] & 15) << 4))
    return np.concatenate(packed).T


def unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    minimum = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scale, minimum


def decode_q4_k(data: Bytes) -> Floats:
    """uint8 [n, 144] -> f32 [n, 256]."""
    n = len(data)
    units = np.ascontiguousarray(data[:, :4]).view(np.float16).astype(np.float32)
    scale, minimum = unpack_scales(data[:, 4:16])
    codes = data[:, 16:].reshape(n, 4, 1, 32)
    values = np.empty((n, 4, 2, 32), np.float32)
    values[:, :, :1] = codes & 15
    values[:, :, 1:] = codes >> 4
    parts = values.reshape(n, 8, 32)
    parts *= (units[:, :1] * scale)[:, :, None]
    parts -= (units[:, 1:] * minimum)[:, :, None]
    return parts.reshape(n, 256)
