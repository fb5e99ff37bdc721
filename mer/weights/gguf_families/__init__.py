"""GGUF's architectures in Hugging Face's terms: a module each, read for opening a file and for writing one.

A new one: a module with a GGUFFamily, entered in `_KNOWN`. The table of names serves both directions.
"""

from __future__ import annotations

from typing import Final

from mer.weights.gguf_families import (
    bailing_moe,
    deepseek,
    deepseek_v4,
    dots1,
    ernie4_5_moe,
    gemma4,
    glm4_moe,
    gpt_oss,
    granite_moe,
    hunyuan_moe,
    lfm2_moe,
    llama,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen_moe,
    qwen_next,
)
from mer.weights.gguf_families.family import GGUFFamily
from mer.weights.gguf_keys import Keys

__all__ = ["ARCHITECTURES", "BY_FAMILY", "GGUFFamily", "family_of"]

_KNOWN: Final = (
    bailing_moe.FIRST,
    bailing_moe.SECOND,
    deepseek.V2,
    deepseek.FAMILY,
    deepseek.GLM_LITE,
    deepseek.V32,
    deepseek.GLM_DSA,
    deepseek_v4.FAMILY,
    dots1.FAMILY,
    ernie4_5_moe.FAMILY,
    gemma4.FAMILY,
    glm4_moe.FAMILY,
    glm4_moe.SOLAR_OPEN,
    gpt_oss.FAMILY,
    granite_moe.SHARED,
    granite_moe.FAMILY,
    hunyuan_moe.FAMILY,
    lfm2_moe.FAMILY,
    llama.LLAMA,
    llama.MISTRAL,
    llama.MISTRAL3,
    llama.QWEN2,
    llama.QWEN3,
    minimax_m2.FAMILY,
    mixtral.FAMILY,
    olmoe.FAMILY,
    phimoe.FAMILY,
    qwen_moe.QWEN2,
    qwen_moe.QWEN3,
    qwen_next.QWEN3_5,
    qwen_next.QWEN3_NEXT,
)
ARCHITECTURES: Final = sorted({family.architecture for family in _KNOWN})
# Those that can be written, by ModelSpec.family.
BY_FAMILY: Final = {family.of_spec or family.model_type: family for family in _KNOWN if family.written}


def family_of(keys: Keys) -> GGUFFamily | None:
    """The family of a file; None for an architecture that is not known."""
    return next((f for f in _KNOWN if f.architecture == keys.architecture and f.is_of(keys)), None)
