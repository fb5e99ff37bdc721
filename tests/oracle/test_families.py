"""The forward pass against transformers, float32, on small random models of every family and many shapes."""

from __future__ import annotations

import json

import evidence
import numpy as np
import pytest
import torch
import transformers
from family_cases import CASES, LONGROPE, YARN, rope
from harness import Runner
from make_checkpoints import CLASSES, COMMON, FAMILY, edit_config, make
from safetensors.torch import load_file, save_file

from mer.engine.engine import Engine

# Largest difference of a logit, relative to the largest logit.
TOLERANCE = 1e-4
PROMPT = np.random.default_rng(3).integers(0, 211, 300).tolist()


def oracle(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """transformers' logits of every token, f32 [tokens, vocab]."""
    evidence.asked("transformers")
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest logit; infinite where something is not a number."""
    worst = float(np.abs(found - expected).max() / np.abs(expected).max())
    return worst if np.isfinite(worst) else np.inf


@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for family, cases in CASES.items() for case in cases]
)
def test_logits(family, case, tmp_path):
    model = make(tmp_path, family, **CASES[family][case])
    runner = Runner(tmp_path)
    expected, found = oracle(model, PROMPT), runner.logits(PROMPT)
    assert error(found, expected) < TOLERANCE
    assert np.array_equal(runner.logits(PROMPT, [1, 7, 64, 33]), found)
    if case == "plain":
        tokens = runner.greedy(PROMPT[:40], 64)
        logits = oracle(model, PROMPT[:40] + tokens)[39:-1]
        assert logits.argmax(-1).tolist() == tokens


def test_rounded_caches_change_little(tmp_path):
    """Keys and values rounded to F16 or Q8_0: an error, but of the format's size.

    Of most tokens: a few get other experts.
    """
    for family in ("mixtral", "gpt_oss", "deepseek_v3"):
        model = make(tmp_path / family, family)
        expected = oracle(model, PROMPT)
        for kv_dtype, least, most in (("f16", 1e-6, 5e-3), ("q8_0", 1e-4, 0.05)):
            found = Runner(tmp_path / family, kv_dtype=kv_dtype).logits(PROMPT)
            off = np.abs(found - expected).max(1) / np.abs(expected).max()
            assert least < np.median(off) < most, (family, kv_dtype, float(np.median(off)))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_bf16_weights(family, tmp_path):
    """BF16 files are widened exactly, so the oracle with the same weights in float32 agrees as closely."""
    model = make(tmp_path, family, dtype=torch.bfloat16)
    assert error(Runner(tmp_path).logits(PROMPT), oracle(model, PROMPT)) < TOLERANCE


# What transformers 5 writes and older files, or files with nothing but the necessary, leave out.
OPTIONAL = (
    "attention_bias", "attention_dropout", "clip_qkv", "decoder_sparse_step", "hidden_act", "layer_types",
    "mlp_layer_types", "mlp_only_layers", "norm_topk_prob", "qkv_bias", "rms_norm_eps", "rope_interleave",
    "rope_parameters", "routed_scaling_factor", "tie_word_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_config_without_what_has_a_default(family, tmp_path):
    changes = {"head_dim": 16} if family == "qwen3_moe" else {}
    if family == "qwen2_moe":
        changes = {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 2}
    if family in ("gemma4_text", "deepseek_v4"):
        changes = {"layer_types": None}
    if family == "deepseek_v4":
        changes |= {"mlp_layer_types": None}
    if family == "qwen3_moe":
        changes |= {"norm_topk_prob": False}
    if family.startswith(("qwen3_next", "qwen3_5")):
        changes = {"full_attention_interval": 4, "num_hidden_layers": 4}
    if family == "lfm2_moe":
        changes = {"routed_scaling_factor": 1.0}
    absent = {"qwen3": {"head_dim": 128}, "mistral": {"sliding_window": 4096}}.get(family, {})
    model = make(tmp_path, family, **changes, **absent)
    # What each layer is, LFM2 has no default for.
    optional = [key for key in OPTIONAL if family != "lfm2_moe" or key != "layer_types"]
    edit_config(tmp_path, **dict.fromkeys([*optional, *absent]))
    assert error(Runner(tmp_path).logits(PROMPT), oracle(model, PROMPT)) < TOLERANCE


async def test_longrope_beyond_its_original_context(tmp_path):
    """Other frequencies for all tokens of a model that is asked for more than that.

    transformers never takes those of Phi-MoE, so it is given them as the usual ones.
    """
    model = make(
        tmp_path,
        "phimoe",
        rope_parameters=LONGROPE | {"short_factor": LONGROPE["long_factor"], "short_mscale": 1.3},
    )
    edit_config(tmp_path, rope_parameters=LONGROPE | {"original_max_position_embeddings": 64})
    expected = oracle(model, PROMPT)
    assert error(Runner(tmp_path, longest=65).logits(PROMPT), expected) < TOLERANCE
    assert error(Runner(tmp_path, longest=64).logits(PROMPT), expected) > 0.1
    ropes = []
    for context in (64, 80):
        async with Engine.open(tmp_path, context=context) as engine:
            ropes.append(engine.spec.rope)
    assert ropes[0].long == ropes[1]


def test_kimi_k2_as_published(tmp_path):
    """Moonshot's own model_type for a DeepSeek-V3; YaRN's beta_fast and beta_slow are the same there."""
    yarn = {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, **YARN}
    changes = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827}
    model = make(tmp_path, "deepseek_v3", **rope("yarn", 5e4, **yarn), **changes)
    edit_config(
        tmp_path,
        model_type="kimi_k2",
        rope_parameters=None,
        rope_theta=50000.0,
        rope_scaling={"type": "yarn", **yarn},
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
        num_nextn_predict_layers=0,
        seq_aux=True,
    )
    assert error(Runner(tmp_path).logits(PROMPT), oracle(model, PROMPT)) < TOLERANCE


def test_a_window_of_null_is_none(tmp_path):
    """Where Mistral's file does not say, there is one, further back than the prompts here go."""
    config = make(tmp_path, "mistral", sliding_window=None).config
    assert [layer.window for layer in Runner(tmp_path).spec.layers] == [config.sliding_window] * 3
    edit_config(tmp_path, sliding_window=None)  # removes the key
    usual = type(config)().sliding_window
    assert [layer.window for layer in Runner(tmp_path).spec.layers] == [usual] * 3


def test_config_as_published_before_transformers_5(tmp_path):
    """rope_theta and rope_scaling (with `type`) at the top level, the names of older files."""
    model = make(tmp_path, "deepseek_v3", **rope("yarn", 1e4, **YARN, mscale=1.0, mscale_all_dim=1.0))
    edit_config(
        tmp_path,
        rope_parameters=None,
        rope_theta=10000,
        rope_scaling={"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, **YARN},
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
    )
    assert error(Runner(tmp_path).logits(PROMPT), oracle(model, PROMPT)) < TOLERANCE


@pytest.mark.parametrize("inner", ["mistral", "ministral3"])
@pytest.mark.parametrize("tied", [True, False])
def test_mistral3(inner, tied, tmp_path):
    """A language model beside one for images; names and the head's tie are not where they are without one."""
    text = getattr(transformers, f"{CLASSES[inner]}Config")(**(COMMON | FAMILY[inner])).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision | {"model_type": "pixtral"}, tie_word_embeddings=tied
    )
    config.text_config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = transformers.Mistral3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    runner = Runner(tmp_path)
    assert error(runner.logits(PROMPT), oracle(model, PROMPT)) < TOLERANCE
    assert runner.spec.tied_embeddings is tied
    # Where queries begin to grow, the context ends.
    original = config.text_config.rope_parameters.get("original_max_position_embeddings")
    assert runner.spec.max_positions == (original if inner == "ministral3" else 512)


def test_one_model_of_several(tmp_path):
    """A language model beside one for images, as Qwen3.5-MoE is published, and layers that only predict."""
    text = transformers.Qwen3_5MoeTextConfig(**(COMMON | FAMILY["qwen3_5_moe_text"])).to_dict()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    config.text_config._attn_implementation = config.text_config._experts_implementation = "eager"
    torch.manual_seed(1)
    model = transformers.Qwen3_5MoeForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["mtp.layers.0.self_attn.q_proj.weight"] = torch.zeros(8, 64)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert error(Runner(tmp_path).logits(PROMPT), oracle(model, PROMPT)) < TOLERANCE


def test_gemma4_as_published(tmp_path):
    """The text model inside of one that also sees, with global layers by two keys of their own."""
    model = make(tmp_path / "text", "gemma4_text")
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    inside = {name.replace("model.", "model.language_model.", 1): each for name, each in tensors.items()}
    inside["model.vision_tower.patch_embedder.input_proj.weight"] = torch.ones(3, 5)
    save_file(inside, tmp_path / "model.safetensors")
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    del text["per_layer_config"]
    text |= {"global_head_dim": 32, "num_global_key_value_heads": 1}
    outer = {"model_type": "gemma4", "text_config": text, "vision_config": {"hidden_size": 5}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    assert error(Runner(tmp_path).logits(PROMPT), oracle(model, PROMPT)) < TOLERANCE
