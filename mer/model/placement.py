"""Which part of a model's dense weights is on a GPU, and what that takes there."""

from __future__ import annotations

from typing import Final

from attrs import frozen

from mer.model.spec import CompressedAttentionSpec, LatentAttentionSpec, ModelSpec


@frozen
class Placement:
    """What a GPU computes: the first `layers` layers but for their routed experts, and the head."""

    layers: int = 0
    head: bool = False


ON_THE_CPU: Final = Placement()


def refusal(spec: ModelSpec) -> str | None:
    """Why nothing of this model's dense part can be on a GPU; None: it can."""
    if spec.streams is not None:
        return "its hidden states are of several streams"
    for attention in spec.attentions:
        if isinstance(attention, CompressedAttentionSpec):
            return "its attention is over compressed positions"
        if isinstance(attention, LatentAttentionSpec):
            if attention.indexer is not None:
                return "its attention chooses positions (DSA)"
            continue
        if attention.qk_norm == "vector" and attention.qk_norm_last:
            return "it norms whole queries behind the rotary embedding"
    return None
