"""A synthetic model as one GGUF file, written a piece at a time by the writer of `mer convert --to gguf`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve

from bench.shapes import Tensor, tensors
from bench.synthetic import Weights
from mer.model.families import Architecture, load
from mer.model.gguf_export import file_metadata
from mer.weights.expert_store import StoredExpert
from mer.weights.extents import ExpertExtents, Matrix, Piece
from mer.weights.gguf_families import BY_FAMILY, GGUFFamily
from mer.weights.gguf_writer import Entry, Pieces
from mer.weights.gguf_writer import write_gguf as write_file
from mer.weights.store_layout import expert_bytes, place_matrices
from mer.weights.tensors import Checkpoint, TensorInfo

MATRICES = ("gate", "up", "down")


def write_gguf(config: dict[str, Any], weights: Weights, path: Path, done: Callable[[int], None]) -> int:
    """Write the file; returns the bytes of its tensors. `done` is told how many bytes were written."""
    told = 0

    def progress(position: int, _total: int) -> None:
        nonlocal told
        done(position - told)
        told = position

    experts = next(weights.format(tensor) for tensor in tensors(config) if tensor.expert)
    architecture = _architecture(config, weights)
    metadata = file_metadata(architecture, experts.name)
    metadata |= {
        "general.name": f"synthetic {config['model_type']}",
        "tokenizer.ggml.model": "none",  # prompts are token ids
    }
    entries = list(_entries(config, weights, BY_FAMILY[architecture.spec.family]))
    write_file(path, metadata, entries, progress)
    return sum(e.nbytes for e in entries)


def _architecture(config: dict[str, Any], weights: Weights) -> Architecture:
    """What the model's own code makes of it, as a store that is nowhere."""
    dense: dict[str, TensorInfo] = {}
    experts: dict[tuple[int, int], list[Tensor]] = {}
    for tensor in tensors(config):
        if tensor.expert:
            experts.setdefault(tensor.expert[:2], []).append(tensor)
        else:
            form = weights.format(tensor)
            size = weights.nbytes(tensor)
            dense[tensor.name] = TensorInfo(tensor.name, 0, 0, size, tensor.shape, form.name, form)
    stored: dict[tuple[int, int], StoredExpert] = {}
    for key, matrices in experts.items():
        places = place_matrices([(weights.format(t), t.shape[0], t.cols) for t in matrices])
        gate, up, down = (Matrix(0, p.offset, p.format, p.rows, p.cols) for p in places)
        extents = ExpertExtents((Piece(0, 0, expert_bytes(places)),), gate, up, down)
        stored[key] = StoredExpert("", extents, "")
    return load(Checkpoint(Path("synthetic"), "store", config, [Path("synthetic")], dense, stored))


def _entries(config: dict[str, Any], weights: Weights, family: GGUFFamily) -> Iterator[Entry]:
    experts: dict[tuple[int, int], list[Tensor]] = {}
    for tensor in tensors(config):
        if tensor.expert:
            layer, _, matrix = tensor.expert
            experts.setdefault((layer, matrix), []).append(tensor)
            continue
        form = weights.format(tensor)
        if tensor.kind == "kv_up":
            yield from _split_kv_up(config, weights, tensor)
            continue
        if tensor.name.endswith("proj_bias"):
            yield from _expert_biases(weights, tensor)
            continue
        found = family.names.gguf(tensor.name)
        if found is None:
            raise ValueError(f"GGUF's {family.architecture} has no name for {tensor.name}")
        pieces = _turned(config, weights, tensor) or partial(weights.pieces, tensor)
        yield Entry(found, tensor.shape, form, pieces)
    for (layer, matrix), stacked in experts.items():
        yield Entry(
            f"blk.{layer}.ffn_{MATRICES[matrix]}_exps.weight",
            (len(stacked), *stacked[0].shape),
            weights.format(stacked[0]),
            partial(_joined, weights, stacked),
        )


def _expert_biases(weights: Weights, tensor: Tensor) -> Iterator[Entry]:
    """Of gate and up apart; all of them are zero."""
    layer, down = tensor.name.split(".")[2], "down" in tensor.name
    experts, cols = tensor.shape
    half = evolve(tensor, shape=(experts, cols if down else cols // 2))
    for name in ("down",) if down else ("gate", "up"):
        form, pieces = weights.format(half), partial(weights.pieces, half)
        yield Entry(f"blk.{layer}.ffn_{name}_exps.bias", half.shape, form, pieces)


def _joined(weights: Weights, stacked: Iterable[Tensor]) -> Pieces:
    for tensor in stacked:
        yield from weights.pieces(tensor)


def _turned(config: dict[str, Any], weights: Weights, tensor: Tensor) -> Callable[[], Pieces] | None:
    """llama.cpp's Llama turns neighbours (2i, 2i+1) where Hugging Face's turns (i, i + dim/2)."""
    if config["model_type"] != "mixtral" or not tensor.name.endswith(("q_proj.weight", "k_proj.weight")):
        return None
    half = config["hidden_size"] // config["num_attention_heads"] // 2

    def pieces() -> Pieces:
        rows = weights.array(tensor)
        yield np.ascontiguousarray(rows.reshape(-1, 2, half, rows.shape[1]).swapaxes(1, 2))

    return pieces


def _split_kv_up(config: dict[str, Any], weights: Weights, tensor: Tensor) -> Iterator[Entry]:
    """Keys' part of each head transposed, values' part as it is."""
    form, rank = weights.format(tensor), config["kv_lora_rank"]
    heads, nope, value = (config[k] for k in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))

    def part(keys: bool) -> Pieces:
        rows = weights.array(tensor).reshape(heads, nope + value, rank, form.block_bytes)
        part = rows[:, :nope].swapaxes(1, 2) if keys else rows[:, nope:]
        yield np.ascontiguousarray(part)

    layer = tensor.name.split(".")[2]
    yield Entry(f"blk.{layer}.attn_k_b.weight", (heads, rank, nope), form, lambda: part(True))
    yield Entry(f"blk.{layer}.attn_v_b.weight", (heads, value, rank), form, lambda: part(False))
