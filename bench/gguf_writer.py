"""A synthetic model as one GGUF file, written a piece at a time; metadata and names by the gguf package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.constants import ExpertGatingFuncType
from numpy.typing import NDArray

from bench.shapes import Tensor, n_experts, tensors
from bench.synthetic import Weights
from mer.weights.formats import Format

ARCHITECTURES = {
    "mixtral": ("llama", MODEL_ARCH.LLAMA),
    "qwen3_moe": ("qwen3moe", MODEL_ARCH.QWEN3MOE),
    "deepseek_v3": ("deepseek2", MODEL_ARCH.DEEPSEEK2),
    "gpt_oss": ("gpt-oss", MODEL_ARCH.GPT_OSS),
}
MATRICES = ("gate", "up", "down")
ALIGN = 32

Pieces = Iterator[NDArray[np.uint8]]


@frozen
class Entry:
    """One tensor of the file. shape: in elements, rows last but one."""

    name: str
    shape: tuple[int, ...]
    format: Format
    pieces: Callable[[], Pieces]

    @property
    def nbytes(self) -> int:
        rows = int(np.prod(self.shape[:-1]))
        return rows * self.format.row_bytes(self.shape[-1])


def write_gguf(config: dict[str, Any], weights: Weights, path: Path, done: Callable[[int], None]) -> int:
    """Write the file; returns the bytes of its tensors. `done` is told how many bytes were written."""
    arch, number = ARCHITECTURES[config["model_type"]]
    writer = GGUFWriter(path, arch)
    _metadata(writer, config)
    entries = list(_entries(config, weights, number))
    for e in entries:
        stored = GGMLQuantizationType(e.format.id)
        rows = (*e.shape[:-1], e.format.row_bytes(e.shape[-1]))
        writer.add_tensor_info(e.name, rows, np.dtype(np.uint8), e.nbytes, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    out = writer.fout[0]
    for e in entries:
        out.write(bytes(-out.tell() % ALIGN))
        for piece in e.pieces():
            out.write(piece.data)
            done(piece.nbytes)
    out.write(bytes(-out.tell() % ALIGN))
    writer.close()
    return sum(e.nbytes for e in entries)


def _metadata(w: GGUFWriter, config: dict[str, Any]) -> None:
    w.add_name(f"synthetic {config['model_type']}")
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config["rope_theta"])
    w.add_expert_count(n_experts(config))
    w.add_expert_used_count(config["num_experts_per_tok"])
    w.add_vocab_size(config["vocab_size"])
    w.add_tokenizer_model("none")  # prompts are token ids
    if config["model_type"] == "deepseek_v3":
        rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
        w.add_head_count_kv(1)
        w.add_key_length(rank + turned)
        w.add_value_length(rank)
        w.add_key_length_mla(config["qk_nope_head_dim"] + turned)
        w.add_value_length_mla(config["v_head_dim"])
        w.add_q_lora_rank(config["q_lora_rank"])
        w.add_kv_lora_rank(rank)
        w.add_rope_dimension_count(turned)
        w.add_leading_dense_block_count(config["first_k_dense_replace"])
        w.add_expert_feed_forward_length(config["moe_intermediate_size"])
        w.add_expert_shared_count(config["n_shared_experts"])
        w.add_expert_weights_scale(config["routed_scaling_factor"])
        w.add_expert_weights_norm(config["norm_topk_prob"])
        w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        w.add_expert_group_count(config["n_group"])
        w.add_expert_group_used_count(config["topk_group"])
        return
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(head)
    w.add_value_length(head)
    w.add_rope_dimension_count(head)
    if config["model_type"] == "gpt_oss":
        w.add_sliding_window(config["sliding_window"])
        w.add_expert_feed_forward_length(config["intermediate_size"])
    if "moe_intermediate_size" in config:
        w.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _entries(config: dict[str, Any], weights: Weights, arch: MODEL_ARCH) -> Iterator[Entry]:
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
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
        # the same renaming as in llama.cpp's own converter
        name = tensor.name.replace("e_score_correction_bias", "e_score_correction.bias")
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"the gguf package knows no name for {tensor.name} of {arch.name}")
        if tensor.name.endswith("sinks"):
            found += ".weight"
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
