"""A config.json that lies, and names of tensors other than the usual: errors that say where, or a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from harness import Runner
from make_checkpoints import FAMILY, PER_EXPERT, edit_config, make
from safetensors.numpy import load_file, save_file

from mer.errors import CheckpointError, UnsupportedModelError
from mer.model.families import FAMILIES, load
from mer.weights.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    path = tmp_path_factory.mktemp("originals")
    for family in FAMILY:
        make(path / family, family, num_hidden_layers=2)
    return path


@pytest.fixture
def checkpoint(originals, tmp_path):
    """Copies of the original checkpoints, to be edited: checkpoint('olmoe', vocab_size=3) -> Path."""

    def copy(family: str, **changes: object) -> Path:
        shutil.copytree(originals / family, tmp_path / family, dirs_exist_ok=True)
        edit_config(tmp_path / family, **changes)
        return tmp_path / family

    return copy


def rename(path: Path, change) -> None:
    """Pass the tensors of a checkpoint of one file through `change`."""
    (file,) = path.glob("*.safetensors")
    save_file(change(load_file(file)), file)


def test_unknown_architecture_lists_the_known(checkpoint):
    with pytest.raises(UnsupportedModelError, match="llama_99") as caught:
        load(open_checkpoint(checkpoint("mixtral", model_type="llama_99")))
    assert all(family in str(caught.value) for family in FAMILIES)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("mixtral", {"model_type": None}, "model_type"),
        ("deepseek_v4", {"hc_mult": 17}, "hc_mult is 17, up to 16"),
        ("deepseek_v4", {"layer_types": ["full_attention"] * 2}, "layer_types has 'full_attention'"),
        ("deepseek_v4", {"mlp_layer_types": ["moe"]}, "mlp_layer_types must say hash_moe or moe"),
        ("deepseek_v4", {"compress_rates": {"heavily_compressed_attention": 24}}, "compress_rates has 24"),
        ("deepseek_v4", {"o_groups": 3}, "no multiple of o_groups"),
        ("deepseek_v4", {"index_head_dim": 4}, "index_head_dim .4. is less than the 8 elements"),
        ("deepseek_v4", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ("gemma4_text", {"enable_moe_block": False}, "does not ask for .*post_feedforward_layernorm_1"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input is 8"),
        ("gemma4_text", {"layer_types": ["full_attention"]}, "layer_types must say sliding_attention"),
        ("gemma4_text", {"per_layer_config": {"1": {"num_key_value_heads": 3}}}, "no multiple of 3"),
        ("gemma4_text", {"top_k_experts": 7}, "top_k_experts is 7, but there are 6"),
        ("glm_moe_dsa", {"indexer_types": ["shared", "full"]}, "the first layer can't share"),
        ("glm_moe_dsa", {"indexer_types": ["full"]}, "indexer_types must say full or shared"),
        ("deepseek_v32", {"index_head_dim": 4}, "index_head_dim is less than qk_rope_head_dim"),
        ("deepseek_v32", {"index_topk": 0}, "index_topk"),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank"),
        ("mixtral", {"hidden_size": None}, "hidden_size is missing|key hidden_size"),
        ("mixtral", {"hidden_size": "64"}, "hidden_size is '64'"),
        ("mixtral", {"hidden_size": True}, "hidden_size is True"),
        ("mixtral", {"hidden_size": 128}, r"embed_tokens.weight has shape \[211, 64\].*\[211, 128\]"),
        ("mixtral", {"vocab_size": 200}, "embed_tokens.weight"),
        ("mixtral", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ("mixtral", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("qwen3_next", {"num_hidden_layers": 1 << 40, "layer_types": None}, "but there are .* tensors"),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 1 << 40}}}, "a head has 1,099,511,627,776"),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1, "factor": 2}},
            "rope_theta is 1",
        ),
        ("mixtral", {"num_hidden_layers": 1}, r"num_hidden_layers is 1, .* model\.layers\.1\."),
        ("qwen2_moe", {"qkv_bias": False}, "does not ask for .*k_proj.bias"),
        ("deepseek_v3", {"n_shared_experts": 0}, "does not ask for .*shared_experts"),
        ("deepseek_v3", {"num_hidden_layers": 1, "first_k_dense_replace": 0}, "mlp.gate.weight is missing"),
        ("mixtral", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("mixtral", {"num_key_value_heads": 4}, "k_proj.weight"),
        ("mixtral", {"num_attention_heads": 7}, "num_attention_heads"),
        ("mixtral", {"head_dim": 15}, "q_proj.weight"),
        ("mixtral", {"intermediate_size": 32}, "experts.0.w1.weight"),
        ("mixtral", {"num_local_experts": 5}, r"block_sparse_moe.gate.weight has shape \[4, 64\]"),
        ("mixtral", {"num_local_experts": 3}, "block_sparse_moe.gate.weight"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but there are 4 experts"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ("mixtral", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ("mixtral", {"sliding_window": 0}, "sliding_window"),
        ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ("mixtral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor is missing"),
        ("mixtral", {"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta"),
        ("mixtral", {"rope_parameters": [1]}, "rope_parameters"),
        ("hunyuan_v1_moe", {"moe_topk": [7, 7]}, "moe_topk is 7, but there are 6"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": [32, "x"]}, "moe_intermediate_size"),
        (
            "phimoe",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1]}},
            "a number for each of 8",
        ),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", 1]}, "mlp_layer_types"),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5"),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "3 elements of a head can't turn"),
        ("minimax_m2", {"rope_parameters": None, "rotary_dim": 0}, "rotary_dim is 0"),
        ("qwen3_moe", {"mlp_only_layers": ["x"]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "model.layers.0.mlp.gate_proj.weight is missing"),
        ("qwen3_moe", {"attention_bias": True}, "q_proj.bias is missing"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 41}, "shared_expert.gate_proj.weight"),
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention"]},
            "layer_types",
        ),
        ("olmoe", {"clip_qkv": -2}, "clip_qkv"),
        ("deepseek_v3", {"n_group": 3}, "n_group"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group is 5, but n_group is 4"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ("deepseek_v3", {"kv_lora_rank": 16}, "kv_a_proj_with_mqa.weight"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_proj.weight is missing"),
        ("deepseek_v3", {"v_head_dim": 21}, "kv_b_proj.weight"),
        ("deepseek_v3", {"first_k_dense_replace": 0}, "model.layers.0.mlp.gate.weight is missing"),
        ("qwen3_next", {"linear_num_key_heads": 3}, r"\(4\) is no multiple of linear_num_key_heads \(3\)"),
        ("qwen3_next", {"linear_value_head_dim": 21}, "in_proj_qkvz.weight has shape"),
        ("qwen3_next", {"linear_conv_kernel_dim": 5}, r"conv1d.weight has shape \[144, 1, 4\]"),
        ("qwen3_next", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
        ("qwen3_next", {"layer_types": ["full_attention"]}, "each of the 2 layers"),
        (
            "qwen3_next",
            {"layer_types": ["full_attention"] * 2},
            "layers.0.self_attn.q_proj.weight is missing",
        ),
        ("qwen3_next", {"head_dim": 16}, "q_proj.weight has shape"),
        ("qwen3_5_moe_text", {"num_hidden_layers": 1}, "layer_types"),
        ("qwen3_5_moe_text", {"text_config": [1]}, r"text_config is \[1\]"),
        ("lfm2_moe", {"layer_types": None}, "layer_types"),
        ("lfm2_moe", {"conv_L_cache": 4}, "conv.conv.weight has shape"),
        ("lfm2_moe", {"conv_bias": True}, "conv.in_proj.bias is missing"),
        ("lfm2_moe", {"use_expert_bias": False}, "does not ask for .*expert_bias"),
        ("lfm2_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are 8 experts"),
    ],
)
def test_config_that_lies(checkpoint, family, changes, named):
    with pytest.raises(CheckpointError, match=named) as caught:
        load(open_checkpoint(checkpoint(family, **changes)))
    assert str(caught.value).startswith(("/", str(Path.cwd()))), "the message begins with the file"


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("mixtral", {"rope_parameters": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 1]}, "moe_topk differs by layer"),
        ("minimax_m2", {"attn_type_list": [1, 0]}, "attn_type_list"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("qwen3_next", {"attention_bias": True}, "attention_bias"),
        ("qwen3_next", {"layer_types": ["mamba", "full_attention"]}, "'mamba'; known are linear_attention"),
    ],
)
def test_mathematics_that_is_not_known(checkpoint, family, changes, named):
    with pytest.raises(UnsupportedModelError, match=named):
        load(open_checkpoint(checkpoint(family, **changes)))


@pytest.mark.parametrize(
    "lost", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.experts.7.up_proj.weight"]
)
def test_missing_tensor_is_named(checkpoint, lost):
    path = checkpoint("olmoe")
    rename(path, lambda tensors: {name: t for name, t in tensors.items() if name != lost})
    with pytest.raises(CheckpointError, match=lost):
        load(open_checkpoint(path))


def fuse(tensors, expert: str, gate: str, up: str, down: str, target: str):
    """Per-expert tensors -> [experts, 2 inter, hidden] and [experts, hidden, inter], as in transformers 5."""
    kept = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        names = [n for n in tensors if n.startswith(prefix + expert) and n.endswith(gate)]
        if not names:
            continue
        each = [f"{prefix}{expert}.{e}." for e in range(len(names))]
        kept[f"{prefix}{target}.gate_up_proj"] = np.stack(
            [np.concatenate([tensors[e + gate], tensors[e + up]]) for e in each]
        )
        kept[f"{prefix}{target}.down_proj"] = np.stack([tensors[e + down] for e in each])
    return kept


def test_a_table_that_names_no_expert(checkpoint):
    path = checkpoint("deepseek_v4")
    name = "model.layers.0.ffn.gate.tid2eid"
    rename(path, lambda t: t | {name: np.where(t[name] == 7, 8, t[name])})
    with pytest.raises(CheckpointError, match="tid2eid must have numbers of experts, from 0 to 7"):
        Runner(path)


def test_experts_of_two_codes_a_byte(checkpoint):
    """DeepSeek-V4 as published; what it is stored as is said, not that its shape is another."""
    path, name = checkpoint("deepseek_v4"), "model.layers.0.ffn.experts.0.w1.weight"
    rename(path, lambda t: t | {name: np.zeros((32, 32), np.int8)})
    with pytest.raises(UnsupportedModelError, match=f"{name} has dtype I8, which holds no weights"):
        load(open_checkpoint(path))


def test_published_names(checkpoint, originals):
    """DeepSeek-V4's files have no `model.` before a name, and some names that transformers changes."""
    prompt = list(range(40))
    expected = Runner(originals / "deepseek_v4").logits(prompt)
    path, others = checkpoint("deepseek_v4"), {"embed_tokens": "embed", "hc_head.hc_": "hc_head_"}

    def published(name):
        name = name.removeprefix("model.").replace("attn.norm", "attn.kv_norm")
        return next((name.replace(a, b) for a, b in others.items() if a in name), name)

    rename(path, lambda t: {published(name): each for name, each in t.items()})
    assert "layers.1.attn.kv_norm.weight" in open_checkpoint(path).tensors
    assert Runner(path).logits(prompt).tobytes() == expected.tobytes()


@pytest.mark.parametrize("family", PER_EXPERT)
def test_fused_experts(checkpoint, originals, family):
    """The same logits, byte for byte, from fused expert tensors."""
    prompt = np.random.default_rng(2).integers(0, 211, 40).tolist()
    expected = Runner(originals / family).logits(prompt)
    path = checkpoint(family)
    if family in ("mixtral", "minimax_m2", "phimoe"):
        parts = ("w1.weight", "w3.weight", "w2.weight")
        rename(path, lambda t: fuse(t, "block_sparse_moe.experts", *parts, "mlp.experts"))
        if family == "mixtral":
            rename(
                path, lambda t: {name.replace("block_sparse_moe", "mlp"): each for name, each in t.items()}
            )
    elif family == "lfm2_moe":
        parts = ("w1.weight", "w3.weight", "w2.weight")
        rename(path, lambda t: fuse(t, "feed_forward.experts", *parts, "feed_forward.experts"))
    else:
        parts = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
        rename(path, lambda t: fuse(t, "mlp.experts", *parts, "mlp.experts"))
    assert any("gate_up_proj" in name for name in open_checkpoint(path).tensors)
    assert Runner(path).logits(prompt).tobytes() == expected.tobytes()
