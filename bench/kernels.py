"""Weights per second of every kernel, against the memory bandwidth measured in the same run.

    python -m bench.kernels [--isa avx2] [--formats q8_0,q4_k] [--tokens 1,8,64] [--ggml DIR] [--json FILE]

Each line is a whole product y = W x on all threads, preparing the activations included, as the dense layers
run it. GB/s counts weight bytes read once per product: with few tokens the ceiling is memory, with many
it is arithmetic, for which GMAC/s is given. The best of several repetitions counts; `spread` is the median's
distance from it, which tells how quiet the machine was.

`--ggml` adds ggml's product of the same numbers on as many threads, with the weights as they are in the file
and as its CPU back end lays them out anew (where it does). DIR is where llama-cpp-python keeps its libraries:
site-packages/llama_cpp/lib; bench/peer.py says how to install it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.ggml import Ggml, Product
from bench.options import counts, names
from mer._ext.kernels import Kernels, Pool, isas
from mer.weights import formats

# name: (ggml's type id, elements per block, bytes per block)
FORMATS = {form.name: (form.id, form.block, form.block_bytes) for form in formats.FORMATS}
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
    """Encoded rows [rows, row_bytes] of about that size; almost any bits will do where scales are apart."""
    _, block, block_bytes = FORMATS[name]
    row_bytes = cols // block * block_bytes
    rows = mebibytes * MIB // row_bytes // 64 * 64  # ggml repacks groups of rows
    rng = np.random.default_rng(0)
    piece = rng.integers(0, 60, 4 * MIB, np.uint8)  # small numbers: no NaN, no infinity
    if block == 1:  # a number by itself must not be subnormal: each product would be, and slow
        piece = formats.by_name(name).quantize(rng.standard_normal(4 * MIB // block_bytes)).reshape(-1)
    weights = np.resize(piece, rows * row_bytes)
    if name == "mxfp4":
        weights[::block_bytes] = 120  # scales: with small ones products would be subnormal, and slow
    return weights.reshape(rows, row_bytes)


def measure(run: Callable[[], object]) -> list[float]:
    """Seconds of each repetition: at least five, and a quarter of a second of them."""
    run()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 0.25 and len(times) < 100):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if sum(times) > 1:
            break
    return times


Case = tuple[str, NDArray[np.uint8], NDArray[np.float32]]


def case(name: str, mebibytes: int, tokens: int, cols: int) -> Case:
    """A format, weights in it, and activations f32 [tokens, cols]."""
    x = np.random.default_rng(1).standard_normal((tokens, cols)).astype(np.float32)
    return name, random_weights(name, mebibytes, cols), x


def result(isa: str, of: Case, times: list[float], memory: float) -> Result:
    name, weights, x = of
    best = min(times)
    rate = weights.nbytes / best
    macs = len(weights) * x.size / best
    spread = statistics.median(times) / best - 1
    return Result(
        *(isa, name, len(x), weights.nbytes / MIB),
        *(rate / 1e9, rate / memory, macs / 1e9, spread),
    )


def measure_ggml(ggml: Ggml, pool: Pool, of: Case, memory: float) -> Iterator[Result]:
    """Each layout that ggml has for this product. Raises SystemExit if its numbers are others than ours."""
    name, weights, x = of
    form = FORMATS[name][0]
    ours = Kernels().linear_py(pool, form, weights, x)
    for buffer_type in (ggml.plain, *ggml.repacked()):
        try:
            with Product(ggml, buffer_type, form, weights, x) as product:
                times = measure(product.compute)
                # Q4_K quantises activations in blocks of another size
                if np.abs(product.result() - ours).max() > 0.02 * np.abs(ours).max():
                    raise SystemExit(f"ggml's product of {name} is another than ours")
        except ValueError:
            continue
        yield result("ggml" if buffer_type == ggml.plain else "ggml repacked", of, times, memory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", type=names(isas()), help="names, separated by commas; all that this CPU has")
    parser.add_argument("--formats", type=names(FORMATS), default=list(FORMATS))
    parser.add_argument("--tokens", type=counts, default="1,8,64")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cols", type=int, default=2048, help="row length, a multiple of 256")
    parser.add_argument("--mib", type=int, default=192, help="weights for one token, beyond every cache")
    parser.add_argument("--ggml", type=Path, metavar="DIR", help="compare with the libggml there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    pool = Pool(args.threads)
    try:
        ggml = Ggml(args.ggml, pool.n_threads) if args.ggml else None
    except (OSError, AttributeError) as error:
        raise SystemExit(f"--ggml {args.ggml}: {error}") from None
    console = Console()
    memory = pool.memory_bandwidth(args.mib)
    console.print(
        f"{pool.n_threads} threads read memory at {memory / 1e9:.1f} GB/s (plain sweep of {args.mib} MiB)"
    )
    table = Table("isa", "format", "tokens", "MiB", "GB/s", "of memory", "GMAC/s", "spread")
    results: list[Result] = []

    def add(r: Result) -> None:
        results.append(r)
        table.add_row(
            r.isa, r.format, str(r.tokens), f"{r.weight_mib:.0f}", f"{r.gb_per_s:.2f}", f"{r.of_memory:.0%}",
            f"{r.gmac_per_s:.1f}", f"+{r.spread:.0%}",
        )  # fmt: skip

    for name in args.formats:
        for tokens in args.tokens:
            full = case(name, args.mib if tokens < 4 else 16, tokens, args.cols)
            for isa in args.isa or isas():
                # plain C is bound by arithmetic from the first token on: no need to wait for all of memory
                of = case(name, 4, tokens, args.cols) if isa == "scalar" else full
                linear = partial(Kernels(isa).linear_py, pool, FORMATS[name][0], of[1], of[2])
                add(result(isa, of, measure(linear), memory))
            if ggml:
                for found in measure_ggml(ggml, pool, full, memory):
                    add(found)
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
