"""GLM-4-MoE (GLM-4.5 and later), `glm4moe` in GGUF."""

from __future__ import annotations

from typing import Any

from attrs import evolve

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_families.shared import PREDICTION, SHARED_EXPERTS, deepseek_experts, partial_rotary
from mer.weights.gguf_keys import Keys


def _config(keys: Keys) -> dict[str, Any]:
    return {
        "attention_bias": keys.has_part("attn_q.bias"),
        "use_qk_norm": keys.has_part("attn_q_norm.weight"),
        **deepseek_experts(keys),
        **partial_rotary(keys),
    }


FAMILY = GGUFFamily(
    architecture="glm4moe",
    model_type="glm4_moe",
    config=_config,
    names=Names(SHARED_EXPERTS | PREDICTION | {"post_attention_norm": "post_attention_layernorm"}),
)
# Its files are read as GLM-4-MoE, whose head turns as a whole.
SOLAR_OPEN = evolve(FAMILY, model_type="solar_open", is_of=lambda keys: False)
