"""GGUF files of small models, written by the gguf package from what transformers wrote."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from ling_models import ling_tensors

ARCHITECTURES = {
    "bailing_moe": gguf.MODEL_ARCH.BAILINGMOE2,
    "bailing_moe_1": gguf.MODEL_ARCH.BAILINGMOE,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "ministral3": gguf.MODEL_ARCH.MISTRAL3,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3_next": gguf.MODEL_ARCH.QWEN3NEXT,
    "qwen3_5_moe_text": gguf.MODEL_ARCH.QWEN35MOE,
    "lfm2_moe": gguf.MODEL_ARCH.LFM2MOE,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "phimoe": gguf.MODEL_ARCH.PHIMOE,
    "hunyuan_v1_moe": gguf.MODEL_ARCH.HUNYUAN_MOE,
    "solar_open": gguf.MODEL_ARCH.GLM4_MOE,
    "granitemoe": gguf.MODEL_ARCH.GRANITE_MOE,
    "granitemoeshared": gguf.MODEL_ARCH.GRANITE_MOE,
    "glm4_moe_lite": gguf.MODEL_ARCH.DEEPSEEK2,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "gemma4_text": gguf.MODEL_ARCH.GEMMA4,
    # The package knows GLM's form alone, which is DeepSeek's.
    "deepseek_v32": gguf.MODEL_ARCH.GLM_DSA,
    "glm_moe_dsa": gguf.MODEL_ARCH.GLM_DSA,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "dots1": gguf.MODEL_ARCH.DOTS1,
    "ernie4_5_moe": gguf.MODEL_ARCH.ERNIE4_5_MOE,
}


# llama.cpp turns neighbours where Hugging Face turns (i, i + dim/2).
NEIGHBOURS = ("bailing_moe_1", "llama", "ministral3", "mistral", "mixtral", "granitemoe", "granitemoeshared")

# Where in a block the F16 scales are, of formats that the gguf package does not quantise to.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}
SCALES |= {"IQ4_XS": (0,)}


def write_gguf(model: torch.nn.Module, path: Path, *, shards=0, **more) -> Path:
    """The model in a GGUF file, as llama.cpp's converter lays it out; returns its (first) file.

    shards: most tensors of a part, 0: one part. more: `tokenizer`, a function that adds to the writer;
    `formats` of matrices, by what a name ends with before `.weight` ("_down_exps": "q6_k"), F32 for others;
    `predicting`, how many layers for multi-token prediction there are, and `head`, the first of them;
    `fused`: as Qwen3-Next's first files; `merged`: gate and up of the experts in one tensor.
    The model gets the weights as they are rounded, or random ones where nobody can round.
    """
    family, config = model.config.model_type, model.config.to_dict()
    arch = ARCHITECTURES[family]
    title = "deepseek32" if family == "deepseek_v32" else gguf.MODEL_ARCH_NAMES[arch]
    writer = GGUFWriter(path, title, split_max_tensors=shards)
    predicting = more.get("predicting", 0)
    _metadata(writer, family, config, predicting)
    more.get("tokenizer", lambda writer: writer.add_tokenizer_model("none"))(writer)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"] + predicting)
    head = more.get("head")
    if head is not None:
        model.model.layers.append(head.layer)
    choices = {key: more.get(key) for key in ("fused", "merged")}
    for name, tensor in _tensors(model, family, config | choices):
        found = name if name.startswith("blk.") else names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        found += ".weight" if found.endswith("attn_sinks") else ""
        plain = tensor.dim() < 2 or "ffn_gate_inp" in found or found.endswith("bias")
        asked = {}.items() if plain else more.get("formats", {}).items()
        name = next((form for part, form in asked if found.endswith(f"{part}.weight")), "f32")
        kind = GGMLQuantizationType[name.upper()]
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        data = _stored(values.reshape(-1, values.shape[-1]) if values.ndim == 4 else values, kind)
        if kind != GGMLQuantizationType.F32:
            with torch.no_grad():
                tensor.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)).reshape(tensor.shape))
        writer.add_tensor(found, data, raw_dtype=kind)
    if head is not None:
        model.model.layers = model.model.layers[:-1]
        own = {
            "enorm": head.enorm,
            "hnorm": head.hnorm,
            "eh_proj": head.eh_proj,
            "shared_head_norm": head.norm,
        }
        for name, part in own.items():
            full = f"blk.{config['num_hidden_layers']}.nextn.{name}.weight"
            writer.add_tensor(full, part.weight.detach().numpy())
    for layer in range(predicting if head is None else 0):
        name = f"blk.{config['num_hidden_layers'] + layer}"
        for part in ("attn_norm", "nextn.enorm"):
            writer.add_tensor(f"{name}.{part}.weight", np.ones(config["hidden_size"], np.float32))
    rope = config["rope_parameters"]
    if family == "gemma4_text":
        _add_factors(writer, model.model.rotary_emb.full_attention_inv_freq, rope["full_attention"])
    elif rope["rope_type"] == "llama3":
        _add_factors(writer, model.model.rotary_emb.inv_freq, rope)
    if rope.get("rope_type") == "longrope":
        for kind in ("short", "long"):
            factors = np.array(rope[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))[0]


def _add_factors(writer: GGUFWriter, inv_freq: torch.Tensor, rope: dict) -> None:
    """What plain frequencies are to be divided by; what does not turn, by a huge number."""
    frequencies = inv_freq.numpy()
    exponents = torch.arange(len(frequencies), dtype=torch.float32) / len(frequencies)
    plain = (
        1.0 / rope["rope_theta"] ** exponents
    ).numpy()  # as transformers has them: what turns as usual gets 1
    factors = np.divide(plain, frequencies, out=np.full_like(plain, 1e30), where=frequencies > 0)
    writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))


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


def _metadata(w: GGUFWriter, family: str, config: dict, predicting: int) -> None:
    rope = config["rope_parameters"]
    if family == "gemma4_text":
        _gemma4(w, config)
        rope = rope["full_attention"]
    w.add_block_count(config["num_hidden_layers"] + predicting)
    if predicting:
        w.add_nextn_predict_layers(predicting)
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    if "intermediate_size" in config:
        w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["norm_eps"])
    stretched = 1.0
    if "alpha" in rope:
        stretched = rope["alpha"] ** (config["head_dim"] / (config["head_dim"] - 2))
    w.add_rope_freq_base(rope["rope_theta"] * stretched)
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    n_experts = next((config[name] for name in counts if config.get(name)), 0)
    if n_experts:
        w.add_expert_count(n_experts)
        used = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
        w.add_expert_used_count(next(config[name] for name in used if config.get(name)))
    if rope["rope_type"] in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        w.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "mscale_all_dim" in rope:
            share = 1.0 if family == "ministral3" else 0.1
            w.add_rope_scaling_yarn_log_mul(share * rope["mscale_all_dim"])
        if "llama_4_scaling_beta" in rope:
            w.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if config.get("moe_intermediate_size"):
        w.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config.get("shared_expert_intermediate_size"):
        w.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if family == "hunyuan_v1_moe":
        w.add_expert_shared_feed_forward_length(config["intermediate_size"])
    if family == "bailing_moe_1":
        w.add_leading_dense_block_count(0)
        w.add_expert_shared_count(config["shared_intermediate_size"] // config["intermediate_size"])
        w.add_expert_weights_norm(True)
        w.add_expert_weights_scale(1.0)
    if family in ("gpt_oss", "minimax_m2", "hunyuan_v1_moe", "bailing_moe_1"):
        w.add_expert_feed_forward_length(config["intermediate_size"])
    if family == "ernie4_5_moe":
        w.add_interleave_moe_layer_step(config["moe_layer_interval"])
        w.add_leading_dense_block_count(config["moe_layer_start_index"])
        w.add_expert_shared_count(config["moe_num_shared_experts"])
        shared = config["moe_num_shared_experts"] * config["moe_intermediate_size"]
        w.add_expert_shared_feed_forward_length(shared)
    if family == "minimax_m2":
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if family == "gpt_oss":
        w.add_sliding_window(config["sliding_window"])
    if family.startswith("granite"):
        w.add_attention_scale(config["attention_multiplier"])
        w.add_embedding_scale(config["embedding_multiplier"])
        w.add_residual_scale(config["residual_multiplier"])
        w.add_logit_scale(config["logits_scaling"])
        if config.get("shared_intermediate_size"):
            w.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
    if rope["rope_type"] == "longrope":
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        w.add_rope_scaling_attn_factors(rope["short_mscale"])
    if family == "phimoe":
        w.add_sliding_window(config["sliding_window"] or 0)
    if "index_topk" in config:
        w.add_indexer_head_count(config["index_n_heads"])
        w.add_indexer_key_length(config["index_head_dim"])
        w.add_indexer_top_k(config["index_topk"])
    if config.get("clip_qkv"):
        w.add_clamp_kqv(config["clip_qkv"])
    if "n_group" in config:
        _deepseek_experts(w, config)
    if "linear_num_key_heads" in config:
        w.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
        w.add_ssm_state_size(config["linear_key_head_dim"])
        w.add_ssm_group_count(config["linear_num_key_heads"])
        w.add_ssm_time_step_rank(config["linear_num_value_heads"])
        w.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
        w.add_full_attention_interval(config["layer_types"].index("full_attention") + 1)
    if family == "qwen3_5_moe_text":
        w.add_rope_dimension_sections([11, 11, 10, 0])
    if family == "lfm2_moe":
        w.add_shortconv_l_cache(config["conv_L_cache"])
        w.add_leading_dense_block_count(config["num_dense_layers"])
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        w.add_expert_weights_scale(config["routed_scaling_factor"])
        heads = config["num_key_value_heads"]
        w.add_head_count_kv([0 if kind == "conv" else heads for kind in config["layer_types"]])
        return
    if "kv_lora_rank" not in config and family != "gemma4_text":
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        w.add_head_count_kv(config["num_key_value_heads"])
        w.add_key_length(head)
        w.add_value_length(head)
        w.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))
        return
    if family == "gemma4_text":
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


def _gemma4(w: GGUFWriter, config: dict) -> None:
    local = [kind == "sliding_attention" for kind in config["layer_types"]]
    others = config["per_layer_config"]
    wide = {each["head_dim"] for each in others.values()}.pop()
    kv_heads = [config["num_key_value_heads"]] * len(local)
    for i, each in others.items():
        kv_heads[int(i)] = each.get("num_key_value_heads", kv_heads[int(i)])
    w.add_head_count_kv(kv_heads)
    w.add_key_length(wide)
    w.add_value_length(wide)
    w.add_key_length_swa(config["head_dim"])
    w.add_value_length_swa(config["head_dim"])
    w.add_rope_dimension_count(wide)
    w.add_rope_dimension_count_swa(config["head_dim"])
    w.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    w.add_sliding_window(config["sliding_window"])
    w.add_sliding_window_pattern(local)
    w.add_embedding_length_per_layer_input(0)
    w.add_shared_kv_layers(0)
    if config["final_logit_softcapping"]:
        w.add_final_logit_softcapping(config["final_logit_softcapping"])


def _deepseek_experts(w: GGUFWriter, config: dict) -> None:
    w.add_leading_dense_block_count(config.get("first_k_dense_replace", int("mlp_layer_types" in config)))
    w.add_expert_shared_count(config["n_shared_experts"])
    w.add_expert_weights_scale(config["routed_scaling_factor"])
    w.add_expert_weights_norm(config["norm_topk_prob"])
    scores = gguf.ExpertGatingFuncType
    w.add_expert_gating_func(scores.SOFTMAX if "topk_method" in config else scores.SIGMOID)
    w.add_expert_group_count(config["n_group"])
    w.add_expert_group_used_count(config["topk_group"])


def _tensors(model: torch.nn.Module, family: str, config: dict):
    """(Hugging Face's name, values), in the order and form that llama.cpp expects."""
    state = ling_tensors(model) if family.startswith("bailing") else model.state_dict()
    for name, tensor in state.items():
        if family in ("qwen3_next", "qwen3_5_moe_text"):
            if "linear_attn" in name:
                yield from _delta(name, tensor, family, config)
                continue
            if name.endswith("norm.weight"):
                tensor = tensor + 1
        elif family == "lfm2_moe":
            for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                if name.endswith("experts.gate_up_proj") and theirs != "w2":
                    part = tensor.chunk(2, dim=1)[theirs == "w3"]
                    yield f"{name.removesuffix('gate_up_proj')}{theirs}.weight".removeprefix("model."), part
                elif name.endswith("experts.down_proj") and theirs == "w2":
                    yield f"{name.removesuffix(ours)}{theirs}.weight".removeprefix("model."), tensor
            if "experts." in name:
                continue
            name = name.replace("expert_bias", "expert_bias.bias")
            tensor = tensor.squeeze(1) if name.endswith("conv.conv.weight") else tensor
        elif family == "phimoe":
            name = name.replace("mlp.router", "mlp.gate")
        name = name.replace("mlp.gate.expert_bias", "mlp.gate.expert_bias.bias")
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
        elif family == "gemma4_text" and name.endswith(("router.scale", "per_expert_scale")):
            part = "ffn_gate_inp" if name.endswith("router.scale") else "ffn_down_exps"
            yield f"blk.{name.split('.')[2]}.{part}.scale", tensor
        elif (family == "gemma4_text" and "experts." in name) or name.endswith("layer_scalar"):
            yield f"{name}.weight", tensor
        elif name.endswith("experts.gate_up_proj") and config["merged"]:
            # Of some architectures the package does not know that llama.cpp takes them so.
            yield f"blk.{name.split('.')[2]}.ffn_gate_up_exps.weight", tensor
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
            turned = tensor.view(-1, 2, half, *tensor.shape[1:]).swapaxes(1, 2)
            yield name, turned if tensor.dim() == 2 else turned.reshape(tensor.shape)
        elif name.endswith("kv_b_proj.weight"):
            nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
            both = tensor.reshape(-1, nope + value, tensor.shape[1])
            yield name.replace("kv_b_proj", "k_b_proj"), both[:, :nope].swapaxes(1, 2)
            yield name.replace("kv_b_proj", "v_b_proj"), both[:, nope:]
        elif name.endswith("shared_expert_gate.weight"):
            yield name, tensor[0]
        elif name.endswith("moe_statics.e_score_correction_bias"):
            # In files it does not stand under the router, as it does in memory.
            yield name.replace("gate.moe", "moe").replace("correction_bias", "correction.bias"), tensor[0]
        else:
            yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor


def _delta(name: str, tensor: torch.Tensor, family: str, config: dict):
    """A tensor of a layer with the gated delta rule."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    group = values // keys

    def tiled(rows: torch.Tensor, dim: int) -> torch.Tensor:
        """Value heads [key head, of its own] as [of its own, key head]; `dim` rows are a head."""
        if family == "qwen3_next":
            return rows
        return rows.reshape(keys, group, dim, -1).swapaxes(0, 1).reshape(rows.shape)

    q_and_k = 2 * keys * key_dim
    if name.endswith("in_proj_qkvz.weight") and not config["fused"]:
        widths = [key_dim, key_dim, group * value_dim, group * value_dim]
        parts = tensor.reshape(keys, sum(widths), -1).split(widths, 1)
        *qkv, z = (part.reshape(-1, tensor.shape[1]) for part in parts)
        yield name.replace("qkvz", "qkv"), torch.cat(qkv)
        yield name.replace("qkvz", "z"), z
    elif name.endswith("A_log"):
        yield name, tiled(-tensor.exp(), 1)
    elif name.endswith("dt_bias"):
        yield name.replace("dt_bias", "dt_proj.bias"), tiled(tensor, 1)
    elif name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        rows = tensor.squeeze()
        yield name, torch.cat([rows[:q_and_k], tiled(rows[q_and_k:], value_dim)])
    elif name.endswith(("in_proj_a.weight", "in_proj_b.weight")):
        yield name, tiled(tensor, 1)
    elif name.endswith("in_proj_z.weight"):
        yield name, tiled(tensor, value_dim)
    elif name.endswith("out_proj.weight"):
        yield name, tiled(tensor.T.contiguous(), value_dim).T
    else:
        yield name, tensor
