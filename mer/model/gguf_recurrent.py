"""Layers with a state, as GGUF files have them: names and order of what the gated delta rule multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mer.model.spec import DeltaSpec, ModelSpec, ShortConvSpec
from mer.weights.gguf_writer import Value
from mer.weights.reordered import Columns, Mapped, Picked, Source

Form = tuple[str, tuple[int, ...], Source]
_Order = NDArray[np.intp]
# Parts of a layer's delta rule that do not go as they are.
DELTA_PARTS: Final = {"mix", "mix_and_z", "z", "a", "b", "a_log", "decay_rate", "dt_bias", "o"}


def recurrent_parameters(spec: ModelSpec) -> dict[str, Value]:
    """Keys and values, without the architecture's name."""
    r = spec.recurrent
    if isinstance(r, DeltaSpec):
        return {
            "ssm.conv_kernel": r.kernel,
            "ssm.state_size": r.key_dim,
            "ssm.group_count": r.key_heads,
            "ssm.time_step_rank": r.value_heads,
            "ssm.inner_size": r.out_width,
            "full_attention_interval": interval(spec),
        }
    if isinstance(r, ShortConvSpec):
        heads = [a.n_kv_heads for a in spec.attentions if hasattr(a, "n_kv_heads")]
        kept = [
            0 if layer.state_index is not None else n for layer, n in zip(spec.layers, heads, strict=True)
        ]
        return {"shortconv.l_cache": r.kernel, "attention.head_count_kv": kept}
    return {}


def interval(spec: ModelSpec) -> int:
    """Every how many layers there is attention; 0 where they do not alternate so."""
    attention = [layer.state_index is None for layer in spec.layers]
    if True not in attention:
        return 0
    every = attention.index(True) + 1
    return every if attention == [(i + 1) % every == 0 for i in range(len(attention))] else 0


def conv_form(spec: ModelSpec, name: str, shape: tuple[int, ...], rows: Source, tile: bool) -> Form:
    """A convolution's weights [channels, kernel]."""
    source = _in_part(spec, rows) if tile else rows
    return name, (shape[0], shape[-1]), source


def delta_forms(
    spec: ModelSpec, kind: str, name: str, shape: tuple[int, ...], rows: Source, tile: bool
) -> Iterator[Form]:
    """(Hugging Face's name, shape, values) of one tensor of the delta rule, or of two in its place.

    tile: value heads are to stand as one of each key head, then the next of each.
    """
    r = spec.recurrent
    assert isinstance(r, DeltaSpec)
    if kind == "mix_and_z":
        qkv, z = _parted(r)
        yield name.replace("qkvz", "qkv"), (len(qkv), rows.cols), Picked(rows, rows.rows, qkv)
        yield name.replace("qkvz", "z"), (len(z), rows.cols), Picked(rows, rows.rows, z)
    elif kind == "a_log":
        rate = Mapped(rows, lambda values: -np.exp(values))
        yield name.replace("A_log", "decay_rate"), shape, _columns(r, rate, 1, tile)
    elif kind in ("decay_rate", "dt_bias"):
        yield name, shape, _columns(r, rows, 1, tile)
    elif kind == "o":
        yield name, shape, _columns(r, rows, r.value_dim, tile)
    elif kind == "mix" and tile:
        yield name, shape, _in_part(spec, rows)
    elif kind in ("z", "a", "b") and tile:
        order = _tiled(r, r.value_dim if kind == "z" else 1)
        yield name, shape, Picked(rows, rows.rows, order)
    else:
        yield name, shape, rows


def _columns(r: DeltaSpec, rows: Source, dim: int, tile: bool) -> Source:
    return Columns(rows, _tiled(r, dim)) if tile else rows


def _in_part(spec: ModelSpec, rows: Source) -> Source:
    """Rows of queries and keys as they are, those of values tiled."""
    r = spec.recurrent
    assert isinstance(r, DeltaSpec)
    first = 2 * r.key_heads * r.key_dim
    return Picked(rows, rows.rows, np.concatenate([np.arange(first), first + _tiled(r, r.value_dim)]))


def _tiled(r: DeltaSpec, dim: int) -> _Order:
    """Of value heads of `dim` rows each, which stand with their key head, in the other order."""
    heads = np.arange(r.value_heads * dim).reshape(r.key_heads, -1, dim)
    return heads.swapaxes(0, 1).reshape(-1)


def _parted(r: DeltaSpec) -> tuple[_Order, _Order]:
    """Of the rows of each key head in turn: those of all queries, keys and values, and those of z."""
    values = r.value_heads // r.key_heads * r.value_dim
    ends = np.cumsum([r.key_dim, r.key_dim, values])
    rows = np.arange(r.key_heads * (ends[-1] + values)).reshape(r.key_heads, -1)
    *mixed, z = (part.reshape(-1) for part in np.split(rows, ends, axis=1))
    return np.concatenate(mixed), z
