"""Gemma-4 with experts."""

from __future__ import annotations

from typing import Any

from mer.errors import CheckpointError
from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys


def _config(keys: Keys) -> dict[str, Any]:
    if "rope_freqs.weight" not in keys.tensors:
        # How much of a head turns in global layers is nowhere else.
        raise CheckpointError(
            f"{keys.metadata.path}: the tensor rope_freqs.weight is missing; fetch the file again"
        )
    layers = range(keys["block_count"])
    local = list(keys["attention.sliding_window_pattern"])
    kv_heads = keys["attention.head_count_kv"]
    kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * len(layers)
    return {
        "enable_moe_block": keys.get("expert_count", 0) > 0,
        "moe_intermediate_size": keys.get("expert_feed_forward_length"),
        "hidden_size_per_layer_input": keys.get("embedding_length_per_layer_input", 0),
        "num_kv_shared_layers": keys.get("attention.shared_kv_layers", 0),
        "layer_types": ["sliding_attention" if local[i] else "full_attention" for i in layers],
        "sliding_window": keys["attention.sliding_window"],
        "head_dim": keys["attention.key_length_swa"],
        "num_key_value_heads": next((kv_heads[i] for i in layers if local[i]), kv_heads[0]),
        "per_layer_config": {
            str(i): {"head_dim": keys["attention.key_length"], "num_key_value_heads": kv_heads[i]}
            for i in layers
            if not local[i]
        },
        "attention_k_eq_v": any(f"blk.{i}.attn_v.weight" not in keys.tensors for i in layers),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": keys["rope.freq_base_swa"]},
            "full_attention": {"rope_type": "default", "rope_theta": keys["rope.freq_base"]},
        },
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


FAMILY = GGUFFamily(
    architecture="gemma4",
    model_type="gemma4_text",
    config=_config,
    names=Names(
        {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "post_ffw_norm": "post_feedforward_layernorm",
            "post_ffw_norm_1": "post_feedforward_layernorm_1",
            "post_ffw_norm_2": "post_feedforward_layernorm_2",
            "layer_output_scale.weight": "layer_scalar",
            "ffn_gate_inp.weight": "router.proj.weight",
            "ffn_gate_inp.scale": "router.scale",
            "ffn_down_exps.scale": "router.per_expert_scale",
            "ffn_gate_up_exps.weight": "experts.gate_up_proj",
            "ffn_gate_exps.weight": "experts.gate_proj",
            "ffn_up_exps.weight": "experts.up_proj",
            "ffn_down_exps.weight": "experts.down_proj",
        }
    ),
    merged=True,
)
