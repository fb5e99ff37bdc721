"""What a family's experts compute, told to who computes them."""

from __future__ import annotations

from mer._ext.moe import ExpertStreamer
from mer.model.dense import Vectors
from mer.model.spec import ModelSpec


def fit(streamer: ExpertStreamer, spec: ModelSpec, biases: list[tuple[Vectors, Vectors, Vectors]]) -> None:
    """biases: of each MoE layer, where the experts have such."""
    if spec.expert_bias:
        streamer.add_biases(biases)
    if spec.activation == "gelu":
        streamer.gelu()
    if spec.clamp is not None:
        streamer.clamp(spec.clamp.alpha, spec.clamp.limit, spec.clamp.added)
