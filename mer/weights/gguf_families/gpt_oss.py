"""gpt-oss."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys, rope_of


def _config(keys: Keys) -> dict[str, Any]:
    return {
        "intermediate_size": keys["expert_feed_forward_length"],
        "sliding_window": keys["attention.sliding_window"],
        "rope_parameters": rope_of(keys) | {"truncate": False},
    }


FAMILY = GGUFFamily(
    architecture="gpt-oss",
    model_type="gpt_oss",
    config=_config,
    names=Names(
        {
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            "ffn_gate_exps.bias": "mlp.experts.gate_proj_bias",
            "ffn_up_exps.bias": "mlp.experts.up_proj_bias",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        }
    ),
)
