"""`dots1`: dots.llm1."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_families.shared import SHARED_EXPERTS, deepseek_experts
from mer.weights.gguf_keys import Keys


def _config(keys: Keys) -> dict[str, Any]:
    # llama.cpp has no windows for it.
    bias = keys.has_part("attn_q.bias")
    return {"attention_bias": bias, "sliding_window": None, **deepseek_experts(keys)}


FAMILY = GGUFFamily(architecture="dots1", model_type="dots1", config=_config, names=Names(SHARED_EXPERTS))
