"""GLM-4-MoE (GLM-4.5 and later), `glm4moe` in GGUF."""

from __future__ import annotations

from typing import Any, Final

from mer.weights.gguf_families.shared import SHARED_EXPERTS, deepseek_experts, partial_rotary
from mer.weights.gguf_keys import Keys

NAMES: Final = SHARED_EXPERTS


def config(keys: Keys) -> dict[str, Any]:
    """config.json's keys."""
    return {
        "model_type": "glm4_moe",
        "attention_bias": keys.has_part("attn_q.bias"),
        "use_qk_norm": keys.has_part("attn_q_norm.weight"),
        **deepseek_experts(keys),
        **partial_rotary(keys),
    }
