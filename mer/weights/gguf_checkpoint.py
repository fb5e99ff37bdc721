"""Opening a GGUF file, in one part or several: its tensors under the names that the families know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights import formats, gguf_families
from mer.weights.gguf import SHARD, TYPES, GGUFFile, GGUFTensor, read_gguf
from mer.weights.gguf_config import config_of
from mer.weights.tensors import Checkpoint, TensorInfo

_WHOLE: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Of a layer, without the ending (.weight or .bias).
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SHARED: Final = {"qwen2_moe": "mlp.shared_expert", "deepseek_v3": "mlp.shared_experts"}
# Experts of a layer in one tensor: these names have no ending.
_STACKED: Final = {
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
}
# Mixtral's of files that are older than stacked experts.
_SINGLE: Final = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
_IN_LAYER: Final = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a directory that has nothing but such."""
    if path.is_dir():
        return not (path / "config.json").exists() and any(path.glob("*.gguf"))
    return path.suffix == ".gguf"


def first_part(path: Path) -> Path:
    """The file with the metadata: `path`, the first of its parts, or that of the only model in a directory.

    Raises CheckpointError.
    """
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        models = {SHARD.sub(r"\1", file.name) for file in files}
        if len(models) > 1:
            names = ", ".join(file.name for file in files[:3])
            raise CheckpointError(f"{path}: holds several GGUF models ({names}, ...); name the file")
        path = files[0]
    match = SHARD.fullmatch(path.name)
    return path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf") if match else path


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF model; reads no weights. config: as Hugging Face's config.json would be.

    Raises CheckpointError, naming file and tensor, for what is missing or damaged, UnsupportedModelError for
    what `mer` can't read.
    """
    path = first_part(path)
    parts = _parts(path)
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        for tensor in part.tensors:
            if tensor.name in shapes:
                raise CheckpointError(
                    f"{part.path}: the tensor {tensor.name} is also in another part; the parts are not of "
                    "one model, fetch them again"
                )
            shapes[tensor.name] = tensor.shape
    config = config_of(parts[0].metadata, shapes)
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        for tensor in part.tensors:
            info = _info(tensor, number, _name(part.path, tensor.name, config), config)
            tensors[info.name] = info
    return Checkpoint(path, "gguf", config, [part.path for part in parts], tensors)


def _parts(path: Path) -> list[GGUFFile]:
    first = read_gguf(path)
    count = first.metadata.get("split.count", 1)
    match = SHARD.fullmatch(path.name)
    if type(count) is not int or count < 1:
        raise CheckpointError(f"{path}: split.count is {count!r}, it must be a number of files")
    if count == 1:
        return [first]
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts, but is not called so (NAME-00001-of-{count:05d}.gguf); give "
            "the parts their names back"
        )
    parts = [first]
    for number in range(2, count + 1):
        file = path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
        if not file.exists():
            raise CheckpointError(f"{file} is missing: the model has {count} parts; fetch it")
        parts.append(read_gguf(file))
    for number, part in enumerate(parts):
        if part.metadata.get("split.no") != number:
            raise CheckpointError(
                f"{part.path}: says that it is part {part.metadata.get('split.no', 0) + 1}, by its name it "
                f"is {number + 1}; give the parts their names back"
            )
    total = first.metadata.get("split.tensors.count")
    there = sum(len(part.tensors) for part in parts)
    if total is not None and total != there:
        raise CheckpointError(f"{path}: the model has {total} tensors, its parts {there}; fetch them again")
    return parts


def _name(path: Path, name: str, config: dict[str, Any]) -> str:
    """Hugging Face's name. Raises UnsupportedModelError for a part of a layer that nobody would use."""
    if name in _WHOLE:
        return _WHOLE[name]
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        if name == "rope_freqs.weight":
            raise UnsupportedModelError(f"{path}: has rotary frequencies of its own, which is not supported")
        return name
    layer, part, ending = match.groups()
    family = config["model_type"]
    prefix = f"model.layers.{layer}"
    if family == "gpt_oss":
        if part == "attn_sinks":
            return f"{prefix}.self_attn.sinks"
        if part == "ffn_gate_inp":
            return f"{prefix}.mlp.router.{ending}"
        if part in _STACKED and ending == "bias":
            return f"{prefix}.{_STACKED[part]}_bias"
    own = gguf_families.NAMES.get(family, {})
    if f"{part}.{ending}" in own:
        return f"{prefix}.{own[f'{part}.{ending}']}"
    if part in _LAYER:
        return f"{prefix}.{_LAYER[part]}.{ending}"
    if part in _STACKED and ending == "weight":
        return f"{prefix}.{_STACKED[part]}"
    if part == "exp_probs_b":
        return f"{prefix}.mlp.gate.e_score_correction_bias"
    if family in _SHARED:
        if part == "ffn_gate_inp_shexp":
            return f"{prefix}.{_SHARED[family]}_gate.{ending}"
        if part.endswith("_shexp"):
            return f"{prefix}.{_SHARED[family]}.{part[4:-6]}_proj.{ending}"
    single, _, expert = part.partition(".")
    if family == "mixtral" and single in _SINGLE and expert.isdecimal():
        return f"{prefix}.block_sparse_moe.experts.{expert}.{_SINGLE[single]}.{ending}"
    # Layers of multi-token prediction stand behind the model's own; without them it answers all the same.
    if int(layer) >= config["num_hidden_layers"] or part == "attn_rot_embd":
        return name
    raise UnsupportedModelError(
        f"{path}: has the tensor {name}, which models of {family} do not have here; take another file"
    )


def _info(tensor: GGUFTensor, file: int, name: str, config: dict[str, Any]) -> TensorInfo:
    shape = tensor.shape
    if name.endswith("shared_expert_gate.weight") and len(shape) == 1:
        shape = (1, *shape)
    known = {each.id: each for each in formats.FORMATS}
    title = TYPES[tensor.type][0]
    return TensorInfo(name, file, tensor.offset, tensor.nbytes, shape, title, known.get(tensor.type))
