"""`ernie4_5-moe`: ERNIE 4.5 with experts."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys


def _config(keys: Keys) -> dict[str, Any]:
    return {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "moe_num_shared_experts": keys.get("expert_shared_count", 0),
        "moe_layer_start_index": keys["leading_dense_block_count"],
        "moe_layer_interval": keys["interleave_moe_layer_step"],
    }


FAMILY = GGUFFamily(
    architecture="ernie4_5-moe",
    model_type="ernie4_5_moe",
    config=_config,
    names=Names(
        {
            "exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias",
            **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
        }
    ),
    neighbours=True,
)
