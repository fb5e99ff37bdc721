"""DeepSeek-V4's GGUF files, whose names the gguf package does not have: written as llama.cpp reads them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from cli_models import called
from gguf import GGMLQuantizationType, GGUFWriter
from harness import Runner
from llama_cpp import LlamaCpp
from make_checkpoints import make
from test_families import oracle
from test_llama_cpp import EXACT, PROMPT, VOCAB, N, add_words, log_softmax

from mer.errors import CheckpointError
from mer.weights.checkpoint import open_checkpoint

# By what a name in transformers' memory ends with, behind the layer.
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_norm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_proj.weight": "attn_kv.weight",
    "self_attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_a_proj.weight": "attn_output_a.weight",
    "self_attn.o_b_proj.weight": "attn_output_b.weight",
    "self_attn.compressor.kv_proj.weight": "attn_compressor_kv.weight",
    "self_attn.compressor.gate_proj.weight": "attn_compressor_gate.weight",
    "self_attn.compressor.position_bias": "attn_compressor_ape.weight",
    "self_attn.compressor.kv_norm.weight": "attn_compressor_norm.weight",
    "self_attn.compressor.indexer.kv_proj.weight": "indexer_compressor_kv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "indexer_compressor_gate.weight",
    "self_attn.compressor.indexer.position_bias": "indexer_compressor_ape.weight",
    "self_attn.compressor.indexer.kv_norm.weight": "indexer_compressor_norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "indexer.attn_q_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "indexer.proj.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    **{f"{b}_hc.{p}": f"hc_{b}_{p}.weight" for b in ("attn", "ffn") for p in ("fn", "base", "scale")},
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    **{f"model.hc_head.hc_{p}": f"output_hc_{p}.weight" for p in ("fn", "base", "scale")},
}
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
SIZES = {
    "hidden_size": 128,
    "vocab_size": VOCAB,
    # llama.cpp (b11549) divides by 0 where a cache of no layer has heads of a multiple of 64.
    "head_dim": 96,
    "index_head_dim": 64,
    "moe_intermediate_size": 64,
    "partial_rotary_factor": 1 / 3,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    # Hashed layers are the first ones in these files.
    "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
}


def write(model: torch.nn.Module, path: Path, form: str = "f32", **changed) -> Path:
    """The model in a GGUF file; matrices of experts in this format, and rounded to it in the model, too."""
    c = model.config
    w = GGUFWriter(path, "deepseek4")
    add_words(w)
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(1)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["main"]["rope_theta"])
    w.add_rope_dimension_count(c.qk_rope_head_dim)
    compress = c.rope_parameters["compress"]
    if compress["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(compress["factor"])
        w.add_rope_scaling_orig_ctx_len(compress["original_max_position_embeddings"])
        w.add_rope_scaling_yarn_beta_fast(32.0)
        w.add_rope_scaling_yarn_beta_slow(1.0)
    w.add_q_lora_rank(c.q_lora_rank)
    w.add_sliding_window(c.sliding_window)
    w.add_indexer_head_count(c.index_n_heads)
    w.add_indexer_key_length(c.index_head_dim)
    w.add_indexer_top_k(c.index_topk)
    w.add_expert_count(c.n_routed_experts)
    w.add_expert_used_count(c.num_experts_per_tok)
    w.add_expert_feed_forward_length(c.moe_intermediate_size)
    w.add_expert_shared_count(1)
    w.add_expert_weights_scale(c.routed_scaling_factor)
    w.add_expert_weights_norm(True)
    w.add_uint32("deepseek4.expert_gating_func", 4)
    w.add_vocab_size(c.vocab_size)
    for key, value in {
        "attention.output_lora_rank": c.o_lora_rank,
        "attention.output_group_count": c.o_groups,
        "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
        "hash_layer_count": c.mlp_layer_types.count("hash_moe"),
        "nextn_predict_layers": 1,  # which the file does not have: converters write so
    }.items():
        w.add_uint32(f"deepseek4.{key}", value)
    w.add_float32("deepseek4.hyper_connection.epsilon", c.hc_eps)
    w.add_float32("deepseek4.attention.compress_rope_freq_base", compress["rope_theta"])
    w.add_array("deepseek4.attention.compress_ratios", [RATIOS[kind] for kind in c.layer_types])
    w.add_array("deepseek4.swiglu_clamp_exp", [float(c.swiglu_limit)] * c.num_hidden_layers)
    if "shared_clamp" in changed:
        w.add_array("deepseek4.swiglu_clamp_shexp", [changed["shared_clamp"]] * c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in WHOLE:
            parts = {WHOLE[name]: tensor}
        else:
            _, _, layer, rest = name.split(".", 3)
            if rest == "mlp.experts.gate_up_proj":
                gate, up = tensor.chunk(2, 1)
                parts = {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
            else:
                parts = {LAYER[rest]: tensor}
            parts = {f"blk.{layer}.{part}": each for part, each in parts.items()}
        for part, each in parts.items():
            if part.endswith("tid2eid.weight"):
                w.add_tensor(part, each.numpy().astype(np.int32))
                continue
            kind = GGMLQuantizationType[form.upper() if "_exps" in part else "F32"]
            data = gguf.quants.quantize(np.ascontiguousarray(each.float().numpy()), kind)
            with torch.no_grad():
                each.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)).reshape(each.shape))
            w.add_tensor(part, data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


YARN = {
    "rope_type": "yarn",
    "rope_theta": 160000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
}
LONG = [int(token) for token in np.random.default_rng(4).integers(10, VOCAB, 300)]


def off(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(found - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
def test_logits(rope, tmp_path):
    """As far as 128 positions are compressed into one; transformers' numbers."""
    changes = {} if rope is None else {"rope_parameters": rope}
    model = make(tmp_path / "hf", "deepseek_v4", **SIZES, **changes)
    path = write(model, tmp_path / "model.gguf")
    assert off(Runner(path).logits(LONG), oracle(model, LONG)) < 1e-4


def test_logits_of_mxfp4(tmp_path):
    """Experts that stay what DeepSeek publishes; activations are rounded."""
    changes = {"num_hidden_layers": 1, "mlp_layer_types": ["moe"], "layer_types": ["sliding_attention"]}
    model = make(tmp_path / "hf", "deepseek_v4", **SIZES | changes)
    path = write(model, tmp_path / "model.gguf", "mxfp4")
    found = Runner(path).logits(LONG)
    assert off(found, oracle(model, LONG)) < 0.035
    called("convert", path, tmp_path / "store", "--format", "same")
    assert np.array_equal(Runner(tmp_path / "store").logits(LONG), found)


def test_llama_cpp(tmp_path):
    """The same tokens and probabilities, greedily."""
    model = make(tmp_path / "hf", "deepseek_v4", **SIZES)
    path = write(model, tmp_path / "model.gguf")
    with LlamaCpp(path) as llama:
        answer = llama.greedy(PROMPT, N, 10, endless=True)
    tokens = PROMPT + [drawn.id for drawn in answer][:-1]
    ours = log_softmax(Runner(path).logits(tokens)[len(PROMPT) - 1 :])
    theirs = [(value, ours[i, id]) for i, drawn in enumerate(answer) for id, value in drawn.top.items()]
    assert np.sqrt(np.mean([(a - b) ** 2 for a, b in theirs])) < EXACT


def test_what_files_say_beside_it(tmp_path):
    """Of layers for multi-token prediction, which are not there; a clamp of its own is refused."""
    model = make(tmp_path / "hf", "deepseek_v4", **SIZES)
    path = write(model, tmp_path / "model.gguf")
    assert open_checkpoint(path).config["num_hidden_layers"] == 4
    path = write(model, tmp_path / "other.gguf", shared_clamp=5.0)
    with pytest.raises(CheckpointError, match="swiglu_clamp_shexp is not swiglu_clamp_exp"):
        open_checkpoint(path)
