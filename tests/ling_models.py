"""Ling and Ring, of which transformers has no class: the same mathematics of others, under their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

NAMES = {
    "embed_tokens": "word_embeddings",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "e_score_correction_bias": "expert_bias",
    "block_sparse_moe.router": "mlp.gate",
    "block_sparse_moe.experts": "mlp.experts",
    "shared_mlp.output_linear": "mlp.shared_experts.down_proj",
}
KEYS = {
    "n_routed_experts": "num_experts",
    "num_local_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
}


def ling_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a GLM-4-MoE, which is a Ling 2.0, or of a Granite-MoE, a Ling 1, of the same values.

    q, k and v of the first stand one above the other; experts of a layer in one tensor.
    """
    state = dict(model.state_dict())
    second = model.config.model_type == "bailing_moe"
    found = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if "self_attn." in name and second:
            if name.endswith("q_proj.weight"):
                parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        elif "shared_mlp.input_linear" in name:
            for part, values in zip(("gate", "up"), tensor.chunk(2), strict=True):
                found[name.replace("shared_mlp.input_linear", f"mlp.shared_experts.{part}_proj")] = values
        else:
            found[name] = tensor
    return found


def write_ling(path: Path, model: torch.nn.Module, **changes: Any) -> Any:
    """The files that inclusionAI publishes; returns the model, which now knows its name."""
    second = model.config.model_type == "glm4_moe"
    values = model.config.to_dict()
    model.config.model_type = "bailing_moe" if second else "bailing_moe_1"
    tensors = {}
    for name, tensor in ling_tensors(model).items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for part, matrix in zip(("gate", "up"), both.chunk(2), strict=True):
                    tensors[name.replace("gate_up_proj", f"{e}.{part}_proj.weight")] = matrix
        elif name.endswith("experts.down_proj"):
            for e, matrix in enumerate(tensor):
                tensors[name.replace("down_proj", f"{e}.down_proj.weight")] = matrix
        else:
            tensors[name] = tensor
    if not second:
        for name in [name for name in tensors if name.endswith("self_attn.q_proj.weight")]:
            parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            tensors[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = {KEYS.get(key, key): value for key, value in values.items()}
    rope = config.pop("rope_parameters")
    config |= {"model_type": "bailing_moe", "rope_theta": rope["rope_theta"], "rope_scaling": None}
    config |= {"use_bias": False, "use_qkv_bias": False, "norm_head": False, "use_cache": True}
    if second:
        config |= {"score_function": "sigmoid", "partial_rotary_factor": rope["partial_rotary_factor"]}
        config |= {"moe_router_enable_expert_bias": True, "router_dtype": "fp32"}
    else:
        config["moe_intermediate_size"] = config["intermediate_size"]
        config["num_shared_experts"] = config["shared_intermediate_size"] // config["intermediate_size"]
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return model
