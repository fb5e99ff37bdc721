"""What the GGUF forms of several families have in common."""

from __future__ import annotations

from typing import Any, Final

from mer.weights.gguf_keys import SCORES, SIGMOID, SOFTMAX, Keys

# Of a layer for multi-token prediction, besides what every layer has.
PREDICTION: Final = {
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.shared_head_norm": "shared_head.norm",
}
# A layer's tensors, DeepSeek's experts with their choice.
SHARED_EXPERTS: Final = {
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    # As some files have it.
    "exp_probs_b.weight": "mlp.gate.e_score_correction_bias",
    **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
}


def scores(keys: Keys) -> int:
    """expert_gating_func; in files without it only sigmoid scores have a bias beside them."""
    biased = keys.has_part("exp_probs_b.bias") or keys.has_part("exp_probs_b.weight")
    gating: int = keys.get("expert_gating_func") or (SIGMOID if biased else SOFTMAX)
    return gating


def deepseek_experts(keys: Keys) -> dict[str, Any]:
    """Experts and their choice, as DeepSeek's config.json names them."""
    gating = scores(keys)
    return {
        "scoring_func": SCORES.get(gating, gating),
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "n_shared_experts": keys.get("expert_shared_count", 0),
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "n_group": keys.get("expert_group_count", 1),
        "topk_group": keys.get("expert_group_used_count", 1),
    }


def partial_rotary(keys: Keys) -> dict[str, Any]:
    """How much of a head turns."""
    turned = keys.get("rope.dimension_count")
    if turned is None:
        return {}
    head = keys.get("attention.key_length") or keys["embedding_length"] // keys.one("attention.head_count")
    return {"partial_rotary_factor": turned / head}
