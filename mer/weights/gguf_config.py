"""What a GGUF file's metadata says, as the config.json that Hugging Face has for the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights.gguf import Metadata
from mer.weights.gguf_families import ARCHITECTURES, GGUFFamily, family_of
from mer.weights.gguf_keys import Keys, rope_of


def _common(keys: Keys, own: Mapping[str, Any]) -> dict[str, Any]:
    """What every family has, by config.json's keys; own: what this one says, which goes before."""
    heads = keys.one("attention.head_count")
    head_dim = keys.get("attention.key_length")
    return {
        "hidden_size": keys["embedding_length"],
        "intermediate_size": None
        if keys.get("feed_forward_length") is None
        else keys.one("feed_forward_length"),
        "num_hidden_layers": keys["block_count"] - keys.get("nextn_predict_layers", 0),
        "num_nextn_predict_layers": keys.get("nextn_predict_layers"),
        "num_attention_heads": heads,
        # A family whose layers differ has its own.
        "num_key_value_heads": own.get("num_key_value_heads") or keys.where_any("attention.head_count_kv"),
        **({} if head_dim is None else {"head_dim": head_dim}),
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": keys["context_length"],
        "rope_parameters": rope_of(keys),
        "num_experts": keys.get("expert_count", 0),
        "num_experts_per_tok": keys.get("expert_used_count", 0),
    }


def understand(
    metadata: Metadata, tensors: Mapping[str, tuple[int, ...]]
) -> tuple[GGUFFamily, dict[str, Any]]:
    """The family of a file, and config.json's keys and values. tensors: shapes by GGUF's names.

    Raises CheckpointError for keys that are missing, UnsupportedModelError for another architecture.
    """
    keys = Keys(metadata, tensors)
    family = family_of(keys)
    if family is None:
        raise UnsupportedModelError(
            f"{metadata.path}: general.architecture is {keys.architecture!r}; known are "
            + ", ".join(ARCHITECTURES)
        )
    n_layers = keys["block_count"]
    if type(n_layers) is not int or not 0 < n_layers <= len(tensors):
        raise CheckpointError(
            f"{metadata.path}: {keys.architecture}.block_count is {n_layers!r}, but there are {len(tensors)} "
            "tensors; fetch it again"
        )
    try:
        own = family.config(keys)
        config = {**_common(keys, own), **own}
    except (TypeError, ValueError, LookupError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{metadata.path}: a metadata value of {keys.architecture} is wrong: {error}; fetch it again"
        ) from None
    config |= {"model_type": family.model_type, "rope_interleave": family.neighbours}
    if "token_embd.weight" in tensors:
        config["vocab_size"] = tensors["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if eos is not None:
        config["eos_token_id"] = eos
    return family, {name: value for name, value in config.items() if value is not None}
