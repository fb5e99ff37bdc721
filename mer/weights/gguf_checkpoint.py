"""Opening a GGUF file, in one part or several: its tensors under the names that the families know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights import formats
from mer.weights.gguf import SHARD, TYPES, GGUFFile, GGUFTensor, read_gguf
from mer.weights.gguf_config import understand
from mer.weights.gguf_families import GGUFFamily
from mer.weights.hub import advice
from mer.weights.tensors import Checkpoint, TensorInfo

# Tensors by which frequencies are divided: config.json's key, and the rope_type that has them.
_FREQUENCIES: Final = {
    "rope_freqs.weight": ("frequency_factors", "default"),
    "rope_factors_short.weight": ("short_factor", "longrope"),
    "rope_factors_long.weight": ("long_factor", "longrope"),
}
_MAX_FREQUENCIES: Final = 1 << 16  # bytes
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
    family, config = understand(parts[0].metadata, shapes)
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        for tensor in part.tensors:
            name = _name(part.path, tensor.name, family, config["num_hidden_layers"])
            info = _info(tensor, number, name)
            tensors[info.name] = info
    checkpoint = Checkpoint(path, "gguf", config, [part.path for part in parts], tensors)
    _take_frequencies(checkpoint)
    return checkpoint


def _take_frequencies(checkpoint: Checkpoint) -> None:
    """What each rotary frequency is divided by is a tensor here; config.json says such things itself."""
    rope = checkpoint.config["rope_parameters"]
    # Where layers with a window have a rotary embedding of their own, it has none.
    rope = rope.get("full_attention", rope)
    for name, (key, kind) in _FREQUENCIES.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            continue
        if info.nbytes > _MAX_FREQUENCIES or rope["rope_type"] != kind:
            raise UnsupportedModelError(
                f"{checkpoint.files[info.file]}: has the tensor {name} {list(info.shape)} beside rope "
                f"scaling {rope['rope_type']!r}, which is not supported; take another file"
            )
        rope[key] = checkpoint.numpy(name).reshape(-1).tolist()


def _parts(path: Path) -> list[GGUFFile]:
    match = SHARD.fullmatch(path.name)
    if match and not path.exists():
        raise CheckpointError(f"{path} is missing: the model has {int(match[3])} parts; {advice(path)}")
    first = read_gguf(path)
    count = first.metadata.get("split.count", 1)
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
            raise CheckpointError(f"{file} is missing: the model has {count} parts; {advice(file)}")
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


def _name(path: Path, name: str, family: GGUFFamily, n_layers: int) -> str:
    """Hugging Face's name. Raises UnsupportedModelError for a part of a layer that nobody would use."""
    found = family.names.hugging_face(name)
    if found is not None:
        return found
    match = _IN_LAYER.fullmatch(name)
    # Layers of multi-token prediction stand behind the model's own; without them it answers all the same.
    if match is None or int(match[1]) >= n_layers or match[2] == "attn_rot_embd":
        return name
    raise UnsupportedModelError(
        f"{path}: has the tensor {name}, which models of {family.model_type} do not have here; take another "
        "file"
    )


def _info(tensor: GGUFTensor, file: int, name: str) -> TensorInfo:
    shape = tensor.shape
    rows = ("shared_expert_gate.weight", "moe_statics.e_score_correction_bias")  # of one
    if name.endswith(rows) and len(shape) == 1:
        shape = (1, *shape)
    known = {each.id: each for each in (*formats.FORMATS, *formats.INTEGERS)}
    title = TYPES[tensor.type][0]
    return TensorInfo(name, file, tensor.offset, tensor.nbytes, shape, title, known.get(tensor.type))
