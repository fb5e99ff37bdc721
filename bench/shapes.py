"""Real models' shapes: config.json, and every tensor of the model that it describes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from attrs import frozen

# What a layer's attention and its experts each add to the hidden state, against embeddings of 1 (root mean
# square): small, so that activations stay finite and neighbouring layers see similar states, as in real
# models (the next layer's router on this layer's state guesses 88 % of its choice right).
STEP = 0.1

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {"rope_type": "default"},
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": True,
        "torch_dtype": "bfloat16",
    },
    "qwen3-next-80b-a3b": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "full_attention_interval": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000000.0,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    },
    # These two without YaRN: neither shapes nor work depend on it.
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "vocab_size": 129280,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    },
}

Kind = Literal["embedding", "head", "norm", "zero", "router", "matrix", "kv_up", "expert"]


@frozen
class Tensor:
    """name: as Hugging Face has it. gain: a row of `cols` numbers has deviation gain / sqrt(cols).

    expert: (layer, expert, 0 gate / 1 up / 2 down) of a routed expert's matrix.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    gain: float = 1.0
    expert: tuple[int, int, int] | None = None

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def model_config(shape: str, layers: int | None = None, **changes: Any) -> dict[str, Any]:
    """config.json of a shape, with another number of layers; `changes` make it smaller for tests."""
    config = SHAPES[shape] | changes
    if layers:
        config["num_hidden_layers"] = layers
        if "first_k_dense_replace" in config:
            # of few layers most shall have experts, as in the whole model
            config["first_k_dense_replace"] = min(config["first_k_dense_replace"], (layers + 9) // 10)
    return config


def n_experts(config: dict[str, Any]) -> int:
    """Routed experts of a layer."""
    return int(
        next(config[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in config)
    )


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Every tensor, in file order."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    # A norm of Qwen3-Next multiplies by 1 + its weight.
    norm: Kind = "zero" if config["model_type"] == "qwen3_next" else "norm"
    interval = config.get("full_attention_interval", 1)
    yield Tensor("model.embed_tokens.weight", (vocab, hidden), "embedding")
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        yield Tensor(layer + "input_layernorm.weight", (hidden,), norm)
        yield Tensor(layer + "post_attention_layernorm.weight", (hidden,), norm)
        if (n + 1) % interval:
            yield from _delta(config, layer)
        else:
            yield from _latent(config, layer) if "kv_lora_rank" in config else _grouped(config, layer)
        yield from _feed_forward(config, n, layer)
    yield Tensor("model.norm.weight", (hidden,), norm)
    yield Tensor("lm_head.weight", (vocab, hidden), "head")


def _grouped(config: dict[str, Any], layer: str) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer += "self_attn."
    gated = 2 if config["model_type"] == "qwen3_next" else 1
    yield Tensor(layer + "q_proj.weight", (gated * q, hidden), "matrix")
    yield Tensor(layer + "k_proj.weight", (kv, hidden), "matrix")
    yield Tensor(layer + "v_proj.weight", (kv, hidden), "matrix")
    yield Tensor(layer + "o_proj.weight", (hidden, q), "matrix", gated * STEP)
    if config["model_type"] == "gpt_oss":
        for name, rows in ("q_proj", q), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden):
            yield Tensor(f"{layer}{name}.bias", (rows,), "zero")
        yield Tensor(layer + "sinks", (config["num_attention_heads"],), "zero")
    if config["model_type"] == "qwen3_moe":
        yield Tensor(layer + "q_norm.weight", (head,), "norm")
        yield Tensor(layer + "k_norm.weight", (head,), "norm")
    if config["model_type"] == "qwen3_next":
        yield Tensor(layer + "q_norm.weight", (head,), "zero")
        yield Tensor(layer + "k_norm.weight", (head,), "zero")


def _delta(config: dict[str, Any], layer: str) -> Iterator[Tensor]:
    """The gated delta rule."""
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    channels = 2 * keys + values
    layer += "linear_attn."
    yield Tensor(layer + "in_proj_qkvz.weight", (channels + values, hidden), "matrix")
    yield Tensor(layer + "in_proj_ba.weight", (2 * heads, hidden), "matrix")
    yield Tensor(layer + "conv1d.weight", (channels, 1, config["linear_conv_kernel_dim"]), "norm")
    yield Tensor(layer + "A_log", (heads,), "zero")
    yield Tensor(layer + "dt_bias", (heads,), "zero")
    yield Tensor(layer + "norm.weight", (config["linear_value_head_dim"],), "norm")
    # A silu of unit normals, by which the norm's result is multiplied, has deviation 0.6.
    yield Tensor(layer + "out_proj.weight", (hidden, values), "matrix", STEP / 0.6)


def _latent(config: dict[str, Any], layer: str) -> Iterator[Tensor]:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, turned, value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    layer += "self_attn."
    yield Tensor(layer + "q_a_proj.weight", (config["q_lora_rank"], hidden), "matrix")
    yield Tensor(layer + "q_a_layernorm.weight", (config["q_lora_rank"],), "norm")
    yield Tensor(layer + "q_b_proj.weight", (heads * (nope + turned), config["q_lora_rank"]), "matrix")
    yield Tensor(layer + "kv_a_proj_with_mqa.weight", (rank + turned, hidden), "matrix")
    yield Tensor(layer + "kv_a_layernorm.weight", (rank,), "norm")
    yield Tensor(layer + "kv_b_proj.weight", (heads * (nope + value), rank), "kv_up")
    yield Tensor(layer + "o_proj.weight", (hidden, heads * value), "matrix", STEP)


def _feed_forward(config: dict[str, Any], n: int, layer: str) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    names = ("gate_proj", "up_proj", "down_proj")
    block = layer + "mlp."
    # swiglu of unit normals has deviation 0.6
    step = STEP / 0.6
    if n < config.get("first_k_dense_replace", 0):
        yield from _triple(block, names, hidden, config["intermediate_size"], step)
        return
    if config["model_type"] == "mixtral":
        block, names = layer + "block_sparse_moe.", ("w1", "w3", "w2")
    experts = n_experts(config)
    if config["model_type"] == "gpt_oss":
        inter = config["intermediate_size"]
        yield Tensor(block + "router.weight", (experts, hidden), "router")
        yield Tensor(block + "router.bias", (experts,), "zero")
        yield Tensor(block + "experts.gate_up_proj_bias", (experts, 2 * inter), "zero")
        yield Tensor(block + "experts.down_proj_bias", (experts, hidden), "zero")
    else:
        yield Tensor(block + "gate.weight", (experts, hidden), "router")
    if config["model_type"] == "deepseek_v3":
        yield Tensor(block + "gate.e_score_correction_bias", (experts,), "zero")
        shared = config["n_shared_experts"] * config["moe_intermediate_size"]
        yield from _triple(block + "shared_experts.", names, hidden, shared, step)
    if config["model_type"] == "qwen3_next":
        shared = config["shared_expert_intermediate_size"]
        yield from _triple(block + "shared_expert.", names, hidden, shared, step)
        yield Tensor(block + "shared_expert_gate.weight", (1, hidden), "router")
    inter = config.get("moe_intermediate_size") or config["intermediate_size"]
    # k experts with weights that sum to `scale`
    step *= math.sqrt(config["num_experts_per_tok"]) / config.get("routed_scaling_factor", 1.0)
    for e in range(experts):
        yield from _triple(f"{block}experts.{e}.", names, hidden, inter, step, (n, e))


def _triple(
    prefix: str,
    names: tuple[str, str, str],
    hidden: int,
    inter: int,
    step: float,
    expert: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    kind: Kind = "expert" if expert else "matrix"
    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    for m, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        gain = step if m == 2 else 1.0
        yield Tensor(f"{prefix}{name}.weight", shape, kind, gain, (*expert, m) if expert else None)
