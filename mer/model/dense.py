"""The always-needed weights: read once into memory, matrices in the format they are stored in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from mer._ext.decoder import embed
from mer.errors import CheckpointError
from mer.model.families import Architecture
from mer.model.placement import ON_THE_CPU, Placement
from mer.model.spec import Attention, AttentionSpec, DeltaSpec, LatentAttentionSpec, ModelSpec
from mer.streaming.reader import aligned_empty
from mer.weights import formats
from mer.weights.checkpoint import Checkpoint, TensorInfo

_ALIGN = 64
# Parts that are vectors: kept as f32. All others are matrices.
_VECTORS = ("norm", "bias", "sinks", "scale", "conv", "a_log", "decay_rate")
# Matrices that are parted into several.
_INTERLEAVED = ("q_and_gate", "mix_and_z", "b_and_a")


class Source(Protocol):
    """Reads extents of the checkpoint's files; `mer._ext.uring.Reader` is one."""

    def read_into(self, pieces: Sequence[tuple[int, int, int, NDArray[np.uint8], int]]) -> None:
        """Each (file, offset, length, array, place in the array); raises DeviceReadError."""


Vectors = NDArray[np.float32]


@frozen(eq=False)
class Matrix:
    """A weight matrix. data: uint8 [rows, row_bytes]. format: ggml's number."""

    data: NDArray[np.uint8]
    format: int
    cols: int


@frozen(eq=False)
class DenseWeights:
    """Weights of the whole model ('head', 'final_norm') and of each layer, by part.

    late: reads the matrices of a layer that were not read with the others, those of a GPU's layers.
    """

    model: dict[str, Any]
    layers: list[dict[str, Any]]
    embedding: Matrix
    late: Callable[[int], dict[str, Any]] | None = None

    def layer(self, index: int) -> dict[str, Any]:
        """All of one layer's. Raises DeviceReadError where some have still to be read."""
        return self.layers[index] | (self.late(index) if self.late is not None else {})

    def whole(self) -> DenseWeights:
        """The same, all read. Raises DeviceReadError."""
        return evolve(self, layers=[self.layer(index) for index in range(len(self.layers))], late=None)

    def matrices(self) -> list[NDArray[np.uint8]]:
        """The bytes of every matrix."""
        parts = [part for weights in (self.model, *self.layers) for part in weights.values()]
        return [self.embedding.data, *(part.data for part in parts if isinstance(part, Matrix))]

    def expert_biases(self) -> list[tuple[Vectors, Vectors, Vectors]]:
        """Of each MoE layer, where there are such biases: f32 [E, I] of gate and of up, [E, H] of down."""
        return _expert_biases(self.layers)

    def embed(self, tokens: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Rows of the embedding for i32 [T] into out, f32 [T, hidden]."""
        if not embed(self.embedding, tokens, out):
            out[:] = formats.by_id(self.embedding.format).dequantize(self.embedding.data[tokens])


def load_expert_biases(
    checkpoint: Checkpoint, architecture: Architecture, source: Source
) -> list[tuple[Vectors, Vectors, Vectors]]:
    """These alone. Raises as load_dense."""
    wanted = [part for part in architecture.dense if re.fullmatch(r"\d+\.expert_\w+_bias", part)]
    return _expert_biases(load_parts(checkpoint, architecture, source, wanted.__contains__)[1])


def _expert_biases(layers: list[dict[str, Any]]) -> list[tuple[Vectors, Vectors, Vectors]]:
    names = ("expert_gate_bias", "expert_up_bias", "expert_down_bias")
    return [(layer[names[0]], layer[names[1]], layer[names[2]]) for layer in layers if names[0] in layer]


def _is_vector(part: str) -> bool:
    return part.endswith(_VECTORS)


def _parts(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, TensorInfo]:
    """Parts to read; a head that is the embedding is not read twice."""
    parts = {part: checkpoint.tensors[name] for part, name in architecture.dense.items()}
    if architecture.spec.tied_embeddings:
        parts.pop("head", None)
    return parts


def _on_device(part: str, placement: Placement) -> bool:
    """Whether a GPU alone has this. Routers and the head stay here, too: draft heads want them."""
    layer, _, name = part.rpartition(".")
    return layer != "" and int(layer) < placement.layers and name != "router" and not _is_vector(part)


def dense_bytes(checkpoint: Checkpoint, architecture: Architecture, placement: Placement = ON_THE_CPU) -> int:
    """Bytes that they take in memory, at the worst moment of loading them; without those of a GPU."""
    total = spare = 0
    for part, info in _parts(checkpoint, architecture).items():
        if _on_device(part, placement):
            continue
        if part.endswith(".kv_up"):
            total += _kv_up_bytes(architecture.spec.attentions[int(part.partition(".")[0])], info)
            spare = max(spare, info.nbytes)
        elif part.endswith(_INTERLEAVED):
            total += info.nbytes
            spare = max(spare, info.nbytes)
        else:
            total += 4 * math.prod(info.shape) if _is_vector(part) else info.nbytes
    return total + spare


def device_bytes(checkpoint: Checkpoint, architecture: Architecture) -> tuple[list[int], int]:
    """Bytes of each layer's dense weights on a GPU, and of the head's, each array on a boundary."""
    layers = [0] * architecture.spec.n_layers
    head = 0
    for part, info in _parts(checkpoint, architecture).items():
        layer, _, name = part.rpartition(".")
        nbytes = 4 * math.prod(info.shape) if _is_vector(part) else info.nbytes
        if name == "kv_up":
            nbytes = 256 + _kv_up_bytes(architecture.spec.attentions[int(layer)], info)
        nbytes += 512 if name in _INTERLEAVED else 256
        if layer and not name.startswith("expert_"):
            layers[int(layer)] += nbytes
        elif name in ("head", "head_bias") or (name == "embedding" and architecture.spec.tied_embeddings):
            head += nbytes
    return layers, head


def load_dense(
    checkpoint: Checkpoint, architecture: Architecture, source: Source, placement: Placement = ON_THE_CPU
) -> DenseWeights:
    """Read every dense tensor; matrices of a GPU's layers are read when their layer is asked for.

    Raises DeviceReadError, or CheckpointError for a format without a kernel.
    """

    def late(index: int) -> dict[str, Any]:
        if index >= placement.layers:
            return {}
        parts = {part for part in architecture.dense if part.startswith(f"{index}.")}
        wanted = {part for part in parts if _on_device(part, placement)}
        return load_parts(checkpoint, architecture, source, wanted.__contains__)[1][index]

    model, layers = load_parts(checkpoint, architecture, source, lambda part: not _on_device(part, placement))
    embedding = model.pop("embedding")
    model.setdefault("head", embedding)
    return DenseWeights(model, layers, embedding, late if placement.layers else None)


def load_parts(
    checkpoint: Checkpoint,
    architecture: Architecture,
    source: Source,
    wanted: Callable[[str], bool] = lambda _: True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The wanted parts of it: what belongs to no layer, and of each layer, by part."""
    parts = {p: info for p, info in _parts(checkpoint, architecture).items() if wanted(p)}
    for info in parts.values():
        if info.format not in (*formats.FORMATS, *formats.INTEGERS):
            raise CheckpointError(
                f"{checkpoint.files[info.file]}: tensor {info.name} is stored as {info.format.name}, "
                "which can't be multiplied directly: make a store of this checkpoint with `mer convert`"
            )
    raw = {part: _destination(info) for part, info in parts.items()}
    source.read_into([(info.file, info.offset, info.nbytes, raw[part], 0) for part, info in parts.items()])
    spec = architecture.spec
    model: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{} for _ in spec.layers]
    for part, info in parts.items():
        data = raw.pop(part)
        layer, _, name = part.rpartition(".")
        target = layers[int(layer)] if layer else model
        if name == "expert_gate_up_bias":
            both = info.format.dequantize(data).reshape(info.shape)
            target["expert_gate_bias"] = np.ascontiguousarray(both[:, ::2])
            target["expert_up_bias"] = np.ascontiguousarray(both[:, 1::2])
        elif name == "router_table":
            target[name] = _table(spec, info, data)
        elif _is_vector(part):
            values = info.format.dequantize(data).reshape(info.shape).astype(np.float32)
            target.update(_vector(spec, name, values))
        elif name in _INTERLEAVED:
            target.update(_part_rows(spec, name, info, data))
        elif name == "gate_up":
            gate, up = data.reshape(2, info.rows // 2, -1)
            target["gate"] = Matrix(gate, info.format.id, info.cols)
            target["up"] = Matrix(up, info.format.id, info.cols)
        elif name == "qkv":
            target.update(_split_qkv(spec.attentions[int(layer)], info, data))
        elif name == "kv_up":
            target.update(_split_kv_up(spec.attentions[int(layer)], info, data))
        else:
            target[name] = Matrix(data.reshape(info.rows, -1), info.format.id, info.cols)
    return model, layers


def _vector(spec: ModelSpec, name: str, values: Vectors) -> dict[str, Vectors]:
    """A vector as the decoder takes it."""
    if name == "conv":  # [channels, 1, kernel], or without the 1
        return {name: values.reshape(len(values), -1)}
    if name == "a_log":
        return {"decay_rate": -np.exp(values)}
    if spec.zero_centred_norms and name.endswith("norm") and name != "state_norm":
        return {name: np.float32(1.0) + values}
    return {name: values}


def _table(spec: ModelSpec, info: TensorInfo, data: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Each token's experts: i32 [vocab, top_k]."""
    found = info.format.dequantize(data).reshape(info.shape)
    if not ((found >= 0) & (found < spec.n_experts) & (found == np.floor(found))).all():
        raise CheckpointError(
            f"the tensor {info.name} must have numbers of experts, from 0 to {spec.n_experts - 1}; "
            "fetch the file again"
        )
    return found.astype(np.int32)


def _part_rows(spec: ModelSpec, name: str, info: TensorInfo, data: NDArray[np.uint8]) -> dict[str, Matrix]:
    """The matrices whose rows alternate in one, head by head."""
    a, r = spec.attention, spec.recurrent
    if name == "q_and_gate":
        assert isinstance(a, AttentionSpec)
        heads, rows = a.n_heads, {"q": a.head_dim, "q_gate": a.head_dim}
    else:
        assert isinstance(r, DeltaSpec)
        group = r.value_heads // r.key_heads
        heads, rows = r.key_heads, {"b": group, "a": group}
        if name == "mix_and_z":
            values = group * r.value_dim
            rows = {"query": r.key_dim, "key": r.key_dim, "value": values, "z": values}
    by_head = data.reshape(heads, sum(rows.values()), -1)
    parts: dict[str, NDArray[np.uint8]] = {}
    at = 0
    for part, count in rows.items():
        parts[part] = by_head[:, at : at + count].reshape(heads * count, -1)
        at += count
    if name == "mix_and_z":
        mixed = np.concatenate([parts.pop(part) for part in ("query", "key", "value")])
        parts = {"mix": mixed, **parts}
    return {part: Matrix(_copy(rows), info.format.id, info.cols) for part, rows in parts.items()}


def _split_qkv(a: Attention, info: TensorInfo, data: NDArray[np.uint8]) -> dict[str, Matrix]:
    """Queries, keys and values one above the other."""
    assert isinstance(a, AttentionSpec)
    q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    rows = np.split(data.reshape(info.rows, -1), [q, q + kv])
    return {part: Matrix(each, info.format.id, info.cols) for part, each in zip("qkv", rows, strict=True)}


def _split_kv_up(a: Attention, info: TensorInfo, data: NDArray[np.uint8]) -> dict[str, Matrix]:
    """What makes keys and values of a latent, as latent attention uses it.

    v_up [heads * value_dim, kv_rank] turns a mean latent into a value; k_up [heads * kv_rank, nope_dim], each
    head transposed, takes a query to the latent's space. A format of blocks along the row can't be
    transposed, it becomes F16.
    """
    assert isinstance(a, LatentAttentionSpec)
    per_head = data.reshape(a.n_heads, a.nope_dim + a.value_dim, -1)
    v_up = _copy(per_head[:, a.nope_dim :].reshape(a.n_heads * a.value_dim, -1))
    form = _transposable(info)
    k_up = _aligned(a.n_heads * a.kv_rank * form.row_bytes(a.nope_dim)).reshape(a.n_heads, a.kv_rank, -1)
    for head in range(a.n_heads):
        keys = info.format.dequantize(np.ascontiguousarray(per_head[head, : a.nope_dim]))
        k_up[head] = form.quantize(np.ascontiguousarray(keys.T))
    return {
        "v_up": Matrix(v_up, info.format.id, a.kv_rank),
        "k_up": Matrix(k_up.reshape(a.n_heads * a.kv_rank, -1), form.id, a.nope_dim),
    }


def _transposable(info: TensorInfo) -> formats.Format:
    return info.format if info.format.block == 1 else formats.F16


def _kv_up_bytes(a: Attention, info: TensorInfo) -> int:
    assert isinstance(a, LatentAttentionSpec)
    values = a.value_dim * info.format.row_bytes(a.kv_rank)
    return a.n_heads * (values + a.kv_rank * _transposable(info).row_bytes(a.nope_dim))


def _destination(info: TensorInfo) -> NDArray[np.uint8]:
    """Memory that starts on a cache line; where its place in the file does, too, a read needs no copy."""
    return _aligned(info.nbytes) if info.offset % _ALIGN else aligned_empty(info.nbytes, info.offset)


def _aligned(size: int) -> NDArray[np.uint8]:
    """`size` bytes that start on a boundary of a cache line."""
    memory = np.empty(size + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    return memory[start : start + size]


def _copy(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    copy = _aligned(values.nbytes).reshape(values.shape)
    copy[:] = values
    return copy
