"""GGUF files of small models, written by the gguf package from what transformers wrote."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "granitemoe": gguf.MODEL_ARCH.GRANITE_MOE,
    "granitemoeshared": gguf.MODEL_ARCH.GRANITE_MOE,
    "glm4_moe_lite": gguf.MODEL_ARCH.DEEPSEEK2,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
}


# llama.cpp turns neighbours where Hugging Face turns (i, i + dim/2).
NEIGHBOURS = ("llama", "mistral", "mixtral", "granitemoe", "granitemoeshared")

# Where in a block the F16 scales are, of formats that the gguf package does not quantise to.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}
SCALES |= {"IQ4_XS": (0,)}


def write_gguf(model: torch.nn.Module, path: Path, *, shards=0, **more) -> Path:
    """The model in a GGUF file, as llama.cpp's converter lays it out; returns its (first) file.

    shards: most tensors of a part, 0: one part. more: `tokenizer`, a function that adds to the writer;
    `formats`, by what a tensor's name ends with before `.weight` ("ffn_down_exps": "q6_k"), F32 for others.
    The model gets the weights as they are rounded, or random ones where nobody can round.
    """
    family, config = model.config.model_type, model.config.to_dict()
    arch = ARCHITECTURES[family]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=shards)
    _metadata(writer, family, config)
    more.get("tokenizer", lambda writer: writer.add_tokenizer_model("none"))(writer)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in _tensors(model, family, config):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        found += ".weight" if found.endswith("attn_sinks") else ""
        asked = more.get("formats", {}).items()
        name = next((form for part, form in asked if found.endswith(f"{part}.weight")), "f32")
        kind = GGMLQuantizationType[name.upper()]
        data = _stored(np.ascontiguousarray(tensor.detach().float().numpy()), kind)
        if kind != GGMLQuantizationType.F32:
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)))
        writer.add_tensor(found, data, raw_dtype=kind)
    if config["rope_parameters"]["rope_type"] == "llama3":
        frequencies = model.model.rotary_emb.inv_freq.numpy()
        exponents = np.arange(len(frequencies), dtype=np.float32) / len(frequencies)
        plain = config["rope_parameters"]["rope_theta"] ** -exponents
        writer.add_tensor("rope_freqs.weight", (plain / frequencies).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))[0]


def _stored(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    if kind.name not in SCALES:
        return gguf.quants.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.size)
    blocks = rng.integers(0, 256, (values.size // block, size), np.uint8)
    for at in SCALES[kind.name]:
        blocks[:, at : at + 2] = np.full((len(blocks), 1), 1e-3, np.float16).view(np.uint8)
    # Of the size that the values had.
    ratio = values.std() / gguf.quants.dequantize(blocks, kind).std()
    for at in SCALES[kind.name]:
        blocks[:, at : at + 2] = np.full((len(blocks), 1), 1e-3 * ratio, np.float16).view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def _metadata(w: GGUFWriter, family: str, config: dict) -> None:
    rope = config["rope_parameters"]
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(rope["rope_theta"])
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    n_experts = next((config[name] for name in counts if config.get(name)), 0)
    if n_experts:
        w.add_expert_count(n_experts)
        w.add_expert_used_count(config["num_experts_per_tok"])
    if rope["rope_type"] in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        w.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "mscale_all_dim" in rope:
            w.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if config.get("moe_intermediate_size"):
        w.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if family == "qwen2_moe":
        w.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if family in ("gpt_oss", "minimax_m2"):
        w.add_expert_feed_forward_length(config["intermediate_size"])
    if family == "gpt_oss":
        w.add_sliding_window(config["sliding_window"])
    if family.startswith("granite"):
        w.add_attention_scale(config["attention_multiplier"])
        w.add_embedding_scale(config["embedding_multiplier"])
        w.add_residual_scale(config["residual_multiplier"])
        w.add_logit_scale(config["logits_scaling"])
        if config.get("shared_intermediate_size"):
            w.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
    if config.get("clip_qkv"):
        w.add_clamp_kqv(config["clip_qkv"])
    if "n_group" in config:
        _deepseek_experts(w, config)
    if "kv_lora_rank" not in config:
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        w.add_head_count_kv(config["num_key_value_heads"])
        w.add_key_length(head)
        w.add_value_length(head)
        w.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))
        return
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    w.add_head_count_kv(1)
    w.add_key_length(rank + turned)
    w.add_value_length(rank)
    w.add_key_length_mla(config["qk_nope_head_dim"] + turned)
    w.add_value_length_mla(config["v_head_dim"])
    if config["q_lora_rank"]:
        w.add_q_lora_rank(config["q_lora_rank"])
    w.add_kv_lora_rank(rank)
    w.add_rope_dimension_count(turned)


def _deepseek_experts(w: GGUFWriter, config: dict) -> None:
    w.add_leading_dense_block_count(config.get("first_k_dense_replace", 1))
    w.add_expert_shared_count(config["n_shared_experts"])
    w.add_expert_weights_scale(config["routed_scaling_factor"])
    w.add_expert_weights_norm(config["norm_topk_prob"])
    scores = gguf.ExpertGatingFuncType
    w.add_expert_gating_func(scores.SOFTMAX if "topk_method" in config else scores.SIGMOID)
    w.add_expert_group_count(config["n_group"])
    w.add_expert_group_used_count(config["topk_group"])


def _tensors(model: torch.nn.Module, family: str, config: dict):
    """(Hugging Face's name, values), in the order and form that llama.cpp expects."""
    for name, tensor in model.state_dict().items():
        if family.startswith("granite"):
            name = name.replace("block_sparse_moe.experts", "mlp.experts").replace("router.", "router.layer.")
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if family == "gpt_oss" and "experts.gate_up_proj" in name:
            # Columns of gate and up alternate here, and matrices lie the other way.
            bias = name.endswith("_bias")
            for at, part in enumerate(("gate_proj", "up_proj")):
                values = tensor[..., at::2]
                place = name.removesuffix("_bias").replace("gate_up_proj", part)
                yield f"{place}.{'bias' if bias else 'weight'}", values if bias else values.swapaxes(1, 2)
        elif family == "gpt_oss" and "experts.down_proj" in name:
            bias = name.endswith("_bias")
            place = name.removesuffix("_bias")
            yield f"{place}.{'bias' if bias else 'weight'}", tensor if bias else tensor.swapaxes(1, 2)
        elif name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj.weight"), gate
            yield name.replace("gate_up_proj", "up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", tensor
        elif name.endswith("shared_mlp.input_linear.weight"):
            gate, up = tensor.chunk(2)
            yield name.replace("shared_mlp.input_linear", "mlp.shared_expert.gate_proj"), gate
            yield name.replace("shared_mlp.input_linear", "mlp.shared_expert.up_proj"), up
        elif family in NEIGHBOURS and ("q_proj." in name or "k_proj." in name):
            half = (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) // 2
            yield name, tensor.reshape(-1, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        elif name.endswith("kv_b_proj.weight"):
            nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
            both = tensor.reshape(-1, nope + value, tensor.shape[1])
            yield name.replace("kv_b_proj", "k_b_proj"), both[:, :nope].swapaxes(1, 2)
            yield name.replace("kv_b_proj", "v_b_proj"), both[:, nope:]
        elif name.endswith("shared_expert_gate.weight"):
            yield name, tensor[0]
        else:
            yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor
