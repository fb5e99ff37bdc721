"""The metadata of a GGUF file, read key by key under the architecture's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights.gguf import Metadata

SOFTMAX: Final = 1
SIGMOID: Final = 2
# expert_gating_func as config.json has it.
SCORES: Final = {SOFTMAX: "softmax", SIGMOID: "sigmoid"}


class Keys:
    """The values of one architecture: `block_count` stands for `qwen3moe.block_count`."""

    def __init__(self, metadata: Metadata, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """tensors: shapes by GGUF's names."""
        self.metadata = metadata
        self.tensors = tensors
        self.architecture = metadata.get("general.architecture")

    def __getitem__(self, key: str) -> Any:
        """Raises CheckpointError when there is none."""
        value = self.get(key)
        if value is None:
            raise CheckpointError(
                f"{self.metadata.path}: the metadata key {self.architecture}.{key} is missing; fetch it again"
            )
        return value

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def one(self, key: str, default: Any = None) -> Any:
        """A value that may be given for each layer, but has to be the same in all of them."""
        value = self[key] if default is None else self.get(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise UnsupportedModelError(
                f"{self.metadata.path}: {self.architecture}.{key} differs by layer, which is not supported"
            )
        return value[0]

    def where_any(self, key: str) -> Any:
        """The same, of layers that have any: others have 0."""
        value = self[key]
        some = [each for each in value if each] if isinstance(value, list) else [value]
        if len(set(some)) > 1:
            return self.one(key)  # which says what is wrong
        return some[0] if some else 0

    def has_part(self, part: str) -> bool:
        """Whether some layer has this tensor, `attn_q.bias` say."""
        return any(name.startswith("blk.") and name.endswith(f".{part}") for name in self.tensors)


def rope_of(keys: Keys) -> dict[str, Any]:
    """`rope_parameters`."""
    rope = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    rope["rope_type"] = kind
    if kind != "longrope":  # whose factor is that of the contexts
        rope["factor"] = keys["rope.scaling.factor"]
    for theirs, key in (
        ("original_max_position_embeddings", "rope.scaling.original_context_length"),
        ("beta_fast", "rope.scaling.yarn_beta_fast"),
        ("beta_slow", "rope.scaling.yarn_beta_slow"),
    ):
        if keys.get(key) is not None:
            rope[theirs] = keys[key]
    return rope
