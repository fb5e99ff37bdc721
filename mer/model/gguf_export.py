"""A model as a GGUF file: names, forms and numbers as llama.cpp wants them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from mer.errors import UnsupportedModelError
from mer.model.families import Architecture
from mer.model.families.rope import plain_frequencies
from mer.model.gguf_metadata import NOT_WRITTEN, hyper_parameters
from mer.model.gguf_recurrent import DELTA_PARTS, conv_form, delta_forms
from mer.model.spec import AttentionSpec, DeltaSpec, LatentAttentionSpec, ModelSpec
from mer.weights.convert import Report, left_out
from mer.weights.encode import Encoder
from mer.weights.extents import Matrix, MoeLayerSource
from mer.weights.formats import F32, Format
from mer.weights.gguf_families import BY_FAMILY, GGUFFamily
from mer.weights.gguf_writer import Entry, Progress, Value, write_gguf
from mer.weights.plan import Plan, Substitutions, choose
from mer.weights.reordered import Columns, Mapped, Picked, Source, Turned
from mer.weights.rows import dense_rows, expert_rows
from mer.weights.tensors import Checkpoint

# general.file_type, by the format of most weights.
_FILE_TYPES: Final = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 12,
    "q4_k": 15, "q5_k": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "bf16": 32, "mxfp4": 38,
}  # fmt: skip
_QUANTIZATION_VERSION: Final = 2


def export(
    checkpoint: Checkpoint,
    architecture: Architecture,
    path: Path,
    *,
    experts: Format | None,
    dense: Format | None,
    more: Mapping[str, Value],
    progress: Progress | None = None,
) -> Report:
    """Write the GGUF file `path`, with experts and other matrices in these formats, None: as they are.

    more: metadata besides hyper-parameters: the tokenizer's, the model's name. Vectors, routers, biases and
    norms are F32. Raises UnsupportedModelError for what llama.cpp can't compute, CheckpointError for a source
    that is damaged, ConfigError when `path` exists, MerError when writing fails.
    """
    with Encoder() as encoder:
        tensors = _Tensors(checkpoint, architecture, encoder)
        entries = tensors.entries(experts, dense)
        sizes: Counter[str] = Counter()
        for entry in entries:
            sizes[entry.format.name] += entry.nbytes
        metadata = {**file_metadata(architecture, sizes.most_common(1)[0][0]), **more}
        nbytes = write_gguf(path, metadata, entries, progress)
    plan = Plan(architecture.experts, tuple(architecture.dense.values()))
    return Report(path, nbytes, dict(sizes), tensors.notes.list(), left_out(checkpoint, plan), resumed=0)


def file_metadata(architecture: Architecture, form: str) -> dict[str, Value]:
    """What every such file says. form: that of most weights. Raises UnsupportedModelError."""
    family = _family(architecture)
    return {
        "general.architecture": family.architecture,
        "general.file_type": _FILE_TYPES[form],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **hyper_parameters(family, architecture.spec),
    }


def _family(architecture: Architecture) -> GGUFFamily:
    name = architecture.spec.family
    family = BY_FAMILY.get(name)
    if family is None:
        why = NOT_WRITTEN.get(name)
        raise UnsupportedModelError(
            f"models of {name} are not written as GGUF"
            + (f": {why}" if why else f"; known are {', '.join(sorted(BY_FAMILY))}")
        )
    return family


class _Tensors:
    """The tensors of a file, in the order in which the model uses them."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, encoder: Encoder) -> None:
        self.notes = Substitutions()
        self._checkpoint, self._architecture, self._encoder = checkpoint, architecture, encoder
        self._family = _family(architecture)

    def entries(self, experts: Format | None, dense: Format | None) -> list[Entry]:
        found: list[Entry] = []
        written: set[str] = set()
        for part, name in self._architecture.dense.items():
            if name not in written:  # the head may be the embedding
                written.add(name)
                found += self._dense(part, name, dense)
        for source in self._architecture.experts:
            found += self._stacked(source, experts)
        if factors := _frequency_factors(self._architecture.spec):
            data = np.array(factors, np.float32)
            found.append(Entry("rope_freqs.weight", data.shape, F32, lambda: iter([data.view(np.uint8)])))
        return found

    def _dense(self, part: str, name: str, wanted: Format | None) -> Iterator[Entry]:
        info = self._checkpoint.tensor(name)
        rows = dense_rows(self._checkpoint, info)
        kept = name in self._architecture.kept or len(info.shape) < 2
        layer, _, kind = part.rpartition(".")
        state = bool(layer) and self._architecture.spec.layers[int(layer)].state_index is not None
        for theirs, shape, source in self._forms(kind, name, info.shape, rows, state):
            form = F32 if kept else choose(wanted, source.format, source.cols)
            if not kept:
                self.notes.note(theirs, source.cols, wanted, form)
            yield Entry(self._gguf(theirs), shape, form, partial(self._encoder.slabs, [source], form))

    def _forms(
        self, kind: str, name: str, shape: tuple[int, ...], rows: Source, state: bool
    ) -> Iterator[tuple[str, tuple[int, ...], Source]]:
        """(Hugging Face's name, shape, values): of one tensor, one or two that llama.cpp has in its place.

        state: of a layer with a state in the place of attention.
        """
        spec, a = self._architecture.spec, self._architecture.spec.attention
        delta = spec.recurrent if isinstance(spec.recurrent, DeltaSpec) else None
        tile = self._family.tiled and delta is not None and not delta.tiled
        if spec.zero_centred_norms and kind.endswith("norm") and kind != "state_norm":
            yield name, shape, Mapped(rows, lambda values: values + np.float32(1.0))
            return
        if kind == "conv":
            yield conv_form(spec, name, shape, rows, tile)
            return
        if state and delta is not None and kind in DELTA_PARTS:
            yield from delta_forms(spec, kind, name, shape, rows, tile)
            return
        if kind in ("q", "k", "q_bias", "k_bias") and self._family.neighbours and not spec.rope.interleaved:
            yield name, shape, self._turned(name, rows)
        elif kind == "qkv" and self._family.neighbours:
            yield from self._parted(name, rows)
        elif kind == "kv_up":
            assert isinstance(a, LatentAttentionSpec)
            both, values = a.nope_dim + a.value_dim, np.arange(a.nope_dim, a.nope_dim + a.value_dim)
            keys = name.replace("kv_b_proj", "k_b_proj")
            yield keys, (a.n_heads, a.kv_rank, a.nope_dim), Turned(rows, both, a.nope_dim)
            values_name = name.replace("kv_b_proj", "v_b_proj")
            yield values_name, (a.n_heads, a.value_dim, a.kv_rank), Picked(rows, both, values)
        elif kind == "expert_gate_up_bias":
            for first, part in enumerate(("gate", "up")):
                columns = np.arange(first, shape[1], 2)
                new = name.replace("gate_up_proj", f"{part}_proj")
                yield new, (shape[0], len(columns)), Columns(rows, columns)
        elif kind == "gate_up":
            for half, part in zip(np.arange(rows.rows).reshape(2, -1), ("gate", "up"), strict=True):
                new = name.replace("input_linear", f"{part}_proj")
                yield new, (len(half), rows.cols), Picked(rows, rows.rows, half)
        elif kind == "shared_gate" or (kind == "router_choice_bias" and len(shape) == 2):
            yield name, shape[-1:], rows
        else:
            yield name, shape, rows

    def _parted(self, name: str, rows: Source) -> Iterator[tuple[str, tuple[int, ...], Source]]:
        """Queries, keys and values that stand one above the other, the first two as _turned() has them."""
        a = self._architecture.spec.attention
        assert isinstance(a, AttentionSpec)
        first = 0
        for part, heads in ("q", a.n_heads), ("k", a.n_kv_heads), ("v", a.n_kv_heads):
            order = np.arange(first, first + heads * a.head_dim)
            if part != "v":
                order = order.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
            new = name.replace("query_key_value", f"{part}_proj")
            yield new, (len(order), rows.cols), Picked(rows, rows.rows, order)
            first += heads * a.head_dim

    def _turned(self, name: str, rows: Source) -> Source:
        """Rows of q or k, with elements (i, i + dim / 2) of a head, which turn together, as neighbours."""
        a = self._architecture.spec.attention
        if not isinstance(a, AttentionSpec) or 2 * len(self._architecture.spec.rope.inv_freq) != a.head_dim:
            raise UnsupportedModelError(
                f"{rows.origin}: tensor {name} can't be written as GGUF: the order that its rows would have "
                "to have is known for heads that turn as a whole only"
            )
        order = np.arange(a.head_dim).reshape(2, -1).T.reshape(-1)
        if rows.rows == 1:  # a bias
            starts = np.arange(0, rows.cols, a.head_dim)[:, None]
            return Columns(rows, (starts + order).reshape(-1))
        return Picked(rows, a.head_dim, order)

    def _stacked(self, layer: MoeLayerSource, wanted: Format | None) -> Iterator[Entry]:
        """gate, up and down of all experts of a layer; in some families gate above up in one tensor."""
        together = (("gate", "up"), ("down",)) if self._family.merged else (("gate",), ("up",), ("down",))
        for parts in together:
            first: Matrix = getattr(layer.experts[0], parts[0])
            name = f"model.layers.{layer.layer}.mlp.experts.{'_'.join(parts)}_proj"
            form = choose(wanted, first.format, first.cols)
            sources: list[Source] = []
            for e, extents in enumerate(layer.experts):
                for part in parts:
                    matrix: Matrix = getattr(extents, part)
                    what = f"{part} of expert {e} of layer {layer.layer}"
                    if wanted is None and matrix.format is not first.format:
                        raise UnsupportedModelError(
                            f"{self._checkpoint.path}: {what} is {matrix.format.name}, {parts[0]} of expert "
                            f"0 {first.format.name}; in GGUF they are one tensor: name a format"
                        )
                    sources.append(expert_rows(self._checkpoint, extents, matrix, what))
            self.notes.note(name, first.cols, wanted, form)
            shape = (len(layer.experts), len(parts) * first.rows, first.cols)
            yield Entry(self._gguf(name), shape, form, partial(self._encoder.slabs, sources, form))

    def _gguf(self, name: str) -> str:
        # Of the language model of several models.
        plain = name.replace("model.language_model.", "model.").removeprefix("language_model.")
        found = self._family.names.gguf(plain)
        if found is None:
            raise UnsupportedModelError(
                f"{self._checkpoint.path}: tensor {name} has no name in GGUF's {self._family.architecture}"
            )
        return found


def _frequency_factors(spec: ModelSpec) -> list[float]:
    """What rope_freqs.weight divides the frequencies by; empty where there is no need of it."""
    rope = spec.rope
    if spec.family == "gemma4_text":  # of its global layers a part of each head turns
        rope = next(r for r, layer in zip(spec.ropes, spec.layers, strict=True) if layer.window is None)
        pairs = len(rope.inv_freq)
        plain = plain_frequencies(rope.theta, 2 * pairs, pairs)  # what is read is divided, too: 1 stays 1
        return [p / f if f > 1e-20 * p else 1e30 for p, f in zip(plain.tolist(), rope.inv_freq, strict=True)]
    if rope.scaling is None or rope.scaling.kind not in ("llama3", "factors"):
        return []
    pairs = len(rope.inv_freq)
    return [rope.theta ** (-i / pairs) / frequency for i, frequency in enumerate(rope.inv_freq)]
