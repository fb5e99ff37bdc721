"""What a conversion shall do: which tensors, in which format, and where that does not fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from attrs import frozen

from mer.errors import CheckpointError
from mer.weights.extents import ExpertExtents, MoeLayerSource
from mer.weights.formats import BF16, F8_E4M3, F16, F32, INTEGERS, Q4_K, Q8_0, Format
from mer.weights.rows import Rows, dense_rows, expert_rows
from mer.weights.store_layout import (
    MAX_FILE,
    FileLayout,
    MatrixPlace,
    expert_name,
    lay_out_dense,
    lay_out_experts,
    place_matrices,
)
from mer.weights.tensors import Checkpoint

_PARTS = ("gate", "up", "down")


@frozen
class Plan:
    """The tensors of a model. layers: its routed experts. dense: names of all other tensors.

    kept: those of `dense` whose precision is not touched whatever is asked for: norms, routers, biases.
    """

    layers: list[MoeLayerSource]
    dense: tuple[str, ...]
    kept: frozenset[str] = frozenset()


@frozen
class Substitution:
    """`count` matrices like `what`, whose rows of `cols` do not fit the format asked for."""

    what: str
    cols: int
    wanted: Format
    got: Format
    count: int


@frozen(eq=False)
class Segment:
    """A matrix to write. offset: bytes from the start of its tensor in the store."""

    source: Rows
    format: Format
    offset: int


@frozen(eq=False)
class TensorJob:
    """One tensor of the store: its segments in order of offset; what lies between is zero."""

    name: str
    segments: tuple[Segment, ...]


@frozen(eq=False)
class Work:
    """The files to write and, for each, the tensors in order. formats: bytes of weights in each format."""

    files: list[tuple[FileLayout, list[TensorJob]]]
    substitutions: list[Substitution]
    formats: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(layout.data_start + layout.data_bytes for layout, _ in self.files)


def choose(wanted: Format | None, source: Format, cols: int) -> Format:
    """The format a matrix gets. None: the source's own; 8-bit floats become BF16, integers F32.

    Where rows do not fit: Q8_0 in place of Q4_K if that fits, else 16 bits.
    """
    plain = {F8_E4M3: BF16, **dict.fromkeys(INTEGERS, F32)}.get(source, source)
    if wanted is None or wanted is plain:
        return plain
    if wanted.fits(cols):
        return wanted
    if wanted is Q4_K and Q8_0.fits(cols):
        return Q8_0
    return plain if plain in (F16, BF16) else F16


class Substitutions:
    """Collects where a format did not fit."""

    def __init__(self) -> None:
        self._found: Counter[tuple[str, int, Format, Format]] = Counter()

    def note(self, name: str, cols: int, wanted: Format | None, got: Format) -> None:
        if wanted is not None and got is not wanted:
            self._found[re.sub(r"\.\d+(?=\.|$)", ".*", name), cols, wanted, got] += 1

    def list(self) -> list[Substitution]:
        return [Substitution(*key, count) for key, count in self._found.items()]


def lay_out(
    checkpoint: Checkpoint,
    plan: Plan,
    experts: Format | None,
    dense: Format | None,
    max_file: int = MAX_FILE,
) -> Work:
    """Decide every tensor's format and place. Raises CheckpointError when experts of a layer differ."""
    notes = Substitutions()
    sizes: Counter[str] = Counter()
    dense_jobs = _dense_jobs(checkpoint, plan, dense, notes)
    layout = lay_out_dense(
        {name: (job.segments[0].format, checkpoint.tensors[name].shape) for name, job in dense_jobs.items()},
        experts=bool(plan.layers),
    )
    files = [(layout, [dense_jobs[tensor.name] for tensor in layout.tensors])]
    jobs: dict[str, TensorJob] = {}
    layers = []
    for layer in plan.layers:
        places = _expert_places(layer.experts[0], experts)
        layers.append((layer.layer, len(layer.experts), places))
        for e, extents in enumerate(layer.experts):
            name = expert_name(layer.layer, e)
            jobs[name] = _expert_job(checkpoint, name, extents, places)
            for part, place in zip(_PARTS, places, strict=True):
                notes.note(f"{name}.{part}", place.cols, experts, place.format)
    files += [(file, [jobs[t.name] for t in file.tensors]) for file in lay_out_experts(layers, max_file)]
    for job in (job for _, batch in files for job in batch):
        for segment in job.segments:
            size = segment.source.rows * segment.format.row_bytes(segment.source.cols)
            sizes[segment.format.name] += size
    return Work(files, notes.list(), dict(sizes))


def _dense_jobs(
    checkpoint: Checkpoint, plan: Plan, wanted: Format | None, notes: Substitutions
) -> dict[str, TensorJob]:
    jobs: dict[str, TensorJob] = {}
    for name in _unique(plan.dense):
        info = checkpoint.tensor(name)
        rows = dense_rows(checkpoint, info)
        if name in plan.kept or len(info.shape) < 2:
            form = F32 if info.format in (F8_E4M3, *INTEGERS) else info.format
        else:
            form = choose(wanted, info.format, info.cols)
            notes.note(name, info.cols, wanted, form)
        jobs[name] = TensorJob(name, (Segment(rows, form, 0),))
    return jobs


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _expert_places(first: ExpertExtents, wanted: Format | None) -> tuple[MatrixPlace, ...]:
    """One layout for all experts of a layer, decided by the first."""
    return place_matrices([(choose(wanted, m.format, m.cols), m.rows, m.cols) for m in first.matrices])


def _expert_job(
    checkpoint: Checkpoint, name: str, extents: ExpertExtents, places: tuple[MatrixPlace, ...]
) -> TensorJob:
    segments = []
    for part, matrix, place in zip(_PARTS, extents.matrices, places, strict=True):
        if (matrix.rows, matrix.cols) != (place.rows, place.cols):
            raise CheckpointError(
                f"{checkpoint.path}: {part} of {name} is {matrix.rows} x {matrix.cols}, "
                f"that of the layer's first expert {place.rows} x {place.cols}; they must be equal"
            )
        rows = expert_rows(checkpoint, extents, matrix, f"{part} of {name}")
        segments.append(Segment(rows, place.format, place.offset))
    return TensorJob(name, tuple(segments))
