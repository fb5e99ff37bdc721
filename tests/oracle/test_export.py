"""`mer convert --to gguf`: sources, tokenizers, refusals; a file is there as a whole or not at all."""

import errno
import json
import os
import subprocess
import sys
from hashlib import sha256

import gguf
import pytest
from cli_models import mer
from llama_cpp import LlamaCpp
from make_checkpoints import edit_config, make
from test_gguf_tokenizer import TEXTS
from tokenizer_models import JSON_KINDS, write_json, write_sentencepiece

from mer.errors import CheckpointError, ConfigError, MerError, UnsupportedModelError
from mer.model.families import load
from mer.model.gguf_export import export
from mer.model.gguf_vocab import vocabulary
from mer.model.tokenizer import Tokenizer
from mer.weights import formats, gguf_writer
from mer.weights.checkpoint import open_checkpoint
from mer.weights.gguf_writer import write_gguf

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def write(src, dst, form=formats.F32, more=None):
    checkpoint = open_checkpoint(src)
    return export(checkpoint, load(checkpoint), dst, experts=form, dense=form, more=more or {})


def tensors(path):
    return {
        t.name: (t.tensor_type, list(t.shape), sha256(t.data).hexdigest())
        for t in gguf.GGUFReader(path).tensors
    }


def digest(path):
    return sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4_text", "qwen3_5_moe_text"])
def test_whatever_the_source_is(family, tmp_path):
    """A directory, the store and the GGUF file made of it, and again the same, are the same tensors."""
    make(tmp_path / "hf", family, **({"linear_value_head_dim": 16} if "qwen" in family else {}))
    write(tmp_path / "hf", tmp_path / "a.gguf")
    write(tmp_path / "hf", tmp_path / "b.gguf")
    assert digest(tmp_path / "a.gguf") == digest(tmp_path / "b.gguf")
    assert mer("convert", str(tmp_path / "hf"), str(tmp_path / "store"), "--format", "same").returncode == 0
    write(tmp_path / "store", tmp_path / "c.gguf", None)
    write(tmp_path / "a.gguf", tmp_path / "d.gguf", None)
    wanted = tensors(tmp_path / "a.gguf")
    assert tensors(tmp_path / "c.gguf") == wanted
    assert tensors(tmp_path / "d.gguf") == wanted


def test_of_a_mixtral_that_has_its_rows_in_order_already(tmp_path):
    make(tmp_path / "hf", "mixtral")
    write(tmp_path / "hf", tmp_path / "a.gguf")
    write(tmp_path / "a.gguf", tmp_path / "b.gguf", None)
    assert tensors(tmp_path / "a.gguf") == tensors(tmp_path / "b.gguf")


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma", "sentencepiece"])
def test_tokenizers(kind, tmp_path):
    """mer reads its tokens back; llama.cpp cuts texts alike and renders the same template."""
    source = tmp_path / "hf"
    make(source, "qwen3_moe", vocab_size=600)
    if kind == "sentencepiece":
        write_sentencepiece(source, chat_template=TEMPLATE)
    else:
        write_json(kind, source)
        settings = json.loads((source / "tokenizer_config.json").read_text())
        (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    done = mer("convert", str(source), str(tmp_path / "x.gguf"), "--to", "gguf", "--format", "f32")
    assert done.returncode == 0, done.stderr
    wanted, found = Tokenizer.open(source), Tokenizer.open(tmp_path / "x.gguf")
    assert wanted.eos_ids <= found.eos_ids  # <|im_end|> ends an answer in any GGUF
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hello"}]
    with LlamaCpp(tmp_path / "x.gguf") as llama:
        for text in TEXTS:
            ids = wanted.encode(text)
            assert found.encode(text) == ids
            assert llama.tokens(text) == ids, text
        assert llama.chat(messages) == wanted.chat_template.render(messages)
    assert found.chat_template.source == wanted.chat_template.source


@pytest.mark.parametrize("kind", ["unigram", "words"])
def test_a_tokenizer_of_another_kind(kind, tmp_path):
    assert kind in JSON_KINDS
    write_json(kind, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json: is of the kind .*only BPE"):
        vocabulary(tmp_path, 600)


def test_a_tokenizer_of_another_model(tmp_path):
    write_json("byte_level", tmp_path)
    with pytest.raises(CheckpointError, match="the files are of different models"):
        vocabulary(tmp_path, 100)


def test_a_cut_without_a_name(tmp_path):
    write_json("byte_level", tmp_path)
    file = tmp_path / "tokenizer.json"
    parts = json.loads(file.read_text())
    parts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,7}"
    file.write_text(json.dumps(parts))
    with pytest.raises(UnsupportedModelError, match="cuts a text in a way that has no name"):
        vocabulary(tmp_path, 600)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmoe", {"norm_topk_prob": True}, "olmoe does not normalise the weights of the chosen experts"),
        ("olmoe", {"clip_qkv": 0.5}, "does not clip q, k and v"),
        ("qwen3_moe", {"norm_topk_prob": False}, "qwen3moe does normalise"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "has experts in every layer"),
        ("mixtral", {"sliding_window": 16}, "has no attention windows"),
        ("deepseek_v2", {}, "chooses groups by the sum of their two best experts"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "has other constants"),
        ("dots1", {}, "has as many heads of keys as of queries"),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full"]}, "has an indexer in every layer"),
        ("lfm2_moe", {"routed_scaling_factor": 1.3}, "does not scale the experts' sum"),
        (
            "qwen3_next",
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "has attention in every so many layers",
        ),
        ("qwen3_5_moe_text", {}, "has heads of values that are as wide as those of keys"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(family, changes, message, tmp_path):
    make(tmp_path / "hf", family, **changes)
    if family == "gpt_oss":
        edit_config(tmp_path / "hf", **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        write(tmp_path / "hf", tmp_path / "x.gguf")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


@pytest.mark.parametrize(
    ("family", "why"),
    [("phimoe", "sparsemixer"), ("flex_olmo", "no architecture"), ("deepseek_v4", "gguf package")],
)
def test_what_llama_cpp_has_not_is_refused(family, why, tmp_path):
    make(tmp_path / "hf", family)
    with pytest.raises(UnsupportedModelError, match=f"models of {family} are not written as GGUF: .*{why}"):
        write(tmp_path / "hf", tmp_path / "x.gguf")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_nothing_half_written(tmp_path, monkeypatch):
    make(tmp_path / "hf", "qwen3_moe")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def interrupted(*args):
        raise KeyboardInterrupt

    for failure, error in ((full, MerError), (interrupted, KeyboardInterrupt)):
        monkeypatch.setattr(gguf_writer.os, "fsync", failure)
        with pytest.raises(error):
            write(tmp_path / "hf", tmp_path / "x.gguf")
        assert sorted(os.listdir(tmp_path)) == ["hf"]
    monkeypatch.undo()
    write(tmp_path / "hf", tmp_path / "x.gguf")
    before = digest(tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="exists already"):
        write(tmp_path / "hf", tmp_path / "x.gguf")
    assert digest(tmp_path / "x.gguf") == before


def test_values_of_every_type(tmp_path):
    """As the gguf package reads them."""
    values = {
        "a": True, "b": 7, "c": 0.5, "d": "text", "e": [1, -2], "f": [0.5, 1.5], "g": ["x", "ÿ"],
        "h": [True, False], "general.architecture": "none",
    }  # fmt: skip
    write_gguf(tmp_path / "x.gguf", values, [])
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert {name: fields[name].contents() for name in values} == values


def test_wrong_options(tmp_path):
    for words, message in (
        ((str(tmp_path / "x"), "--to", "gguf"), "ends with .gguf"),
        ((str(tmp_path / "x.gguf"),), "add --to gguf"),
        ((str(tmp_path / "x.gguf"), "--to", "gguf", "--restart"), "--restart goes with --to store"),
        ((str(tmp_path / "x.gguf"), "--to", "gguf", "--format", "q6_k"), "q6_k' is not known"),
    ):
        done = mer("convert", "demo", *words)
        assert done.returncode == 2
        assert message in done.stderr


MEMORY_RUN = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_export import formats, write
def peak():
    # Not getrusage: it has the peak of whoever started this process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
write(Path({src!r}), Path({dst!r}), formats.Q8_0)
print(peak() - before)
"""


def test_memory_stays_flat(tmp_path):
    """Experts and an embedding of 100 and 400 MB in f32 are written within 150 MB."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "num_experts": 8, "num_hidden_layers": 1}
    import torch

    make(tmp_path / "hf", "qwen3_moe", **sizes, vocab_size=100_000, dtype=torch.bfloat16)
    code = MEMORY_RUN.format(path=sys.path, src=str(tmp_path / "hf"), dst=str(tmp_path / "x.gguf"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 150 << 10


def test_advice_where_a_store_is_faster_to_read(tmp_path):
    """Three small reads an expert are; one is not, nor are three large ones."""
    make(tmp_path / "hf", "qwen3_moe")
    write(tmp_path / "hf", tmp_path / "small.gguf")
    sizes = {"moe_intermediate_size": 256, "hidden_size": 256, "num_experts": 2, "num_hidden_layers": 1}
    make(tmp_path / "wide", "qwen3_moe", **sizes)
    write(tmp_path / "wide", tmp_path / "large.gguf")
    assert (
        mer("convert", str(tmp_path / "small.gguf"), str(tmp_path / "store"), "--format", "same").returncode
        == 0
    )
    for name, wanted in ("small.gguf", True), ("large.gguf", False), ("store", False):
        shown = mer("inspect", str(tmp_path / name)).stdout
        assert ("advice: an expert is 3 reads" in shown) == wanted
        run = ("run", str(tmp_path / name), "1 2 3", "--ids", "-n", "2", "--cache-experts")
        assert ("advice" in mer(*run, "2").stderr) == wanted
        assert "advice" not in mer(*run, "100%").stderr
