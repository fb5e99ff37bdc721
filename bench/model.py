"""What a token of a model costs, for benchmarks that divide by it."""

from __future__ import annotations

from pathlib import Path

from mer.config import EngineConfig
from mer.engine.budget import Budget, measure
from mer.model.families import load
from mer.streaming.experts import expert_tables
from mer.weights.checkpoint import open_checkpoint

# The interpreter that inspects the model is smaller than one that runs it.
SLACK = 24 << 20


class Model:
    """What a token of the model costs."""

    def __init__(self, store: Path) -> None:
        checkpoint = open_checkpoint(store)
        architecture = load(checkpoint)
        self.spec = spec = architecture.spec
        tables = expert_tables(architecture.experts)
        self.budget: Budget = measure(checkpoint, architecture, tables, EngineConfig(ram=1 << 50))
        embedding = checkpoint.tensors[architecture.dense["embedding"]].nbytes
        dense = self.budget.dense - (0 if spec.tied_embeddings else embedding)
        self.head = (
            embedding if spec.tied_embeddings else checkpoint.tensors[architecture.dense["head"]].nbytes
        )
        self.expert = tables.slot_bytes
        self.token_bytes = dense + spec.n_moe_layers * spec.top_k * self.expert
        # One that experts are read from, to measure the device with.
        self.file = store / "experts-00001.safetensors" if store.is_dir() else store

    def ram(self, share: float) -> int:
        """Bytes that hold this share of the experts."""
        cache = self.budget.slot * round(share * self.budget.experts)
        return int((self.budget.fixed + cache + SLACK) * 1.004)
