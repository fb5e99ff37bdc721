"""What a GGUF file's metadata says, as the config.json that Hugging Face has for the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights import gguf_families
from mer.weights.gguf import Metadata
from mer.weights.gguf_keys import SCORES, SOFTMAX, Keys, rope_of


def _common(keys: Keys) -> dict[str, Any]:
    heads = keys.one("attention.head_count")
    head_dim = keys.get("attention.key_length")
    return {
        "hidden_size": keys["embedding_length"],
        "intermediate_size": None
        if keys.get("feed_forward_length") is None
        else keys.one("feed_forward_length"),
        "num_hidden_layers": keys["block_count"] - keys.get("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.one("attention.head_count_kv"),
        **({} if head_dim is None else {"head_dim": head_dim}),
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": keys["context_length"],
        "rope_parameters": rope_of(keys),
        "num_experts": keys.get("expert_count", 0),
        "num_experts_per_tok": keys.get("expert_used_count", 0),
    }


def _mixtral(keys: Keys) -> dict[str, Any]:
    # Rows of q and k stand in another order in these files, so that pairs that turn together are neighbours.
    return {"model_type": "mixtral", "rope_interleave": True}


def _qwen2_moe(keys: Keys) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "shared_expert_intermediate_size": keys["expert_shared_feed_forward_length"],
        "norm_topk_prob": keys.get("expert_weights_norm", False),
    }


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "norm_topk_prob": keys.get("expert_weights_norm", True),
    }


def _olmoe(keys: Keys) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "clip_qkv": keys.get("attention.clamp_kqv"),
    }


def _deepseek_v3(keys: Keys) -> dict[str, Any]:
    gating = keys.get("expert_gating_func", SOFTMAX)
    rope_dim = keys["rope.dimension_count"]
    # In files with keys and values of the latent apart, key_length is that of the cache's rows.
    head = keys.get("attention.key_length_mla") or keys["attention.key_length"]
    config = {
        "model_type": "deepseek_v3",
        "scoring_func": SCORES.get(gating, gating),
        "moe_intermediate_size": keys["expert_feed_forward_length"],
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
        "n_shared_experts": keys.get("expert_shared_count", 0),
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "routed_scaling_factor": keys.get("expert_weights_scale", 1.0),
        "n_group": keys.get("expert_group_count", 1),
        "topk_group": keys.get("expert_group_used_count", 1),
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "kv_lora_rank": keys["attention.kv_lora_rank"],
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": head - rope_dim,
        "v_head_dim": keys.get("attention.value_length_mla") or keys["attention.value_length"],
    }
    multiplier = keys.get("rope.scaling.yarn_log_multiplier")
    if multiplier is not None:
        # A tenth of what config.json has for both.
        weight = round(10 * multiplier, 6)
        config["rope_parameters"] = rope_of(keys) | {"mscale": weight, "mscale_all_dim": weight}
    return config


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "intermediate_size": keys["expert_feed_forward_length"],
        "sliding_window": keys["attention.sliding_window"],
        "rope_parameters": rope_of(keys) | {"truncate": False},
    }


# By general.architecture.
_ARCHITECTURES: Final[dict[str, Callable[[Keys], dict[str, Any]]]] = {
    "deepseek2": _deepseek_v3,
    "gpt-oss": _gpt_oss,
    "llama": _mixtral,
    "olmoe": _olmoe,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    **gguf_families.CONFIGS,
}


def config_of(metadata: Metadata, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json's keys and values. tensors: shapes by GGUF's names.

    Raises CheckpointError for keys that are missing, UnsupportedModelError for another architecture.
    """
    keys = Keys(metadata, tensors)
    translate = _ARCHITECTURES.get(str(keys.architecture))
    if translate is None:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise UnsupportedModelError(
            f"{metadata.path}: general.architecture is {keys.architecture!r}; known are {known}"
        )
    try:
        config = {**_common(keys), **translate(keys)}
    except (TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{metadata.path}: a metadata value of {keys.architecture} is wrong: {error}; fetch it again"
        ) from None
    if "token_embd.weight" in tensors:
        config["vocab_size"] = tensors["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if eos is not None:
        config["eos_token_id"] = eos
    return {name: value for name, value in config.items() if value is not None}
