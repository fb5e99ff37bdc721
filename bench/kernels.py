"""Weights per second of every kernel, against the memory bandwidth measured in the same run.

    python bench/kernels.py [--isa avx2] [--formats q8_0,q4_k] [--tokens 1,8,64] [--json FILE]

Each line is a whole product y = W x on all threads, preparing the activations included, as the dense layers
run it. GB/s counts weight bytes read once per product: with few tokens the ceiling is memory, with many
it is arithmetic, for which GMAC/s is given. The best of several repetitions counts; `spread` is the median's
distance from it, which tells how quiet the machine was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mer._ext.kernels import Kernels, Pool, isas

# name: (ggml's type id, elements per block, bytes per block)
FORMATS = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "bf16": (30, 1, 2),
    "q4_0": (2, 32, 18),
    "q8_0": (8, 32, 34),
    "q4_k": (12, 256, 144),
}
MIB = 1 << 20


@dataclass
class Result:
    isa: str
    format: str
    tokens: int
    weight_mib: float
    gb_per_s: float
    of_memory: float
    gmac_per_s: float
    spread: float


def random_weights(name: str, mebibytes: int, cols: int) -> NDArray[np.uint8]:
    """Encoded rows [rows, row_bytes] of about that size; any bits will do, the kernels take the same time."""
    _, block, block_bytes = FORMATS[name]
    row_bytes = cols // block * block_bytes
    rows = mebibytes * MIB // row_bytes
    piece = np.random.default_rng(0).integers(0, 60, 4 * MIB, np.uint8)  # small numbers: no NaN, no infinity
    return np.resize(piece, rows * row_bytes).reshape(rows, row_bytes)


def measure(
    k: Kernels, pool: Pool, name: str, tokens: int, weights: NDArray[np.uint8], cols: int
) -> list[float]:
    """Seconds of each repetition: at least five, and half a second of them."""
    x = np.random.default_rng(1).standard_normal((tokens, cols)).astype(np.float32)
    fmt = FORMATS[name][0]
    k.linear_py(pool, fmt, weights[:64], x)
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 0.5 and len(times) < 100):
        start = time.perf_counter()
        k.linear_py(pool, fmt, weights, x)
        times.append(time.perf_counter() - start)
        if sum(times) > 5:
            break
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", help="names, separated by commas; all that this CPU has")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="1,8,64")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cols", type=int, default=2048, help="row length, a multiple of 256")
    parser.add_argument("--mib", type=int, default=192, help="weights for one token, beyond every cache")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    pool = Pool(args.threads)
    console = Console()
    memory = pool.memory_bandwidth(args.mib)
    console.print(
        f"{pool.n_threads} threads read memory at {memory / 1e9:.1f} GB/s (plain sweep of {args.mib} MiB)"
    )
    table = Table("isa", "format", "tokens", "MiB", "GB/s", "of memory", "GMAC/s", "spread")
    results: list[Result] = []
    for isa in args.isa.split(",") if args.isa else isas():
        k = Kernels(isa)
        for name in args.formats.split(","):
            # plain C is bound by arithmetic from the first token on: no need to wait for all of memory
            sizes = {
                t: 4 if isa == "scalar" else args.mib if t < 4 else 16
                for t in map(int, args.tokens.split(","))
            }
            for tokens, mib in sizes.items():
                weights = random_weights(name, mib, args.cols)
                times = measure(k, pool, name, tokens, weights, args.cols)
                best = min(times)
                rate = weights.nbytes / best
                macs = weights.shape[0] * args.cols * tokens / best
                spread = statistics.median(times) / best - 1
                r = Result(
                    isa, name, tokens, weights.nbytes / MIB, rate / 1e9, rate / memory, macs / 1e9, spread
                )
                results.append(r)
                table.add_row(
                    isa, name, str(tokens), f"{r.weight_mib:.0f}", f"{r.gb_per_s:.2f}", f"{r.of_memory:.0%}",
                    f"{r.gmac_per_s:.1f}", f"+{spread:.0%}",
                )  # fmt: skip
    console.print(table)
    after = pool.memory_bandwidth(args.mib)
    console.print(f"memory again at the end: {after / 1e9:.1f} GB/s")
    if args.json:
        report = {
            "threads": pool.n_threads,
            "memory_gb_per_s": [memory / 1e9, after / 1e9],
            "cols": args.cols,
            "results": [asdict(r) for r in results],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
