"""`deepseek4`: DeepSeek-V4, without what predicts several tokens."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import SCORES, Keys

_SQRT_SOFTPLUS = 4


def _config(keys: Keys) -> dict[str, Any]:
    n_layers, predicting = keys["block_count"], keys.get("nextn_predict_layers", 0)
    # Files may speak of such layers that they do not have.
    if predicting and f"blk.{n_layers - predicting}.nextn.eh_proj.weight" in keys.tensors:
        n_layers -= predicting
    gating = keys["expert_gating_func"]
    limit = keys.one("swiglu_clamp_exp")
    if keys.one("swiglu_clamp_shexp", limit) != limit:
        raise ValueError("swiglu_clamp_shexp is not swiglu_clamp_exp")
    return {
        "num_hidden_layers": n_layers,
        "num_nextn_predict_layers": keys["block_count"] - n_layers,
        "num_key_value_heads": 1,
        "qk_rope_head_dim": keys["rope.dimension_count"],
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "compress_rope_theta": keys["attention.compress_rope_freq_base"],
        "compress_ratios": list(keys["attention.compress_ratios"]),
        "sliding_window": keys["attention.sliding_window"],
        "q_lora_rank": keys["attention.q_lora_rank"],
        "o_lora_rank": keys["attention.output_lora_rank"],
        "o_groups": keys["attention.output_group_count"],
        "index_n_heads": keys["attention.indexer.head_count"],
        "index_head_dim": keys["attention.indexer.key_length"],
        "index_topk": keys["attention.indexer.top_k"],
        "hc_mult": keys["hyper_connection.count"],
        "hc_sinkhorn_iters": keys["hyper_connection.sinkhorn_iterations"],
        "hc_eps": keys["hyper_connection.epsilon"],
        "num_hash_layers": keys["hash_layer_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "n_shared_experts": keys["expert_shared_count"],
        "routed_scaling_factor": keys["expert_weights_scale"],
        "norm_topk_prob": keys.get("expert_weights_norm", True),
        "scoring_func": "sqrtsoftplus" if gating == _SQRT_SOFTPLUS else SCORES.get(gating, gating),
        "swiglu_limit": limit,
    }


_LAYER = {
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attn_sinks.weight": "attn.attn_sink",
    "attn_q_a": "attn.wq_a",
    "attn_q_a_norm": "attn.q_norm",
    "attn_q_b": "attn.wq_b",
    "attn_kv": "attn.wkv",
    "attn_kv_a_norm": "attn.kv_norm",
    "attn_output_a": "attn.wo_a",
    "attn_output_b": "attn.wo_b",
    "indexer.attn_q_b": "attn.indexer.wq_b",
    "indexer.proj": "attn.indexer.weights_proj",
    "ffn_gate_inp": "ffn.gate",
    "ffn_gate_tid2eid.weight": "ffn.gate.tid2eid",
    "exp_probs_b.bias": "ffn.gate.bias",
    "ffn_gate_shexp": "ffn.shared_experts.w1",
    "ffn_up_shexp": "ffn.shared_experts.w3",
    "ffn_down_shexp": "ffn.shared_experts.w2",
}
for _ours, _theirs in ("attn", "attn"), ("indexer", "attn.indexer"):
    _LAYER |= {
        f"{_ours}_compressor_kv": f"{_theirs}.compressor.wkv",
        f"{_ours}_compressor_gate": f"{_theirs}.compressor.wgate",
        f"{_ours}_compressor_ape.weight": f"{_theirs}.compressor.ape",
        f"{_ours}_compressor_norm": f"{_theirs}.compressor.norm",
    }
_STREAMS = ("fn", "base", "scale")
for _part in _STREAMS:
    _LAYER |= {f"hc_{_block}_{_part}.weight": f"hc_{_block}_{_part}" for _block in ("attn", "ffn")}
FAMILY = GGUFFamily(
    architecture="deepseek4",
    model_type="deepseek_v4",
    config=_config,
    names=Names(
        _LAYER,
        whole={f"output_hc_{part}.weight": f"model.hc_head.hc_{part}" for part in _STREAMS},
    ),
    written=False,
)
