"""Small checkpoints with random weights, written by transformers: the oracle's own models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers

# model_type -> the beginning of transformers' class names.
CLASSES = {
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v32": "DeepseekV32",
    "deepseek_v4": "DeepseekV4",
    "glm_moe_dsa": "GlmMoeDsa",
    "gemma4_text": "Gemma4",
    "gpt_oss": "GptOss",
    "qwen3_next": "Qwen3Next",
    "qwen3_5_moe_text": "Qwen3_5Moe",
    "lfm2_moe": "Lfm2Moe",
    "glm4_moe": "Glm4Moe",
    "glm4_moe_lite": "Glm4MoeLite",
    "minimax_m2": "MiniMaxM2",
    "phimoe": "Phimoe",
    "hunyuan_v1_moe": "HunYuanMoEV1",
    "flex_olmo": "FlexOlmo",
    "solar_open": "SolarOpen",
    "granitemoe": "GraniteMoe",
    "granitemoeshared": "GraniteMoeShared",
    "deepseek_v2": "DeepseekV2",
    "llama": "Llama",
    "ministral3": "Ministral3",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "dots1": "Dots1",
    "ernie4_5_moe": "Ernie4_5_Moe",
}
CONFIGS = {"gemma4_text": "Gemma4TextConfig", "qwen3_5_moe_text": "Qwen3_5MoeTextConfig"}
COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DELTA: dict[str, Any] = {
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 40,
    "head_dim": 32,
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 20,
}
FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "qwen2_moe": {
        "num_experts": 6,
        "moe_intermediate_size": 32,
        "intermediate_size": 80,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 32,
        "intermediate_size": 80,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 32, "num_key_value_heads": 4},
    "gemma4_text": {
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 40,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 211,
        "sliding_window": 37,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
        "final_logit_softcapping": 8.0,
    },
    "gpt_oss": {"num_local_experts": 6, "intermediate_size": 32, "head_dim": 16, "sliding_window": 37},
    "hunyuan_v1_moe": {"num_experts": 6, "intermediate_size": 32, "head_dim": 16},
    "flex_olmo": {"num_experts": 6, "intermediate_size": 32},
    "solar_open": {
        "n_routed_experts": 8,
        "n_group": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    },
    "phimoe": {
        "num_local_experts": 6,
        "intermediate_size": 32,
        "lm_head_bias": True,
    },
    "granitemoe": {
        "num_local_experts": 6,
        "intermediate_size": 32,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 1.7,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    },
    "granitemoeshared": {
        "num_local_experts": 6,
        "intermediate_size": 32,
        "shared_intermediate_size": 40,
        "attention_multiplier": 0.2,
    },
    "minimax_m2": {
        "num_local_experts": 6,
        "intermediate_size": 32,
        "head_dim": 16,
        "rotary_dim": 8,
    },
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "n_shared_experts": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 80,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
    },
    "glm4_moe_lite": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "moe_intermediate_size": 32,
        "intermediate_size": 80,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 80,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "n_routed_experts": 8,
        "moe_intermediate_size": 32,
        "q_lora_rank": 24,
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": 21,
        "num_hidden_layers": 4,
        "layer_types": [
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "sliding_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 32},
        "mlp_layer_types": ["hash_moe", "moe", "moe", "hash_moe"],
        "index_n_heads": 16,
        "index_head_dim": 20,
        "index_topk": 6,
    },
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "n_group": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 80,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 80,
        "tie_word_embeddings": False,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_group": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 80,
        "use_qk_norm": True,
        "num_mtp_layers": 0,
    },
    "llama": {"intermediate_size": 80},
    "ministral3": {"intermediate_size": 80, "head_dim": 16},
    "mistral": {"intermediate_size": 80, "sliding_window": None},
    "qwen2": {"intermediate_size": 80},
    "qwen3": {"intermediate_size": 80, "head_dim": 32},
    "qwen3_next": {**DELTA, "linear_num_key_heads": 2, "intermediate_size": 80},
    "qwen3_5_moe_text": {**DELTA, "linear_num_key_heads": 4},
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 32,
        "intermediate_size": 80,
        "num_dense_layers": 1,
        "conv_L_cache": 3,
        "tie_word_embeddings": True,
        "routed_scaling_factor": 1.3,
    },
}
# Norms that multiply by 1 + their weight; not so that of a recurrent layer's output.
ZERO_CENTRED = ("qwen3_next", "qwen3_5_moe_text")
# DeepSeek-V3 that chooses positions; with many heads, as what no head likes is a tie, and which wins is open.
INDEXER = {"index_topk": 24, "index_n_heads": 16, "index_head_dim": 20}
FAMILY["deepseek_v32"] = FAMILY["deepseek_v3"] | INDEXER
FAMILY["glm_moe_dsa"] = FAMILY["deepseek_v3"] | INDEXER | {"n_group": 1, "topk_group": 1}
# Those without experts, and with.
DENSE = ("llama", "ministral3", "mistral", "qwen2", "qwen3")
SPARSE = [family for family in FAMILY if family not in DENSE]
# Those whose weights run where they lie; the others are converted first.
IN_PLACE = [family for family in FAMILY if family != "gpt_oss"]
# Those whose files have a tensor for each expert, and whose files elsewhere may have one of all.
PER_EXPERT = [f for f in IN_PLACE if f in SPARSE and not f.startswith(("granite", "gemma", "deepseek_v4"))]


def make(
    path: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """Write a checkpoint of this family to `path`; returns the model, in float32, ready to be asked.

    Every tensor is random, norms, biases and the router's choice bias included: what a model ignores or
    applies twice must show.
    """
    torch.manual_seed(seed)
    name = CLASSES[family]
    values = COMMON | FAMILY[family] | changes
    if family == "lfm2_moe":
        kinds = ["conv" if i % 2 == 0 else "full_attention" for i in range(values["num_hidden_layers"])]
        values = {"layer_types": kinds} | values
    for kinds in "layer_types", "mlp_layer_types":
        if values.get(kinds) is not None:
            values[kinds] = values[kinds][: values["num_hidden_layers"]]
    config = getattr(transformers, CONFIGS.get(family, f"{name}Config"))(**values)
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in key:
                centre = 0.0 if family in ZERO_CENTRED and "linear_attn" not in key else 1.0
                value.copy_(centre + 0.2 * noise)
            elif "A_log" in key:
                value.copy_(noise - 2.0)  # states that last for some tokens, and for many
            elif "scal" in key and "embed" not in key:
                # What a router gets may be divided by the root of its width.
                value.copy_((1.0 + 0.2 * noise) * (8.0 if "router.scale" in key else 1.0))
            elif "tid2eid" in key:
                value.copy_(
                    torch.rand(len(value), values["n_routed_experts"], generator=generator).argsort()[
                        :, : value.shape[1]
                    ]
                )
                continue
            elif "hc" in key and value.dim() == 2:
                value.copy_(noise * 1.6 / value.shape[-1] ** 0.5)
            elif "inv_freq" in key or "embed_scale" in key:
                continue
            elif value.dim() == 1:
                value.copy_(0.2 * noise)
            else:
                # Large enough for attention and router to be far from uniform.
                value.copy_(noise * (2.0 if "embed" in key else 1.6) / value.shape[-1] ** 0.5)
            value.copy_(value.to(dtype))
    copy.deepcopy(model).to(dtype).save_pretrained(path)
    return model


def edit_config(path: Path, **changes: Any) -> None:
    """Set keys of a checkpoint's config.json; a value of None removes the key."""
    file = path / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
