"""Reading GGUF headers: against the gguf package, and what a damaged or hostile file can do."""

import math
import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mer.errors import CheckpointError, MerError
from mer.model import families
from mer.weights.checkpoint import open_checkpoint
from mer.weights.gguf import TYPES, read_gguf

VALUES = {
    "a.uint8": (gguf.GGUFValueType.UINT8, 200),
    "a.int8": (gguf.GGUFValueType.INT8, -100),
    "a.uint16": (gguf.GGUFValueType.UINT16, 60000),
    "a.int16": (gguf.GGUFValueType.INT16, -30000),
    "a.uint32": (gguf.GGUFValueType.UINT32, 4_000_000_000),
    "a.int32": (gguf.GGUFValueType.INT32, -2_000_000_000),
    "a.float32": (gguf.GGUFValueType.FLOAT32, 1.5),
    "a.bool": (gguf.GGUFValueType.BOOL, True),
    "a.string": (gguf.GGUFValueType.STRING, "Grüße 世界"),
    "a.uint64": (gguf.GGUFValueType.UINT64, 2**63 + 1),
    "a.int64": (gguf.GGUFValueType.INT64, -(2**62)),
    "a.float64": (gguf.GGUFValueType.FLOAT64, 0.1),
}
ARRAYS = {
    "b.ints": [1, -2, 3],
    "b.floats": [0.5, -1.25],
    "b.strings": ["", "one", "zwei 二"],
    "b.flags": [True, False],
    "b.nested": [[1, 2], [3]],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (kind, value) in VALUES.items():
        writer.add_key_value(key, value, kind)
    for key, value in ARRAYS.items():
        writer.add_array(key, value)
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    for name in ("F32", "F16", "Q8_0", "Q4_0"):
        kind = gguf.GGMLQuantizationType[name]
        data = gguf.quants.quantize(rng.standard_normal((3, 5, 64), np.float32), kind)
        writer.add_tensor(f"t.{name}", data, raw_dtype=kind)
    writer.add_tensor("vector", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_types_are_those_of_ggml():
    wanted = {int(kind): (kind.name.lower(), *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert wanted == TYPES


def test_metadata(path):
    metadata = read_gguf(path).metadata
    for key, (_, value) in VALUES.items():
        assert metadata[key] == value
        assert type(metadata[key]) is type(value)
    for key, value in ARRAYS.items():
        assert metadata[key] == value
    assert metadata["general.architecture"] == "llama"
    assert set(VALUES) | set(ARRAYS) < set(metadata)


def test_tensors(path):
    found = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    for wanted in gguf.GGUFReader(path).tensors:
        tensor = found.pop(wanted.name)
        assert tensor.shape == tuple(wanted.shape[::-1])
        assert (tensor.type, tensor.offset, tensor.nbytes) == (
            wanted.tensor_type,
            wanted.data_offset,
            wanted.n_bytes,
        )
    assert not found


def test_a_large_vocabulary_costs_nothing_until_it_is_asked_for(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    tokens = [f"token {i}" for i in range(200_000)]
    writer.add_token_list(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"] == tokens
    # A length that became another one.
    raw = bytearray((tmp_path / "model.gguf").read_bytes())
    at = raw.index(b"token 199999") - 8
    raw[at : at + 8] = b"\xff" * 8
    (tmp_path / "model.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"changed while it was open; tokenizer.ggml.tokens is cut off"):
        metadata["tokenizer.ggml.tokens"]


def write_large(path: Path) -> int:
    """A Qwen3-MoE of 44 layers and 128 experts in Q4_0, its weights a hole. Returns where they begin."""
    hidden, inter, layers, experts, vocab = 4096, 1536, 44, 128, 151_936
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(layers)
    writer.add_context_length(40_960)
    writer.add_embedding_length(hidden)
    writer.add_head_count(64)
    writer.add_head_count_kv(4)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(8)
    writer.add_expert_feed_forward_length(inter)
    writer.add_token_list([f"token {i}".encode() for i in range(vocab)])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocab, hidden), "output": (vocab, hidden), "output_norm": (hidden,),
    }  # fmt: skip
    for i in range(layers):
        shapes |= {
            f"blk.{i}.{name}": shape
            for name, shape in {
                "attn_norm": (hidden,), "attn_q": (8192, hidden), "attn_k": (512, hidden),
                "attn_v": (512, hidden), "attn_output": (hidden, 8192), "attn_q_norm": (128,),
                "attn_k_norm": (128,),
                "ffn_norm": (hidden,), "ffn_gate_inp": (experts, hidden),
                "ffn_gate_exps": (experts, inter, hidden), "ffn_up_exps": (experts, inter, hidden),
                "ffn_down_exps": (experts, hidden, inter),
            }.items()
        }  # fmt: skip
    total = 0
    for name, shape in shapes.items():
        quantised = len(shape) > 1 and "gate_inp" not in name
        kind = gguf.GGMLQuantizationType.Q4_0 if quantised else gguf.GGMLQuantizationType.F32
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        total += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = path.stat().st_size
    os.truncate(path, -(-start // 32) * 32 + total)
    return start


def test_sixty_gigabytes(tmp_path, monkeypatch):
    """Opening and understanding a model reads its header, once, and keeps none of it."""
    path = tmp_path / "model.gguf"
    header, read, pread = write_large(path), 0, os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        nonlocal read
        found = pread(descriptor, size, offset)
        read += len(found)
        return found

    monkeypatch.setattr(os, "pread", counted)
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(path)
        kept, peak = tracemalloc.get_traced_memory()
        architecture = families.load(checkpoint)
        # Where each of 16,896 matrices lies, 300 bytes for one.
        everything = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 60e9
    assert header > 2_000_000
    assert header <= read <= header + (1 << 20)
    assert kept < 1 << 20
    assert peak < 4 << 20
    assert everything < 8 << 20
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert sum(len(layer.experts) for layer in architecture.experts) == 44 * 128


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_error_or_harmless(path, tmp_path, data):
    """Bytes of the header changed or cut off: a clear error, or a file that still describes itself."""
    raw = bytearray(path.read_bytes())
    header = read_gguf(path).tensors[0].offset
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 9))
        new = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<q", -1), bytes(8)]),
            )
        )
        raw[at : at + len(new)] = new
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(raw)
    problem = problem_with(damaged, len(raw))
    assert problem is None or str(damaged) in problem


def problem_with(damaged, size):
    try:
        found = read_gguf(damaged)
        for tensor in found.tensors:
            assert 0 < tensor.offset <= tensor.offset + tensor.nbytes <= size
        for key in found.metadata:
            found.metadata[key]
        open_checkpoint(damaged)
    except MerError as error:
        return str(error)
    return None


def header(*parts: bytes, version=3, tensors=0, values=0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name=b"t", dims=(32,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


NUMBER = struct.pack("<II", 4, 1)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the header is cut off after 0 bytes"),
        (b"GGML" + bytes(40), "does not begin with GGUF"),
        (header(version=1), "is GGUF version 1; mer reads versions 2 and 3"),
        (header(version=3 << 24), "big-endian numbers"),
        (header(values=2**60), "metadata values do not fit"),
        (header(tensors=2**40), "tensors do not fit"),
        (header(text(b"k"), NUMBER, text(b"k"), NUMBER, values=2), "the metadata key 'k' is there twice"),
        (header(text(b"k"), struct.pack("<I", 99), bytes(9), values=1), "unknown type number 99"),
        (header(text(b"k"), struct.pack("<IQ", 8, 2**63), bytes(9), values=1), "longer than the file"),
        (header(text(b"k"), struct.pack("<IIQ", 9, 4, 2**62), bytes(9), values=1), "longer than the file"),
        (header(text(b"k"), struct.pack("<IIQ", 9, 8, 2**61), bytes(9), values=1), "items of k do not fit"),
        (
            header(text(b"k"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 9, values=1),
            "arrays in arrays",
        ),
        (header(struct.pack("<Q", 2**40), bytes(30), values=1), "the length of a metadata key is"),
        (header(text(b"\xff"), NUMBER, values=1), "a metadata key is not UTF-8"),
        (header(tensor(dims=(2**40, 2**40)), bytes(64), tensors=1), "the download is incomplete"),
        (header(tensor(dims=(1,) * 5), bytes(64), tensors=1), "has 5 dimensions"),
        (header(tensor(dims=(4, 0)), bytes(64), tensors=1), "a dimension of none"),
        (header(tensor(kind=77), bytes(640), tensors=1), "has type number 77"),
        (header(tensor(kind=2, dims=(33,)), bytes(640), tensors=1), "rows of 33 are no multiple of 32"),
        (header(tensor(offset=1), bytes(640), tensors=1), "lies at 1, which is no multiple of 32"),
        (header(tensor(offset=2**63), bytes(640), tensors=1), "the download is incomplete"),
        (header(tensor(), tensor(), bytes(640), tensors=2), "the tensor t is there twice"),
        (header(text(b"general.alignment"), NUMBER[:4], struct.pack("<I", 3), values=1), "a power of two"),
    ],
)
def test_hostile(raw, message, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
