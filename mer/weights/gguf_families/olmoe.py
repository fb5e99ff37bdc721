"""olmoe."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys


def _config(keys: Keys) -> dict[str, Any]:
    return {
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "clip_qkv": keys.get("attention.clamp_kqv"),
    }


FAMILY = GGUFFamily(architecture="olmoe", model_type="olmoe", config=_config, names=Names({}))
