"""Which tensor of a checkpoint plays which part, each with its shape checked."""

from __future__ import annotations

import re

from attrs import frozen

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights.checkpoint import Checkpoint
from mer.weights.experts import (
    ExpertExtents,
    MoeLayerSource,
    fused,
    per_expert,
    split_blocks,
    stacked,
    stored,
    transposed,
)
from mer.weights.formats import FORMATS, INTEGERS


@frozen
class ExpertNames:
    """How a family names expert weights, relative to the layer; `{e}` stands for the expert."""

    gate: str
    up: str
    down: str
    # Also as two tensors of all experts: [experts, 2 inter, hidden] and [experts, hidden, inter].
    fused_gate_up: str = "mlp.experts.gate_up_proj"
    fused_down: str = "mlp.experts.down_proj"
    # With that for down, also each by itself: [experts, inter, hidden].
    stacked_gate: str = "mlp.experts.gate_proj"
    stacked_up: str = "mlp.experts.up_proj"


class Tensors:
    """A model's parts. Raises CheckpointError for a tensor that is missing or of wrong shape or dtype."""

    def __init__(self, checkpoint: Checkpoint, renamed: tuple[str, str] = ("", "")) -> None:
        """renamed: what names begin with in here, and in place of that in the files."""
        self._checkpoint = checkpoint
        self._infos = checkpoint.tensors
        self.dense: dict[str, str] = {}
        self.experts: list[MoeLayerSource] = []
        self._asked: set[str] = set()
        self._root, self._before = "model.", ""
        self._renamed = renamed

    def inside(self, part: str) -> Tensors:
        """One model of several: from here on `model.` stands for `model.PART.`, if there are such names.

        Or, if there are such, all names for those with `PART.` before them.
        """
        if any(name.startswith(f"model.{part}.") for name in self._infos):
            self._root = f"model.{part}."
        elif any(name.startswith(f"{part}.model.") for name in self._infos):
            self._before = f"{part}."
        return self

    def without_root(self) -> Tensors:
        """From here on `model.` stands for nothing, if no name begins with it."""
        if not any(name.startswith("model.") for name in self._infos):
            self._root = ""
        return self

    def _full(self, name: str) -> str:
        inside, outside = self._renamed
        if inside and name.startswith(inside):
            return outside + name.removeprefix(inside)
        name = self._root + name.removeprefix("model.") if name.startswith("model.") else name
        return self._before + name

    def weights_not_asked_for(self) -> dict[str, int]:
        """Weights and biases of layers that play no part, and their layers' numbers."""
        layer = re.compile(re.escape(self._before + self._root) + r"layers\.(\d+)\..*(weight|bias)$")
        layers = {name: layer.match(name) for name in self._infos}
        return {name: int(m[1]) for name, m in sorted(layers.items()) if m and name not in self._asked}

    def has(self, name: str) -> bool:
        return self._full(name) in self._infos

    def take(self, part: str, name: str, *shape: int) -> None:
        """The dense tensor `name`, of this shape, is the model's `part`."""
        self.take_full(part, self._full(name), *shape)

    def take_full(self, part: str, name: str, *shape: int) -> None:
        """The same of a tensor that has this very name in the files."""
        self._check(name, shape)
        self.dense[part] = name

    def take_table(self, part: str, name: str, *shape: int) -> None:
        """Numbers of experts: integers, or, in a store, F32."""
        name = self._full(name)
        self._check(name, shape, "I32", "I64")
        self.dense[part] = name

    def take_conv(self, part: str, name: str, channels: int, kernel: int) -> None:
        """Weights of a convolution of each channel by itself: [channels, 1, kernel], or without the 1."""
        info = self._infos.get(self._full(name))
        plain = info is not None and len(info.shape) == 2
        self.take(part, name, *((channels, kernel) if plain else (channels, 1, kernel)))

    def take_linear(self, part: str, name: str, rows: int, cols: int, *, bias: bool = False) -> None:
        """`name`.weight [rows, cols], and `name`.bias [rows]."""
        self.take(part, f"{name}.weight", rows, cols)
        if bias:
            self.take(f"{part}_bias", f"{name}.bias", rows)

    def take_experts(self, layer: int, names: ExpertNames, n_experts: int, hidden: int, inter: int) -> None:
        """The routed experts of the next MoE layer, which is layer `layer` of the model."""
        prefix = self._full(f"model.layers.{layer}.")
        gate_up, down = prefix + names.fused_gate_up, prefix + names.fused_down
        wanted = [(inter, hidden), (inter, hidden), (hidden, inter)]
        extents: list[ExpertExtents]
        if self._checkpoint.kind == "store":
            extents = [stored(self._checkpoint, layer, e) for e in range(n_experts)]
        elif gate_up in self._infos:
            self._check(gate_up, (n_experts, 2 * inter, hidden))
            self._check(down, (n_experts, hidden, inter))
            extents = [fused(self._checkpoint, gate_up, down, e) for e in range(n_experts)]
        elif prefix + names.stacked_gate in self._infos:
            triple = [prefix + each for each in (names.stacked_gate, names.stacked_up, names.fused_down)]
            for name, shape in zip(triple, wanted, strict=True):
                self._check(name, (n_experts, *shape))
            gate, up, down = triple
            extents = [stacked(self._checkpoint, gate, up, down, e) for e in range(n_experts)]
        else:
            extents = []
            for e in range(n_experts):
                triple = [prefix + each.format(e=e) for each in (names.gate, names.up, names.down)]
                for name, shape in zip(triple, wanted, strict=True):
                    self._check(name, shape)
                extents.append(per_expert(self._checkpoint, *triple))
        self._append(layer, extents, hidden, inter)

    def take_interleaved_experts(self, layer: int, n_experts: int, hidden: int, inter: int) -> None:
        """The same where rows of gate and up alternate: stored by columns, or as blocks of MXFP4."""
        name = self._full(f"model.layers.{layer}.mlp.experts")
        gate_up, down = f"{name}.gate_up_proj", f"{name}.down_proj"
        if self._checkpoint.kind == "store":
            extents = [stored(self._checkpoint, layer, e) for e in range(n_experts)]
        elif f"{gate_up}_blocks" in self._infos:
            for each, rows, cols in (gate_up, 2 * inter, hidden), (down, hidden, inter):
                self._check(f"{each}_blocks", (n_experts, rows, cols // 32, 16), "U8")
                self._check(f"{each}_scales", (n_experts, rows, cols // 32), "U8")
            extents = [split_blocks(self._checkpoint, gate_up, down, e) for e in range(n_experts)]
        else:
            self._check(gate_up, (n_experts, hidden, 2 * inter))
            self._check(down, (n_experts, inter, hidden))
            extents = [transposed(self._checkpoint, gate_up, down, e) for e in range(n_experts)]
        self._append(layer, extents, hidden, inter)

    def _append(self, layer: int, extents: list[ExpertExtents], hidden: int, inter: int) -> None:
        wanted = [(inter, hidden), (inter, hidden), (hidden, inter)]
        for e, extent in enumerate(extents):
            shapes = [(m.rows, m.cols) for m in (extent.gate, extent.up, extent.down)]
            if shapes != wanted:
                raise CheckpointError(
                    f"{self._checkpoint.path}: expert {e} of layer {layer} has gate, up, down of {shapes}, "
                    f"config.json says {inter} x {hidden}"
                )
        self.experts.append(MoeLayerSource(layer, extents))

    def _check(self, name: str, shape: tuple[int, ...], *codes: str) -> None:
        """codes: the dtypes, where it is no floating-point one."""
        self._asked.add(name)
        info = self._infos.get(name)
        if info is None:
            raise CheckpointError(
                f"{self._checkpoint.path}: the tensor {name} is missing; config.json asks for it, "
                "so the download may be incomplete"
            )
        if (info.weights is None or info.weights in INTEGERS) and info.dtype.upper() not in codes:
            known = "BF16, F16, F32 or FP8"
            if self._checkpoint.kind == "gguf":
                known = ", ".join(each.name.upper() for each in FORMATS)
            raise UnsupportedModelError(
                f"{self._checkpoint.files[info.file]}: tensor {name} has dtype {info.dtype}, which "
                f"holds no weights that mer multiplies; take a file in {known}"
            )
        if tuple(info.shape) != shape:
            raise CheckpointError(
                f"{self._checkpoint.files[info.file]}: tensor {name} has shape {list(info.shape)}, "
                f"by config.json it must be {list(shape)}"
            )
