"""The expert store as files: ordinary safetensors, damage found at opening or by verification."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from store_models import convert_model, write_model

from mer.errors import CheckpointError, MerError
from mer.weights import formats
from mer.weights.checkpoint import open_checkpoint
from mer.weights.experts import stored
from mer.weights.verify import verify


@pytest.fixture
def store(tmp_path):
    write_model(tmp_path / "src")
    convert_model(tmp_path / "src", tmp_path / "dst", "q4_k", "q8_0", max_file=300_000)
    return tmp_path / "dst"


def test_the_safetensors_package_opens_it(store, tmp_path):
    opened = open_checkpoint(store)
    dense = load_file(store / "dense.safetensors")
    assert dense["embed.weight"].dtype == np.uint8
    values = formats.Q8_0.dequantize(dense["embed.weight"])
    np.testing.assert_array_equal(values, opened.numpy("embed.weight"))
    np.testing.assert_array_equal(dense["norm.weight"], opened.numpy("norm.weight"))
    names = set()
    for n in (1, 2):
        path = store / f"experts-{n:05d}.safetensors"
        with safe_open(path, "numpy") as file:
            assert file.metadata()["kind"] == "mer experts 1"
            for name in file.keys():  # noqa: SIM118
                _, layer, _, e = name.split(".")
                (piece,) = stored(opened, int(layer), int(e)).pieces
                raw = opened.read_bytes(piece.file, piece.offset, piece.nbytes, name)
                np.testing.assert_array_equal(file.get_tensor(name), raw)
                names.add(name)
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + length) % 4096 == 0
    assert names == {f"layers.{layer}.experts.{e}" for layer in (0, 2) for e in range(3)}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_verify_names_what_is_damaged(store):
    opened = open_checkpoint(store)
    assert verify(opened) == []
    (piece,) = stored(opened, 2, 1).pieces
    flip(opened.files[piece.file], piece.offset + piece.nbytes - 1)  # padding counts, too
    info = opened.tensors["router.weight"]
    flip(opened.files[0], info.offset)
    seen = []
    bad = verify(open_checkpoint(store), lambda done, total: seen.append((done, total)))
    assert [(d.file.name, d.tensor) for d in bad] == [
        ("dense.safetensors", "router.weight"),
        ("experts-00002.safetensors", "layers.2.experts.1"),
    ]
    assert seen[-1][0] == seen[-1][1] > 0


def test_verify_goes_on_after_a_tensor_that_can_not_be_read(store):
    opened = open_checkpoint(store)
    (piece,) = stored(opened, 2, 1).pieces
    os.truncate(opened.files[piece.file], piece.offset + 100)
    assert [d.tensor for d in verify(opened)] == ["layers.2.experts.1", "layers.2.experts.2"]
    with pytest.raises(CheckpointError, match=r"layers.2.experts.1.*truncated"):
        open_checkpoint(store)


@pytest.mark.parametrize(
    "name", ["dense.safetensors", "experts-00001.safetensors", "experts-00002.safetensors"]
)
def test_missing_file(store, name):
    (store / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        open_checkpoint(store)


def test_files_of_two_conversions(store, tmp_path):
    convert_model(tmp_path / "src", tmp_path / "other", "q4_k", "q8_0")
    (tmp_path / "other/experts-00001.safetensors").rename(store / "experts-00002.safetensors")
    with pytest.raises(CheckpointError, match="should be expert file 2"):
        open_checkpoint(store)


def rewrite(path, change):
    """Change the header's JSON."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def metadata(key, change):
    def apply(header):
        value = json.loads(header["__metadata__"][key])
        change(value)
        header["__metadata__"][key] = json.dumps(value, separators=(",", ":"))

    return apply


def set_item(key, value):
    return lambda target: target.__setitem__(key, value)


DAMAGE = {
    "kind": (lambda h: h["__metadata__"].update(kind="mer experts 9"), "does not say 'mer experts 1'"),
    "no checksum": (
        metadata("checksums", lambda c: c.pop("layers.0.experts.1")),
        "experts.1 has no checksum",
    ),
    "no layers": (lambda h: h["__metadata__"].pop("layers"), "no valid layers"),
    "layers no json": (lambda h: h["__metadata__"].update(layers="{"), "no valid layers"),
    "layer missing": (metadata("layers", lambda v: v.clear()), "of no layer"),
    "strange name": (lambda h: h.update({"x": h.pop("layers.0.experts.1")}), "x has no checksum"),
    "format": (metadata("layers", lambda v: v["0"][0].__setitem__(0, "q9")), "layer 0.*q9"),
    "shape": (metadata("layers", lambda v: v["0"][0].__setitem__(1, 97)), "layer 0 makes no sense"),
    "zero": (metadata("layers", lambda v: v["0"][0].__setitem__(1, 0)), "layer 0 makes no sense"),
    "overlap": (metadata("layers", lambda v: v["0"][1].__setitem__(3, 64)), "overlap"),
    "two matrices": (metadata("layers", lambda v: v["0"].pop()), "layer 0 makes no sense"),
    "larger": (
        metadata("layers", lambda v: v["0"][2].__setitem__(3, 1 << 20)),
        "not as its layer's description",
    ),
    "part": (lambda h: h["__metadata__"].update(part="2/2"), "should be expert file 1"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_descriptions(store, case):
    change, message = DAMAGE[case]
    rewrite(store / "experts-00001.safetensors", change)
    with pytest.raises(MerError, match=rf"experts-00001.safetensors: .*{message}"):
        open_checkpoint(store)


@pytest.mark.parametrize("block", [["q8_0", [50, 128]], ["q9", [50, 256]], ["q8_0"], None, ["q8_0", ["a"]]])
def test_damaged_descriptions_of_dense_tensors(store, block):
    rewrite(store / "dense.safetensors", metadata("blocks", set_item("embed.weight", block)))
    if block is None:
        with pytest.raises(MerError, match=r"embed.weight has dtype U8"):
            open_checkpoint(store).numpy("embed.weight")
        return
    with pytest.raises(MerError, match=r"dense.safetensors: .*tensor embed.weight makes no sense"):
        open_checkpoint(store)
