"""Q4_K: blocks of 256 as 8 sub-blocks of 32, each value = d * scale * code - dmin * minimum.

d and dmin are F16 for the block, scale and minimum 6 bits for each sub-block, codes 4 bits. Layout and
dequantising are GGUF's, bit for bit. How to choose the numbers is the quantiser's, and this one is our own
search: the `gguf` package has none to compare with. It follows the published method of the k-quants: for each
sub-block try a range of step sizes, fit scale and minimum to the codes by weighted least squares, keep the
best fit.

Sums run over the first axis, element after element: the result is the same on every machine.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Step sizes tried: the range of a sub-block is divided into 14.0, 14.1, ... 16.0 steps.
_STEPS: Final = tuple(np.float32(14 + 0.1 * i) for i in range(21))
_SIX_BITS: Final = np.float32(63)


def _divide(a: Floats, b: Floats) -> Floats:
    """a / b, and 0 where b is not positive."""
    return np.where(b > 0, a / np.where(b > 0, b, np.float32(1)), np.float32(0))


def _fit(values: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum (as a positive number to subtract) of sub-blocks [32, n] -> each [n].

    Large values count more: the weight of x is |x| plus the root mean square of its sub-block.
    """
    weight = np.abs(values)
    weight += np.sqrt((values * values).sum(axis=0) / np.float32(32))
    low = np.minimum(values.min(axis=0), np.float32(0))
    span = values.max(axis=0) - low
    # Within the search a sub-block goes from 0 to 1, so that sums lose little to cancellation.
    unit = _divide(values - low, np.broadcast_to(span, values.shape))
    weighted = weight * unit
    sum_w, sum_x, sum_xx = weight.sum(axis=0), weighted.sum(axis=0), (weighted * unit).sum(axis=0)
    # The minimum may not rise above zero: it is stored without a sign.
    ceiling = _divide(-low, span)
    best = np.full(low.shape, np.inf, np.float32)
    best_scale, best_offset = np.zeros_like(low), np.zeros_like(low)
    code, product = np.empty_like(values), np.empty_like(values)
    for steps in _STEPS:
        np.rint(np.multiply(unit, steps, out=code), out=code)
        if steps >= 15.5:
            np.minimum(code, np.float32(15), out=code)
        sum_lx = np.multiply(weighted, code, out=product).sum(axis=0)
        sum_l = np.multiply(weight, code, out=product).sum(axis=0)
        sum_ll = np.multiply(product, code, out=product).sum(axis=0)
        scale = _divide(sum_w * sum_lx - sum_x * sum_l, sum_w * sum_ll - sum_l * sum_l)
        offset = _divide(sum_x - scale * sum_l, sum_w)
        above = offset > ceiling
        offset = np.where(above, ceiling, offset)
        scale = np.where(above, _divide(sum_lx - ceiling * sum_l, sum_ll), scale)
        error = (
            sum_xx
            - 2 * (scale * sum_lx + offset * sum_x)
            + scale * (scale * sum_ll + 2 * offset * sum_l)
            + offset * offset * sum_w
        )
        better = (error < best) & (scale > 0)
        best = np.where(better, error, best)
        best_scale = np.where(better, scale, best_scale)
        best_offset = np.where(better, offset, best_offset)
    return best_scale * span, np.maximum(-(low + best_offset * span), np.float32(0))


def _six_bits(values: Floats) -> tuple[NDArray[np.float16], Bytes]:
    """Not negative [8, n] -> F16 unit [n] and codes [8, n] of at most 63."""
    largest = values.max(axis=0)
    unit = (largest / _SIX_BITS).astype(np.float16)
    codes = np.rint(values * _divide(np.broadcast_to(_SIX_BITS, largest.shape), largest))
    return unit, np.minimum(codes, _SIX_BITS).astype(np.uint8)


def encode_q4_k(values: Floats) -> Bytes:
    """f32 [n, 256] -> uint8 [n, 144]. What is not finite becomes 0: it has no code."""
    n = len(values)
    if not np.isfinite(values).all():
        values = np.where(np.isfinite(values), values, np.float32(0))
    parts = np.ascontiguousarray(values.reshape(n * 8, 32).T)
    scale, minimum = _fit(parts)
    d, scale_code = _six_bits(np.ascontiguousarray(scale.reshape(n, 8).T))
    dmin, minimum_code = _six_bits(np.ascontiguousarray(minimum.reshape(n, 8).T))
    # Codes are chosen for the scale and minimum as they are stored, not as they were wished.
    step = (d.astype(np.float32) * scale_code).T.reshape(-1)
    parts += (dmin.astype(np.float32) * minimum_code).T.reshape(-1)
    parts *= _divide(np.broadcast_to(np.float32(1), step.shape), step)
    np.rint(parts, out=parts)
    code = np.clip(parts, 0, 15, out=parts).astype(np.uint8)
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


def _unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    minimum = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scale, minimum


def decode_q4_k(data: Bytes) -> Floats:
    """uint8 [n, 144] -> f32 [n, 256]."""
    n = len(data)
    units = np.ascontiguousarray(data[:, :4]).view(np.float16).astype(np.float32)
    scale, minimum = _unpack_scales(data[:, 4:16])
    codes = data[:, 16:].reshape(n, 4, 1, 32)
    values = np.empty((n, 4, 2, 32), np.float32)
    values[:, :, :1] = codes & 15
    values[:, :, 1:] = codes >> 4
    parts = values.reshape(n, 8, 32)
    parts *= (units[:, :1] * scale)[:, :, None]
    parts -= (units[:, 1:] * minimum)[:, :, None]
    return parts.reshape(n, 256)
