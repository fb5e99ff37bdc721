"""bench/: the synthetic models are the same in every container, and whole; the peer's command line."""

import json
import math
import re
import shutil
import subprocess

import click
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from gguf import GGUFReader, dequantize

from bench import (
    ahead,
    ceilings,
    compare,
    draft_cost,
    first_token,
    inplace,
    io,
    kernels,
    make_model,
    peer,
    speculative,
    start,
    steps,
)
from bench.gguf_writer import write_gguf
from bench.options import names
from bench.shapes import SHAPES, model_config, tensors
from bench.synthetic import Weights
from mer.demo import model_path
from mer.model.families import load
from mer.weights import formats
from mer.weights.checkpoint import open_checkpoint
from mer.weights.rows import dense_rows, expert_rows
from mer.weights.verify import verify

SMALL = {
    "mixtral-8x7b": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512},
    "qwen3-30b-a3b": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "moe_intermediate_size": 256,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "qwen3-next-80b-a3b": {
        "full_attention_interval": 3,
        "num_attention_heads": 4,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 64,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "gpt-oss-20b": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 256,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "deepseek-v3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 256,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "n_routed_experts": 16,
    },
}


def small(shape):
    return model_config(shape, 3, hidden_size=256, vocab_size=300, **SMALL[shape])


def nothing(nbytes):
    pass


def values(checkpoint, name):
    rows = dense_rows(checkpoint, checkpoint.tensors[name])
    return rows.read(0, rows.rows).reshape(checkpoint.tensors[name].shape)


@pytest.mark.parametrize(
    ("shape", "experts", "dense"),
    [
        ("mixtral-8x7b", "q4_0", "q8_0"),
        ("mixtral-8x7b", "q4_k", "f16"),
        ("mixtral-8x7b", "q8_0", "bf16"),
        ("qwen3-30b-a3b", "q8_0", "bf16"),
        ("gpt-oss-20b", "q4_0", "f16"),
        ("deepseek-v3", "q4_0", "q8_0"),
    ],
)
def test_store_and_gguf_hold_the_same_numbers(tmp_path, shape, experts, dense):
    config = small(shape)
    if (shape, experts) == ("qwen3-30b-a3b", "q8_0"):
        config["moe_intermediate_size"] = 96  # experts that end between multiples of 4096
    forms = formats.by_name(experts), formats.by_name(dense)
    store_bytes = make_model.write_store(config, Weights(config, *forms), tmp_path / "store", nothing)
    assert store_bytes > 0
    gguf_bytes = write_gguf(config, Weights(config, *forms), tmp_path / "model.gguf", nothing)
    reader = GGUFReader(tmp_path / "model.gguf")
    assert sum(t.n_bytes for t in reader.tensors) == gguf_bytes
    theirs = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}

    checkpoint = open_checkpoint(tmp_path / "store")
    assert verify(checkpoint) == []
    architecture = load(checkpoint)
    for source in architecture.experts:
        for e, extents in enumerate(source.experts):
            for name in ("gate", "up", "down"):
                rows = expert_rows(checkpoint, extents, getattr(extents, name), name)
                stacked = theirs[f"blk.{source.layer}.ffn_{name}_exps.weight"]
                np.testing.assert_array_equal(rows.read(0, rows.rows), stacked[e])
                assert 0.8 < stacked[e].std() / stacked[0].std() < 1.25
    ours = {part: values(checkpoint, name) for part, name in architecture.dense.items()}
    np.testing.assert_array_equal(ours["embedding"], theirs["token_embd.weight"])
    np.testing.assert_array_equal(ours["head"], theirs["output.weight"])
    np.testing.assert_array_equal(ours["2.router"], theirs["blk.2.ffn_gate_inp.weight"])
    np.testing.assert_array_equal(ours["2.o"], theirs["blk.2.attn_output.weight"])
    if shape == "deepseek-v3":
        per_head = ours["1.kv_up"].reshape(4, 64 + 64, 256)
        np.testing.assert_array_equal(per_head[:, :64].swapaxes(1, 2), theirs["blk.1.attn_k_b.weight"])
        np.testing.assert_array_equal(per_head[:, 64:], theirs["blk.1.attn_v_b.weight"])
    elif shape == "mixtral-8x7b":
        # as llama.cpp's converter permutes: halves of a head become neighbours
        wanted = ours["0.k"].reshape(2, 2, 32, 256).swapaxes(1, 2).reshape(128, 256)
        np.testing.assert_array_equal(wanted, theirs["blk.0.attn_k.weight"])
    else:
        np.testing.assert_array_equal(ours["0.k"], theirs["blk.0.attn_k.weight"])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "gpt-oss-20b"])
def test_transformers_loads_the_directory_and_counts_upward(tmp_path, shape):
    config = small(shape) | {"hidden_size": 512}
    if shape == "mixtral-8x7b":
        config["head_dim"] = 64
    weights = Weights(config, formats.BF16, formats.BF16, plain=formats.BF16)
    make_model.write_hf(config, weights, tmp_path / "hf", nothing)
    assert verify(open_checkpoint(tmp_path / "hf")) == []
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype="float32", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # over the end of the vocabulary, too
    prompt = model.dummy_inputs["input_ids"].new_tensor([[293, 294, 295, 296]])
    found = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found[0].tolist() == [n % 300 for n in range(293, 305)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_are_those_of_the_real_models(shape):
    """Parameters as published: Mixtral 46.7 billion, Qwen3 30.5, DeepSeek-V3 671, GPT-OSS 20.91.

    Of Qwen3-Next a round number is published; transformers counts them, without the layer that only predicts.
    """
    billions = {"mixtral-8x7b": 46.7, "qwen3-30b-a3b": 30.5, "deepseek-v3": 671.0, "gpt-oss-20b": 20.91}
    if shape == "qwen3-next-80b-a3b":
        with torch.device("meta"):
            config = transformers.Qwen3NextConfig(**model_config(shape))
            billions[shape] = transformers.Qwen3NextForCausalLM(config).num_parameters() / 1e9
    total = sum(t.elements for t in tensors(model_config(shape)))
    assert total / 1e9 == pytest.approx(billions[shape], rel=0.002)


def test_neighbouring_tokens_are_alike_and_far_ones_less(tmp_path):
    config = small("qwen3-30b-a3b") | {"hidden_size": 2048}
    weights = Weights(config, formats.Q4_0, formats.F16)
    embedding = next(t for t in tensors(config) if t.kind == "embedding")
    rows = weights.array(embedding).view(np.float16).astype(np.float32)
    assert np.sqrt((rows**2).mean()) == pytest.approx(1, rel=0.05)
    alike = {lag: float((rows[lag:] * rows[:-lag]).mean()) for lag in (1, 4, 200)}
    assert alike[1] > alike[4] + 0.05
    assert alike[4] > alike[200] + 0.02
    assert 0.3 < alike[200] < 0.7


def test_sparse_directories_take_no_space(tmp_path):
    out = tmp_path / "sparse"
    config = small("qwen3-30b-a3b")
    weights = Weights(config, formats.BF16, formats.BF16, plain=formats.BF16)
    make_model.write_hf(config, weights, out, nothing, sparse=True)
    checkpoint = open_checkpoint(out)
    extents = load(checkpoint).experts[0].experts[3]
    assert not expert_rows(checkpoint, extents, extents.down, "down").read(0, 8).any()
    stats = [file.stat() for file in out.glob("*.safetensors")]
    dense = sum(2 * t.elements for t in tensors(config) if not t.expert)
    assert sum(s.st_blocks * 512 for s in stats) < dense + (1 << 20) < sum(s.st_size for s in stats)


def test_make_model_refuses(tmp_path):
    (tmp_path / "there").mkdir()
    for args, message in (
        (["mixtral-8x7b", str(tmp_path / "there")], "exists already"),
        (["mixtral-8x7b", str(tmp_path / "new"), "--sparse"], "--as hf only"),
        (["gpt-9", str(tmp_path / "new")], "gpt-9"),
    ):
        result = CliRunner().invoke(make_model.main, args)
        assert result.exit_code
        assert message in result.output
    assert not (tmp_path / "new").exists()


def test_the_peer_reports_what_its_process_says(tmp_path):
    """Another program in llama.cpp's place: arguments arrive, the last line counts, failures are named."""
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env python3\n"
        "import json, sys\nprint('noise')\nprint(json.dumps({'argv': sys.argv[2:]}))\n"
    )
    python.chmod(0o755)
    found = peer.measure(python, model, [1, 2], 3, threads=2, extra_bufts=False, warmup=True, group=None)
    expected = f"{model} --prompt 1,2 --decode 3 --threads 2 --no-extra-bufts --warmup"
    assert found == {"argv": expected.split()}
    for body, message in (("echo no room >&2; exit 3", "no room"), ("kill -9 $$", "did not fit")):
        python.write_text(f"#!/bin/sh\n{body}\n")
        with pytest.raises(peer.PeerError, match=message):
            peer.measure(python, model, [1], 1)


def test_what_is_compared_in_place(tmp_path):
    """Three reads of an expert in a GGUF file, one in the store that is made of it, which holds the same."""
    config, down = small("qwen3-30b-a3b"), formats.Q6_K
    config["moe_intermediate_size"] = 512
    write_gguf(config, Weights(config, formats.Q4_K, formats.Q8_0, down=down), tmp_path / "m.gguf", nothing)
    with inplace.store_of(tmp_path / "m.gguf") as store:
        models = [inplace.Model(tmp_path / "m.gguf"), inplace.Model(store)]
        gguf, stored = (model.layout for model in models)
        assert (gguf.pieces, stored.pieces) == (3, 1)
        assert gguf.nbytes == stored.nbytes
        assert [m.format.name for m in models[1].experts[0].matrices] == ["q4_k", "q4_k", "q6_k"]
        assert gguf.around > stored.around >= 0
        assert all(model.read_rate(0) > 0 for model in models)
    assert not store.exists()


def test_reads_of_experts_of_many_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(inplace, "WIDTHS", (32, 64))
    monkeypatch.setattr(inplace, "SIZES_BYTES", 1 << 20)
    done = CliRunner().invoke(inplace.main, ["--sizes", str(tmp_path), "--rounds", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    # 18 bytes are 32 weights of Q4_0; a row has 2048.
    assert [each["read"] for each in found] == [32 * 2048 // 32 * 18, 64 * 2048 // 32 * 18]
    assert all(len(rates) == 2 and min(rates) > 0 for each in found for rates in each["rates"].values())
    assert not list(tmp_path.iterdir())
    assert CliRunner().invoke(inplace.main, []).exit_code == 2


def test_token_ids():
    assert peer.token_ids("3,7,10-12") == [3, 7, 10, 11, 12]
    assert json.dumps(peer.token_ids("0-1")) == "[0, 1]"


def test_the_ceiling_is_the_slower_of_memory_and_device():
    found = ceilings.Ceilings(2, 20e9, 1.0, 1 << 20, 16, 4e9, 1.0)
    assert ceilings.decode_ceiling(found, compute_bytes=1e9, missed_bytes=0) == pytest.approx(20)
    assert ceilings.decode_ceiling(found, compute_bytes=1e9, missed_bytes=4e8) == pytest.approx(10)


@pytest.mark.skipif(not shutil.which("fio"), reason="needs fio")
def test_fio_runs_for_parts_of_a_second(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    said = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: said.append(run(*a, **k)) or said[-1])
    assert io.run_fio(shutil.which("fio"), file, "buffered", 65536, 1, 0.3) > 0
    found = said[0].stdout
    # Milliseconds that fio says it read for; without a time to run it ends at the end of the file.
    assert json.loads(found[found.index("{") :])["jobs"][0]["read"]["runtime"] > 250


def test_reader_and_fio_take_turns_in_being_first(tmp_path, monkeypatch):
    order = []
    rates = {"fio": iter([1.0, 4.0]), "reader": iter([0.5, 8.0])}

    def run(name):
        order.append(name)
        return next(rates[name])

    monkeypatch.setattr(io, "run_fio", lambda *_: run("fio"))
    monkeypatch.setattr(io, "run_reader", lambda *_: run("reader"))
    row = io.compare("fio", tmp_path, "uring", 4096, 1, 0.1, 2)
    assert order == ["fio", "reader", "reader", "fio"]
    # Half in one round and twice in the other is as fast; their logarithms are log 2 from it.
    assert row["ratio"] == pytest.approx(1)
    assert row["ratio_error"] == pytest.approx(2 * math.log(2))


def test_without_fio_the_reader_stands_alone(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(io.shutil, "which", lambda _: None)
    quick = ["--backend", "buffered", "--block", "65536", "--depth", "1", "--rounds", "1", "--seconds", ".1"]
    result = CliRunner().invoke(io.main, [str(file), *quick])
    assert result.exit_code == 0, result.output
    assert "fio was not found" in result.output
    result = CliRunner().invoke(io.main, [str(file), *quick, "--json"])
    (row,) = json.loads(result.output)["rows"]
    assert row["reader"] > 0
    assert row["fio"] is row["ratio"] is None


@pytest.mark.skipif(not shutil.which("fio"), reason="needs fio")
def test_ceilings_measure_a_file(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    result = CliRunner().invoke(ceilings.main, [str(file), "--block", "65536", "--rounds", "1", "--json"])
    if "O_DIRECT" in result.output:
        pytest.skip("tmp_path is on a file system without O_DIRECT")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["memory"] > 0
    assert found["device"] > 0
    assert found["block"] == 65536


def test_ceilings_refuse_a_block_that_can_not_be(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(8192))
    result = CliRunner().invoke(ceilings.main, [str(file), "--block", "5000"])
    assert result.exit_code == 2
    assert "multiple of 4096" in result.output
    if shutil.which("fio"):
        result = CliRunner().invoke(ceilings.main, [str(file), "--block", "65536"])
        assert result.exit_code == 1
        assert "smaller than one block" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "q8_0,q9"], r"--formats: no q9; there are f32.*q8_0"),
        (["--isa", "avx3"], r"--isa: no avx3; there are .*scalar"),
        (["--tokens", "1,x"], r"--tokens: numbers from 1 on.*'1,x'"),
        (["--tokens", "0"], r"--tokens: numbers from 1 on"),
    ],
)
def test_wrong_names_are_named(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kernels", *options])
    with pytest.raises(SystemExit) as caught:
        kernels.main()
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert names(kernels.FORMATS)("Q8_0,f32") == ["q8_0", "f32"]


@pytest.mark.parametrize(
    ("shares", "message"), [("25,x", "percentages"), ("0", "above 0"), ("101", "at most")]
)
def test_wrong_shares_are_named(shares, message, tmp_path):
    (tmp_path / "f").touch()
    done = CliRunner().invoke(compare.main, [str(tmp_path), str(tmp_path / "f"), "--shares", shares])
    assert done.exit_code == 2
    assert "--shares" in done.output
    assert message in done.output


@pytest.mark.parametrize("name", kernels.FORMATS)
def test_kernels_are_timed_on_normal_numbers(name):
    """Subnormal ones would be slow, and others than a model's."""
    weights = kernels.random_weights(name, 1, 2048)[:64]
    values = np.abs(dequantize(weights, kernels.FORMATS[name][0]))
    assert np.isfinite(values).all()
    assert np.mean(values[values > 0] > 2.0**-60) > 0.999
    assert np.mean(values > 0) > 0.5


def test_loading_is_measured():
    found = start.measure(model_path(), rounds=1)
    dense = sum(file.stat().st_size for file in model_path().glob("dense*.safetensors"))
    assert 0.9 * dense < found["bytes"] < 1.1 * dense
    assert all(len(found[name]) == 1 and found[name][0] > 0 for name in ("device", "load", "touch"))


def test_the_first_token_is_timed_from_the_command():
    took = first_token.time_mer(model_path(), [5, 6, 7], ["--ram", "1GiB", "--threads", "1"])
    assert 0 < took < 120
    with pytest.raises(click.ClickException, match=r"mer failed: .*context"):
        first_token.time_mer(model_path(), [5, 6, 7], ["--context", "0"])


def test_drafting_is_measured(tmp_path):
    out = tmp_path / "found.json"
    result = CliRunner().invoke(speculative.main, ["--tokens", "12", "--rounds", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert set(found) == set(speculative.TEXTS)
    assert all(run["tokens_per_s"] > 0 for modes in found.values() for runs in modes.values() for run in runs)
    assert all(set(modes) == {"off", "again", "ngram", "draft", "auto", "wrong"} for modes in found.values())
    assert not any(run["drafted"] for modes in found.values() for run in modes["off"] + modes["again"])
    assert not any(run["accepted"] for modes in found.values() for run in modes["wrong"])


def test_speeds_are_compared_within_rounds():
    plain = [{"speed": float(n)} for n in range(1, 101)]
    assert speculative.ratio(plain, plain, "speed") == (1, 1, 1)
    twice = [{"speed": run["speed"] * (2 + (n - 50) / 100)} for n, run in enumerate(plain)]
    assert speculative.ratio(twice, plain, "speed") == pytest.approx((1.995, 1.89, 2.1))


def test_what_wrong_drafts_cost(tmp_path):
    out = tmp_path / "found.json"
    result = CliRunner().invoke(draft_cost.main, ["--seconds", "0", "--json", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    for way in ("again", "wrong"):
        assert found[way]["turns"] > 0
        for column in ("time", "cpu"):
            assert found[way][column]["least"] <= found[way][column]["ratio"] <= found[way][column]["most"]
    result = CliRunner().invoke(draft_cost.main, ["--seconds", "0", "--tokens", "12"])
    assert result.exit_code == 1
    assert "give more" in result.output


def test_turns_are_compared_at_their_place_and_with_those_near():
    """Later places take longer, one answer twice as long as others; wrong drafts cost a tenth."""
    turns = draft_cost.Turns.__new__(draft_cost.Turns)
    turns.turns = []
    for answer in range(7):
        for number in range(12):
            way = draft_cost.WAYS[(number + answer) % 3]
            took = (2 if answer == 4 else 1) * (1.1 if way == "wrong" else 1) * (1 + number / 10)
            places = range(number * draft_cost.TURN, (number + 1) * draft_cost.TURN)
            turns.turns.append(draft_cost.Turn(("prose", answer), way, [(at, took, took) for at in places]))
    assert draft_cost.middle_mean(turns.ratios("wrong", 1)) == pytest.approx(1.1)
    assert draft_cost.middle_mean(turns.ratios("again", 2)) == pytest.approx(1.0)


def test_reading_ahead_is_measured(tmp_path):
    out = tmp_path / "runs.json"
    options = ["--rates", "0", "--slots", "25%,100%", "--ahead", "2", "--tokens", "3", "--json", str(out)]
    done = CliRunner().invoke(ahead.main, ["demo", *options])
    assert done.exit_code == 0, done.output
    runs = json.loads(out.read_text())
    assert [(run["slots"], run["ahead"]) for run in runs] == [
        ("25%", 0),
        ("25%", 2),
        ("100%", 0),
        ("100%", 2),
    ]
    assert [run["ahead_bytes"] > 0 for run in runs] == [False, True, False, False]
    assert all(run["used_bytes"] <= run["ahead_bytes"] < run["read_bytes"] for run in runs)
    assert CliRunner().invoke(ahead.main, ["demo", "--rates", "fast"]).exit_code == 2


def test_steps_say_where_the_time_went(tmp_path):
    """Two steps of 10 ms behind one that is not asked for; reads that overlap, and one that began before."""

    def span(name, ts, dur):
        return {"name": name, "ph": "X", "ts": ts, "dur": dur}

    def read(number, begin, end):
        names = {"cat": "reads", "id": number}
        return [{"ph": "b", "ts": begin, **names}, {"ph": "e", "ts": end, **names}]

    events = [
        *(span("step", ts, 10_000) for ts in (0, 10_000, 20_000)),
        *(span("attend", ts, 3_000) for ts in (1_000, 11_000, 21_000)),
        *(span("layer 0", ts, 9_000) for ts in (1_000, 11_000, 21_000)),
        span("wait for reads", 25_000, 1_000),
        *read(1, 9_000, 12_000),
        *read(2, 13_000, 17_000),
        *read(3, 15_000, 18_000),
        *read(4, 29_000, 34_000),
    ]
    (file := tmp_path / "profile.json").write_text(json.dumps({"traceEvents": events}))
    done = CliRunner().invoke(steps.main, [str(file), "--steps", "2", "--json"])
    found = json.loads(done.output)
    assert found["ms"] == {"step": 10, "attend": 3, "wait for reads": 0.5}
    assert (found["reads"], found["read_ms"], found["reading"]) == (1.5, 4, 0.3)  # 13 to 18, 29 to 30
    assert "3 steps" in CliRunner().invoke(steps.main, [str(file), "--steps", "4"]).output
    file.write_text("[]")
    assert "no profile" in CliRunner().invoke(steps.main, [str(file)]).output
