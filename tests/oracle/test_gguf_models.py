"""GGUF files in place, against transformers on the same weights."""

import gguf
import numpy as np
import pytest
from cli_models import mer
from family_cases import LONGROPE
from gguf_models import write_gguf
from harness import Runner
from make_checkpoints import FAMILY, make
from test_families import error, oracle
from test_gguf_tokenizer import bpe_settings
from tokenizer_models import byte_level

from mer.engine.engine import Engine
from mer.engine.params import SamplingParams
from mer.errors import UnsupportedModelError
from mer.model.families import load
from mer.streaming.experts import expert_tables
from mer.weights import formats
from mer.weights.checkpoint import open_checkpoint
from mer.weights.gguf import TYPES, read_gguf

PROMPT = [int(token) for token in np.random.default_rng(3).integers(0, 211, 40)]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


# flex_olmo: llama.cpp has no such architecture. deepseek_v4: see test_gguf_v4.
@pytest.mark.parametrize("family", sorted(set(FAMILY) - {"flex_olmo", "deepseek_v4"}))
def test_logits(family, tmp_path):
    model = make(tmp_path / "hf", family)
    runner = Runner(write_gguf(model, tmp_path / "model.gguf"))
    assert runner.checkpoint.kind == "gguf"
    assert error(runner.logits(PROMPT), oracle(model, PROMPT)) < 1e-4


STRETCHED = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 20.0, "factor": 1.0}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"rope_parameters": YARN}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("qwen3_moe", {"tie_word_embeddings": True}),
        ("qwen3_next", {"full_attention_interval": 3, "tie_word_embeddings": True}),
        ("qwen3_5_moe_text", {"linear_num_value_heads": 12}),
        ("lfm2_moe", {"use_expert_bias": False, "num_dense_layers": 0}),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full"]}),
        ("gemma4_text", {"enable_moe_block": False, "num_experts": None, "top_k_experts": None}),
        ("gemma4_text", {"attention_k_eq_v": False, "final_logit_softcapping": None}),
        ("olmoe", {"clip_qkv": 0.7}),
        ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_interval": 2}),
        ("mixtral", {"num_key_value_heads": 4}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"head_dim": 24, "num_key_value_heads": 1, "rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
        ("llama", {"rope_parameters": {key: YARN[key] for key in list(YARN)[:4]}}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "head_dim": 32}),
        ("mixtral", {"rope_parameters": LLAMA3}),
        ("deepseek_v2", {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}),
        ("hunyuan_v1_moe", {"rope_parameters": STRETCHED}),
        ("phimoe", {"rope_parameters": LONGROPE, "attention_bias": True}),
        ("glm4_moe", {"attention_bias": True, "use_qk_norm": False}),
    ],
)
def test_variants(family, changes, tmp_path):
    model = make(tmp_path / "hf", family, **changes)
    runner = Runner(write_gguf(model, tmp_path / "model.gguf"))
    assert error(runner.logits(PROMPT), oracle(model, PROMPT)) < 1e-4


@pytest.mark.parametrize("family", ["glm4_moe", "glm4_moe_lite", "deepseek_v2"])
def test_files_that_do_not_say_how_experts_are_scored(family, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf.GGUFWriter, "add_expert_gating_func", lambda writer, value: None)
    model = make(tmp_path / "hf", family)
    runner = Runner(write_gguf(model, tmp_path / "model.gguf"))
    assert error(runner.logits(PROMPT), oracle(model, PROMPT)) < 1e-4


def test_parts(tmp_path):
    model = make(tmp_path / "hf", "qwen3_moe")
    first = write_gguf(model, tmp_path / "model.gguf", shards=9)
    assert first.name.startswith("model-00001-of-")
    assert len(read_gguf(first).tensors) <= 9
    for path in first, sorted(tmp_path.glob("*.gguf"))[1], tmp_path:
        runner = Runner(path)
        assert error(runner.logits(PROMPT), oracle(model, PROMPT)) < 1e-4


@pytest.mark.parametrize(
    "formats",
    [
        # As llama.cpp's Q4_K_M, Q2_K, IQ4_XS and Q5_0 mix them.
        {"_gate_exps": "q4_k", "_up_exps": "q4_k", "_down_exps": "q6_k", "attn_v": "q6_k", "output": "q6_k"},
        {
            "_gate_exps": "q2_k",
            "_up_exps": "q2_k",
            "_down_exps": "q3_k",
            "attn_q": "q5_k",
            "token_embd": "q3_k",
        },
        {"_gate_exps": "iq4_xs", "_up_exps": "iq4_xs", "_down_exps": "q5_k", "attn_output": "iq4_nl"},
        {"_gate_exps": "q5_0", "_up_exps": "q5_0", "_down_exps": "q5_1", "attn_k": "q4_1", "output": "q8_0"},
        # Gate and up apart, as mixes made for a single model have them.
        {"_gate_exps": "q4_k", "_up_exps": "q5_k", "_down_exps": "q6_k", "token_embd": "q8_0"},
        {"_gate_exps": "iq4_nl", "_up_exps": "q8_0", "_down_exps": "q4_0", "output": "q6_k"},
        {"_gate_exps": "q4_1", "_up_exps": "q4_1", "_down_exps": "iq4_nl", "token_embd": "q6_k"},
        # Gate and up in one tensor: an expert is two reads.
        {"_gate_up_exps": "q4_k", "_down_exps": "q6_k"},
    ],
    ids=lambda formats: "-".join(dict.fromkeys(formats.values())),
)
async def test_formats(formats, tmp_path):
    """Weights as published files mix them; activations are rounded to int8, which costs a little."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 8, "head_dim": 32}
    # Every expert is chosen: otherwise rounding may choose another.
    model = make(tmp_path / "hf", "qwen3_moe", **sizes, num_experts=4, num_experts_per_tok=4)
    merged = "_gate_up_exps" in formats
    path = write_gguf(model, tmp_path / "model.gguf", formats=formats, merged=merged)
    runner = Runner(path)
    reads = {len(expert.pieces) for layer in runner.architecture.experts for expert in layer.experts}
    assert reads == {2 if merged else 3}
    assert error(runner.logits(PROMPT), oracle(model, PROMPT)) < 0.035
    answers = set()
    for settings in (
        {},
        {"cache_experts": 4},
        {"cache_experts": "50%", "io_backend": "buffered", "threads": 1},
    ):
        async with Engine.open(path, context=128, kv_dtype="f32", **settings) as engine:
            result = await engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, logprobs=3))
            answers.add((result.token_ids, result.logprobs))
    assert len(answers) == 1


@pytest.mark.parametrize(
    "formats",
    [
        {
            "attn_q": "q4_0",
            "attn_k": "q4_1",
            "attn_v": "q5_0",
            "attn_output": "q5_1",
            "ffn_gate": "q8_0",
            "ffn_up": "iq4_nl",
            "ffn_down": "mxfp4",
            "token_embd": "q4_1",
            "output": "q6_k",
        },
        {
            "attn_v": "q3_k",
            "attn_output": "q2_k",
            "ffn_gate": "q5_k",
            "ffn_up": "iq4_xs",
            "ffn_down": "q6_k",
            "token_embd": "q2_k",
            "output": "q4_k",
        },
        {"attn_q": "f16", "attn_k": "bf16", "ffn_down": "q4_1", "token_embd": "q6_k"},
    ],
    ids=lambda formats: "-".join(dict.fromkeys(formats.values())),
)
async def test_dense_formats(formats, tmp_path):
    """Every format that a matrix of a dense model may have; the last with head and embedding in one."""
    tied = "output" not in formats
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_hidden_layers": 2}
    model = make(tmp_path / "hf", "llama", **sizes, tie_word_embeddings=tied)
    path = write_gguf(model, tmp_path / "model.gguf", formats=formats)
    found, expected = Runner(path).logits(PROMPT), oracle(model, PROMPT)
    # The errors of seven matrices a layer add up, and attention may make more of them: so of most tokens.
    off = np.abs(found - expected).max(1) / np.abs(expected).max()
    assert np.median(off) < 0.035
    assert off.max() < 0.1
    answers = set()
    for settings in {}, {"threads": 1, "step_tokens": 7}, {"io_backend": "buffered", "prefix_cache": False}:
        async with Engine.open(path, context=128, kv_dtype="f32", **settings) as engine:
            result = await engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, logprobs=3))
            answers.add((result.token_ids, result.logprobs))
    assert len(answers) == 1


def test_command_line(tmp_path):
    """What a person does with such a file; the store made of it answers with the same bytes."""
    model = make(tmp_path / "hf", "qwen3_moe", vocab_size=500)
    path = write_gguf(model, tmp_path / "model.gguf", tokenizer=add_tokenizer)

    def output(*words):
        done = mer(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    asked = ("Hello world", "--max-tokens", "12", "--temperature", "0")
    answer = output("run", str(path), *asked)
    assert "GGUF, 1 file" in output("inspect", str(path))
    assert "every tensor is readable" in output("verify", str(path))
    output("convert", str(path), str(tmp_path / "store"), "--experts", "same", "--dense", "same")
    assert output("run", str(tmp_path / "store"), *asked) == answer
    assert output("run", str(path), *asked, "--cache-experts", "2") == answer


def add_tokenizer(writer):
    for name, value in bpe_settings(byte_level(), "qwen2").items():
        getattr(writer, f"add_{name}")(value)
    writer.add_eos_token_id(1)


def test_the_first_files_of_qwen3_next(tmp_path):
    """q, k, v and z of each key head in turn, as in Hugging Face's files."""
    model = make(tmp_path / "hf", "qwen3_next", num_hidden_layers=2)
    path = write_gguf(model, tmp_path / "model.gguf", fused=True)
    assert "blk.0.ssm_in.weight" in {tensor.name for tensor in read_gguf(path).tensors}
    assert error(Runner(path).logits(PROMPT), oracle(model, PROMPT)) < 1e-4


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "glm4_moe"])
def test_layers_that_only_predict(family, tmp_path):
    """Multi-token prediction has a layer of its own behind the model's; the answer does not need it."""
    model = make(tmp_path / "hf", family)
    path = write_gguf(model, tmp_path / "model.gguf", predicting=1)
    assert any(tensor.name == "blk.3.attn_norm.weight" for tensor in read_gguf(path).tensors)
    assert error(Runner(path).logits(PROMPT), oracle(model, PROMPT)) < 1e-4


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text", "lfm2_moe"])
def test_store_of_a_file(family, tmp_path):
    """What only a GGUF's config says goes with it: what norms have added already, which order heads have."""
    model = make(tmp_path / "hf", family, linear_num_value_heads=8)
    path = write_gguf(model, tmp_path / "model.gguf")
    done = mer("convert", str(path), str(tmp_path / "store"), "--experts", "same", "--dense", "same")
    assert done.returncode == 0, done.stderr
    found = Runner(tmp_path / "store").logits(PROMPT)
    assert error(found, oracle(model, PROMPT)) < 1e-4
    assert found.tobytes() == Runner(path).logits(PROMPT).tobytes()


def test_gate_and_up_that_do_not_go_together(tmp_path):
    model = make(tmp_path / "hf", "qwen3_moe")
    path = write_gguf(model, tmp_path / "x.gguf", formats={"_gate_exps": "f16", "_up_exps": "q8_0"})
    with pytest.raises(UnsupportedModelError, match="layer 0: gate is f16 and up q8_0"):
        expert_tables(load(open_checkpoint(path)).experts, path)


WITHOUT_KERNEL = sorted(set(TYPES) - {each.id for each in formats.FORMATS})


@pytest.mark.parametrize("part", ["ffn_up_exps", "attn_q", "token_embd"])
def test_formats_without_a_kernel_are_refused_by_name(part, tmp_path):
    """Before anything is loaded: IQ2, IQ3, TQ and so on. The type's number is changed in a file of F32."""
    sizes = {"moe_intermediate_size": 256, "hidden_size": 256, "num_experts": 2, "num_hidden_layers": 1}
    path = write_gguf(make(tmp_path / "hf", "qwen3_moe", **sizes), tmp_path / "x.gguf")
    raw = path.read_bytes()
    name = f"{'' if part == 'token_embd' else 'blk.0.'}{part}.weight"
    start = raw.index(name.encode()) + len(name)
    at = start + 4 + 8 * int.from_bytes(raw[start : start + 4], "little")
    assert {"iq2_xxs", "iq3_s", "tq1_0", "nvfp4"} <= {TYPES[kind][0] for kind in WITHOUT_KERNEL}
    for kind in WITHOUT_KERNEL:
        title = TYPES[kind][0]
        if title in ("i64", "f64"):
            continue  # more bytes than the file has
        path.write_bytes(raw[:at] + kind.to_bytes(4, "little") + raw[at + 4 :])
        with pytest.raises(
            UnsupportedModelError, match=f"has dtype {title}, which holds no weights"
        ) as caught:
            load(open_checkpoint(path))
        assert str(path) in str(caught.value)
