"""qwen3next and qwen35moe: Qwen3-Next and Qwen3.5-MoE."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_families.shared import partial_rotary
from mer.weights.gguf_keys import Keys

_DELTA = "linear_attn"
_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "attn_qkv.weight": f"{_DELTA}.in_proj_qkv.weight",
    "attn_gate.weight": f"{_DELTA}.in_proj_z.weight",
    "ssm_a": f"{_DELTA}.decay_rate",
    "ssm_dt.bias": f"{_DELTA}.dt_bias",
    "ssm_conv1d.weight": f"{_DELTA}.conv1d.weight",
    "ssm_norm.weight": f"{_DELTA}.norm.weight",
    "ssm_out.weight": f"{_DELTA}.out_proj.weight",
}


def _config(keys: Keys) -> dict[str, Any]:
    value_heads = keys["ssm.time_step_rank"]
    return {
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "norm_topk_prob": keys.get("expert_weights_norm", True),
        "full_attention_interval": keys.get("full_attention_interval", 4),
        "linear_num_key_heads": keys["ssm.group_count"],
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": keys["ssm.state_size"],
        "linear_value_head_dim": keys["ssm.inner_size"] // value_heads,
        "linear_conv_kernel_dim": keys["ssm.conv_kernel"],
        # The 1 is added already.
        "zero_centred_norms": False,
        **partial_rotary(keys),
    }


def _qwen3_5(keys: Keys) -> dict[str, Any]:
    # Value heads stand in another order in these files: one of each key head, then the next of each.
    return {**_config(keys), "linear_tiled_value_heads": True}


QWEN3_NEXT = GGUFFamily(
    architecture="qwen3next",
    model_type="qwen3_next",
    config=_config,
    names=Names(
        {
            **_NAMES,
            "ssm_ba.weight": f"{_DELTA}.in_proj_ba.weight",
            # Of the first files of this architecture, in the place of attn_qkv and attn_gate.
            "ssm_in.weight": f"{_DELTA}.in_proj_qkvz.weight",
        }
    ),
)
QWEN3_5 = GGUFFamily(
    architecture="qwen35moe",
    model_type="qwen3_5_moe_text",
    config=_qwen3_5,
    names=Names(
        {
            **_NAMES,
            "ssm_alpha.weight": f"{_DELTA}.in_proj_a.weight",
            "ssm_beta.weight": f"{_DELTA}.in_proj_b.weight",
        }
    ),
    tiled=True,
)
