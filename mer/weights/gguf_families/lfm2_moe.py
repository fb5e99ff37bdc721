"""lfm2moe: LFM2-MoE."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys

_BLOCK = "feed_forward"


def _config(keys: Keys) -> dict[str, Any]:
    heads = keys["attention.head_count_kv"]
    if not isinstance(heads, list):
        heads = [heads] * keys["block_count"]
    return {
        "norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "conv_L_cache": keys["shortconv.l_cache"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "num_dense_layers": keys.get("leading_dense_block_count", 0),
        "use_expert_bias": keys.has_part("exp_probs_b.bias"),
        "norm_topk_prob": keys.get("expert_weights_norm", True),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
    }


FAMILY = GGUFFamily(
    architecture="lfm2moe",
    model_type="lfm2_moe",
    config=_config,
    names=Names(
        {
            "attn_norm": "operator_norm",
            "ffn_norm": "ffn_norm",
            "attn_output": "self_attn.out_proj",
            "attn_q_norm": "self_attn.q_layernorm",
            "attn_k_norm": "self_attn.k_layernorm",
            "shortconv.conv.weight": "conv.conv.weight",
            "shortconv.in_proj.weight": "conv.in_proj.weight",
            "shortconv.out_proj.weight": "conv.out_proj.weight",
            "ffn_gate_inp": f"{_BLOCK}.gate",
            "exp_probs_b.bias": f"{_BLOCK}.expert_bias",
            "ffn_gate": f"{_BLOCK}.w1",
            "ffn_up": f"{_BLOCK}.w3",
            "ffn_down": f"{_BLOCK}.w2",
            "ffn_gate_exps.weight": f"{_BLOCK}.experts.gate_proj",
            "ffn_up_exps.weight": f"{_BLOCK}.experts.up_proj",
            "ffn_down_exps.weight": f"{_BLOCK}.experts.down_proj",
            "ffn_gate_up_exps.weight": f"{_BLOCK}.experts.gate_up_proj",
        },
        # The norm before the head, under a name that would be one behind the embedding.
        whole={"token_embd_norm.weight": "model.embedding_norm.weight"},
    ),
)
