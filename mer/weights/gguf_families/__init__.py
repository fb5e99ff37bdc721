"""Families whose GGUF form has a module here: config.json's keys, and names that others have not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from mer.weights.gguf_families import glm4_moe
from mer.weights.gguf_keys import Keys

# By general.architecture: what the metadata says besides what all models have.
CONFIGS: Final[dict[str, Callable[[Keys], dict[str, Any]]]] = {
    "glm4moe": glm4_moe.config,
}
# By model_type: names in a layer, GGUF's (`ffn_up_shexp.weight`) to Hugging Face's; they go first.
NAMES: Final[dict[str, Mapping[str, str]]] = {
    "glm4_moe": glm4_moe.NAMES,
}
