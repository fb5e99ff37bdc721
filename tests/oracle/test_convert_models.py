"""Converted models against transformers, which gets the stored weights, decoded by gguf, torch or numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import evidence
import gguf
import numpy as np
import pytest
import torch
import transformers
from cli_models import called
from harness import Runner
from make_checkpoints import CLASSES, FAMILY, SPARSE, edit_config, make
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mer.weights.checkpoint import Checkpoint, open_checkpoint
from mer.weights.experts import stored

MER = str(Path(sys.executable).with_name("mer"))
PROMPT = np.random.default_rng(5).integers(0, 211, 120).tolist()
WIDE = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256}
# With one layer the router sees exact numbers: an error of the experts can't change who is chosen.
ONE_LAYER = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
}
ONE_LAYER |= {"mlp_layer_types": ["sparse"]}
# Activations become int8 with a scale for each 32 of them: a logit is off by at most 0.007 to 0.015 of the
# largest one, as one expects of two products with errors of half a per cent.
INT8_ERROR = 0.035
# With three layers and the other matrices quantised, too, some tokens get other experts; of most tokens the
# logits stay close: 0.022 to 0.053.
MEDIAN_ERROR = 0.12


def decoded(form: str, data: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """Stored bytes -> f32, by the gguf package."""
    kind = gguf.GGMLQuantizationType[form.upper()]
    return torch.from_numpy(gguf.quants.dequantize(data.reshape(-1), kind).reshape(shape).astype(np.float32))


def expert_names(source: dict[str, torch.Tensor]) -> dict[tuple[int, int, int], str]:
    """(layer, expert, 0 gate, 1 up, 2 down) -> name in the source."""
    parts = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}
    found = {}
    for name in source:
        if ".experts." in name and name.endswith(".weight"):
            words = name.split(".")
            at = words.index("experts")
            found[int(words[2]), int(words[at + 1]), parts[words[at + 2]]] = name
    return found


def read_store(path: Path, source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor of a store under its name in the source."""
    store = open_checkpoint(path)
    tensors = {
        name: decoded(info.format.name, store.read(name), info.shape) for name, info in store.tensors.items()
    }
    for (layer, expert, part), name in expert_names(source).items():
        extents = stored(store, layer, expert)
        matrix, (piece,) = extents.matrices[part], extents.pieces
        data = store.read_bytes(piece.file, piece.offset + matrix.offset, matrix.nbytes, name)
        tensors[name] = decoded(matrix.format.name, data, (matrix.rows, matrix.cols))
    # Numbers of experts become floats.
    tensors |= {name: each.long() for name, each in tensors.items() if name.endswith("tid2eid")}
    return tensors | in_two_tensors(store, source)


def in_two_tensors(store: Checkpoint, source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts that the source has in two tensors.

    GPT-OSS as transformers has it: [E, H, 2I], gate and up in turn, and [E, I, H]. Granite as published and
    Gemma: [E, 2I, H] and [E, H, I].
    """
    found = {}
    for name in source:
        if not name.endswith(("experts.gate_up_proj", "block_sparse_moe.input_linear.weight")):
            continue
        layer, parts = int(name.split(".")[2]), []
        for e in range(len(source[name])):
            extents = stored(store, layer, e)
            (piece,), matrices = extents.pieces, extents.matrices
            parts.append(
                [
                    decoded(
                        m.format.name,
                        store.read_bytes(piece.file, piece.offset + m.offset, m.nbytes, name),
                        (m.rows, m.cols),
                    )
                    for m in matrices
                ]
            )
        gate, up, down = (torch.stack([each[i] for each in parts]) for i in range(3))
        if name.endswith("input_linear.weight"):
            found[name] = torch.cat([gate, up], 1)
            found[name.replace("input_linear", "output_linear")] = down
            continue
        if ".mlp." not in name:
            found[name] = torch.cat([gate, up], 1)
            found[name.replace("gate_up_proj", "down_proj")] = down
            continue
        gate, up, down = (each.swapaxes(1, 2) for each in (gate, up, down))
        found[name] = torch.stack([gate, up], -1).reshape(source[name].shape)
        found[name.replace("gate_up_proj", "down_proj")] = down
    return found


def oracle(family: str, config: Path, tensors: dict[str, torch.Tensor], path: Path):
    """transformers' logits of a model with these weights, f32 [tokens, vocab]."""
    evidence.asked("transformers")
    path.mkdir()
    save_file(
        {name: each.contiguous() for name, each in tensors.items()},
        path / "model.safetensors",
        {"format": "pt"},
    )
    (path / "config.json").write_bytes((config / "config.json").read_bytes())
    kind = getattr(transformers, f"{CLASSES[family]}ForCausalLM")
    model = kind.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()


def difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each token: the largest difference of a logit relative to the largest logit."""
    assert np.isfinite(found).all()
    return np.abs(found - expected).max(1) / np.abs(expected).max()


def compare(tmp_path: Path, family: str, *options: str) -> np.ndarray:
    """Convert tmp_path/src with the command line -> difference of each token's logits."""
    source = load_file(tmp_path / "src/model.safetensors")
    called("convert", tmp_path / "src", tmp_path / "dst", *options)
    tensors = read_store(tmp_path / "dst", source)
    assert set(tensors) == set(source)
    expected = oracle(family, tmp_path / "src", tensors, tmp_path / "again")
    return difference(Runner(tmp_path / "dst").logits(PROMPT), expected)


@pytest.mark.parametrize("family", FAMILY)
def test_bf16_is_lossless(family, tmp_path):
    make(tmp_path / "src", family, dtype=torch.bfloat16, **WIDE)
    errors = compare(tmp_path, family, "--experts", "bf16", "--dense", "bf16")
    assert errors.max() < 1e-4


@pytest.mark.parametrize("experts", ["q8_0", "q4_0", "q4_k", "mxfp4"])
@pytest.mark.parametrize("family", SPARSE)
def test_quantised_experts(family, experts, tmp_path):
    changes = {**WIDE, **ONE_LAYER} | ({"mlp_layer_types": ["moe"]} if family == "deepseek_v4" else {})
    make(tmp_path / "src", family, dtype=torch.bfloat16, **changes)
    errors = compare(tmp_path, family, "--experts", experts, "--dense", "bf16")
    assert errors.max() < INT8_ERROR


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_rows_that_do_not_fit(family, tmp_path):
    changes = WIDE | ONE_LAYER | {"moe_intermediate_size": 96}
    if family == "mixtral":
        changes["intermediate_size"] = 96
    make(tmp_path / "src", family, dtype=torch.bfloat16, **changes)
    errors = compare(tmp_path, family, "--experts", "q4_k", "--dense", "bf16")
    assert errors.max() < INT8_ERROR
    forms = {m.format.name for m in open_checkpoint(tmp_path / "dst").experts[0, 0].extents.matrices}
    assert forms == {"q4_k", "q8_0"}


@pytest.mark.parametrize("family", FAMILY)
def test_default_formats(family, tmp_path):
    # Where scores decide which positions are seen, rounding decides, too: here for few tokens.
    most_seen = {"index_topk": 100} if "index_topk" in FAMILY[family] else {}
    make(tmp_path / "src", family, dtype=torch.bfloat16, **WIDE, **most_seen)
    errors = compare(tmp_path, family)
    assert np.median(errors) < MEDIAN_ERROR


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., cols] as GPT-OSS is published: codes [..., cols / 32, 16], two a byte, and exponents."""
    blocks = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = torch.ldexp(blocks, -exponents[..., None])
    codes = (scaled.abs()[..., None] - steps).abs().argmin(-1) + 8 * (scaled < 0)
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    return packed.to(torch.uint8), (exponents + 127).to(torch.uint8)


def test_published_mxfp4(tmp_path):
    """Experts stay as they are but for the order of bytes; transformers itself decodes for the oracle."""
    make(tmp_path / "src", "gpt_oss", dtype=torch.bfloat16, **WIDE, **ONE_LAYER)
    tensors = load_file(tmp_path / "src/model.safetensors")
    decoded_by_peer = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        blocks, scales = to_mxfp4(tensors.pop(name).float().transpose(1, 2).contiguous())
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        decoded_by_peer[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, tmp_path / "src/model.safetensors", {"format": "pt"})
    expected = oracle("gpt_oss", tmp_path / "src", decoded_by_peer, tmp_path / "again")
    edit_config(tmp_path / "src", quantization_config={"quant_method": "mxfp4"})
    said = subprocess.run([MER, "run", tmp_path / "src", "x"], capture_output=True, text=True, check=False)
    assert said.returncode != 0
    assert "mer convert" in said.stderr
    assert "left out" not in called("convert", tmp_path / "src", tmp_path / "dst", "--dense", "same")
    matrices = open_checkpoint(tmp_path / "dst").experts[0, 0].extents.matrices
    assert {m.format.name for m in matrices} == {"mxfp4"}
    stored_weights = read_store(tmp_path / "dst", decoded_by_peer)
    for name, each in decoded_by_peer.items():
        assert torch.equal(stored_weights[name].float(), each.float()), name
    assert difference(Runner(tmp_path / "dst").logits(PROMPT), expected).max() < INT8_ERROR


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as DeepSeek publishes it: E4M3 and, for each block of 128 x 128, what to multiply it by."""
    rows, cols = weight.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-cols // 128) * 128)
    padded[:rows, :cols] = weight
    blocks = padded.reshape(padded.shape[0] // 128, 128, -1, 128)
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.reshape(padded.shape)[:rows, :cols].contiguous(), scales


def from_fp8(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return values.to(torch.float32) * wide[: values.shape[0], : values.shape[1]]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A DeepSeek-V3 in FP8 with a layer for multi-token prediction; the weights as torch decodes them."""
    path = tmp_path_factory.mktemp("fp8") / "src"
    sizes = {"hidden_size": 320, "moe_intermediate_size": 160, "intermediate_size": 288, "kv_lora_rank": 160}
    make(path, "deepseek_v3", dtype=torch.bfloat16, **sizes)
    plain = load_file(path / "model.safetensors")
    plain |= {n.replace("layers.2.", "layers.3."): t.clone() for n, t in plain.items() if "layers.2." in n}
    written: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in plain.items():
        if name.endswith("_proj.weight") or "_proj_with_mqa" in name or "q_b_proj" in name:
            written[name], written[f"{name}_scale_inv"] = to_fp8(tensor.float())
            expected[name] = from_fp8(written[name], written[f"{name}_scale_inv"])
        else:
            written[name] = tensor
            expected[name] = tensor.float()
    # In two shards, scales in another one than their weights.
    shards = {name: f"model-0000{1 + name.endswith('_scale_inv')}-of-00002.safetensors" for name in written}
    for shard in set(shards.values()):
        save_file({name: t for name, t in written.items() if shards[name] == shard}, path / shard)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    quantisation = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    edit_config(
        path,
        quantization_config=quantisation | {"weight_block_size": [128, 128]},
        num_nextn_predict_layers=1,
    )
    return path, expected


def test_fp8_decoded(fp8, tmp_path):
    """F32 keeps what torch decodes, bit for bit; BF16 and Q8_0 round it as torch and gguf do."""
    src, expected = fp8
    used = {name: tensor for name, tensor in expected.items() if ".layers.3." not in name}
    said = called("convert", src, tmp_path / "f32", "--experts", "f32", "--dense", "f32")
    n_left = sum(".layers.3." in name for shard in src.glob("*.safetensors") for name in load_file(shard))
    assert f"model.layers.3.* (multi-token prediction), {n_left} tensors" in said
    found = read_store(tmp_path / "f32", used)
    assert set(found) == set(used)
    for name, tensor in used.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
    called("convert", src, tmp_path / "bf16", "--experts", "q8_0", "--dense", "same")
    found = read_store(tmp_path / "bf16", used)
    for name, tensor in used.items():
        if ".experts." in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            rounded = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
            assert np.array_equal(found[name].numpy(), rounded), name
        else:
            rounded = tensor if name.endswith("bias") else tensor.to(torch.bfloat16).float()
            torch.testing.assert_close(found[name], rounded, rtol=0, atol=0, msg=name)


def test_fp8_logits(fp8, tmp_path):
    src, expected = fp8
    called("convert", src, tmp_path / "dst", "--experts", "f32", "--dense", "f32")
    used = {name: tensor for name, tensor in expected.items() if ".layers.3." not in name}
    edit = json.loads((src / "config.json").read_text())
    del edit["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(edit))
    logits = oracle("deepseek_v3", tmp_path, used, tmp_path / "again")
    assert difference(Runner(tmp_path / "dst").logits(PROMPT), logits).max() < 1e-4


@pytest.mark.parametrize("family", FAMILY)
def test_number_of_parameters(family, tmp_path):
    """As transformers counts them; the choice bias of a router is a buffer there."""
    model = make(tmp_path / "src", family)
    facts = json.loads(called("inspect", tmp_path / "src", "--json"))
    biases = ("correction_bias", "expert_bias", "layer_scalar")
    buffers = sum(each.numel() for name, each in model.named_buffers() if name.endswith(biases))
    assert facts["parameters"] == model.num_parameters() + buffers
    idle = sum(
        each.numel() * (facts["spec"]["router"]["n_experts"] - 2) // facts["spec"]["router"]["n_experts"]
        for name, each in model.named_parameters()
        if ".experts." in name
    )
    assert facts["active_parameters"] == facts["parameters"] - idle
