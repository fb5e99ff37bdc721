"""dots.llm1: grouped attention with normed heads, and DeepSeek-V3's experts."""

from __future__ import annotations

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.deepseek_blocks import Blocks, sigmoid_router
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import ModelSpec


def read(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a dots.llm1, its parts taken from `tensors`."""
    config.expect("hidden_act", "silu")
    hidden, n_layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    rope = Rope(config)
    attention = common.grouped_attention(config, qk_norm="head")
    blocks = Blocks(config, sigmoid_router(config, default_normalise=False), default_plain=0)
    bias = config.flag("attention_bias", False)
    tied = common.take_ends(config, tensors)
    for i in range(n_layers):
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=bias, o_bias=bias)
        blocks.take(tensors, i)
    return ModelSpec(
        family="dots1",
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        max_positions=rope.max_positions,
        attention=attention,
        rope=rope.spec(attention.head_dim),
        layers=common.number_layers(config, blocks.moe, _windows(config, n_layers)),
        router=blocks.router,
        moe_inter=blocks.inter,
        dense_inter=blocks.dense_inter,
        shared_inter=blocks.shared_inter,
        tied_embeddings=tied,
    )


def _windows(config: Config, n_layers: int) -> list[int | None]:
    """The last layers may have one, from max_window_layers on; published models have none."""
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    first = n_layers if window is None else config.integer("max_window_layers", default=62, minimum=0)
    usual = ["full_attention" if i < first else "sliding_attention" for i in range(n_layers)]
    kinds = common.layer_kinds(config, n_layers, usual, ("full_attention", "sliding_attention"))
    return [window if kind == "sliding_attention" else None for kind in kinds]
