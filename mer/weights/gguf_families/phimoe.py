"""`phimoe`: Phi-MoE."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys, rope_of


def _config(keys: Keys) -> dict[str, Any]:
    config = {
        "attention_bias": keys.has_part("attn_q.bias"),
        "lm_head_bias": "output.bias" in keys.tensors,
        "sliding_window": keys.get("attention.sliding_window") or None,
    }
    if "rope_factors_long.weight" in keys.tensors:
        rope = {
            "rope_type": "longrope",
            "original_max_position_embeddings": keys["rope.scaling.original_context_length"],
            "attention_factor": keys.get("rope.scaling.attn_factor"),
        }
        config["rope_parameters"] = rope_of(keys) | rope
    return config


FAMILY = GGUFFamily(
    architecture="phimoe",
    model_type="phimoe",
    config=_config,
    names=Names({"ffn_gate_inp": "block_sparse_moe.gate"}),
    written=False,
)
