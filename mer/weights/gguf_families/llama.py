"""llama without experts (Llama, Mistral, SmolLM and many more), mistral3, qwen2 and qwen3."""

from __future__ import annotations

from typing import Any

from attrs import evolve

from mer.errors import UnsupportedModelError
from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys, rope_of


def _llama(keys: Keys) -> dict[str, Any]:
    head = keys.get("attention.key_length") or keys["embedding_length"] // keys.one("attention.head_count")
    turned = keys.get("rope.dimension_count", head)
    if turned != head:
        raise UnsupportedModelError(
            f"{keys.metadata.path}: llama.rope.dimension_count is {turned}, a head has {head} elements; "
            "heads that turn only in part are not supported in this architecture"
        )
    return {
        "attention_bias": keys.has_part("attn_q.bias"),
        "mlp_bias": keys.has_part("ffn_gate.bias"),
    }


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {"attention_bias": keys.has_part("attn_q.bias")}


def _mistral3(keys: Keys) -> dict[str, Any]:
    rope = rope_of(keys)
    if rope["rope_type"] == "yarn":
        rope |= {"mscale": 1.0, "mscale_all_dim": keys.get("rope.scaling.yarn_log_multiplier", 0.0)}
        rope["llama_4_scaling_beta"] = keys.get("attention.temperature_scale", 0.0)
    return {"rope_parameters": rope}


LLAMA = GGUFFamily(
    architecture="llama",
    model_type="llama",
    config=_llama,
    names=Names({}),
    # Rows of q and k stand in another order in these files than in Hugging Face's.
    neighbours=True,
    is_of=lambda keys: not keys.get("expert_count"),
)
# Written in the same way, and read as a Llama.
MISTRAL = evolve(LLAMA, model_type="mistral", is_of=lambda keys: False)
MISTRAL3 = GGUFFamily(
    architecture="mistral3",
    model_type="ministral3",
    config=_mistral3,
    names=Names({}),
    neighbours=True,
    is_of=lambda keys: not keys.get("expert_count"),
)
QWEN2 = GGUFFamily(architecture="qwen2", model_type="qwen2", config=lambda keys: {}, names=Names({}))
QWEN3 = GGUFFamily(architecture="qwen3", model_type="qwen3", config=_qwen3, names=Names({}))
