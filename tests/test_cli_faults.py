"""Faults of files and disks, and signals: `mer` says which file and what to do, and leaves no wreck."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from cli_models import MER, environment, mer, mer_here, write_mixtral
from safetensors.numpy import load_file, save_file
from store_models import hashes

from mer.model.families import FAMILIES
from mer.weights.checkpoint import open_checkpoint
from mer.weights.partial import JOURNAL

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "model"
    write_mixtral(path)
    return path


@pytest.fixture
def model(original, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def refused(done, *words):
    """The run failed in the way that a user should see."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "bug of mer" not in done.stderr
    for word in words:
        assert word in done.stderr


def truncate(name):
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 1000)


def remove(name):
    return lambda path: (path / name).unlink()


def replace(name, content):
    return lambda path: (path / name).write_bytes(content)


def as_directory(name):
    def apply(path):
        (path / name).unlink()
        (path / name).mkdir()

    return apply


def edit_json(name, change):
    def apply(path):
        value = json.loads((path / name).read_text())
        change(value)
        (path / name).write_text(json.dumps(value))

    return apply


def config(**changes):
    return edit_json("config.json", lambda value: value.update(changes))


def tensor(shard, name, change):
    """Rewrite a tensor of a shard; `change` takes and gives an array, or gives None to leave it out."""

    def apply(path):
        tensors = load_file(path / shard)
        changed = change(tensors.pop(name))
        save_file(tensors if changed is None else tensors | {name: changed}, path / shard)

    return apply


UP = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"

# What is done to the model -> words of the message.
FAULTS = {
    "shard truncated": (truncate(TWO), [TWO, "truncated"]),
    "shard missing": (remove(TWO), [TWO, "missing"]),
    "shard is a directory": (as_directory(ONE), [ONE]),
    "shard empty": (replace(ONE, b""), [ONE, "cut off"]),
    "shard is a pointer of git": (replace(ONE, b"version https://git-lfs"), [ONE, "git lfs pull"]),
    "index names a missing tensor": (
        edit_json(INDEX, lambda value: value["weight_map"].update({"model.y": TWO})),
        [TWO, "model.y", "missing"],
    ),
    "index is no JSON": (replace(INDEX, b"{"), [INDEX, "not valid JSON"]),
    "tensor missing": (
        lambda path: (tensor(TWO, UP, lambda _: None)(path), (path / INDEX).unlink()),
        ["model:", UP, "missing"],
    ),
    "dtype of a matrix": (tensor(ONE, QUERY, lambda t: t.astype(np.int32)), [ONE, QUERY, "I32"]),
    "dtype of an expert": (tensor(TWO, UP, lambda t: t.astype(np.float64)), [TWO, UP, "F64"]),
    "shape of a matrix": (tensor(ONE, QUERY, lambda t: t[:-1]), [ONE, QUERY, "[255, 256]", "[256, 256]"]),
    "shape of an expert": (tensor(TWO, UP, lambda t: t.T.copy()), [TWO, UP, "[256, 96]", "[96, 256]"]),
    "config missing": (remove("config.json"), ["config.json", "missing"]),
    "config is no JSON": (replace("config.json", b"model_type: mixtral"), ["config.json", "not valid JSON"]),
    "config is no text": (replace("config.json", bytes(range(128, 256))), ["config.json"]),
    "config is a list": (replace("config.json", b"[1]"), ["config.json", "object"]),
    "config is a directory": (as_directory("config.json"), ["config.json", "irectory"]),
    "config: too many experts": (config(num_local_experts=5), [ONE, "gate.weight", "[5, 256]"]),
    "config: too many layers": (config(num_hidden_layers=3), ["model.layers.2", "config.json"]),
    "config: other size": (config(hidden_size=512), ["embed_tokens", "config.json"]),
    "config: a size that is a word": (
        config(intermediate_size="96"),
        ["config.json", "intermediate_size", "'96'"],
    ),
    "config: top-k": (config(num_experts_per_tok=9), ["config.json", "num_experts_per_tok is 9"]),
    "config: no experts": (config(num_local_experts=0), ["config.json", "num_local_experts"]),
    "config: quantised": (config(quantization_config={"quant_method": "gptq"}), ["config.json", "gptq"]),
    "architecture": (config(model_type="llama_99"), ["config.json", "'llama_99'", *FAMILIES]),
    "no model": (
        lambda path: [file.unlink() for file in path.glob("*.safetensors*")],
        ["model", "safetensors"],
    ),
}


@pytest.mark.parametrize(
    ("of", "words"),
    [([2], "layer 1: up of expert 2 is f32"), (range(4), "layer 1: gate is f16 and up f32")],
)
def test_formats_that_do_not_fit(model, of, words):
    for e in of:
        tensor(TWO, UP.replace(".2.w3", f".{e}.w3"), lambda t: t.astype(np.float32))(model)
    refused(mer_here("run", model, "word"), f"{model}: {words}")
    done = mer_here("inspect", model)
    assert (done.returncode, f"{model}: {words}" in done.stdout) == (0, True)


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_model(model, tmp_path, fault):
    damage, words = FAULTS[fault]
    damage(model)
    refused(mer_here("convert", model, tmp_path / "dst"), *words)
    assert os.listdir(tmp_path) == ["model"]


def test_damaged_model_seen_by_the_program(model, tmp_path):
    damage, words = FAULTS["shard truncated"]
    damage(model)
    refused(mer("convert", model, tmp_path / "dst"), *words)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("fault", ["shard truncated", "dtype of an expert", "config missing", "architecture"])
def test_damaged_model_seen_by_others(model, command, fault):
    damage, words = FAULTS[fault]
    damage(model)
    refused(mer_here(command, model), *words)


def test_a_model_that_is_not_there(tmp_path):
    nowhere = tmp_path / "nowhere"
    for command, *more in ["inspect"], ["verify"], ["convert", tmp_path / "dst"]:
        refused(mer_here(command, nowhere, *more), str(nowhere), "does not exist")
    assert os.listdir(tmp_path) == []


def test_a_file_in_place_of_a_model(model):
    refused(mer_here("inspect", model / ONE), ONE, "name its directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(model, tmp_path):
    for name in (ONE, "config.json"):
        (model / name).chmod(0)
        refused(mer("convert", model, tmp_path / "dst"), name, "Permission denied")
        (model / name).chmod(0o600)


def test_weights_that_are_not_finite(model, tmp_path):
    def spoil(values):
        values[3, 5] = np.nan
        return values

    tensor(TWO, UP, spoil)(model)
    done = mer_here("convert", model, tmp_path / "dst")
    refused(done, TWO, "layers.1.experts.2", "NaN")
    assert not (tmp_path / "dst").exists()
    done = mer_here("verify", model)
    refused(done, "1 of 41 tensors are damaged")
    assert done.stdout == f"{model / TWO}: {UP}: it holds NaN or infinity\n"


@pytest.fixture
def store(original, tmp_path):
    assert mer_here("convert", original, tmp_path / "store").returncode == 0
    return tmp_path / "store"


def flip(path, place):
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 16]))


def test_a_flipped_bit_in_a_store(store):
    opened = open_checkpoint(store)
    expert, dense = opened.experts[1, 2].extents.pieces[0], opened.tensors[QUERY]
    flip(opened.files[expert.file], expert.offset + 12_345)
    flip(opened.files[dense.file], dense.offset)
    done = mer_here("verify", store)
    refused(done, "2 of 25 tensors are damaged", "convert the model again")
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{store / 'dense.safetensors'}: {QUERY}: its checksum is ")
    assert second.startswith(f"{store / 'experts-00001.safetensors'}: layers.1.experts.2: its checksum is ")


@pytest.mark.parametrize("name", ["dense.safetensors", "experts-00001.safetensors"])
@pytest.mark.parametrize("damage", [truncate, remove, as_directory])
def test_a_store_with_a_damaged_file(store, name, damage):
    damage(name)(store)
    for command in ("verify", "inspect"):
        refused(mer_here(command, store), name)


def test_the_destination_exists(original, tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("directory", "file", "link"):
        refused(mer_here("convert", original, tmp_path / name), str(tmp_path / name), "exists already")
    assert (tmp_path / "file").read_text() == "precious"
    refused(mer_here("convert", original, tmp_path / "file/below"), str(tmp_path / "file"), "Not a directory")
    assert sorted(os.listdir(tmp_path)) == ["directory", "file", "link"]


def test_a_file_size_limit(original, tmp_path):
    """The kernel refuses what is longer: like a full disk, but for everyone."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    done = mer("convert", original, tmp_path / "dst", preexec_fn=limit)
    refused(done, str(tmp_path / "dst.partial"), "File too large", "make room")
    assert not (tmp_path / "dst").exists()
    assert mer_here("convert", original, tmp_path / "dst").returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(size) -> Path of an empty file system with this many bytes; asked again, it grows."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(nbytes):
        option = f"size={nbytes}" + (",remount" if path.is_mount() else "")
        tool = shutil.which("mount")
        done = tool and subprocess.run(
            [tool, "-t", "tmpfs", "-o", option, "tmpfs", path], capture_output=True
        )
        if not done or done.returncode:
            pytest.skip("mounting a small tmpfs is not allowed here")
        return path

    yield mount
    if path.is_mount():
        subprocess.run(["umount", path], check=True)


def test_a_disk_that_is_too_small(original, small_disk):
    """Said before anything is written, with numbers."""
    disk = small_disk(300_000)
    done = mer_here("convert", original, disk / "dst")
    refused(done, str(disk / "dst.partial"), "are needed", "are free", "make room")
    assert not (disk / "dst").exists()


def test_a_disk_that_becomes_full(model, small_disk, tmp_path):
    """The last file does not fit; with more room the same command goes on, to the same bytes."""
    (model / "tokenizer.json").write_text(json.dumps("x" * 500_000))
    assert mer_here("convert", model, tmp_path / "whole").returncode == 0
    weights = sum(file.stat().st_size for file in (tmp_path / "whole").glob("*.safetensors"))
    disk = small_disk(weights + 200_000)
    done = mer("convert", model, disk / "dst")
    refused(done, str(disk / "dst.partial"), "No space left on device", "make room")
    assert not (disk / "dst").exists()
    small_disk(weights + 1_000_000)
    done = mer_here("convert", model, disk / "dst")
    assert done.returncode == 0
    assert "resumed: 25 tensors were there from an earlier run" in done.stdout
    assert hashes(disk / "dst") == hashes(tmp_path / "whole")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model whose conversion takes long enough to be interrupted."""
    path = tmp_path_factory.mktemp("large") / "model"
    write_mixtral(path, intermediate_size=512, num_hidden_layers=2, num_local_experts=16)
    return path


@pytest.fixture(scope="module")
def converted(large):
    """What an uninterrupted run writes."""
    assert mer_here("convert", large, large.with_name("whole")).returncode == 0
    return hashes(large.with_name("whole"))


def interrupt(src, dst, number):
    """Start a conversion, send the signal when some tensors are done; returns exit status and output."""
    child = subprocess.Popen(
        [MER, "convert", src, dst],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    journal = Path(f"{dst}.partial") / JOURNAL
    while not journal.exists() or journal.read_bytes().count(b"\n") < 15:
        assert child.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.005)
    child.send_signal(number)
    out, err = child.communicate()
    return child.returncode, out + err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(large, converted, tmp_path, number):
    dst = tmp_path / "dst"
    status, text = interrupt(large, dst, number)
    if number == signal.SIGINT:
        assert status == 130
        assert f"{dst}.partial is kept" in text
        assert text.endswith("interrupted\n")
    else:
        assert status == -number
    assert "Traceback" not in text
    assert os.listdir(tmp_path) == ["dst.partial"]
    refused(mer_here("convert", large, dst, "--experts", "q8_0"), "dst.partial", "--restart")
    done = mer_here("convert", large, dst)
    assert done.returncode == 0
    assert "resumed: " in done.stdout
    assert os.listdir(tmp_path) == ["dst"]
    assert hashes(dst) == converted


def test_restart(large, converted, tmp_path):
    dst = tmp_path / "dst"
    interrupt(large, dst, signal.SIGKILL)
    done = mer_here("convert", large, dst, "--restart")
    assert done.returncode == 0
    assert "resumed" not in done.stdout
    assert hashes(dst) == converted
