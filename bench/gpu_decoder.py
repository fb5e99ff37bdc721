"""The dense part of a decoder on a GPU, against the CPU's bytes, and what a token of it costs.

    python -m bench.gpu_decoder [--shape qwen3-30b-a3b] [--layers 8] [--contexts 128,4096] [--json FILE]

Random weights of a model's shape (Q4_K, the router F32), its experts giving nearly nothing. First two layers
are computed by the CPU and by the device, a prompt and some tokens, and compared byte for byte; a difference
ends the program with an error. Then each line is a step of `--layers` layers and the head: `us a layer` has
its share of the head, and `GB/s of weights` counts a layer's matrices once in that time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.kernels import FORMATS, random_weights
from bench.options import counts
from mer._ext.device import Device
from mer._ext.kernels import Kernels, Pool, isas
from mer.config import EngineConfig
from mer.gpu import open_device
from mer.model.batch import Batch
from mer.model.dense import DenseWeights, Matrix
from mer.model.forward import Forward
from mer.model.kv import BLOCK, KVCache
from mer.model.placement import ON_THE_CPU, Placement
from mer.model.spec import AttentionSpec, LatentAttentionSpec, LayerSpec, ModelSpec, RopeSpec, RouterSpec
from mer.model.state import StateCache

# hidden, heads, heads of keys, head's size, vocabulary, experts, of a token
SHAPES = {
    "qwen3-30b-a3b": (2048, 32, 4, 128, 151936, 128, 8),
    "gpt-oss-20b": (2880 // 256 * 256, 64, 8, 64, 201088, 32, 4),
    "deepseek-v2-lite": (2048, 16, 1, 192, 102400, 64, 6),
    "tiny": (256, 4, 2, 64, 512, 8, 2),
    "tiny-latent": (256, 4, 1, 96, 512, 8, 2),
}
# Of latent attention: what is not turned and what is of a head of queries, a head's values, the latent.
LATENT = {"deepseek-v2-lite": (128, 64, 128, 512), "tiny-latent": (64, 32, 64, 256)}


def spec_of(shape: str, layers: int) -> ModelSpec:
    hidden, heads, kv, dim, vocab, experts, chosen = SHAPES[shape]
    attention: AttentionSpec | LatentAttentionSpec
    turned = dim
    if shape in LATENT:
        nope, turned, value, rank = LATENT[shape]
        attention = LatentAttentionSpec(heads, nope, turned, value, rank, None, dim**-0.5)
    else:
        attention = AttentionSpec(heads, kv, dim, dim**-0.5, qk_norm="head")
    inverse = tuple(float(1e6 ** (-2 * i / turned)) for i in range(turned // 2))
    return ModelSpec(
        family="bench", vocab=vocab, hidden=hidden, norm_eps=1e-6, max_positions=1 << 17, attention=attention,
        rope=RopeSpec(inverse), layers=tuple(LayerSpec(None, i) for i in range(layers)),
        router=RouterSpec(experts, chosen, "softmax", True), moe_inter=256, dense_inter=0, shared_inter=0,
    )  # fmt: skip


def matrix(rng: np.random.Generator, name: str, rows: int, cols: int) -> Matrix:
    number, block, block_bytes = FORMATS[name]
    if name == "f32":
        values = (rng.standard_normal((rows, cols)) / cols**0.5).astype(np.float32)
        return Matrix(values.view(np.uint8).reshape(rows, -1), number, cols)
    data = np.ascontiguousarray(
        np.resize(random_weights(name, 16, cols), (rows, cols // block * block_bytes))
    )
    blocks = data.reshape(-1, block_bytes)
    blocks[:, :4] = np.frombuffer(np.array([0.5 / cols, 0.6 / cols**1.0], np.float16).tobytes(), np.uint8)
    rng.shuffle(blocks[: len(blocks) // 64 * 64].reshape(-1, 64 * block_bytes))
    return Matrix(data, number, cols)


def weights_of(spec: ModelSpec) -> DenseWeights:
    assert spec.router is not None
    rng = np.random.default_rng(0)

    def norm(n: int) -> NDArray[np.float32]:
        return (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)

    def attention() -> dict[str, Any]:
        a, hidden = spec.attention, spec.hidden
        if isinstance(a, LatentAttentionSpec):
            heads = a.n_heads
            return {
                "q": matrix(rng, "q4_k", heads * (a.nope_dim + a.rope_dim), hidden),
                "latent": matrix(rng, "q4_k", a.latent_dim, hidden), "latent_norm": norm(a.kv_rank),
                "k_up": matrix(rng, "q8_0", heads * a.kv_rank, a.nope_dim),
                "v_up": matrix(rng, "q8_0", heads * a.value_dim, a.kv_rank),
                "o": matrix(rng, "q4_k", hidden, heads * a.value_dim),
            }  # fmt: skip
        assert isinstance(a, AttentionSpec)
        q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        return {
            "q_norm": norm(a.head_dim), "k_norm": norm(a.head_dim),
            "q": matrix(rng, "q4_k", q, hidden), "k": matrix(rng, "q4_k", kv, hidden),
            "v": matrix(rng, "q4_k", kv, hidden), "o": matrix(rng, "q4_k", hidden, q),
        }  # fmt: skip

    layers: list[dict[str, Any]] = []
    for _ in spec.layers:
        layers.append(
            {
                "attention_norm": norm(spec.hidden), "mlp_norm": norm(spec.hidden), **attention(),
                "router": matrix(rng, "f32", spec.router.n_experts, spec.hidden),
            }
        )  # fmt: skip
    head = matrix(rng, "q4_k", spec.vocab, spec.hidden)
    return DenseWeights({"final_norm": norm(spec.hidden), "head": head}, layers, head)


class Silent:
    """Experts whose sum is a little of what they get."""

    def wants_guesses(self, tokens: int) -> bool:
        return False

    def forward(self, layer: int, x: Any, ids: Any, weights: Any, out: Any, ahead: Any = None) -> None:
        np.multiply(x, weights[:, :1], out=out)


class Model:
    """Forward of one sequence; embeddings are random numbers."""

    def __init__(
        self, spec: ModelSpec, device: Device | None, placement: Placement, context: int, tokens: int
    ) -> None:
        self.spec = spec
        dense = weights_of(spec)
        dense = evolve(dense, embedding=matrix(np.random.default_rng(1), "f32", 256, spec.hidden))
        self.bytes = [
            sum(w.data.nbytes for w in layer.values() if isinstance(w, Matrix)) for layer in dense.layers
        ]
        kv = KVCache(spec, -(-context // BLOCK) + 1, "f16")
        isa = "avx512" if "avx512" in isas() else "avx2"  # AMX adds up BF16 in another order
        self.forward = Forward(
            spec, dense, Silent(), kv, StateCache(spec, 0), Pool(), Kernels(isa),
            max_tokens=tokens, max_rows=16, device=device, placement=placement,
        )  # fmt: skip
        self.table = np.random.default_rng(2).permutation(kv.n_blocks).astype(np.int32)[None]

    def step(self, start: int, n: int) -> NDArray[np.float32]:
        tokens = np.arange(start, start + n, dtype=np.int32) % 256
        return self.forward.step(
            Batch(
                tokens=tokens, positions=np.arange(start, start + n, dtype=np.int32),
                query_offsets=np.array([0, n], np.int32), block_tables=self.table,
                logit_rows=np.array([n - 1], np.int32),
            )
        )  # fmt: skip


def compare(shape: str, device: Device, console: Console) -> None:
    spec = spec_of(shape, 2)
    found = []
    for placement in (ON_THE_CPU, Placement(2, True)):
        model = Model(spec, device, placement, 400, 200)
        rows = [model.step(0, 150).copy(), model.step(150, 150).copy()]
        rows += [model.step(300 + i, 1).copy() for i in range(8)]
        found.append(np.concatenate(rows))
    if not np.isfinite(found[0]).all():
        raise SystemExit("the random weights give no numbers")
    if found[0].tobytes() != found[1].tobytes():
        off = np.count_nonzero(found[0].view(np.uint32) != found[1].view(np.uint32))
        worst = np.abs(found[0] - found[1]).max()
        raise SystemExit(f"{off} of {found[0].size} logits are not the CPU's, by up to {worst:.3g}")
    console.print(f"{found[0].size} logits: the same bytes as the CPU's")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--contexts", type=counts, default="128,1024,4096,16384")
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt's chunk")
    parser.add_argument("--cpu", action="store_true", help="time the CPU, too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = open_device(EngineConfig(device="cuda"))
    assert device is not None
    console = Console()
    console.print(device.name)
    compare(args.shape, device, console)
    contexts = args.contexts
    spec = spec_of(args.shape, args.layers)
    table = Table("on", "context", "tokens", "ms a step", "us a layer", "GB/s of weights")
    steps: list[dict[str, Any]] = []
    for placement in (Placement(args.layers, True), *([ON_THE_CPU] if args.cpu else [])):
        model = Model(spec, device, placement, max(contexts) + args.tokens + 64, args.tokens)
        for context in contexts:
            for tokens, times in ((1, 40), (args.tokens, 3)):
                model.step(context, tokens)
                begun = time.perf_counter()
                for i in range(times):
                    model.step(context + (i if tokens == 1 else 0), tokens)
                took = (time.perf_counter() - begun) / times
                per_layer = took / args.layers
                on, rate = "gpu" if placement.layers else "cpu", model.bytes[0] / per_layer / 1e9
                table.add_row(
                    on,
                    str(context),
                    str(tokens),
                    f"{took * 1e3:.2f}",
                    f"{per_layer * 1e6:.0f}",
                    f"{rate:.0f}",
                )
                row = {"on": on, "context": context, "tokens": tokens, "gb_per_s": rate}
                steps.append(row | {"us_a_layer": per_layer * 1e6})
    console.print(table)
    if args.json:
        report = {"device": device.name, "shape": args.shape, "layers": args.layers, "steps": steps}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
