"""The same GGUF file in mer and in llama.cpp: written by the gguf package, and by `mer convert --to gguf`.

llama.cpp answers greedily, with the log-probabilities of the likeliest tokens in each place; mer computes the
logits of the same tokens, transformers what is exact: the weights as they are rounded, in float32.

With weights of F32 all three agree within EXACT: the order of sums. With quantised weights both programs
round activations to 8 bits, but in other blocks and at other places (llama.cpp's Q8_K is 256 wide), so they
differ from what is exact and from each other. mer may be off by no more than llama.cpp is, but for a quarter
(of 160 numbers), and llama.cpp's token is mer's likeliest, or as likely but for three times the deviation.
"""

import json

import gguf
import numpy as np
import pytest
from cli_models import called
from gguf_models import write_gguf
from harness import Runner
from llama_cpp import LlamaCpp
from make_checkpoints import FAMILY, make
from test_families import oracle

VOCAB = 500
PROMPT = [int(token) for token in np.random.default_rng(3).integers(10, VOCAB, 24)]
N = 16
EOS = "aaa"
EXACT = 5e-5
# As llama.cpp's Q4_K_M mixes them.
MIX = {"_gate_exps": "q4_k", "_up_exps": "q4_k", "_down_exps": "q6_k", "attn_v": "q6_k", "output": "q6_k"}
MIX[""] = "q8_0"
# Multiples of 256, for the formats that need it.
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": VOCAB}
LATENT = {
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
WIDE_OF = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "mixtral": {},
    "qwen2_moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {"moe_intermediate_size": 256, "head_dim": 64},
    "olmoe": {},
    "gpt_oss": {"head_dim": 64, "max_position_embeddings": 131072},
    "granitemoe": {},
    "granitemoeshared": {"shared_intermediate_size": 256},
    "minimax_m2": {"head_dim": 64, "rotary_dim": 32},
    "glm4_moe": {"moe_intermediate_size": 256},
    "hunyuan_v1_moe": {"head_dim": 64},
    "solar_open": {"moe_intermediate_size": 256, "head_dim": 64},
    "glm4_moe_lite": {"moe_intermediate_size": 256, **LATENT},
    "deepseek_v2": {
        "moe_intermediate_size": 256,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        **LATENT,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 256,
        **LATENT,
    },
}
# Those that are compared once, as F32. llama.cpp knows no routed_scaling_factor of LFM2-MoE.
INDEXED = {"index_n_heads": 64, "index_head_dim": 64, "qk_rope_head_dim": 32}
ONCE = {
    "lfm2_moe": {"routed_scaling_factor": 1.0},
    "qwen3_next": {"linear_value_head_dim": 16, "intermediate_size": 32},
    "qwen3_5_moe_text": {"linear_value_head_dim": 16, "linear_num_value_heads": 12},
    "gemma4_text": {},
    "glm_moe_dsa": INDEXED,
    "deepseek_v32": INDEXED,
    "dots1": {"num_key_value_heads": 4},
    "ernie4_5_moe": {},
}
MERGED = ("deepseek_v3", "gemma4_text", "glm4_moe_lite", "qwen3_next", "qwen3_5_moe_text")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def words() -> dict:
    """A byte-level tokenizer of words: llama.cpp tells the probabilities of whole characters only."""
    vocab = {f"{i:03d}".translate(str.maketrans("0123456789", "abcdefghij")): i for i in range(VOCAB)}
    steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    return {
        "version": "1.0",
        "model": model,
        "pre_tokenizer": steps,
        "decoder": steps,
        "added_tokens": [
            {"id": 0, "content": EOS, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
    }


def write_words(path) -> None:
    (path / "tokenizer.json").write_text(json.dumps(words()))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def deviations(path, model) -> tuple[float, float, float]:
    """Root mean squares of what llama.cpp and mer are off, and by how much mer prefers another token."""
    with LlamaCpp(path) as llama:
        answer = llama.greedy(PROMPT, N, 10, endless=True)
    assert len(answer) == N
    tokens = PROMPT + [drawn.id for drawn in answer][:-1]
    exact = log_softmax(oracle(model, tokens)[len(PROMPT) - 1 :])
    ours = log_softmax(Runner(path).logits(tokens)[len(PROMPT) - 1 :])
    off = [
        (theirs - exact[i, id], ours[i, id] - exact[i, id])
        for i, drawn in enumerate(answer)
        for id, theirs in drawn.top.items()
    ]
    rms = np.sqrt(np.mean(np.square(off), axis=0))
    # Token 0 is EOS, which llama.cpp was told not to say.
    preferred = max(row[1:].max() - row[drawn.id] for row, drawn in zip(ours, answer, strict=True))
    return float(rms[0]), float(rms[1]), float(preferred)


@pytest.mark.parametrize("family", sorted(WIDE_OF))
def test_exported(family, tmp_path):
    """Of what the gguf package writes of the same model every tensor and value is there, and it runs."""
    model = make(tmp_path / "hf", family, **{**WIDE, **WIDE_OF[family]})
    write_words(tmp_path / "hf")
    path = export(tmp_path / "hf", "--format", "f32")
    theirs, ours, preferred = deviations(path, model)
    # llama.cpp rounds the ends of YaRN's ramp, GPT-OSS's own code does not.
    assert theirs < (0.03 if family == "gpt_oss" else EXACT)
    assert ours < EXACT
    assert preferred < (0.03 if family == "gpt_oss" else EXACT)
    for form in ("f32", "q4_0"):
        wanted = gguf.GGUFReader(
            write_gguf(model, tmp_path / f"wanted-{form}.gguf", formats={"": form}, tokenizer=add_words)
        )
        found = gguf.GGUFReader(export(tmp_path / "hf", "--format", form))
        check_same(found, wanted)
        make_again = make(tmp_path / "again", family, **{**WIDE, **WIDE_OF[family]})
        model.load_state_dict(make_again.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"rope_parameters": LLAMA3, "head_dim": 32},
    ],
    ids=["biases-tied", "llama3"],
)
def test_exported_llama(changes, tmp_path):
    model = make(tmp_path / "hf", "llama", vocab_size=VOCAB, **changes)
    write_words(tmp_path / "hf")
    theirs, ours, preferred = deviations(export(tmp_path / "hf", "--format", "f32"), model)
    assert max(theirs, ours, preferred) < EXACT


def test_ministral3(tmp_path):
    """As llama.cpp's converter writes it, and as `mer convert` does, for the context that mer computes."""
    model = make(tmp_path / "hf", "ministral3", vocab_size=VOCAB, max_position_embeddings=32768)
    write_words(tmp_path / "hf")
    wanted = write_gguf(model, tmp_path / "model.gguf", tokenizer=add_words)
    path = export(tmp_path / "hf", "--format", "f32")
    for each in wanted, path:
        theirs, ours, preferred = deviations(each, model)
        assert max(theirs, ours, preferred) < EXACT
    found, there = (
        {field.name: field.contents() for field in gguf.GGUFReader(each).fields.values()}
        for each in (path, wanted)
    )
    assert found["mistral3.context_length"] == 16384
    for key in there:
        if key.startswith("mistral3.") and key != "mistral3.context_length":
            assert found[key] == pytest.approx(there[key]), key


def within(family: str) -> float:
    """How far off llama.cpp may be: its GELU is a table of F16."""
    return 0.003 if family == "gemma4_text" else EXACT


@pytest.mark.parametrize("family", sorted(ONCE))
def test_exported_once(family, tmp_path):
    """As test_exported, in one size and format."""
    model = make(tmp_path / "hf", family, vocab_size=VOCAB, **ONCE[family])
    write_words(tmp_path / "hf")
    path = export(tmp_path / "hf", "--format", "f32")
    wanted = write_gguf(model, tmp_path / "wanted.gguf", tokenizer=add_words, merged=family == "gemma4_text")
    check_same(gguf.GGUFReader(path), gguf.GGUFReader(wanted))
    theirs, ours, preferred = deviations(path, model)
    assert theirs < within(family)
    assert ours < EXACT
    assert preferred < within(family)


@pytest.mark.parametrize("family", MERGED)
def test_read_with_gate_and_up_in_one(family, tmp_path):
    """ffn_gate_up_exps, of the architectures for which llama.cpp takes it."""
    model = make(tmp_path / "hf", family, vocab_size=VOCAB, **ONCE.get(family, {}))
    path = write_gguf(model, tmp_path / "model.gguf", tokenizer=add_words, merged=True)
    assert "blk.2.ffn_gate_up_exps.weight" in {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    theirs, ours, preferred = deviations(path, model)
    assert theirs < within(family)
    assert ours < EXACT
    assert preferred < within(family)


def export(path, *options):
    target = path.parent / f"exported{''.join(options)}.gguf"
    if not target.exists():
        called("convert", path, target, "--to", "gguf", *options)
    return target


def check_same(found, wanted) -> None:
    tensors = {tensor.name: tensor for tensor in found.tensors}
    assert sorted(tensors) == sorted(tensor.name for tensor in wanted.tensors)
    for tensor in wanted.tensors:
        ours = tensors[tensor.name]
        assert (ours.tensor_type, list(ours.shape)) == (tensor.tensor_type, list(tensor.shape)), tensor.name
        # An exponential, by numpy and by torch.
        rounding = 1e-6 if tensor.name.endswith("ssm_a") else 0
        np.testing.assert_allclose(ours.data, tensor.data, rtol=rounding, err_msg=tensor.name)
    for name, field in wanted.fields.items():
        # Of M-RoPE's parts the test's config says nothing that suits its heads.
        if not name.startswith(("GGUF.", "tokenizer.ggml.merges")) and "dimension_sections" not in name:
            value = field.contents()
            approx = pytest.approx(value) if isinstance(value, float) else value
            assert found.fields[name].contents() == approx, name


@pytest.mark.parametrize(
    ("family", "formats"),
    [
        *((family, form) for family in sorted(WIDE_OF) for form in ("q4_0", "mix")),
        *((family, "q8_0") for family in ("deepseek_v3", "gpt_oss", "qwen2_moe")),
    ],
)
def test_quantised(family, formats, tmp_path):
    """Every expert is chosen: otherwise rounding may choose another, which is a large difference."""
    changes = {name: 4 for name in EXPERTS if name in FAMILY[family]} | {"num_experts_per_tok": 4}
    if "n_group" in FAMILY[family]:
        changes |= {"n_group": 1, "topk_group": 1}
    model = make(tmp_path / "hf", family, **{**WIDE, **WIDE_OF[family], **changes})
    forms = MIX if formats == "mix" else {"": formats}
    path = write_gguf(model, tmp_path / "x.gguf", formats=forms, tokenizer=add_words)
    theirs, ours, preferred = deviations(path, model)
    assert 0.01 < theirs < 0.2
    assert ours < 1.25 * theirs
    assert preferred < 3 * max(theirs, ours)


def add_words(writer):
    parts = words()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(parts["model"]["vocab"]))
    writer.add_token_types([3] + [1] * (VOCAB - 1))
    writer.add_token_merges(["a a"])  # llama.cpp wants some, and the writer leaves out an empty list
    writer.add_eos_token_id(0)
