"""What is to be said about one of GGUF's architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen

from mer.weights.gguf_families.names import Names
from mer.weights.gguf_keys import Keys


@frozen(eq=False)
class GGUFFamily:
    """One architecture in Hugging Face's terms.

    architecture: general.architecture. model_type: config.json's. config: config.json's other keys, besides
    those that `gguf_config` finds. names: of its tensors. neighbours: elements (2i, 2i + 1) of a head turn
    together in llama.cpp, not (i, i + dim / 2): config.json's rope_interleave. is_of: whether a file of the
    architecture is of this family, where several families share one. written: whether names are all that
    differs, so that such a file can also be written. tiled: value heads of the delta rule stand as one of
    each key head, then the next of each. merged: gate and up of a layer's experts are written as one tensor.
    of_spec: ModelSpec.family, where several share a model_type.
    """

    architecture: str
    model_type: str
    config: Callable[[Keys], dict[str, Any]]
    names: Names
    neighbours: bool = False
    is_of: Callable[[Keys], bool] = lambda keys: True
    written: bool = True
    tiled: bool = False
    merged: bool = False
    of_spec: str | None = None
