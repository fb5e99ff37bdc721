"""Files quantised as they are published: DeepSeek-V4 (FP4 and FP8), Kimi-K2-Thinking (INT4), FP8 of others.

What the weights are, transformers or the compressed-tensors package says, from the same tensors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_models import called, mer_here
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from harness import Runner
from make_checkpoints import edit_config, make
from safetensors.torch import load_file, save_file
from test_convert_models import INT8_ERROR, PROMPT, decoded, difference, from_fp8, oracle, to_fp8, to_mxfp4
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from mer.errors import CheckpointError, UnsupportedModelError
from mer.model.families import load, load_head
from mer.weights.checkpoint import Checkpoint, open_checkpoint
from mer.weights.extents import ExpertExtents
from mer.weights.rows import expert_rows

Tensors = dict[str, torch.Tensor]


def write(path: Path, tensors: Tensors, quantisation: dict | None = None, **config) -> None:
    """In the place of what is there."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    edit_config(path, quantization_config=quantisation, **config)


def matrices(checkpoint: Checkpoint, extents: ExpertExtents) -> list[np.ndarray]:
    """gate, up and down of an expert as mer reads them, f32."""
    return [expert_rows(checkpoint, extents, m, "it").read(0, m.rows) for m in extents.matrices]


def stored_matrices(store: Checkpoint, layer: int, expert: int) -> list[torch.Tensor]:
    """The same of a store, decoded by gguf."""
    extents = store.experts[layer, expert].extents
    (piece,) = extents.pieces
    return [
        decoded(
            m.format.name,
            store.read_bytes(piece.file, piece.offset + m.offset, m.nbytes, "it"),
            (m.rows, m.cols),
        )
        for m in extents.matrices
    ]


def to_e8m0(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3, and a power of two for each block of 128 x 128."""
    _, scales = to_fp8(weight)
    scales = torch.exp2(torch.ceil(torch.log2(scales)))
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    return (weight / wide).to(torch.float8_e4m3fn), scales.to(torch.float8_e8m0fnu)


def publish_v4(name: str) -> str:
    """What transformers calls a tensor, as DeepSeek's files have it."""
    name = name.removeprefix("model.").replace("attn.norm", "attn.kv_norm").replace("embed_tokens", "embed")
    return name.replace("hc_head.hc_", "hc_head_")


@pytest.fixture(scope="module")
def v4(tmp_path_factory) -> tuple[Path, Tensors, Tensors]:
    """DeepSeek-V4 as published; its tensors, and the weights as transformers decodes them (its names)."""
    path = tmp_path_factory.mktemp("v4") / "src"
    sizes = {"hidden_size": 128, "moe_intermediate_size": 96, "q_lora_rank": 32}
    sizes |= {"index_head_dim": 24, "num_hidden_layers": 3}
    make(path, "deepseek_v4", dtype=torch.bfloat16, **sizes)
    written: Tensors = {}
    expected: Tensors = {}
    decode = Fp8Dequantize(None)._dequantize_one
    for name, tensor in load_file(path / "model.safetensors").items():
        new = publish_v4(name)
        last = new.split(".")[-2] if "." in new else ""
        if ".experts." in name:
            codes, exponents = to_mxfp4(tensor.float())
            weight = codes.reshape(len(codes), -1).view(torch.int8)
            scale = exponents.view(torch.float8_e8m0fnu)
        elif last.startswith("w") and last[1] != "g" and "compressor" not in new and tensor.dim() == 2:
            weight, scale = to_e8m0(tensor.float())
        else:
            written[new], expected[name] = tensor, tensor.float()
            continue
        written[new], written[new.removesuffix("weight") + "scale"] = weight, scale
        expected[name] = decode(weight, scale, torch.float32)
    expected |= {n: t.long() for n, t in expected.items() if n.endswith("tid2eid")}
    quantisation = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    quantisation |= {"scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    write(path, written, quantisation, expert_dtype="fp4")
    return path, written, expected


def expert_of(tensors: Tensors, layer: int, expert: int) -> list[torch.Tensor]:
    base = f"model.layers.{layer}.ffn.experts.{expert}"
    return [tensors[f"{base}.{part}.weight"] for part in ("w1", "w3", "w2")]


def test_v4_stays_what_it_is(v4, tmp_path):
    """Experts are MXFP4 bit for bit; what is FP8 times a power of two is BF16, which rounds nothing."""
    path, written, expected = v4
    assert {str(t.dtype) for t in written.values()} >= {"torch.int8", "torch.float8_e8m0fnu"}
    called("convert", path, tmp_path / "dst", "--dense", "same")
    store = open_checkpoint(tmp_path / "dst")
    for layer in range(3):
        for e in range(8):
            for found, wanted in zip(
                stored_matrices(store, layer, e), expert_of(expected, layer, e), strict=True
            ):
                assert torch.equal(found, wanted)
    assert {m.format.name for m in store.experts[2, 7].extents.matrices} == {"mxfp4"}
    for name, wanted in expected.items():
        if ".experts." not in name:
            info = store.tensor(publish_v4(name))
            found = decoded(info.format.name, store.read(info.name), info.shape)
            assert torch.equal(found, wanted.float()), name


def test_v4_logits(v4, tmp_path):
    """Against transformers with the decoded weights."""
    path, _, expected = v4
    plain = tmp_path / "config"
    plain.mkdir()
    (plain / "config.json").write_bytes((path / "config.json").read_bytes())
    edit_config(plain, quantization_config=None, expert_dtype=None)
    logits = oracle("deepseek_v4", plain, expected, tmp_path / "again")
    for experts, bound in ("f32", 1e-4), ("same", INT8_ERROR):
        called("convert", path, tmp_path / experts, "--experts", experts, "--dense", "bf16")
        errors = difference(Runner(tmp_path / experts).logits(PROMPT), logits)
        assert np.median(errors) < bound
        assert experts == "same" or errors.max() < bound


def test_v4_is_converted_first(v4):
    path, *_ = v4
    said = called("inspect", path)
    assert "mer convert" in said
    assert "mxfp4" in said


def changed(path: Path, tmp_path: Path, change) -> Path:
    """A copy whose tensors are those that `change` gives of them."""
    tensors = change(load_file(path / "model.safetensors"))
    new = tmp_path / "changed"
    new.mkdir()
    (new / "config.json").write_bytes((path / "config.json").read_bytes())
    save_file({n: t.contiguous() for n, t in tensors.items()}, new / "model.safetensors")
    return new


W1 = "layers.0.ffn.experts.0.w1"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: {n: x for n, x in t.items() if n != f"{W1}.scale"},
            UnsupportedModelError,
            "dtype I8, which",
        ),
        (lambda t: t | {f"{W1}.scale": t[f"{W1}.scale"][:, :2]}, CheckpointError, r"must be \[96, 4\]"),
        (lambda t: t | {f"{W1}.weight": t[f"{W1}.weight"][:, :-1]}, CheckpointError, "two codes a byte"),
    ],
)
def test_v4_scales_that_do_not_fit(v4, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        load(open_checkpoint(changed(v4[0], tmp_path, change)))


def test_v4_a_scale_that_is_no_number(v4, tmp_path):
    def change(tensors):
        scale = tensors[f"{W1}.scale"].view(torch.uint8).clone()
        scale[3, 1] = 255
        return tensors | {f"{W1}.scale": scale.view(torch.float8_e8m0fnu)}

    path = changed(v4[0], tmp_path, change)
    said = mer_here("convert", path, tmp_path / "dst").stderr
    assert "a scale is NaN" in said


def int4(
    weight: torch.Tensor, group: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, torch.Tensor]:
    """A matrix as compressed-tensors packs it, by suffix; and what that is, by its own unpacking."""
    rows, cols = weight.shape
    groups = weight.reshape(rows, -1, group)
    scale = (groups.abs().amax(-1) / 7.5).to(dtype)
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int8).reshape(rows, cols)
    packed = pack_to_int32(codes, 4)
    again = unpack_from_int32(packed, 4, torch.Size((rows, cols)))
    shape = torch.tensor([rows, cols], dtype=torch.int32)
    values = again.float() * scale.float().repeat_interleave(group, 1)
    return {"packed": packed, "scale": scale, "shape": shape}, values


GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": GROUP, "input_activations": None}},
}


@pytest.fixture(scope="module")
def kimi(tmp_path_factory) -> tuple[Path, Tensors]:
    """Kimi-K2-Thinking as published: experts in INT4, all else BF16; the weights as they are meant."""
    path = tmp_path_factory.mktemp("kimi") / "src"
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
    make(path, "deepseek_v3", dtype=torch.bfloat16, **sizes)
    written: Tensors = {}
    expected: Tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if ".experts." not in name:
            written[name], expected[name] = tensor, tensor.float()
            continue
        parts, expected[name] = int4(tensor.float(), 64 if ".up_proj" in name else 32)
        written |= {f"{name}_{part}": each for part, each in parts.items()}
    write(path, written, INT4, model_type="kimi_k2")
    return path, expected


def test_kimi_int4_stays_what_it_is(kimi, tmp_path):
    """Q4_0 with the same codes and scales, by default; and the same model's logits."""
    path, expected = kimi
    said = called("convert", path, tmp_path / "dst", "--dense", "same")
    assert "left out" not in said
    store = open_checkpoint(tmp_path / "dst")
    parts = ("gate_proj", "up_proj", "down_proj")
    for layer, e in (1, 0), (1, 7), (2, 3):
        assert {m.format.name for m in store.experts[layer, e].extents.matrices} == {"q4_0"}
        for part, found in zip(parts, stored_matrices(store, layer, e), strict=True):
            assert torch.equal(found, expected[f"model.layers.{layer}.mlp.experts.{e}.{part}.weight"])
    plain = tmp_path / "config"
    plain.mkdir()
    (plain / "config.json").write_bytes((path / "config.json").read_bytes())
    edit_config(plain, quantization_config=None, model_type="deepseek_v3")
    logits = oracle("deepseek_v3", plain, expected, tmp_path / "again")
    assert np.median(difference(Runner(tmp_path / "dst").logits(PROMPT), logits)) < INT8_ERROR
    called("convert", path, tmp_path / "f32", "--format", "f32")
    assert difference(Runner(tmp_path / "f32").logits(PROMPT), logits).max() < 1e-4


def test_int4_with_a_scale_that_f16_has_not(kimi, tmp_path):
    """It would be rounded: that is refused, but for a group of zeros; other formats have the value itself."""
    name = "model.layers.1.mlp.experts.0.down_proj.weight"

    def scaled(tensors, zeros):
        scale = tensors[f"{name}_scale"].clone()
        scale[5, 1] = 1.0078125 * 2.0**-20
        codes = unpack_from_int32(tensors[f"{name}_packed"], 4, torch.Size((128, 64)))
        codes[5, 32:] = 0 if zeros else 3
        return tensors | {f"{name}_scale": scale, f"{name}_packed": pack_to_int32(codes, 4)}

    path = changed(kimi[0], tmp_path, lambda t: scaled(t, False))
    said = mer_here("convert", path, tmp_path / "dst").stderr
    assert "has the scale 9.61124897e-07, which Q4_0's 16 bits would round" in said.replace("\n", " ")
    checkpoint = open_checkpoint(path)
    down = matrices(checkpoint, load(checkpoint).experts[0].experts[0])[2]
    assert (down[5, 32:] == np.float32(3 * 1.0078125 * 2.0**-20)).all()
    (tmp_path / "changed").rename(tmp_path / "other")
    path = changed(kimi[0], tmp_path, lambda t: scaled(t, True))
    called("convert", path, tmp_path / "dst", "--restart")
    assert not stored_matrices(open_checkpoint(tmp_path / "dst"), 1, 0)[2][5, 32:].any()


def compressed(**weights) -> dict:
    """A quantization_config of compressed-tensors."""
    group = {"format": weights.pop("format", None), "weights": GROUP | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantised by 'awq'; mer reads BF16"),
        ({"quant_method": "gptq"}, "quantised by 'gptq'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantised by 'modelopt'"),
        ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes'"),
        ({"quant_method": "auto-round"}, "quantised by 'auto-round'"),
        (compressed(format="nvfp4-pack-quantized"), "has the format 'nvfp4-pack-quantized'"),
        (compressed(format="int-quantized"), "has the format 'int-quantized'"),
        (compressed(format="marlin-24"), "has the format 'marlin-24'"),
        (compressed(num_bits=8), "num_bits 8, pack-quantized is read with 4 alone"),
        (compressed(symmetric=False), "symmetric False, pack-quantized is read with True alone"),
        (compressed(actorder="group"), "columns in another order"),
        (compressed(format="float-quantized"), "type 'int', float-quantized is read with 'float' alone"),
    ],
)
def test_what_is_refused_by_config(kimi, tmp_path, quantisation, message):
    (tmp_path / "model.safetensors").symlink_to(kimi[0] / "model.safetensors")
    (tmp_path / "config.json").write_bytes((kimi[0] / "config.json").read_bytes())
    edit_config(tmp_path, quantization_config=quantisation)
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(tmp_path)


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: {f"{NAME}_zero_point": torch.zeros(2)}, UnsupportedModelError, "zero_point, which is not"),
        (lambda t: {f"{NAME}_g_idx": torch.zeros(2)}, UnsupportedModelError, "g_idx, which is not"),
        (
            lambda t: {f"{NAME}_packed": t[f"{NAME}_packed"].view(torch.uint8)},
            UnsupportedModelError,
            r"is U8 \[64, 64\], not I32",
        ),
        (
            lambda t: {f"{NAME}_scale": t[f"{NAME}_scale"][:5]},
            CheckpointError,
            r"BF16 \[5, 2\], it must be \[64,",
        ),
        (lambda t: {f"{NAME}_scale": torch.ones(64, 8)}, UnsupportedModelError, "128 columns have 8 scales"),
    ],
)
def test_what_is_refused_by_tensor(kimi, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        open_checkpoint(changed(kimi[0], tmp_path, lambda t: t | change(t)))


def per_row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E4M3 with a scale for each row, as compressed-tensors writes GLM-4.5-FP8; and what that is."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (weight / scale.float()).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * scale.float()


def per_matrix(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * scale


def per_block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scale = to_fp8(weight)
    return codes, scale, from_fp8(codes, scale)


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FLOAT = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": FLOAT8}},
}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("family", "quantise", "scale_name", "quantisation"),
    [
        ("glm4_moe", per_row, "weight_scale", FLOAT),
        ("qwen3_moe", per_block, "weight_scale_inv", BLOCKS | {"fmt": "e4m3"}),
        ("minimax_m2", per_block, "weight_scale_inv", BLOCKS | {"fmt": "float8_e4m3fn"}),
        ("glm_moe_dsa", per_block, "weight_scale_inv", BLOCKS),
        ("deepseek_v32", per_block, "weight_scale_inv", BLOCKS | {"scale_fmt": "ue8m0"}),
        ("mixtral", per_matrix, "weight_scale", {"quant_method": "fp8", "activation_scheme": "static"}),
    ],
)
def test_fp8_of_other_families(family, quantise, scale_name, quantisation, tmp_path):
    """Whichever way scales are given. Static scales of activations are not used: mer does not round these."""
    sizes = {"hidden_size": 160, "moe_intermediate_size": 144, "num_hidden_layers": 2}
    if family == "mixtral":
        sizes["intermediate_size"] = 144
    make(tmp_path / "src", family, dtype=torch.bfloat16, **sizes)
    written: Tensors = {}
    expected: Tensors = {}
    for name, tensor in load_file(tmp_path / "src/model.safetensors").items():
        plain = tensor.dim() != 2 or any(
            each in name for each in ("embed", "lm_head", "gate.weight", "weights_proj", "kv_b_proj")
        )
        if plain:
            written[name], expected[name] = tensor, tensor.float()
            continue
        codes, scale, expected[name] = quantise(tensor.float())
        written |= {name: codes, name.removesuffix("weight") + scale_name: scale}
        if quantise is per_matrix:
            written[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_bytes((tmp_path / "src/config.json").read_bytes())
    predicting = family in ("deepseek_v32", "glm_moe_dsa")
    if predicting:  # the layer for multi-token prediction, which their files have
        last = {n: t.clone() for n, t in written.items() if ".layers.1." in n}
        written |= {n.replace(".layers.1.", ".layers.2."): t for n, t in last.items()}
        for name, shape in {
            "eh_proj": (160, 320),
            "enorm": 160,
            "hnorm": 160,
            "shared_head.norm": 160,
        }.items():
            written[f"model.layers.2.{name}.weight"] = torch.ones(shape)
        written["model.layers.2.embed_tokens.weight"] = written["model.embed_tokens.weight"].clone()
    write(tmp_path / "src", written, quantisation, num_nextn_predict_layers=1 if predicting else None)
    assert "F8_E4M3" in (mer_here("run", tmp_path / "src", "x").stderr)
    called("convert", tmp_path / "src", tmp_path / "dst", "--format", "f32")
    if predicting:
        store = open_checkpoint(tmp_path / "dst")
        assert load_head(store, load(store)) is not None
    logits = oracle(family, config, expected, tmp_path / "again")
    assert difference(Runner(tmp_path / "dst").logits(PROMPT), logits).max() < 1e-4
