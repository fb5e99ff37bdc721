"""GGUF's architectures in Hugging Face's terms: a module each, read for opening a file and for writing one.

A new one: a module with a GGUFFamily, entered in `_KNOWN`. The table of names serves both directions.
"""

from __future__ import annotations

from typing import Final

from mer.weights.gguf_families import deepseek_v3, glm4_moe, gpt_oss, mixtral, olmoe, qwen_moe
from mer.weights.gguf_families.family import GGUFFamily

__all__ = ["BY_ARCHITECTURE", "BY_MODEL_TYPE", "GGUFFamily"]

_KNOWN: Final = (
    deepseek_v3.FAMILY, glm4_moe.FAMILY, gpt_oss.FAMILY, mixtral.FAMILY, olmoe.FAMILY, qwen_moe.QWEN2,
    qwen_moe.QWEN3,
)  # fmt: skip
BY_ARCHITECTURE: Final = {family.architecture: family for family in _KNOWN}
BY_MODEL_TYPE: Final = {family.model_type: family for family in _KNOWN}
