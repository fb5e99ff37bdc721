"""Small checkpoints, plans and conversions for the tests of conversion."""

import hashlib
import json

import numpy as np
from safetensors.numpy import save_file

from mer.weights import formats
from mer.weights.checkpoint import open_checkpoint
from mer.weights.convert import convert
from mer.weights.experts import MoeLayerSource, per_expert, stored
from mer.weights.plan import Plan

KEPT = frozenset({"norm.weight", "router.weight", "bias"})
DENSE = ("embed.weight", "norm.weight", "router.weight", "odd.weight", "bias")


def write_model(path, *, layers=(0, 2), experts=3, hidden=256, inter=96, dtype=np.float32, seed=0):
    """A checkpoint of two shards; returns its tensors."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    tensors = {
        "embed.weight": normal(50, hidden),
        "norm.weight": normal(hidden),
        "router.weight": normal(experts, hidden),
        "odd.weight": normal(hidden, 40),
        "bias": normal(7),
        "unused.weight": normal(2, 2),
    }
    for layer in layers:
        for e in range(experts):
            tensors[f"{layer}.{e}.gate"] = normal(inter, hidden)
            tensors[f"{layer}.{e}.up"] = normal(inter, hidden)
            tensors[f"{layer}.{e}.down"] = normal(hidden, inter)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, path / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "test"}')
    (path / "tokenizer.json").write_text('{"tokens": []}')
    return tensors


def plan_of(checkpoint, *, layers=(0, 2), experts=3):
    sources = []
    for layer in layers:
        if checkpoint.kind == "store":
            extents = [stored(checkpoint, layer, e) for e in range(experts)]
        else:
            extents = [
                per_expert(checkpoint, *(f"{layer}.{e}.{part}" for part in ("gate", "up", "down")))
                for e in range(experts)
            ]
        sources.append(MoeLayerSource(layer, extents))
    return Plan(sources, DENSE, KEPT)


def convert_model(src, dst, experts="q8_0", dense="bf16", shape=None, **options):
    checkpoint = open_checkpoint(src)
    wanted = [formats.by_name(name) if name else None for name in (experts, dense)]
    plan = plan_of(checkpoint, **(shape or {}))
    return convert(checkpoint, dst, plan, experts=wanted[0], dense=wanted[1], **options)


def hashes(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}
