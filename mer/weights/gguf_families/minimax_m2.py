"""`minimax-m2`: MiniMax-M2."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_families.shared import partial_rotary
from mer.weights.gguf_keys import Keys

_BLOCK = "block_sparse_moe"


def _config(keys: Keys) -> dict[str, Any]:
    return {"intermediate_size": keys["expert_feed_forward_length"], **partial_rotary(keys)}


FAMILY = GGUFFamily(
    architecture="minimax-m2",
    model_type="minimax_m2",
    config=_config,
    names=Names(
        {
            "ffn_gate_inp": f"{_BLOCK}.gate",
            "exp_probs_b.bias": f"{_BLOCK}.e_score_correction_bias",
        }
    ),
)
