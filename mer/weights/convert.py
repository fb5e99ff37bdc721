"""Converting a checkpoint to an expert store: a slab of rows at a time, in the same bytes on every run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer.errors import CheckpointError, ConfigError
from mer.weights.encode import Encoder
from mer.weights.formats import Format
from mer.weights.partial import PartialStore
from mer.weights.plan import Plan, Substitution, TensorJob, Work, lay_out
from mer.weights.store_layout import MAX_FILE, TensorPlace, new_checksum
from mer.weights.tensors import Checkpoint

# What a model has beside its weights.
BESIDE: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip

Progress = Callable[[int, int], None]


@frozen(eq=False)
class Report:
    """What was written. nbytes: of all files. formats: bytes of weights by format.

    left_out: tensors of the source that the model does not use. resumed: tensors that an earlier, interrupted
    run had finished.
    """

    path: Path
    nbytes: int
    formats: dict[str, int]
    substitutions: list[Substitution]
    left_out: list[str]
    resumed: int


def convert(
    checkpoint: Checkpoint,
    dst: Path,
    plan: Plan,
    *,
    experts: Format | None,
    dense: Format | None,
    restart: bool = False,
    progress: Progress | None = None,
    max_file: int = MAX_FILE,
    texts: Mapping[str, str] | None = None,
) -> Report:
    """Write the expert store `dst` from `checkpoint`, with experts and dense tensors in these formats.

    None leaves the source's own format (8-bit floats become BF16). texts: more files of the store, by name:
    config.json and the tokenizer's, of a source that is no directory. `progress` is called with (bytes done,
    bytes in all). An interrupted conversion leaves `dst`.partial, and the same call goes on where it ended;
    `restart` throws that away. Raises ConfigError when `dst` exists or `dst`.partial is of another
    conversion, CheckpointError for a source that is damaged, MerError when writing fails: `dst`
    then does not exist.
    """
    if dst.exists() or dst.is_symlink():
        raise ConfigError(f"{dst} exists already; name a new directory, or remove it first")
    work = lay_out(checkpoint, plan, experts, dense, max_file)
    if restart:
        _throw_away(dst.with_name(dst.name + ".partial"))
    with PartialStore(dst, [layout for layout, _ in work.files], _identity(checkpoint)) as store:
        resumed = len(store.done)
        _write(store, work, progress or (lambda done, total: None))
        files = {name: checkpoint.path / name for name in BESIDE}
        extra = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
        extra |= {name: text.encode() for name, text in (texts or {}).items()}
        store.finish(extra)
    nbytes = sum(file.stat().st_size for file in dst.iterdir())
    return Report(dst, nbytes, work.formats, work.substitutions, left_out(checkpoint, plan), resumed)


def left_out(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Names of the tensors that the model does not use."""
    used = {*plan.dense, *_tensors_of_experts(checkpoint, plan)}
    return sorted(name for name in checkpoint.tensors if name not in used)


def _throw_away(partial: Path) -> None:
    try:
        shutil.rmtree(partial)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"{partial}: can't be removed: {error.strerror}") from error


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells this source from another one: names, sizes and times of its files, its config.json."""
    try:
        stats = [file.stat() for file in checkpoint.files]
        file = checkpoint.path / "config.json"
        config = file.read_bytes() if file.exists() else json.dumps(checkpoint.config).encode()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: can't be read: {error.strerror}") from error
    files = [[f.name, s.st_size, s.st_mtime_ns] for f, s in zip(checkpoint.files, stats, strict=True)]
    return {"journal": 1, "source": files, "config": hashlib.sha256(config).hexdigest()}


def _tensors_of_experts(checkpoint: Checkpoint, plan: Plan) -> set[str]:
    """Names of the tensors that hold routed experts or their scales."""
    starts = set()
    runs = []
    for layer in plan.layers:
        for expert in layer.experts:
            runs += [(p.file, p.offset, p.offset + p.nbytes) for p in expert.pieces]
            starts |= {(m.scales.file, m.scales.offset) for m in expert.matrices if m.scales}
    for name in plan.dense:
        for scales in checkpoint.tensors[name].scales, checkpoint.tensors[name].layout:
            if scales:
                starts.add((scales.file, scales.offset))
    runs.sort()
    inside = set()
    infos = sorted(checkpoint.tensors.values(), key=lambda info: (info.file, info.offset))
    position = 0
    for info in infos:
        while position < len(runs) and (runs[position][0], runs[position][2]) <= (info.file, info.offset):
            position += 1
        if position < len(runs):
            file, start, stop = runs[position]
            if file == info.file and start < info.offset + info.nbytes and info.offset < stop:
                inside.add(info.name)
        if (info.file, info.offset) in starts:
            inside.add(info.name)
    return inside


def _write(store: PartialStore, work: Work, progress: Progress) -> None:
    total = sum(layout.data_bytes for layout, _ in work.files)
    done = 0
    with Encoder() as encoder:
        for layout, jobs in work.files:
            for place, job in zip(layout.tensors, jobs, strict=True):
                if (layout.name, job.name) not in store.done:
                    _write_tensor(store, encoder, layout.name, place, job)
                done += place.nbytes
                progress(done, total)


def _write_tensor(
    store: PartialStore, encoder: Encoder, file: str, place: TensorPlace, job: TensorJob
) -> None:
    checksum = new_checksum()
    position = 0

    def put(data: NDArray[np.uint8]) -> None:
        nonlocal position
        view = data.reshape(-1).data
        store.write(file, place.offset + position, view)
        checksum.update(view)
        position += len(view)

    for segment in job.segments:
        put(np.zeros(segment.offset - position, np.uint8))
        for data in encoder.slabs([segment.source], segment.format):
            put(data)
    put(np.zeros(place.nbytes - position, np.uint8))
    store.record(file, job.name, checksum.hexdigest())
