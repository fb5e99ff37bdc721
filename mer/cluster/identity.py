"""What must be the same on two machines, so that where an expert is computed leaves no trace."""

from __future__ import annotations

from hashlib import blake2b
from importlib.metadata import version
from typing import Final

import numpy as np
from attrs import frozen

from mer._ext.moe import ExpertStreamer
from mer.streaming.experts import ExpertTables
from mer.weights import formats
from mer.weights.checkpoint import Checkpoint
from mer.weights.fingerprint import content_fingerprint

PROTOCOL: Final = 4


@frozen
class Identity:
    """Of a model, on a machine, in a version of mer."""

    version: str
    model: bytes
    arithmetic: str
    probe: bytes
    protocol: int = PROTOCOL

    def refusal(self, other: Identity) -> str | None:
        """Why `other` may not have its experts computed here; None: it may."""
        if other.protocol != self.protocol or other.version != self.version:
            return (
                f"the shard runs mer {self.version} (protocol {self.protocol}), the engine {other.version} "
                f"(protocol {other.protocol}); install the same version on both"
            )
        if other.model != self.model:
            return "the shard has another model than the engine; give both the same files"
        if other.arithmetic != self.arithmetic:
            return (
                f"kernels add in another order: {self.arithmetic} in the shard, {other.arithmetic} in the "
                "engine; set MER_ISA to one that both can run (see mer doctor), such as avx2"
            )
        if other.probe != self.probe:
            return (
                "the shard computes other bytes than the engine for the same expert and activations: its "
                "files differ, or its build of mer; use the same of both (mer verify checks files)"
            )
        return None


def identify(checkpoint: Checkpoint, tables: ExpertTables, streamer: ExpertStreamer, isa: str) -> Identity:
    """Of a model whose experts `streamer` computes; reads some. Raises CheckpointError, DeviceReadError."""
    return Identity(
        version=version("mer"),
        model=content_fingerprint(checkpoint),
        arithmetic=_arithmetic(tables, isa),
        probe=_probe(tables, streamer),
    )


def _arithmetic(tables: ExpertTables, isa: str) -> str:
    """The same name for instruction sets that give the same bytes: tests/test_kernels.py holds them to it."""
    if isa == "amx" and not (tables.layers[:, :3] == formats.BF16.id).any():
        return "avx2"
    return "avx2" if isa in ("avx512", "avxvnni") else isa


def _probe(tables: ExpertTables, streamer: ExpertStreamer) -> bytes:
    """What expert 0 gives for fixed activations, in the first layer of each kind."""
    digest = blake2b(digest_size=16)
    _, firsts = np.unique(tables.layers, axis=0, return_index=True)
    for layer in sorted(map(int, firsts)):
        hidden = int(tables.layers[layer, 3])
        mixed = np.arange(1, hidden + 1, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(1 << 32)
        x = (mixed.astype(np.float64) / (1 << 31) - 1).astype(np.float32)[None]
        ids = np.arange(streamer.top_k, dtype=np.int32)[None]
        weights = np.zeros((1, streamer.top_k), np.float32)
        weights[0, 0] = 1
        out = np.empty_like(x)
        streamer.forward(layer, x, ids, weights, out)
        digest.update(out.tobytes())
    return digest.digest()
