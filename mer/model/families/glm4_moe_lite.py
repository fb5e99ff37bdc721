"""GLM-4-MoE-Lite (GLM-4.7-Flash): DeepSeek-V3 with other defaults."""

from __future__ import annotations

from mer.model.families import deepseek_v3
from mer.model.families.config import Config
from mer.model.families.deepseek_blocks import Blocks, sigmoid_router
from mer.model.families.tensors import Tensors
from mer.model.spec import ModelSpec


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a GLM-4-MoE-Lite, without the layers for multi-token prediction."""
    blocks = Blocks(config, sigmoid_router(config, default_scale=1.8), default_plain=1)
    return deepseek_v3.read_with(config, tensors, blocks, "glm4_moe_lite", default_eps=1e-5)
