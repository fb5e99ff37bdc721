"""qwen2moe and qwen3moe."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys


def _qwen2(keys: Keys) -> dict[str, Any]:
    return {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "norm_topk_prob": keys.get("expert_weights_norm", False),
    }


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "norm_topk_prob": keys.get("expert_weights_norm", True),
    }


QWEN2 = GGUFFamily(
    architecture="qwen2moe",
    model_type="qwen2_moe",
    config=_qwen2,
    names=Names(
        {
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
            "ffn_up_shexp": "mlp.shared_expert.up_proj",
            "ffn_down_shexp": "mlp.shared_expert.down_proj",
        }
    ),
)
QWEN3 = GGUFFamily(architecture="qwen3moe", model_type="qwen3_moe", config=_qwen3, names=Names({}))
