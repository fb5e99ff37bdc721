"""What the configs of each family can say, in small models: cases for test_families."""

from __future__ import annotations


def rope(kind: str, theta: float, **more: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


ORIGINAL = {"original_max_position_embeddings": 64}
LLAMA3 = rope("llama3", 500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)
YARN = {"factor": 8.0, **ORIGINAL}
ODD_YARN = {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 9.0, 12.0, 16.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 400,
}

# The first of each family also generates 64 tokens.
CASES = {
    "dots1": {
        "plain": {},
        "bias-tied": {"attention_bias": True, "tie_word_embeddings": True, "first_k_dense_replace": 0},
        "as-published": {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 1},
        "window": {"sliding_window": 21, "max_window_layers": 1},
        "odd": {"head_dim": 22, "num_attention_heads": 6, "num_key_value_heads": 3, "topk_group": 2},
    },
    "ernie4_5_moe": {
        "plain": {},
        "mixed": {"num_hidden_layers": 5, "moe_layer_interval": 2, "moe_layer_end_index": 2},
        "no-shared-tied": {"moe_num_shared_experts": 0, "tie_word_embeddings": True, "moe_k": 4},
        "odd": {"head_dim": 22, "num_attention_heads": 6, "num_key_value_heads": 3},
    },
    "mixtral": {
        "plain": {},
        "mha-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
        "one-kv-head": {"num_key_value_heads": 1, "num_experts_per_tok": 4},
        "window": {"sliding_window": 37},
        "window-of-blocks": {"sliding_window": 32, "num_experts_per_tok": 1},
        "odd": {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 14, "intermediate_size": 37},
        "llama3": LLAMA3,
        "linear": rope("linear", 1e4, factor=3.0),
        "dynamic": rope("dynamic", 1e4, factor=2.0) | {"head_dim": 16},
    },
    "qwen3_moe": {
        "plain": {},
        "odd-heads": {"head_dim": 22, "num_attention_heads": 6, "num_key_value_heads": 3},
        "mixed": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
        "bias": {"attention_bias": True, "norm_topk_prob": False},
        "window-yarn": rope("yarn", 1e4, **YARN) | {"use_sliding_window": True, "sliding_window": 50},
        "odd-yarn": rope("yarn", 1e4, **ODD_YARN) | {"tie_word_embeddings": True},
    },
    "qwen2_moe": {
        "plain": {},
        "window": {
            "num_hidden_layers": 5,
            "use_sliding_window": True,
            "sliding_window": 21,
            "max_window_layers": 3,
            "mlp_only_layers": [1],
        },
        "normalised": {"norm_topk_prob": True, "num_experts_per_tok": 4},
        "no-bias": {"qkv_bias": False, "num_key_value_heads": 1, "tie_word_embeddings": True},
    },
    "olmoe": {
        "plain": {},
        "clip": {"clip_qkv": 0.7, "num_key_value_heads": 2, "attention_bias": True},
        "normalised": {"norm_topk_prob": True, "num_experts_per_tok": 8, "hidden_size": 40},
    },
    "deepseek_v32": {
        "plain": {},
        "all-seen": {"index_topk": 2048},
        "one-seen": {"index_topk": 1, "index_n_heads": 32},
        "yarn": rope("yarn", 1e4, **YARN, mscale=1.0, mscale_all_dim=1.0) | {"attention_bias": True},
        "odd": {
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "kv_lora_rank": 27,
            "qk_nope_head_dim": 11,
            "qk_rope_head_dim": 6,
            "v_head_dim": 9,
            "index_topk": 100,
            "index_n_heads": 19,
            "index_head_dim": 7,
        },
    },
    "glm_moe_dsa": {
        "plain": {},
        "shared": {"indexer_types": ["full", "shared", "shared"], "mlp_layer_types": ["sparse"] * 3},
        "by-frequency": {"num_hidden_layers": 5, "index_topk_freq": 2, "index_skip_topk_offset": 1},
        "groups": {"n_group": 4, "topk_group": 3, "norm_topk_prob": False, "index_topk": 70},
    },
    "gemma4_text": {
        "plain": {},
        "two-projections": {"attention_k_eq_v": False, "final_logit_softcapping": None},
        "odd": {
            "hidden_size": 60,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 14,
            "global_head_dim": 26,
            "num_global_key_value_heads": 2,
            "intermediate_size": 37,
            "top_k_experts": 6,
        },
        "no-experts": {"enable_moe_block": False},
        "global-narrower": {"global_head_dim": 8, "num_global_key_value_heads": 4, "layer_types": None},
        "untied": {"tie_word_embeddings": False, "attention_bias": True, "sliding_window": 16},
        "ropes": {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.4,
                    "factor": 4.0,
                },
            }
        },
    },
    "gpt_oss": {
        "plain": {},
        "no-bias": {"attention_bias": False, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "clamped": {"swiglu_limit": 0.8, "swiglu_alpha": 0.9, "num_experts_per_tok": 4},
        "default-rope": rope("default", 1e4),
        "all-sliding": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 16},
        "odd": {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 14, "intermediate_size": 37},
    },
    "glm4_moe": {
        "plain": {},
        "bias": {"attention_bias": True, "use_qk_norm": False, "first_k_dense_replace": 0},
        "quarter": rope("default", 1e5, partial_rotary_factor=0.25) | {"head_dim": 24, "n_group": 1},
        "scaled": {"routed_scaling_factor": 1.7, "topk_group": 2},
        "yarn": rope("yarn", 1e4, partial_rotary_factor=0.75, **YARN) | {"tie_word_embeddings": True},
        "whole-head": rope("default", 1e4, partial_rotary_factor=1.0) | {"num_key_value_heads": 1},
        "odd": {
            "hidden_size": 60,
            "num_attention_heads": 6,
            "head_dim": 14,
            "moe_intermediate_size": 37,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.45},
            "n_shared_experts": 2,
            "norm_topk_prob": False,
        },
    },
    "hunyuan_v1_moe": {
        "plain": {},
        "alpha": rope("dynamic", 1e4, alpha=20.0, factor=1.0) | {"tie_word_embeddings": True},
        "bias": {"attention_bias": True, "num_key_value_heads": 1, "num_experts_per_tok": 6},
        "odd": {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 14, "intermediate_size": 37},
    },
    "flex_olmo": {
        "plain": {},
        "normalised": {"norm_topk_prob": True, "num_experts_per_tok": 6, "num_key_value_heads": 4},
        "bias-tied": {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
        "odd": {"hidden_size": 60, "num_attention_heads": 6, "intermediate_size": 37},
    },
    "solar_open": {
        "plain": {},
        "scaled": {"routed_scaling_factor": 1.7, "attention_bias": True, "n_shared_experts": 2},
        "yarn": rope("yarn", 1e4, **YARN) | {"tie_word_embeddings": True, "norm_topk_prob": False},
    },
    "phimoe": {
        "plain": {},
        "published": {"attention_bias": True, "rope_parameters": LONGROPE},
        "no-bias-tied": {
            "router_jitter_noise": 0.3,
            "lm_head_bias": False,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
        },
        "window": {"sliding_window": 37, "router_jitter_noise": 2.0},
        "odd": {"hidden_size": 60, "num_attention_heads": 6, "num_local_experts": 3, "intermediate_size": 37},
    },
    "granitemoe": {
        "plain": {},
        "ones": {
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "num_key_value_heads": 1,
        },
        "bias-tied": {"attention_bias": True, "tie_word_embeddings": True, "num_experts_per_tok": 6},
        "odd": {"hidden_size": 60, "num_attention_heads": 6, "intermediate_size": 37},
    },
    "granitemoeshared": {
        "plain": {},
        "all": {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
            "shared_intermediate_size": 33,
        },
        "none-shared": {"shared_intermediate_size": 0},
    },
    "minimax_m2": {
        "plain": {},
        "whole-head-tied": {"rotary_dim": 16, "tie_word_embeddings": True},
        "yarn": rope("yarn", 1e5, **YARN) | {"num_key_value_heads": 1, "num_experts_per_tok": 6},
        "odd": {
            "hidden_size": 60,
            "num_attention_heads": 6,
            "head_dim": 14,
            "rotary_dim": 6,
            "intermediate_size": 37,
        },
    },
    "deepseek_v2": {
        "plain": {},
        "lite": rope("yarn", 1e4, **YARN, mscale=0.707, mscale_all_dim=0.707)
        | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
        "groups-of-one": {
            "n_group": 8,
            "topk_group": 5,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 0,
        },
        "scaled": {"routed_scaling_factor": 16.0, "attention_bias": True, "tie_word_embeddings": True},
        "odd": {
            "hidden_size": 60,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "kv_lora_rank": 26,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6,
            "v_head_dim": 9,
        },
    },
    "glm4_moe_lite": {
        "plain": {},
        "direct-queries": {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2},
        "mixed": {"mlp_layer_types": ["sparse", "dense", "sparse"]},
        "halves": {"rope_interleave": False, "n_group": 4, "topk_group": 3, "norm_topk_prob": False},
    },
    "deepseek_v4": {
        "plain": {},
        # As before transformers 5; all compressed positions are seen.
        "yarn": {
            "rope_scaling": {"rope_type": "yarn", **YARN},
            "index_topk": 512,
            "layer_types": None,
            "mlp_layer_types": None,
        },
        "window": {"layer_types": ["sliding_attention"] * 4, "sliding_window": 5},
        "odd": {
            "hidden_size": 60,
            "num_attention_heads": 6,
            "head_dim": 44,
            "partial_rotary_factor": 6 / 44,
            "o_groups": 3,
            "hc_mult": 3,
            "hc_sinkhorn_iters": 2,
            "swiglu_limit": 0.5,
            "n_shared_experts": 1,
            "compress_rates": {"compressed_sparse_attention": 8, "heavily_compressed_attention": 16},
        },
    },
    "deepseek_v3": {
        "plain": {},
        "direct-queries": {"q_lora_rank": None, "first_k_dense_replace": 0},
        "yarn": rope("yarn", 1e4, **YARN, mscale=1.0, mscale_all_dim=1.0) | {"attention_bias": True},
        "yarn-mscale": rope("yarn", 1e4, **YARN, mscale=0.7, mscale_all_dim=1.2),
        "odd": {
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "kv_lora_rank": 27,
            "qk_nope_head_dim": 11,
            "qk_rope_head_dim": 6,
            "v_head_dim": 9,
            "rope_interleave": False,
        },
        "one-group": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "n_shared_experts": 2},
        "many-chosen": {"num_experts_per_tok": 4, "topk_group": 3, "routed_scaling_factor": 0.7},
    },
    "llama": {
        "plain": {},
        "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        "mha-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True, "num_hidden_layers": 1},
        "odd": {"hidden_size": 60, "num_attention_heads": 6, "head_dim": 14, "intermediate_size": 37},
        "wide-heads": {"head_dim": 40, "rms_norm_eps": 0.01},
        "llama3": LLAMA3,
        "linear": rope("linear", 1e4, factor=3.0),
        "yarn": rope("yarn", 1e4, **YARN),
    },
    "ministral3": {
        "plain": {},
        "window-tied": {"sliding_window": 37, "tie_word_embeddings": True},
        "yarn": rope("yarn", 1e4, **ODD_YARN, llama_4_scaling_beta=0.0) | {"head_dim": 24},
    },
    "mistral": {
        "plain": {},
        "window": {"sliding_window": 37, "head_dim": 24},
        "window-of-blocks": {"sliding_window": 32, "tie_word_embeddings": True},
        "yarn": rope("yarn", 1e6, **ODD_YARN),
    },
    "qwen2": {
        "plain": {},
        "window": {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 2},
        "layer-types": {
            "use_sliding_window": True,
            "sliding_window": 30,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "tied-yarn": rope("yarn", 1e4, **YARN) | {"tie_word_embeddings": True, "num_key_value_heads": 4},
        "one-kv-head": {"num_key_value_heads": 1, "intermediate_size": 37},
    },
    "qwen3": {
        "plain": {},
        "odd-heads": {"head_dim": 22, "num_attention_heads": 6, "num_key_value_heads": 3},
        "bias-tied": {"attention_bias": True, "tie_word_embeddings": True},
        "window": {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
        "yarn": rope("yarn", 1e4, **YARN),
    },
    "qwen3_next": {
        "plain": {},
        "odd": {
            "hidden_size": 60,
            "num_attention_heads": 6,
            "head_dim": 24,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 7,
            "linear_value_head_dim": 33,
            "linear_conv_kernel_dim": 2,
        },
        "wide": {"linear_key_head_dim": 40, "linear_value_head_dim": 64, "linear_conv_kernel_dim": 6},
        "mixed": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "norm_topk_prob": False},
        "kinds": {
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        "no-attention": {"layer_types": ["linear_attention"] * 3},
        "yarn": rope("yarn", 1e4, **YARN, partial_rotary_factor=0.5) | {"num_hidden_layers": 2},
    },
    "qwen3_5_moe_text": {
        "plain": {},
        "grouped": {"linear_num_key_heads": 2, "linear_num_value_heads": 6},
        "all-attention": {"layer_types": ["full_attention"] * 3, "num_key_value_heads": 1},
    },
    "lfm2_moe": {
        "plain": {},
        "biases": {"conv_bias": True, "use_expert_bias": False, "conv_L_cache": 4},
        "untied": {"tie_word_embeddings": False, "norm_topk_prob": False, "num_dense_layers": 0},
        "kinds": {"layer_types": ["conv", "conv", "full_attention"], "num_dense_layers": 2},
    },
}
