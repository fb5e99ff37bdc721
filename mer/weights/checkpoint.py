"""Opening a checkpoint: a Hugging Face directory of safetensors, a GGUF file, or an expert store."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights import expert_store, published
from mer.weights.formats import F8_E4M3
from mer.weights.gguf_checkpoint import is_gguf, open_gguf
from mer.weights.hub import INDEX, advice
from mer.weights.safetensors import RawTensor, read_header
from mer.weights.tensors import Checkpoint, TensorInfo, format_of_dtype

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "require_streamable"]

_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open the model at `path`, a directory or a GGUF file, and check every header; reads no weights.

    Raises CheckpointError, naming file and tensor, for what is missing or damaged, UnsupportedModelError for
    what `mer` can't read.
    """
    path = Path(path)
    if is_gguf(path) and path.exists():
        return open_gguf(path)
    _check_directory(path)
    config = read_config(path)
    if expert_store.is_store(path):
        return expert_store.open_store(path, config)
    published.check(path, config)
    files, index = _find_files(path)
    tensors: dict[str, TensorInfo] = {}
    for number, file in enumerate(files):
        for raw in read_header(file).tensors:
            if raw.name in tensors:
                other = files[tensors[raw.name].file]
                raise CheckpointError(
                    f"{file}: the tensor {raw.name} is also in {other.name}; remove the file that does not "
                    f"belong to the model, or write {INDEX}"
                )
            tensors[raw.name] = _info(raw, number)
    for name, shard in index.items():
        info = tensors.get(name)
        if info is None or files[info.file].name != shard:
            raise CheckpointError(
                f"{path / shard}: the tensor {name} is missing, {INDEX} says it is here; "
                "the files are of different downloads, fetch them again"
            )
    published.attach(path, config, files, tensors)
    return Checkpoint(path, "hf", config, files, tensors)


def require_streamable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when some weights can't be used where they lie and need `mer convert`."""
    for info in checkpoint.tensors.values():
        if info.weights is F8_E4M3 or info.layout is not None:
            raise CheckpointError(
                f"{checkpoint.files[info.file]}: tensor {info.name} is {info.dtype} with scales apart, "
                f"which is not run in place; "
                f"convert the model first: mer convert {checkpoint.path} NEW_DIRECTORY"
            )


def read_config(path: Path) -> dict[str, Any]:
    """config.json of the model in directory `path`. Raises CheckpointError."""
    return _read_json(path / "config.json", f"every checkpoint needs it; {advice(path)}")


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> name of its file, as the list of the model in directory `path` says; empty when it has none.

    Raises CheckpointError.
    """
    file = path / INDEX
    if not file.exists():
        return {}
    index = _read_json(file, "fetch it again").get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{file}: weight_map must map tensors to files; fetch it again")
    for name in index.values():
        if Path(name).name != name:
            raise CheckpointError(f"{file}: {name!r} is no plain file name; fetch it again")
    return index


def _check_directory(path: Path) -> None:
    try:
        if path.is_dir():
            return
        exists = path.exists()
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    if not exists:
        hint = " (a model of the Hugging Face hub is fetched by: mer pull ORG/NAME)"
        raise CheckpointError(f"{path} does not exist; name the directory of a model{hint}")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a model; name its directory: {path.parent}")
    raise UnsupportedModelError(
        f"{path} is no model; name a GGUF file, or the directory with config.json and *.safetensors"
    )


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {advice}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    return parse_object(path, data)


def parse_object(path: object, data: bytes | str) -> dict[str, Any]:
    """The JSON object that `data`, from `path`, holds. Raises CheckpointError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: must be a JSON object, it is a {type(value).__name__}; fetch it again"
        )
    return value


def _find_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files, sorted by name, and the index, empty when there is none."""
    index = read_index(path)
    if index:
        names = sorted(set(index.values()))
    elif (path / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
        for match in filter(None, map(_SHARD.fullmatch, list(names))):
            stem, _, total = match.groups()
            names += [f"{stem}-{n:05d}-of-{total}.safetensors" for n in range(1, int(total) + 1)]
        names = sorted(set(names))
    if not names:
        other = next(
            (file.name for suffix in ("*.bin", "*.gguf", "*.pt") for file in path.glob(suffix)), None
        )
        found = f" (there is {other}, which is not read)" if other else ""
        raise CheckpointError(
            f"{path}: no *.safetensors file{found}; download the model's safetensors, {advice(path)}"
        )
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        more = f" and {len(missing) - 1} more of {len(names)}" if len(missing) > 1 else f" (of {len(names)})"
        raise CheckpointError(
            f"{path / missing[0]} is missing{more}; the download is incomplete, {advice(path)}"
        )
    return [path / name for name in names], index


def _info(raw: RawTensor, file: int) -> TensorInfo:
    form = format_of_dtype(raw.dtype)
    return TensorInfo(raw.name, file, raw.offset, raw.nbytes, raw.shape, raw.dtype, form)
