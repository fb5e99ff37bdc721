"""Runs a checkpoint through mer's forward pass, with routed experts that are read at once and kept."""

from __future__ import annotations

from pathlib import Path

import evidence
import numpy as np
from numpy.typing import NDArray

from mer._ext.kernels import Kernels, Pool
from mer._ext.uring import Reader
from mer.model.batch import Batch
from mer.model.dense import load_dense
from mer.model.families import load
from mer.model.forward import Forward
from mer.model.kv import BLOCK, KVCache
from mer.model.placement import ON_THE_CPU
from mer.model.state import StateCache
from mer.weights.checkpoint import open_checkpoint
from mer.weights.rows import expert_rows

# Most of them that a runner knows at once.
SEQUENCES = 12


class ResidentExperts:
    """All experts in memory; each (token, expert) product by the kernels, so that it is batch-invariant."""

    def __init__(self, checkpoint, sources, kernels, spec, biases):
        self.kernels, self.biases = kernels, biases
        self.gate = (
            spec.clamp and (spec.clamp.alpha, spec.clamp.limit, spec.clamp.added),
            spec.activation == "gelu",
        )
        self.layers = []
        for source in sources:
            experts = []
            for extents in source.experts:
                experts.append(
                    [
                        (m.format.id, expert_rows(checkpoint, extents, m, "expert").raw(0, m.rows))
                        for m in extents.matrices
                    ]
                )
            self.layers.append(experts)

    def wants_guesses(self, tokens):
        return False

    def forward(self, layer, x, ids, weights, out, ahead=None):
        assert out.shape == x.shape
        assert len(set(map(len, map(set, ids.tolist())))) == 1, "an expert is chosen twice"
        outputs = np.zeros((*ids.shape, x.shape[1]), np.float32)
        product = self.kernels.matmul_py
        for e in np.unique(ids):
            (fg, gate), (fu, up), (fd, down) = self.layers[layer][e]
            tokens, places = np.nonzero(ids == e)
            g, u = product(fg, gate, x[tokens]), product(fu, up, x[tokens])
            if self.biases:
                g, u = g + self.biases[layer][0][e], u + self.biases[layer][1][e]
            h = np.stack([self.kernels.swiglu_py(a, b, *self.gate) for a, b in zip(g, u, strict=True)])
            outputs[tokens, places] = product(fd, down, h)
            if self.biases:
                outputs[tokens, places] += self.biases[layer][2][e]
        out[:] = 0
        for k in range(ids.shape[1]):
            out += weights[:, k : k + 1] * outputs[:, k]


class Runner:
    """A model with its KV blocks; sequences are known by a number and keep what they have seen."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 2,
        kv_dtype="f32",
        isa=None,
        n_blocks=160,
        max_tokens=400,
        longest=0,
        device=None,
        placement=ON_THE_CPU,
    ) -> None:
        """longest: of the sequences that are asked for. placement: what is on the device, a simulated GPU."""
        self.checkpoint = open_checkpoint(path)
        self.architecture = load(self.checkpoint)
        evidence.opened(self.checkpoint, self.architecture)
        self.spec = self.architecture.spec.reaching(longest)
        kernels, pool = Kernels(isa), Pool(threads)
        reader = Reader([str(file) for file in self.checkpoint.files], backend="preadv")
        dense = load_dense(self.checkpoint, self.architecture, reader, placement)
        experts = ResidentExperts(
            self.checkpoint, self.architecture.experts, kernels, self.spec, dense.expert_biases()
        )
        kv = KVCache(self.spec, n_blocks, kv_dtype)
        for layer in kv.layers:  # what nobody wrote must not be read
            layer.fill(255 if kv_dtype == "q8_0" else np.nan)  # 0xffff is a NaN of F16
        self.states = StateCache(self.spec, 2 * SEQUENCES if self.spec.recurrent else 0)
        for layer in self.states.layers:
            layer.fill(np.nan)
        self.model = Forward(
            self.spec,
            dense,
            experts,
            kv,
            self.states,
            pool,
            kernels,
            max_tokens=max_tokens,
            max_rows=max_tokens,
            device=device,
            placement=placement,
        )
        reader.close()
        # The image of each sequence's state, and those that are free.
        self.images: dict[int, int] = {}
        self.blank = list(range(self.states.n_images))
        # Blocks are given out in an order that is neither ascending nor contiguous.
        self.free = np.random.default_rng(7).permutation(n_blocks).astype(np.int32).tolist()
        self.tables: dict[int, list[int]] = {}
        self.seen: dict[int, int] = {}

    def step(
        self, work: dict[int, list[int]], rows: list[int] | None = None
    ) -> dict[int, NDArray[np.float32]]:
        """The next tokens of some sequences, in one step -> logits of each of them, f32 [tokens, vocab].

        rows: with one sequence, those of its tokens whose logits are wanted.
        """
        tokens, positions, offsets, tables = [], [], [0], []
        for sequence, new in work.items():
            start = self.seen.get(sequence, 0)
            end = self.seen[sequence] = start + len(new)
            table = self.tables.setdefault(sequence, [])
            while len(table) * BLOCK < end:
                table.append(self.free.pop())
            tables.append(table)
            tokens += new
            positions += range(start, end)
            offsets.append(offsets[-1] + len(new))
        width = max(map(len, tables)) + 1
        table_array = np.full((len(tables), width), -1, np.int32)
        for row, table in zip(table_array, tables, strict=True):
            row[: len(table)] = table
        batch = Batch(
            tokens=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            query_offsets=np.array(offsets, np.int32),
            block_tables=table_array,
            logit_rows=np.arange(len(tokens), dtype=np.int32) if rows is None else np.array(rows, np.int32),
            states=self._move(work) if self.spec.recurrent else None,
        )
        logits = self.model.step(batch).copy()
        return {s: logits[offsets[i] : offsets[i + 1]] for i, s in enumerate(work)}

    def _move(self, work: dict[int, list[int]]) -> NDArray[np.int32]:
        """Where each state is, and where it goes: always to another image."""
        moves = []
        for sequence in work:
            moves.append([self.images.get(sequence, -1), self.blank.pop(0), -1, 0])
        for sequence, (before, after, _, _) in zip(work, moves, strict=True):
            self.images[sequence] = after
            self.blank += [before] if before >= 0 else []
        return np.array(moves, np.int32)

    def logits(self, prompt: list[int], chunks: list[int] | None = None, sequence: int = 0):
        """Logits of each token of a new sequence; its prompt comes in chunks of these sizes, in turn."""
        self.tables.pop(sequence, None)
        self.seen.pop(sequence, None)
        if sequence in self.images:
            self.blank.append(self.images.pop(sequence))
        parts, at, i = [], 0, 0
        while at < len(prompt):
            size = chunks[i % len(chunks)] if chunks else len(prompt)
            parts.append(self.step({sequence: prompt[at : at + size]})[sequence])
            at, i = at + size, i + 1
        return np.concatenate(parts)

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        """n tokens after the prompt, each the likeliest."""
        last = self.logits(prompt)[-1]
        tokens = []
        for _ in range(n):
            tokens.append(int(last.argmax()))
            last = self.step({0: tokens[-1:]})[0][-1]
        return tokens
