"""The forward pass of a draft head, on the main model's embedding and output head."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mer._ext.decoder import Decoder, Join
from mer._ext.kernels import Kernels, Pool
from mer.model import scratch
from mer.model.dense import DenseWeights, Source, dense_bytes, load_parts
from mer.model.draft_head import Head, output_head
from mer.model.forward import Experts
from mer.model.kv import KVCache

KV_DTYPE: Final = "f32"  # of so few positions


class DraftForward:
    """One head in memory. It takes all its memory when made; one thread at a time may `step`."""

    def __init__(
        self,
        head: Head,
        main: DenseWeights,
        source: Source,
        moe: Experts | None,
        pool: Pool,
        kernels: Kernels,
        *,
        n_blocks: int,
        max_tokens: int,
        max_rows: int,
    ) -> None:
        """Read its weights from `source`, which reads the files of its checkpoint.

        n_blocks: of its keys and values. moe: where its layer has experts, what multiplies them. Raises
        CheckpointError if the head is of another model, DeviceReadError.
        """
        head.check(main)
        spec = head.spec
        self.spec = spec
        self.vocabulary = head.vocabulary
        self._main, self._moe = main, moe
        weights, (layer,) = load_parts(head.checkpoint, head.architecture, source)
        self._kv = KVCache(spec, n_blocks, KV_DTYPE)
        self._buffers = scratch.allocate(spec, max_tokens, max_rows, pool.n_threads)
        for name, (shape, dtype) in _join_shapes(head, max_tokens).items():
            self._buffers[name] = np.zeros(shape, dtype)
        self._decoder = Decoder(
            spec, kernels, pool, self._buffers, weights | output_head(head, main), self._kv.number
        )
        self._decoder.add_layer(layer, self._kv.layers[0])
        self._join = Join(self._decoder, weights, self._buffers)

    @staticmethod
    def nbytes(
        head: Head, main_row_bytes: int, *, n_blocks: int, max_tokens: int, max_rows: int, n_threads: int
    ) -> int:
        """Bytes that one of this size takes. main_row_bytes: of a row of the main model's output head."""
        rows = 0 if head.vocabulary is None else len(head.vocabulary)
        return (
            dense_bytes(head.checkpoint, head.architecture)
            + rows * main_row_bytes
            + n_blocks * KVCache.bytes_per_block(head.spec, KV_DTYPE)
            + scratch.total_bytes(head.spec, max_tokens, max_rows, n_threads)
            + sum(
                int(np.prod(shape)) * np.dtype(d).itemsize
                for shape, d in _join_shapes(head, max_tokens).values()
            )
        )

    def step(
        self,
        tokens: NDArray[np.int32],
        states: NDArray[np.float32],
        positions: NDArray[np.int32],
        query_offsets: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        rows: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """f32 [R, vocab]: logits behind those tokens that `rows` says; overwritten by the next step.

        tokens i32 [T], each with the state f32 [T, state_width] at the position before it; the rest is as in
        mer.model.batch. May raise DeviceReadError where its layer has experts.
        """
        decoder, n = self._decoder, len(tokens)
        x = self._buffers["x"][:n]
        self._main.embed(tokens, x)
        if self.spec.embedding_scale != 1.0:
            x *= np.float32(self.spec.embedding_scale)
        decoder.begin(positions, query_offsets, block_tables)
        self._join.join(states)
        decoder.attend(0)
        if self.spec.router is None:
            decoder.feed(0)
        else:
            assert self._moe is not None
            decoder.route(0)
            buffers = self._buffers
            ids, weights = buffers["expert_ids"][:n], buffers["expert_weights"][:n]
            self._moe.forward(0, buffers["h"][:n], ids, weights, buffers["y"][:n])
            decoder.finish(0)
        decoder.logits(rows)
        return self._buffers["logits"][: len(rows)]

    def states(self) -> NDArray[np.float32]:
        """f32 [T, state_width]: what the last step's tokens leave for the next; overwritten by the next."""
        n = self._decoder.hidden_states()
        if self.spec.streams is not None:
            # The next step begins with writing there.
            return self._buffers["streams"][:n].reshape(n, -1).copy()
        return self._buffers["h"][:n]


def _join_shapes(head: Head, tokens: int) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    spec = head.spec
    # Embedding and state in one row; or each stream is one.
    rows, cols = (tokens, 2 * spec.hidden) if spec.streams is None else (tokens * spec.streams.n, spec.hidden)
    return {
        "joined": ((rows, cols), np.float32),
        "join_scratch": ((scratch.linear_scratch_bytes(cols, rows),), np.uint8),
    }
