"""The forward pass: Python walks over the layers, `_ext` does the mathematics without the GIL."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from mer._ext.decoder import Decoder
from mer._ext.device import Device
from mer._ext.gpu_blocks import GpuBlocks
from mer._ext.gpu_decoder import GpuDecoder
from mer._ext.kernels import Kernels, Pool
from mer._ext.moe import ExpertStreamer
from mer._ext.recurrent import Recurrent
from mer.model import device_scratch, scratch
from mer.model.batch import Batch
from mer.model.block_copies import BlockCopies
from mer.model.dense import DenseWeights
from mer.model.kv import KVCache
from mer.model.placement import ON_THE_CPU, Placement
from mer.model.spec import ModelSpec
from mer.model.state import StateCache, replay_shape
from mer.streaming.profile import Profile
from mer.streaming.trace import TraceWriter

_VIEWS: Final = 64  # widths of steps whose views are kept


class Experts(Protocol):
    """Multiplies the experts that a router chose; `mer._ext.moe.ExpertStreamer` is one."""

    def forward(
        self,
        layer: int,
        x: NDArray[np.float32],
        ids: NDArray[np.int32],
        weights: NDArray[np.float32],
        out: NDArray[np.float32],
        ahead: NDArray[np.int32] | None = None,
    ) -> None:
        """x f32 [T, hidden], ids i32 [T, top_k], weights f32 [T, top_k] -> out f32 [T, hidden], overwritten.

        `layer` counts MoE layers only. ahead i32 [T, top_k]: what the next one will probably want.
        May raise DeviceReadError; the next call may succeed.
        """

    def wants_guesses(self, tokens: int) -> bool:
        """Whether `ahead` would be of use to the next call, of this many tokens."""


class Forward:
    """One model on one set of blocks. It takes all its memory when made; one thread at a time may `step`."""

    def __init__(
        self,
        spec: ModelSpec,
        dense: DenseWeights,
        moe: Experts | None,
        kv: KVCache,
        states: StateCache,
        pool: Pool,
        kernels: Kernels,
        *,
        max_tokens: int,
        max_rows: int,
        device: Device | None = None,
        placement: Placement = ON_THE_CPU,
    ) -> None:
        """moe: None where no layer has experts.

        max_tokens: most tokens of one step. max_rows: most tokens of one step whose logits are wanted.
        placement: what is to be on `device`, which has the kernels. Raises GpuError, or GpuMemoryError.
        """
        self.spec = spec
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self._dense = dense
        self._moe = moe
        self._kv = kv
        self._states = states
        self._kernels, self._pool = kernels, pool
        self._profile: Profile | None = None
        self._buffers = scratch.allocate(spec, max_tokens, max_rows, pool.n_threads)
        self.device_bytes = 0, 0  # of a GPU's memory: dense part with its buffers, keys and values
        self._decoder = self._place(device, placement)
        for index, blocks in enumerate(kv.layers):
            self._decoder.add_layer(dense.layer(index), blocks)
        blocks_there: GpuBlocks | None = None
        if isinstance(self._decoder, GpuDecoder):
            kv_bytes = self._decoder.kv_bytes
            self.device_bytes = self._decoder.taken_bytes - kv_bytes, kv_bytes
            blocks_there = GpuBlocks(self._decoder)
        self.copies = BlockCopies(kv, blocks_there)
        self._inputs: NDArray[np.float32] | None = None  # see keep_inputs
        self._recurrent = self._states_of_layers()
        # Of each layer, whether it and the next one have experts: what can be predicted.
        self._pairs = [
            layer.moe_index is not None and following.moe_index is not None
            for layer, following in pairwise(spec.layers)
        ] + [False]
        self._tokens = 0  # of the last step
        self._views: dict[int, dict[str, NDArray[Any]]] = {}  # by the tokens of a step
        self.trace: TraceWriter | None = None
        # i32 [MoE layers, most tokens, top_k]: the choices of the last step, if it had no more tokens and its
        # choices were to be kept.
        self.routes: NDArray[np.int32] | None = None
        self.keep_routes = True
        # Whether each layer is told what the next one will probably want.
        self.look_ahead = False
        # Called before each layer: no expert is in use then, and the cache may change its size.
        self.between: Callable[[], None] = lambda: None

    def _place(self, device: Device | None, placement: Placement) -> Decoder:
        """The decoder, without layers."""
        model, kernels, pool = dict(self._dense.model), self._kernels, self._pool
        if device is None or not placement.layers:
            return Decoder(self.spec, kernels, pool, self._buffers, model, self._kv.number)
        head: dict[str, Any] = {}
        if placement.head:
            head = {name: model.pop(name) for name in ("head", "head_bias") if name in model}
        decoder = GpuDecoder(self.spec, kernels, pool, self._buffers, model, self._kv.number)
        blocks = self._kv.n_blocks
        places = device_scratch.places(self.spec, self.max_tokens, self.max_rows, blocks)
        tier = self._moe.vram if isinstance(self._moe, ExpertStreamer) else None
        decoder.place(device, placement.layers, blocks, places, head, self._buffers, tier)
        return decoder

    def _states_of_layers(self) -> Recurrent | None:
        """What takes the states on, beside the decoder."""
        if self.spec.recurrent is None:
            return None
        recurrent = Recurrent(self._decoder, self.spec, self._buffers)
        for index, layer in enumerate(self.spec.layers):
            if layer.state_index is not None:
                images = self._states.layers[layer.state_index]
                recurrent.add_layer(index, self._dense.layers[index], images)
        if self._inputs is not None:
            recurrent.keep_inputs(self._inputs)
        return recurrent

    def leave_device(self) -> None:
        """Have all layers computed here from now on; keys and values are lost.

        Their weights are read and take memory. Raises DeviceReadError; nothing has changed then.
        """
        self._dense = self._dense.whole()
        self.copies.leave_device()
        self.device_bytes = 0, 0
        self._decoder = self._place(None, ON_THE_CPU)  # the one before lets go of the buffers
        for weights, blocks in zip(self._dense.layers, self._kv.layers, strict=True):
            self._decoder.add_layer(weights, blocks)
        self._recurrent = self._states_of_layers()
        if self._profile is not None:
            self.profile(self._profile)

    def profile(self, profile: Profile) -> None:
        """Have the decoder's part of every further step recorded."""
        self._profile = profile
        self._decoder = profile.timed(self._decoder)
        if self._recurrent is not None:
            self._recurrent = profile.timed(self._recurrent)

    @staticmethod
    def scratch_bytes(spec: ModelSpec, max_tokens: int, max_rows: int, n_threads: int) -> int:
        """Bytes that a Forward of this size takes, besides dense weights and KV cache."""
        return scratch.total_bytes(spec, max_tokens, max_rows, n_threads)

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Run the batch: f32 [R, vocab], logits of `batch.logit_rows`; overwritten by the next step.

        Raises ValueError for a batch that doesn't fit, and whatever the experts raise. After an error the
        keys and values of the batch's own positions are undefined, and so are the states that it was to
        write; those before them are intact.
        """
        batch.check(
            vocab=self.spec.vocab,
            max_tokens=self.max_tokens,
            max_rows=self.max_rows,
            n_blocks=self._kv.n_blocks,
            n_images=self._states.n_images,
        )
        self._tokens = len(batch.tokens)
        decoder, view = self._decoder, self._view(self._tokens)
        h, y, ids, weights = view["h"], view["y"], view["expert_ids"], view["expert_weights"]
        self._dense.embed(batch.tokens, view["x"])
        if self.spec.embedding_scale != 1.0:
            view["x"] *= np.float32(self.spec.embedding_scale)
        decoder.begin(batch.positions, batch.query_offsets, batch.block_tables, batch.tokens)
        routes = self.routes if self.keep_routes else None
        if routes is not None and len(ids) > routes.shape[1]:
            routes = None
        recurrent = self._recurrent
        if recurrent is not None and batch.states is not None:
            recurrent.begin(batch.query_offsets, batch.states)
        for index, layer in enumerate(self.spec.layers):
            self.between()
            if recurrent is not None and layer.state_index is not None:
                recurrent.mix(layer.state_index)
            else:
                decoder.attend(index)
            if layer.moe_index is None:
                decoder.feed(index)
                continue
            assert self._moe is not None
            guess = self.look_ahead and self._pairs[index] and self._moe.wants_guesses(len(h))
            # Routes of a trace have their layer's turn.
            if self.trace is None and decoder.mixture(index, layer.moe_index, guess):
                decoder.finish(index)
                continue
            decoder.route(index)
            ahead = None
            if guess:
                decoder.predict(index + 1)
                ahead = view["ahead_ids"]
            if routes is not None:
                routes[layer.moe_index, : len(ids)] = ids
            if self.trace is not None:
                self.trace.record(layer.moe_index, batch.positions, batch.query_offsets, ids, weights)
            self._moe.forward(layer.moe_index, h, ids, weights, y, ahead)
            decoder.finish(index)
        decoder.logits(batch.logit_rows)
        decoder.note_choices(routes)
        return self._buffers["logits"][: len(batch.logit_rows)]

    def keep_inputs(self, tokens: int) -> None:
        """Have `replay` be possible behind steps of up to so many tokens; before the first step."""
        if self._recurrent is not None:
            self._inputs = np.zeros(replay_shape(self.spec, tokens), np.float32)
            self._recurrent.keep_inputs(self._inputs)

    def replay(
        self, rows: NDArray[np.int32], query_offsets: NDArray[np.int32], states: NDArray[np.int32]
    ) -> None:
        """Make states anew as a step of these tokens of the last one alone would have left them.

        rows i32 [T]: their places in that step; query_offsets [S + 1] and states [S, 4] as in
        mer.model.batch. Logits and hidden states stay as they are.
        """
        assert self._recurrent is not None
        self._recurrent.replay(rows, query_offsets, states)

    @property
    def dense(self) -> DenseWeights:
        """The weights that it computes with."""
        return self._dense

    @property
    def kv(self) -> KVCache:
        """The blocks it computes on."""
        return self._kv

    def hidden(self) -> NDArray[np.float32]:
        """f32 [T, hidden]: each token of the last step after the final norm; overwritten by the next step."""
        return self._buffers["h"][: self._decoder.hidden_states()]

    def streams(self) -> NDArray[np.float32]:
        """f32 [T, streams * hidden] of the last step, before they are made one, of a model that has them.

        Overwritten by the next step.
        """
        n = self._tokens
        return self._buffers["streams"][:n].reshape(n, -1)

    def _view(self, tokens: int) -> dict[str, NDArray[Any]]:
        """The first rows of the buffers. Kept: making them takes longer than a small product."""
        view = self._views.get(tokens)
        if view is None:
            if len(self._views) == _VIEWS:
                self._views.clear()
            names = ("x", "h", "y", "expert_ids", "expert_weights", "ahead_ids")
            view = self._views[tokens] = {name: self._buffers[name][:tokens] for name in names}
        return view
