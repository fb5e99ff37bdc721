"""llama without experts (Llama, Mistral, SmolLM and many more), qwen2 and qwen3."""

from __future__ import annotations

from typing import Any

from mer.errors import UnsupportedModelError
from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys


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


LLAMA = GGUFFamily(
    architecture="llama",
    model_type="llama",
    config=_llama,
    names=Names({}),
    # Rows of q and k stand in another order in these files than in Hugging Face's.
    neighbours=True,
    is_of=lambda keys: not keys.get("expert_count"),
)
QWEN2 = GGUFFamily(architecture="qwen2", model_type="qwen2", config=lambda keys: {}, names=Names({}))
QWEN3 = GGUFFamily(architecture="qwen3", model_type="qwen3", config=_qwen3, names=Names({}))
