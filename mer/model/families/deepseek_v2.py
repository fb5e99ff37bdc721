"""DeepSeek-V2 and V2-Lite: DeepSeek-V3 with softmax scores; a group counts as much as its best expert."""

from __future__ import annotations

from mer.model.families import deepseek_v3
from mer.model.families.config import Config
from mer.model.families.deepseek_blocks import Blocks, softmax_router
from mer.model.families.tensors import Tensors
from mer.model.spec import ModelSpec


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a DeepSeek-V2, its parts taken from `tensors`."""
    config.expect("mlp_bias", False)
    blocks = Blocks(config, softmax_router(config), default_plain=0, default_shared=2)
    return deepseek_v3.read_with(config, tensors, blocks, "deepseek_v2")
