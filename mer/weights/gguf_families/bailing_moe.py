"""`bailingmoe` and `bailingmoe2`: Ling and Ring."""

from __future__ import annotations

from typing import Any

from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_families.names import Names
from mer.weights.gguf_families.shared import SHARED_EXPERTS, deepseek_experts, partial_rotary
from mer.weights.gguf_keys import Keys

_NAMES = SHARED_EXPERTS | {
    "exp_probs_b.bias": "mlp.gate.expert_bias",
    "attn_qkv": "attention.query_key_value",
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_output": "attention.dense",
    "attn_q_norm": "attention.query_layernorm",
    "attn_k_norm": "attention.key_layernorm",
}
_WHOLE = {"token_embd.weight": "model.word_embeddings.weight"}


def _first(keys: Keys) -> dict[str, Any]:
    experts = deepseek_experts(keys)
    return {
        "moe_intermediate_size": experts["moe_intermediate_size"],
        "first_k_dense_replace": experts["first_k_dense_replace"],
        "num_shared_experts": experts["n_shared_experts"],
        "norm_topk_prob": experts["norm_topk_prob"],
        **partial_rotary(keys),
    }


def _second(keys: Keys) -> dict[str, Any]:
    experts = deepseek_experts(keys)
    return {
        **experts,
        "num_shared_experts": experts["n_shared_experts"],
        "score_function": experts["scoring_func"],
        **partial_rotary(keys),
    }


FIRST = GGUFFamily(
    architecture="bailingmoe",
    model_type="bailing_moe",
    config=_first,
    names=Names(_NAMES, whole=_WHOLE),
    # Rows of q and k stand in another order in these files than in Hugging Face's.
    neighbours=True,
    of_spec="bailing_moe_1",
)
SECOND = GGUFFamily(
    architecture="bailingmoe2",
    model_type="bailing_moe",
    config=_second,
    names=Names(_NAMES, whole=_WHOLE),
)
