"""The bytes of a synthetic model: the same numbers whatever the container, drawn fast, with local routing.

Matrices are pieces of a small pool of random blocks that are encoded already, each piece from another place.

**Text.** Token v + 1 follows token v: row v + 1 of the head is the part of row v of the embedding that is v's
own. So greedy decoding counts upward through the vocabulary, in every program alike, and the rows of the
embedding, in their order, are the text.

**Locality.** The hidden state is the embedding plus small steps of the layers (`shapes.STEP`), and a router's
rows are random: the logits of one expert over the text are, up to those steps, a Gaussian process with the
correlation of the rows of the embedding. A row is a sum of a direction common to all (some experts are
popular), of processes that forget slowly or fast (`MEMORY`: what the text is about), and of the token's own
part.
The shares are fitted to a recorded routing of Qwen3-30B-A3B (28 tokens of a prompt, then 128), here with 24
layers, 128 experts, 6 of them chosen, and a hidden size of 1024:

                                                           recorded              synthetic
    an LRU of 6.25 / 12.5 / 25 % of the experts hits       0.378 0.580 0.827     0.355 0.596 0.816
    choices shared with the token 1 / 2 / 8 / 32 before    0.38 0.29 0.28 0.24   0.36 0.30 0.25 0.23
    mean router weights, sorted                            0.27 0.20 0.16 0.14   0.27 0.19 0.16 0.14

The whole shape chooses 8 of 128: with 12 layers such caches hit 0.258 0.522 0.780, and by expected next use
0.435 0.626 0.819. What it has not: a real model's text goes back to words it had before, and its layers
differ from each other.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.shapes import Tensor
from mer.weights import formats
from mer.weights.formats import Format

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Variances of an embedding row's parts; the rest is the token's own.
COMMON = 0.50
# (variance, tokens until a correlation of 1/e)
MEMORY = ((0.10, 40.0), (0.30, 1.2))
# Deviation of a router's logits.
ROUTER_GAIN = 1.0

POOL_ELEMENTS = 4 << 20
ROWS = 2048  # of the embedding at a time
ALIGNED = 32  # elements: what every format but Q4_K can start at


class Noise:
    """Normal numbers in a format: [blocks, block_bytes], of which pieces are taken from changing places."""

    def __init__(self, form: Format, deviation: float, elements: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.blocks: Bytes = np.empty((elements // form.block, form.block_bytes), np.uint8)
        step = max(1, (1 << 20) // form.block)
        for start in range(0, len(self.blocks), step):
            part = self.blocks[start : start + step]
            if form is formats.Q6_K:
                part[:] = _q6_k(len(part), deviation, rng)
                continue
            values = rng.standard_normal((len(part), form.block), dtype=np.float32)
            part[:] = form.quantize(values * np.float32(deviation))

    def pieces(self, count: int, rng: np.random.Generator) -> Iterator[Bytes]:
        """`count` blocks in all."""
        half = len(self.blocks) // 2
        while count > 0:
            start = int(rng.integers(0, half))
            piece = self.blocks[start : start + min(count, half)]
            yield piece
            count -= len(piece)


def _q6_k(blocks: int, deviation: float, rng: np.random.Generator) -> Bytes:
    """Codes of -32 ... 31, equally likely: nobody here rounds to Q6_K."""
    data = rng.integers(0, 256, (blocks, 210), np.uint8)
    data[:, 192:208] = 64
    data[:, 208:] = np.array([deviation / (64 * (64**2 / 12) ** 0.5)], np.float16).view(np.uint8)
    return data


class Weights:
    """Formats and bytes of a model's tensors. Norms, biases and routers are F32 unless `plain` is given."""

    def __init__(
        self,
        config: dict[str, Any],
        experts: Format,
        dense: Format,
        seed: int = 0,
        plain: Format = formats.F32,
        down: Format | None = None,
    ) -> None:
        """down: of the experts' down, if not that of gate and up."""
        self._down = down or experts
        self._formats = {"expert": experts, "matrix": dense, "embedding": dense, "head": dense}
        # The two programs split it, and transpose a half: only numbers of their own stay the same numbers.
        self._formats["kv_up"] = dense if dense.block == 1 else formats.F16
        self._plain = plain
        self._seed = seed
        self._noise: dict[tuple[str, float], Noise] = {}
        self._vocab, self._hidden = config["vocab_size"], config["hidden_size"]
        self._grain = max(ALIGNED, dense.block)
        self._own: Noise | None = None

    def format(self, tensor: Tensor) -> Format:
        if tensor.expert and tensor.expert[2] == 2 and tensor.kind in self._formats:
            return self._down
        return self._formats.get(tensor.kind, self._plain)

    def nbytes(self, tensor: Tensor) -> int:
        form = self.format(tensor)
        return tensor.elements // tensor.cols * form.row_bytes(tensor.cols)

    def pieces(self, tensor: Tensor) -> Iterator[Bytes]:
        """The tensor's bytes, in order, in contiguous pieces of a few megabytes."""
        form, rng = self.format(tensor), np.random.default_rng([self._seed, zlib.crc32(tensor.name.encode())])
        if tensor.kind in ("norm", "zero"):
            yield form.quantize(np.full(tensor.elements, float(tensor.kind == "norm"), np.float32))
        elif tensor.kind == "router":
            values = rng.standard_normal(tensor.shape, dtype=np.float32)
            yield form.quantize(values * np.float32(ROUTER_GAIN * tensor.cols**-0.5))
        elif tensor.kind == "embedding":
            yield from self._embedding(form, rng)
        elif tensor.kind == "head":
            yield from self._head()
        else:
            yield from self._pool(form, tensor.gain * tensor.cols**-0.5).pieces(
                tensor.elements // form.block, rng
            )

    def array(self, tensor: Tensor) -> Bytes:
        """All of a small tensor: uint8 [rows, row_bytes]."""
        data = np.concatenate([piece.reshape(-1) for piece in self.pieces(tensor)])
        return data.reshape(tensor.elements // tensor.cols, -1)

    def _pool(self, form: Format, deviation: float) -> Noise:
        key = form.name, deviation
        if key not in self._noise:
            self._noise[key] = Noise(form, deviation, POOL_ELEMENTS, self._seed)
        return self._noise[key]

    def _own_rows(self, start: int, stop: int) -> Bytes:
        """What is these tokens' own, encoded, of deviation 1 / sqrt(hidden): uint8 [tokens, row_bytes].

        Overlapping windows of one pool: shifted by a block or more, normal noise knows nothing of itself.
        """
        form = self._formats["head"]
        per_row = self._hidden // self._grain
        if self._own is None:
            elements = (self._vocab + per_row) * self._grain
            self._own = Noise(form, self._hidden**-0.5, elements, self._seed + 1)
            self._starts = np.random.default_rng(self._seed).permutation(self._vocab)
        grains = self._own.blocks.reshape(self._vocab + per_row, -1)
        rows: Bytes = grains[self._starts[start:stop, None] + np.arange(per_row)]
        return rows.reshape(stop - start, -1)

    def _embedding(self, form: Format, rng: np.random.Generator) -> Iterator[Bytes]:
        hidden = self._hidden
        noise = rng.standard_normal(POOL_ELEMENTS, dtype=np.float32)
        common = np.float32(COMMON**0.5) * rng.standard_normal(hidden, dtype=np.float32)
        kept = [np.float32(np.exp(-1 / tokens)) for _, tokens in MEMORY]
        fresh = [
            np.float32((variance * (1 - k * k)) ** 0.5) for (variance, _), k in zip(MEMORY, kept, strict=True)
        ]
        topics = [np.float32(v**0.5) * rng.standard_normal(hidden, dtype=np.float32) for v, _ in MEMORY]
        own = np.float32(((1 - COMMON - sum(v for v, _ in MEMORY)) * hidden) ** 0.5)
        for start in range(0, self._vocab, ROWS):
            stop = min(self._vocab, start + ROWS)
            rows = form.dequantize(self._own_rows(start, stop)) * own
            places = rng.integers(0, POOL_ELEMENTS - hidden, (stop - start, len(MEMORY)))
            for row, at in zip(rows, places.tolist(), strict=True):
                row += common
                for topic, k, f, place in zip(topics, kept, fresh, at, strict=True):
                    topic *= k
                    topic += f * noise[place : place + hidden]
                    row += topic
            yield form.quantize(rows)

    def _head(self) -> Iterator[Bytes]:
        last = self._vocab - 1
        yield self._own_rows(last, last + 1)  # after the last token, the first
        for start in range(0, last, ROWS):
            yield self._own_rows(start, min(last, start + ROWS))
