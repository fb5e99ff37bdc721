"""The program itself: its frame, and what convert, verify and inspect print."""

import errno
import json
import os
import pty
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import pytest
from cli_models import MER, environment, mer, mer_here, mixtral_config, write_holes, write_mixtral
from safetensors.numpy import load_file

import mer as mer_package
from mer.cli import main as frame
from mer.cli.common import at_least, model_argument, parameters, size
from mer.demo import model_path
from mer.errors import ConfigError, MerError
from mer.weights import formats
from mer.weights.checkpoint import open_checkpoint
from mer.weights.verify import verify

# What a command that does not need it must not wait for.
HEAVY = ("numpy", "rich", "tokenizers", "jinja2", "huggingface_hub", "mer.model", "mer.engine")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    nextn = [(f"model.layers.2.block_sparse_moe.experts.{e}.w1.weight", (4, 4)) for e in range(3)]
    more = [*nextn, ("model.layers.0.rotary.inv_freq", (4,)), ("model.x.weight", (3,))]
    write_mixtral(path, more=more, num_nextn_predict_layers=1)
    return path


@pytest.fixture(scope="module")
def store(model):
    done = mer_here("convert", model, model.with_name("store"))
    assert done.returncode == 0, done.stderr
    return model.with_name("store")


def imported(*arguments):
    code = (
        "import sys\nfrom mer.cli.main import main\n"
        f"sys.argv = ['mer', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    print('MODULES', *sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.rpartition("MODULES")[2].split())


def test_help_imports_no_command():
    assert imported("--help").isdisjoint(HEAVY)
    assert imported("--version").isdisjoint(HEAVY)


def test_doctor_imports_no_model():
    heavy = ("tokenizers", "jinja2", "huggingface_hub", "mer.model", "mer.engine")
    assert imported("doctor", "--help").isdisjoint(heavy)


def test_help_lists_every_command():
    done = mer("--help")
    assert done.returncode == 0
    context = click.Context(frame.cli)
    for name, line in frame.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert line in done.stdout
        command = frame.cli.get_command(context, name)
        assert isinstance(command, click.Command)
        assert command.name == name
        assert command.help
    assert frame.cli.get_command(context, "common") is None


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "mer", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, mer("--version").stdout, "")


def test_what_serve_has_and_shard_calls_otherwise():
    done = mer_here("shard", model_path(), "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert "--listen" in done.stderr
    assert "--io" not in done.stderr


def test_version():
    done = mer("--version")
    assert (done.returncode, done.stdout) == (0, f"mer {version('mer')}\n")
    assert version("mer") == mer_package.__version__
    assert not hasattr(mer_package, "__author__")


@pytest.mark.parametrize("arguments", [["doctr"], ["inspect"], ["inspect", "x", "--rom", "1"], ["--wat"]])
def test_wrong_usage(arguments):
    done = mer_here(*arguments)
    assert done.returncode == 2
    assert "Usage: mer" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (MerError("a.b: it is wrong"), 1, "error: a.b: it is wrong"),
        (ConfigError("x"), 1, "error: x"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f.bin"), 1, "error: f.bin: No space left on"),
        (PermissionError(errno.EACCES, "Permission denied", "/secret/x"), 1, "/secret/x: Permission denied"),
        (OSError("odd"), 1, "error: odd"),
        (MemoryError("3 GiB"), 1, "error: out of memory (3 GiB)"),
        (RuntimeError("can't start new thread"), 1, "error: can't start new thread: out of memory"),
        (ImportError("x.so: failed to map segment from shared object"), 1, "object: out of memory"),
        (ValueError("surprise"), 1, "error: ValueError: surprise"),
        (RuntimeError("surprise"), 1, "error: RuntimeError: surprise"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.ClickException("no"), 1, "error: no"),
    ],
)
@pytest.mark.parametrize("debug", ["", "1"])
def test_what_becomes_of_errors(monkeypatch, capsys, error, status, words, debug):
    def fails(**_):
        raise error

    monkeypatch.setenv("MER_DEBUG", debug)
    monkeypatch.setattr(frame.cli, "main", fails)
    monkeypatch.setattr(frame, "_forget_output", lambda: None)
    with pytest.raises(SystemExit) as caught:
        frame.main()
    assert caught.value.code == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert ("Traceback" in shown.err) == (debug == "1" and status == 1)
    assert ("report it" in shown.err) == ("surprise" in words)


def test_a_reader_that_goes_away(model):
    read, write = os.pipe()
    os.close(read)
    done = mer("inspect", model, "--json", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_output_that_can_not_be_written(model):
    with open("/dev/full", "w") as full:
        done = mer("inspect", model, "--json", stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


def test_output_that_is_closed(model):
    done = mer("inspect", model, "--json", preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")


def test_convert_says_what_it_did(model, tmp_path):
    done = mer_here("convert", model, tmp_path / "dst", "--experts", "Q4_K", "--dense", "BF16")
    assert done.returncode == 0
    assert done.stderr == "", "no progress bar where stderr is no terminal"
    rows = [" ".join(line.replace("│", " ").split()) for line in done.stdout.splitlines()]
    files = {file.name: file for file in (tmp_path / "dst").iterdir()}
    total = size(sum(file.stat().st_size for file in files.values()))
    assert rows[0].startswith(f"{tmp_path / 'dst'}: {len(files)} files, {total}, from ")
    # 2 layers of 4 experts: gate and up of 96 x 256 weights at 144 bytes in 256, down at 34 bytes in 32.
    assert f"experts q4_k 16 {size(16 * 96 * 144)}" in rows
    assert f"experts q8_0 8 {size(8 * 256 * 96 // 32 * 34)}" in rows
    assert any(row.startswith("dense bf16 10 ") for row in rows)
    assert any(row.startswith("dense f16 7 ") for row in rows), "norms and routers stay as they were"
    assert "layers.*.experts.*.down: rows of 96 do not fit q4_k, stored as q8_0, 8 matrices" in rows
    assert "left out: model.layers.2.* (multi-token prediction), 3 tensors that mer does not use" in rows
    assert "left out: model.layers.*.rotary.inv_freq, 1 tensor that mer does not use" in rows
    assert "left out: model.x.weight, 1 tensor that mer does not use" in rows
    assert "resumed" not in done.stdout
    assert set(files) == {"config.json", "tokenizer.json", "dense.safetensors", "experts-00001.safetensors"}
    written = open_checkpoint(tmp_path / "dst")
    assert verify(written) == []
    assert written.tensors["model.norm.weight"].format is formats.F16


def test_formats_left_as_they_are(model, tmp_path):
    done = mer_here("convert", model, tmp_path / "dst", "--experts", "same", "--dense", "same")
    assert done.returncode == 0
    assert "do not fit" not in done.stdout
    shards = [load_file(file) for file in model.glob("*.safetensors")]
    source = {name: tensor for shard in shards for name, tensor in shard.items()}
    for name, tensor in load_file(tmp_path / "dst/dense.safetensors").items():
        np.testing.assert_array_equal(tensor, source[name])


def test_an_unknown_format_lists_the_known(model, tmp_path):
    done = mer_here("convert", model, tmp_path / "dst", "--dense", "q5_k")
    assert done.returncode == 2
    for word in ("--dense", "q5_k", "f32", "f16", "bf16", "q8_0", "q4_0", "q4_k"):
        assert word in done.stderr
    assert "f8_e4m3" not in done.stderr
    assert not (tmp_path / "dst.partial").exists()


def test_a_store_converted_again(store, tmp_path):
    """Quantising what is quantised is said; keeping it is lossless."""
    again = mer_here("convert", store, tmp_path / "q8", "--experts", "q4_0", "--dense", "same")
    assert again.returncode == 0
    assert "note: experts in q4_k are rounded a second time, to q4_0" in again.stderr
    assert "note: experts in q8_0 are rounded a second time, to q4_0" in again.stderr
    assert "dense" not in again.stderr
    same = mer_here("convert", store, tmp_path / "same", "--experts", "same", "--dense", "same")
    assert (same.returncode, same.stderr) == (0, "")
    for file in ("dense.safetensors", "experts-00001.safetensors"):
        assert (tmp_path / "same" / file).read_bytes() == (store / file).read_bytes()


def test_a_progress_bar_on_a_terminal(model, tmp_path):
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [MER, "convert", model, tmp_path / "dst"], stdout=subprocess.DEVNULL, stderr=theirs, env=environment()
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert child.wait() == 0
    assert b"converting" in shown


def test_verify(model, store):
    for path, words in ((model, "every tensor is readable and finite"), (store, "every checksum is right")):
        done = mer_here("verify", path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{path}: ")
        assert words in done.stdout


def test_inspect_shows_a_model(model, store):
    for path, words in (
        (model, ["Hugging Face", "f16", "2 files", "50 % "]),
        (store, ["expert store", "q4_k", "q8_0", "2 files"]),
    ):
        done = mer_here("inspect", path, "--ram", "64GiB") if path is store else mer_here("inspect", path)
        assert (done.returncode, done.stderr) == (0, "")
        more = ["mixtral", "4 per layer, 2 per token", "grouped-query, 4 heads, 2 of", "the least that works"]
        for word in words + more:
            assert word in done.stdout
        lines = done.stdout.replace(str(path), "PATH").splitlines()
        assert max(map(len, lines[1:])) <= 80


def test_inspect_counts(model):
    facts = json.loads(mer_here("inspect", model, "--json").stdout)
    expert = 3 * 256 * 96
    attention = 2 * 256 * 256 + 2 * 128 * 256
    always = 2 * 50 * 256 + 256 + 2 * (attention + 2 * 256 + 4 * 256)
    assert facts["parameters"] == always + 8 * expert
    assert facts["active_parameters"] == always + 2 * 2 * expert
    assert facts["expert_bytes"] == 2 * expert
    assert facts["experts_bytes"] == 8 * 2 * expert
    # Key and value of 2 heads of 64, in 2 layers, 4 bytes each: nothing is rounded beside F16 weights.
    assert facts["kv_bytes_per_token"] == 2 * 2 * 64 * 2 * 4
    assert facts["memory"]["context"] == 512
    assert facts["memory"]["kv"] == 512 * facts["kv_bytes_per_token"]
    assert facts["file_bytes"] == sum(file.stat().st_size for file in model.glob("*.safetensors"))


def test_parameters_of_a_published_model(tmp_path):
    """Mixtral 8x7B has 46.7 B parameters, 12.9 B of them active, by its model card."""
    config = mixtral_config(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        max_position_embeddings=32768,
    )
    write_holes(tmp_path / "mixtral", config)
    done = mer_here("inspect", tmp_path / "mixtral")
    assert "46.7 B, 12.9 B active per token" in done.stdout


def test_inspect_divides_memory(model):
    budgets = {}
    for ram in ("8MiB", "8GiB"):
        facts = json.loads(mer_here("inspect", model, "--json", "--ram", ram).stdout)
        budgets[ram] = {row["what"]: row for row in facts["memory"]["budgets"]}
    little, much = budgets["8MiB"]["as given"], budgets["8GiB"]["as given"]
    assert (little["ram"], little["runs"], little["slots"]) == (8 << 20, False, 0)
    assert (much["runs"], much["slots"], much["share"]) == (True, 8, 1.0)
    least, everything = budgets["8GiB"]["the least that works"], budgets["8GiB"]["all"]
    slot = facts["memory"]["slot"]
    assert slot >= facts["expert_bytes"]
    assert (least["slots"], everything["slots"]) == (2, 8)
    assert everything["ram"] - least["ram"] == pytest.approx(6 * slot, rel=0.01)
    assert "too little" in mer_here("inspect", model, "--ram", "8MiB").stdout


@pytest.mark.parametrize("ram", ["0", "-1", "8 gigs", "1e9", ""])
def test_a_budget_that_is_no_size(model, ram):
    done = mer_here("inspect", model, f"--ram={ram}")
    assert done.returncode == 2
    assert "--ram" in done.stderr


def test_inspect_of_what_must_be_converted(tmp_path):
    write_holes(tmp_path / "fp8", mixtral_config(), "F8_E4M3", 1)
    done = mer_here("inspect", tmp_path / "fp8")
    assert done.returncode == 0
    assert "It does not run as it is" in done.stdout
    assert "mer convert" in done.stdout


def test_numbers_for_people():
    assert [size(n) for n in (0, 999, 1000, 1023, 1536, 5 << 20, 3 << 30, 2500 << 30)] == [
        "0 B", "999 B", "1000 B", "1023 B", "1.5 KiB", "5 MiB", "3.0 GiB", "2,500.0 GiB",
    ]  # fmt: skip
    assert [at_least(n) for n in (0, 1, 1 << 20, (1 << 20) + 1, 20 << 30, (20 << 30) + 1)] == [
        "0 MiB", "1 MiB", "1 MiB", "2 MiB", "20.0 GiB", "20.1 GiB",
    ]  # fmt: skip
    assert [parameters(n) for n in (7, 1500, 3_350_000_000, 671_000_000_000)] == [
        "7", "1.5 K", "3.35 B", "671 B",
    ]  # fmt: skip


def test_the_bundled_model_has_a_name():
    context, argument = click.Context(frame.cli), click.Argument(["model"])
    assert model_argument(context, argument, "demo") == model_path()
    assert model_argument(context, argument, "./demo") == Path("demo")
