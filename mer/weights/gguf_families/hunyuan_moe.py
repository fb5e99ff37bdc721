"""`hunyuan-moe`: Hunyuan-MoE."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys


def _config(keys: Keys) -> dict[str, Any]:
    inter = keys["expert_feed_forward_length"]
    shared = keys.get("expert_shared_feed_forward_length", inter)
    return {
        "moe_topk": keys["expert_used_count"],
        "moe_intermediate_size": inter,
        "intermediate_size": shared,
        "attention_bias": keys.has_part("attn_q.bias"),
    }


FAMILY = GGUFFamily(
    architecture="hunyuan-moe",
    model_type="hunyuan_v1_moe",
    config=_config,
    names=Names(
        {
            "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
            "ffn_gate_inp": "mlp.gate.wg",
            **{f"ffn_{part}_shexp": f"mlp.shared_mlp.{part}_proj" for part in ("gate", "up", "down")},
        }
    ),
)
