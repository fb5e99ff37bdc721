"""Llama (2, 3 and what is built like them), Mistral, Qwen2 and Qwen3: dense models that differ in little."""

from __future__ import annotations

from typing import Any, Final

from mer.model.families import common
from mer.model.families.config import Config
from mer.model.families.rope import Rope
from mer.model.families.tensors import Tensors
from mer.model.spec import AttentionSpec, LayerSpec, ModelSpec

_MINISTRAL_ROPE: Final[dict[str, Any]] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read_llama(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Llama, its parts taken from `tensors`."""
    bias = config.flag("attention_bias", False)
    mlp_bias = config.flag("mlp_bias", False)
    windows: list[int | None] = [None] * config.integer("num_hidden_layers")
    attention = common.grouped_attention(config)
    return _read(config, tensors, "llama", attention, windows, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def read_mistral(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Mistral, its parts taken from `tensors`."""
    # null says that there is none.
    window = None
    if config.get("sliding_window") is not None or not config.has("sliding_window"):
        window = config.integer("sliding_window", default=4096)
    windows = [window] * config.integer("num_hidden_layers")
    return _read(config, tensors, "mistral", common.grouped_attention(config), windows)


def read_ministral3(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Ministral 3 or Devstral 2, its parts taken from `tensors`: a Mistral with YaRN."""
    window = None if config.get("sliding_window") is None else config.integer("sliding_window")
    windows = [window] * config.integer("num_hidden_layers")
    attention = common.grouped_attention(config, default_head=128)
    rope = Rope(config, default=_MINISTRAL_ROPE)
    return _read(config, tensors, "ministral3", attention, windows, rope=rope, default_eps=1e-5)


def read_mistral3(config: Config, tensors: Tensors) -> ModelSpec:
    """The language model of a Mistral Small 3.1 or later, a Devstral or a Ministral 3, which also see."""
    tensors = tensors.inside("language_model")
    tied = config.flag("tie_word_embeddings", True) and not tensors.has("lm_head.weight")
    text = config.inner("text_config").but(tie_word_embeddings=tied)
    text.expect("model_type", "mistral", "ministral3")
    return (read_mistral if text.get("model_type") == "mistral" else read_ministral3)(text, tensors)


def read_qwen2(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Qwen2, its parts taken from `tensors`."""
    attention = common.grouped_attention(config)
    return _read(config, tensors, "qwen2", attention, _qwen_windows(config), qkv_bias=True)


def read_qwen3(config: Config, tensors: Tensors) -> ModelSpec:
    """ModelSpec of a Qwen3, its parts taken from `tensors`."""
    bias = config.flag("attention_bias", False)
    attention = common.grouped_attention(config, qk_norm="head", default_head=128)
    return _read(config, tensors, "qwen3", attention, _qwen_windows(config), qkv_bias=bias, o_bias=bias)


def _qwen_windows(config: Config) -> list[int | None]:
    """Of the layers from max_window_layers on, or of those that layer_types says."""
    n_layers = config.integer("num_hidden_layers")
    if not config.flag("use_sliding_window", False):
        return [None] * n_layers
    window = config.integer("sliding_window", default=4096)
    first = config.integer("max_window_layers", default=28, minimum=0)
    usual = ["full_attention" if i < first else "sliding_attention" for i in range(n_layers)]
    kinds = common.layer_kinds(config, n_layers, usual, ("full_attention", "sliding_attention"))
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _read(
    config: Config,
    tensors: Tensors,
    family: str,
    attention: AttentionSpec,
    windows: list[int | None],
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    rope: Rope | None = None,
    default_eps: float = 1e-6,
) -> ModelSpec:
    config.expect("hidden_act", "silu")
    hidden, inter = config.integer("hidden_size"), config.integer("intermediate_size")
    rope = rope or Rope(config)
    tied = common.take_ends(config, tensors)
    for i in range(len(windows)):
        common.take_norms(tensors, i, hidden)
        common.take_grouped_attention(tensors, i, hidden, attention, qkv_bias=qkv_bias, o_bias=o_bias)
        common.take_feed_forward(tensors, i, f"model.layers.{i}.mlp", hidden, inter, bias=mlp_bias)
    return ModelSpec(
        family=family,
        vocab=config.integer("vocab_size"),
        hidden=hidden,
        norm_eps=config.number("rms_norm_eps", default=default_eps),
        max_positions=rope.max_positions,
        attention=attention,
        rope=rope.spec(attention.head_dim, interleaved=config.flag("rope_interleave", False)),
        layers=tuple(LayerSpec(window, None) for window in windows),
        router=None,
        moe_inter=0,
        dense_inter=inter,
        shared_inter=0,
        tied_embeddings=tied,
    )
