"""`granitemoe`: Granite-MoE, with and without a shared expert."""

from __future__ import annotations

from typing import Any

from attrs import evolve

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys

_BLOCK = "block_sparse_moe"


def _config(keys: Keys) -> dict[str, Any]:
    return {
        "shared_intermediate_size": keys.get("expert_shared_feed_forward_length", 0),
        "attention_multiplier": keys["attention.scale"],
        "embedding_multiplier": keys["embedding_scale"],
        "residual_multiplier": keys["residual_scale"],
        "logits_scaling": keys["logit_scale"],
    }


FAMILY = GGUFFamily(
    architecture="granitemoe",
    model_type="granitemoe",
    config=_config,
    names=Names(
        {
            "ffn_gate_inp": f"{_BLOCK}.router.layer",
            "ffn_down_exps.weight": f"{_BLOCK}.output_linear.weight",
            "ffn_gate_shexp": "shared_mlp.gate_proj",
            "ffn_up_shexp": "shared_mlp.up_proj",
            "ffn_down_shexp": "shared_mlp.output_linear",
        }
    ),
    # Rows of q and k stand in another order in these files than in Hugging Face's.
    neighbours=True,
)
SHARED = evolve(
    FAMILY, model_type="granitemoeshared", is_of=lambda keys: keys.has_part("ffn_up_shexp.weight")
)
