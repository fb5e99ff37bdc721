"""Opening Hugging Face directories: the namings, what can be wrong with files, and what the errors say."""

import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mer.errors import CheckpointError, MerError, UnsupportedModelError
from mer.weights import formats
from mer.weights.checkpoint import open_checkpoint, require_streamable
from mer.weights.experts import fused, per_expert, stored
from mer.weights.rows import expert_rows


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def model(tmp_path):
    """A directory with config.json and nothing else."""
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    return tmp_path


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def sharded(model):
    """Two shards with an index: returns the tensors."""
    tensors = {name: normal(i, 3, 4) for i, name in enumerate("abcd")}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({k: tensors[k] for k in "ab"}, model / names[0])
    save_file({k: tensors[k] for k in "cd"}, model / names[1])
    index = {"weight_map": {"a": names[0], "b": names[0], "c": names[1], "d": names[1]}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_reads_every_tensor_of_a_sharded_model(model):
    tensors = sharded(model)
    checkpoint = open_checkpoint(str(model))
    assert (checkpoint.kind, checkpoint.path, len(checkpoint.files)) == ("hf", model, 2)
    assert checkpoint.config == {"model_type": "mixtral"}
    assert set(checkpoint.tensors) == set("abcd")
    for name, values in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.format, info.rows, info.cols) == ((3, 4), formats.F32, 3, 4)
        np.testing.assert_array_equal(checkpoint.numpy(name), values)
        np.testing.assert_array_equal(checkpoint.read(name).view(np.float32), values.ravel())


def test_half_floats_and_odd_tensors(model):
    values = normal(0, 5, 7)
    bf16 = formats.BF16.quantize(values)
    header = {
        "half": entry("F16", [5, 7], 0, 70),
        "brain": entry("BF16", [5, 7], 70, 140),
        "scalar": entry("F32", [], 140, 144),
        "none": entry("F32", [0, 4], 144, 144),
        "ids": entry("U64", [1], 144, 152),
    }
    data = values.astype(np.float16).tobytes() + bf16.tobytes() + struct.pack("<fq", 2.5, 3)
    write_raw(model / "model.safetensors", header, data)
    checkpoint = open_checkpoint(model)
    np.testing.assert_array_equal(checkpoint.numpy("half"), values.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(checkpoint.numpy("brain"), formats.BF16.dequantize(bf16))
    assert checkpoint.numpy("scalar").shape == ()
    assert checkpoint.numpy("scalar") == 2.5
    assert checkpoint.numpy("none").shape == (0, 4)
    with pytest.raises(UnsupportedModelError, match=r"ids has dtype U64"):
        checkpoint.numpy("ids")
    with pytest.raises(CheckpointError, match=r"tensor missing is missing"):
        checkpoint.read("missing")


HEADERS = {
    "no json": (b"{nonsense", "no valid safetensors file.*not valid JSON"),
    "not an object": (b"[1, 2, 3]", "no JSON object"),
    "name twice": (
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        "'w' stands there twice",
    ),
    "deep nesting": (b"[" * 100_000, "not valid JSON"),
    "unknown dtype": ({"w": entry("F13", [2], 0, 8)}, "tensor w: the dtype 'F13' is not known; known are"),
    "dtype no string": ({"w": entry(["F32"], [2], 0, 8)}, "tensor w: the dtype"),
    "no entry": ({"w": 3}, "tensor w: its header entry is no object"),
    "negative shape": ({"w": entry("F32", [-2], 0, 8)}, "tensor w: the shape"),
    "true as a size": ({"w": entry("F32", [True, 2], 0, 8)}, "tensor w: the shape"),
    "shape of texts": ({"w": entry("F32", ["2"], 0, 8)}, "tensor w: the shape"),
    "one offset": ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "tensor w: data_offsets"),
    "backwards": ({"w": entry("F32", [2], 8, 0)}, "tensor w: F32 .* takes 8 bytes"),
    "shape lies": ({"w": entry("F32", [3], 0, 8)}, "tensor w: F32 .* takes 12 bytes, .* hold 8"),
    "huge shape": ({"w": entry("F32", [1 << 40, 1 << 40], 0, 8)}, "tensor w: F32"),
    "past the end": ({"w": entry("F32", [4], 0, 16)}, "tensor w: its data ends at byte .* truncated"),
    "overlap": (
        {"v": entry("F32", [1], 0, 4), "w": entry("F32", [2], 0, 8)},
        "the tensors v and w overlap",
    ),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__ must map names to strings"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_headers(model, case):
    header, message = HEADERS[case]
    write_raw(model / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=f"{model}/model.safetensors: .*{message}"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off .0 bytes"),
        (b"\x10\0\0", "cut off"),
        (struct.pack("<Q", 1 << 62) + b"{}", "cut off"),
        (struct.pack("<Q", 0) + b"{}", "absurd"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"GGUF\3\0\0\0" + b"\0" * 64, "GGUF file"),
    ],
)
def test_files_that_are_no_safetensors(model, content, message):
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)


def test_an_absurd_header_length_is_not_read(model):
    path = model / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match=r"header of 200000000 bytes is absurd"):
        open_checkpoint(model)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_an_error_or_harmless(tmp_path_factory, data):
    """A flipped byte or a cut never escapes as another exception than MerError."""
    path = tmp_path_factory.mktemp("m")
    (path / "config.json").write_text("{}")
    save_file({"a": normal(0, 4, 8), "b": normal(1, 8)}, path / "model.safetensors")
    content = bytearray((path / "model.safetensors").read_bytes())
    place = data.draw(st.integers(0, 200))
    content[place] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    (path / "model.safetensors").write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            checkpoint.numpy(name)
    except MerError:
        pass


def test_missing_shard(model):
    sharded(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00002.safetensors is missing .of 2.*incomplete"
    ):
        open_checkpoint(model)
    (model / "model.safetensors.index.json").unlink()  # the name alone tells that there were two
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing"):
        open_checkpoint(model)


def test_index_and_shards_disagree(model):
    sharded(model)
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["e"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"00001.*the tensor e is missing"):
        open_checkpoint(model)
    del index["weight_map"]["e"]
    index["weight_map"]["a"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"00002.*the tensor a is missing"):
        open_checkpoint(model)
    index["weight_map"]["a"] = "../../etc/passwd"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"no plain file name"):
        open_checkpoint(model)
    path.write_text('{"weight_map": [1]}')
    with pytest.raises(CheckpointError, match=r"weight_map must map"):
        open_checkpoint(model)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"index.json: is not valid JSON"):
        open_checkpoint(model)


def test_a_tensor_in_two_files(model):
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": normal(0, 2, 2)}, model / name)
    with pytest.raises(CheckpointError, match=r"y.safetensors: the tensor a is also in x.safetensors"):
        open_checkpoint(model)


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b"[]"])
def test_config_json(tmp_path, content):
    save_file({"a": normal(0, 2, 2)}, tmp_path / "model.safetensors")
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json"):
        open_checkpoint(tmp_path)


def test_places_that_are_no_model(tmp_path, model):
    with pytest.raises(CheckpointError, match=r"does not exist.*mer pull"):
        open_checkpoint(tmp_path / "Qwen/Qwen3-30B-A3B")
    with pytest.raises(CheckpointError, match=r"no .*safetensors file"):
        open_checkpoint(model)
    (model / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"there is pytorch_model.bin, which is not read"):
        open_checkpoint(model)
    save_file({"a": normal(0, 2, 2)}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"one file of a model"):
        open_checkpoint(model / "model.safetensors")
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(UnsupportedModelError, match=r"quantised by 'gptq'"):
        open_checkpoint(model)


def test_a_file_that_can_not_be_read(model):
    (model / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors: can't be read: Is a directory"):
        open_checkpoint(model)


def test_a_file_that_shrinks_after_opening(model):
    save_file({"a": normal(0, 64, 64)}, model / "model.safetensors")
    checkpoint = open_checkpoint(model)
    os.truncate(model / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match=r"ends inside tensor a: the file is truncated"):
        checkpoint.read("a")


def matrices(checkpoint, extents):
    return [expert_rows(checkpoint, extents, m, "m").read(0, m.rows) for m in extents.matrices]


def test_experts_of_three_tensors(model):
    """Neighbours in the file become one piece; others do not, whatever their order."""
    gate, up, down = normal(0, 6, 8), normal(1, 6, 8), normal(2, 8, 6)
    header = {
        "down": entry("F32", [8, 6], 0, 192),
        "gate": entry("F32", [6, 8], 192, 384),
        "up": entry("F32", [6, 8], 384, 576),
    }
    write_raw(model / "a.safetensors", header, down.tobytes() + gate.tobytes() + up.tobytes())
    checkpoint = open_checkpoint(model)
    extents = per_expert(checkpoint, "gate", "up", "down")
    assert [piece.nbytes for piece in extents.pieces] == [576]
    assert (extents.gate.offset, extents.up.offset, extents.down.offset) == (192, 384, 0)
    assert extents.nbytes == 576
    for got, wanted in zip(matrices(checkpoint, extents), (gate, up, down), strict=True):
        np.testing.assert_array_equal(got, wanted)

    header = {
        "gate": entry("F32", [6, 8], 0, 192),
        "other": entry("F32", [1], 192, 196),
        "up": entry("F32", [6, 8], 196, 388),
    }
    write_raw(model / "a.safetensors", header, gate.tobytes() + b"\0\0\0\0" + up.tobytes())
    save_file({"down": down}, model / "b.safetensors")
    checkpoint = open_checkpoint(model)
    extents = per_expert(checkpoint, "gate", "up", "down")
    assert len(extents.pieces) == 3
    for got, wanted in zip(matrices(checkpoint, extents), (gate, up, down), strict=True):
        np.testing.assert_array_equal(got, wanted)
    with pytest.raises(CheckpointError, match=r"down has shape \[8, 6\].*must be \[6, 8\]"):
        per_expert(checkpoint, "gate", "down", "up")
    with pytest.raises(CheckpointError, match=r"no expert 0 of layer 0"):
        stored(checkpoint, 0, 0)


def test_fused_experts(model):
    gate_up, down = normal(0, 5, 12, 8), normal(1, 5, 8, 6)
    save_file({"gate_up": gate_up, "down": down}, model / "model.safetensors")
    checkpoint = open_checkpoint(model)
    for e in range(5):
        extents = fused(checkpoint, "gate_up", "down", e)
        got = matrices(checkpoint, extents)
        for a, b in zip(got, (gate_up[e, :6], gate_up[e, 6:], down[e]), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match=r"has 5 experts"):
        fused(checkpoint, "gate_up", "down", 5)
    with pytest.raises(CheckpointError, match=r"must be"):
        fused(checkpoint, "down", "gate_up", 0)
    with pytest.raises(CheckpointError, match=r"experts need 2 dimensions"):
        per_expert(checkpoint, "gate_up", "gate_up", "down")


def fp8_model(model, rows=200, cols=300, block=(128, 128), scale_shape=None):
    """One F8_E4M3 matrix with block scales; returns its values."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 0x7F, (rows, cols), dtype=np.uint8) | (
        rng.integers(0, 2, (rows, cols), np.uint8) << 7
    )
    grid = rng.random((-(-rows // block[0]), -(-cols // block[1])), np.float32)
    size, end = rows * cols, rows * cols + grid.nbytes
    header = {
        "w.weight": entry("F8_E4M3", [rows, cols], 0, size),
        "w.weight_scale_inv": entry("F32", list(scale_shape or grid.shape), size, end),
    }
    write_raw(model / "model.safetensors", header, codes.tobytes() + grid.tobytes())
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    (model / "config.json").write_text(json.dumps(config))
    wide = np.kron(grid, np.ones(block, np.float32))[:rows, :cols]
    return formats.F8_E4M3.dequantize(codes) * wide


@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_fp8_with_block_scales(model, block):
    values = fp8_model(model, block=block)
    checkpoint = open_checkpoint(model)
    np.testing.assert_array_equal(checkpoint.numpy("w.weight"), values)
    extents = per_expert_of_one(checkpoint)
    rows = expert_rows(checkpoint, extents, extents.gate, "gate")
    np.testing.assert_array_equal(rows.read(100, 199), values[100:199])
    with pytest.raises(CheckpointError, match=f"w.weight is F8_E4M3.*mer convert {model}"):
        require_streamable(checkpoint)


def per_expert_of_one(checkpoint):
    from mer.weights.experts import _extents

    info = checkpoint.tensors["w.weight"]
    return _extents([(info.file, info.offset, info.format, info.rows, info.cols, info.scales)] * 3)


def test_fp8_scales_that_do_not_fit(model):
    fp8_model(model, scale_shape=(3, 2))
    with pytest.raises(CheckpointError, match=r"w.weight_scale_inv is F32 \[3, 2\].*must be F32 \[2, 3\]"):
        open_checkpoint(model)


def test_fp8_without_scales(model):
    write_raw(model / "model.safetensors", {"w": entry("F8_E4M3", [2, 2], 0, 4)}, b"\0" * 4)
    with pytest.raises(UnsupportedModelError, match=r"w is F8_E4M3 without"):
        open_checkpoint(model).numpy("w")
