"""A small mixture of experts on disk in an awkward layout, what its output must be, and a streamer of it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from mer._ext.cache import ExpertCache
from mer._ext.kernels import Kernels, Pool
from mer._ext.moe import ExpertStreamer
from mer.errors import ConfigError
from mer.streaming.experts import expert_tables
from mer.streaming.reader import Reader
from mer.weights import formats
from mer.weights.extents import ExpertExtents, Matrix, MoeLayerSource, Piece

EXPERTS, TOP_K, MAX_TOKENS = 8, 3, 40
KERNELS = Kernels()
Floats = NDArray[np.float32]


class Model:
    """Layers of (gate format, down format, hidden, intermediate size); the experts lie in two files.

    An expert is one piece, or three, at any offset; between them lie bytes that belong to nobody, and both
    files end where an expert does.
    """

    def __init__(self, folder: Path, layers: list[tuple[formats.Format, formats.Format, int, int]]) -> None:
        rng = np.random.default_rng([17, *(form.id for layer in layers for form in layer[:2])])
        self.weights: list[list[list[NDArray[np.uint8]]]] = []
        self.formats: list[tuple[int, int, int]] = []
        files, sources = [bytearray(), bytearray()], []
        for index, (gate, down, hidden, inter) in enumerate(layers):
            self.formats.append((gate.id, gate.id, down.id))
            self.weights.append([])
            found = []
            for e in range(EXPERTS):
                parts = [(gate, inter, hidden), (gate, inter, hidden), (down, hidden, inter)]
                raw = [
                    form.quantize(rng.standard_normal((r, c), np.float32) * c**-0.5) for form, r, c in parts
                ]
                self.weights[-1].append(raw)
                pieces: list[Piece] = []
                matrices = []
                apart = e % 2 == 1
                for (form, r, c), data in zip(parts, raw, strict=True):
                    if apart or not pieces:
                        file = int(rng.integers(2))
                        gap = int(rng.choice([1, 333, 4096, 5000])) if e else -len(files[file]) % 4096
                        files[file] += rng.bytes(gap)
                        pieces.append(Piece(file, len(files[file]), 0))
                    last = pieces[-1]
                    matrices.append(Matrix(len(pieces) - 1, last.nbytes, form, r, c))
                    files[last.file] += data.tobytes()
                    pieces[-1] = Piece(last.file, last.offset, last.nbytes + data.nbytes)
                found.append(ExpertExtents(tuple(pieces), *matrices))
            sources.append(MoeLayerSource(index, found))
        self.paths = [folder / "a.bin", folder / "b.bin"]
        for path, content in zip(self.paths, files, strict=True):
            path.write_bytes(content)
        self.layers = layers
        # of each layer: of gate, up and down, one row an expert; and what replaces silu(gate) * up
        self.biases: list[tuple[Floats, Floats, Floats]] = []
        self.clamp: tuple[float, float, float] | None = None
        # to what rows are rounded that go into experts, and that come out
        self.wire = "f32"
        self.tables = expert_tables(sources)

    def inputs(self, layer: int, tokens: int, seed: int = 0, top_k: int = TOP_K):
        """(x, ids, weights) of some tokens; some experts are chosen more often than others."""
        rng = np.random.default_rng([seed, layer, tokens])
        x = rng.standard_normal((tokens, self.layers[layer][2]), np.float32)
        liking = np.arange(1, EXPERTS + 1) / (EXPERTS * (EXPERTS + 1) / 2)
        ids = np.stack([rng.choice(EXPERTS, top_k, replace=False, p=liking) for _ in range(tokens)])
        return x, ids.astype(np.int32), rng.random((tokens, top_k), np.float32)

    def add_biases(self, alpha: float, limit: float) -> None:
        """Become a model of experts with biases and a SwiGLU with clamps."""
        rng = np.random.default_rng(23)
        for _, _, hidden, inter in self.layers:
            gate, up, down = (rng.standard_normal((EXPERTS, n), np.float32) for n in (inter, inter, hidden))
            self.biases.append((gate, up, down))
        self.clamp = (alpha, limit, 1.0)

    def length(self, key: int) -> int:
        """Bytes that are read for one expert."""
        return int(self.tables.reads[key, :, 2].sum())

    def exact(self, kernels: Kernels, layer: int, x: Floats, ids, weights) -> Floats:
        """Each (token, expert) product by itself, added in the router's order: the bytes that must come."""
        out, x = np.zeros_like(x), rounded(x, self.wire)
        product = kernels.matmul_py
        for t, chosen in enumerate(ids):
            for k, e in enumerate(chosen):
                (fg, fu, fd), (gate, up, down) = self.formats[layer], self.weights[layer][e]
                g, u = product(fg, gate, x[t : t + 1]), product(fu, up, x[t : t + 1])
                if self.biases:
                    g, u = g + self.biases[layer][0][e], u + self.biases[layer][1][e]
                h = kernels.swiglu_py(g[0], u[0], self.clamp)
                y = product(fd, down, h[None])[0]
                if self.biases:
                    y = y + self.biases[layer][2][e]
                out[t] += rounded(weights[t, k] * y, self.wire)
        return out

    def reference(
        self, layer: int, x: Floats, ids, weights
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(output in float64 with weights that gguf decodes, bound of the error).

        The bound is that of rounding activations to int8 in blocks of 32 where the format asks for it (half a
        step: the block's largest magnitude / 254), carried through the formula, and 1e-5 of all magnitudes.
        """
        out, bound = np.zeros(x.shape), np.zeros(x.shape)
        (fg, fu, fd) = self.formats[layer]
        for t, chosen in enumerate(ids):
            for k, e in enumerate(chosen):
                gate, up, down = (
                    gguf.quants.dequantize(data, gguf.GGMLQuantizationType(f)).astype(np.float64)
                    for f, data in zip((fg, fu, fd), self.weights[layer][e], strict=True)
                )
                row = x[t].astype(np.float64)
                g, dg = gate @ row, np.abs(gate) @ _rounding(fg, row)
                u, du = up @ row, np.abs(up) @ _rounding(fu, row)
                silu = g / (1 + np.exp(-g))
                h = silu * u
                dh = 1.1 * dg * (np.abs(u) + du) + np.abs(silu) * du  # the slope of silu is below 1.1
                w = float(weights[t, k])
                out[t] += w * (down @ h)
                bound[t] += w * (np.abs(down) @ (dh + _rounding(fd, np.abs(h) + dh)))
        return out, bound


def rounded(x: Floats, wire: str) -> Floats:
    """To the nearest number of this format, as gguf rounds."""
    kind = gguf.GGMLQuantizationType[wire.upper()]
    return gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)


def wired(x: Floats, wire: str) -> bytes:
    """The same in that format."""
    return gguf.quants.quantize(x, gguf.GGMLQuantizationType[wire.upper()]).tobytes()


def _rounding(fmt: int, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the prepared form of x may be from x, element by element."""
    slack = 1e-5 * np.abs(x)
    if fmt in (formats.F32.id, formats.F16.id, formats.BF16.id):
        return slack
    return slack + np.repeat(np.abs(x).reshape(-1, 32).max(axis=1) / 254, 32)


def open_reader(model: Model, backend: str = "auto", **options: int) -> Reader:
    try:
        return Reader(model.paths, backend=backend, **options)
    except ConfigError as e:
        pytest.skip(f"this machine can't: {e}")


class Streamed:
    """A streamer with a cache and a reader of its own, unless they are given."""

    def __init__(
        self,
        model: Model,
        slots: int | None = None,
        *,
        reader: Reader | None = None,
        cache: ExpertCache | None = None,
        threads: int = 2,
        max_tokens: int = MAX_TOKENS,
        prefetch: int = 0,
    ) -> None:
        tables = self.tables = model.tables
        self.model = model
        self.reader = reader or open_reader(model)
        self.cache = cache or ExpertCache(tables.total, slots or tables.total, tables.slot_bytes)
        self.streamer = ExpertStreamer(
            self.cache, self.reader, KERNELS, Pool(threads), tables.layers, tables.reads, tables.matrices,
            TOP_K, max_tokens, prefetch,
        )  # fmt: skip
        if model.biases:
            self.streamer.add_biases(model.biases)
        self.streamer.mixture.round_to(formats.by_name(model.wire).id)
        if model.clamp is not None:
            self.streamer.clamp(*model.clamp)

    def forward(self, layer, x, ids, weights, ahead=None):
        out = np.full(x.shape, np.nan, np.float32)
        self.streamer.forward(layer, x, ids, weights, out, ahead)
        return out

    def check(self, layer: int, tokens: int, seed: int = 0) -> None:
        inputs = self.model.inputs(layer, tokens, seed)
        assert self.forward(layer, *inputs).tobytes() == self.model.exact(KERNELS, layer, *inputs).tobytes()
        assert_idle(self.cache)


def assert_idle(cache: ExpertCache) -> None:
    """Nobody holds anything: what a call that has returned, or raised, must leave behind."""
    now = cache.stats()
    assert (now["in_use"], now["loading"], now["failed"]) == (0, 0, 0)
