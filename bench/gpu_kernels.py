"""Weights per second of every kernel on a GPU, against its memory's and the bus's bandwidth of the same run.

    python -m bench.gpu_kernels [--formats q8_0,q4_k] [--tokens 1,16,512] [--mib 512] [--json FILE]

Each line is one launch after the other: `--products` matrices, `--rows` by `--cols`, as many tokens each,
going round in `--mib` of weights, more than any cache of the device. GB/s counts weight bytes read once a
product. Of 4 to 16 tokens both kernels are measured, that of few tokens and that of many. Every line's first
results are compared with the CPU's, byte for byte; a difference ends the program with an error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.kernels import FORMATS, random_weights
from bench.options import counts, names
from mer._ext.device import Device, Event
from mer._ext.kernels import Kernels, Pool, isas
from mer.config import EngineConfig
from mer.gpu import open_device

# As in mer/gpu/kernels/mer_gpu.cuh.
THREADS, ROWS, MANY_ROWS, MANY_TOKENS = 128, 8, 64, 32
PRODUCT = np.dtype("u8,u8,u8,u8,i4,i4")
MIB = 1 << 20
FLOATS = ("f32", "f16", "bf16")


@dataclass
class Result:
    format: str
    kernel: str
    tokens: int
    us: float
    gb_per_s: float
    of_copy: float
    gmac_per_s: float


def seconds(device: Device, times: int, launch: Callable[[int], object]) -> float:
    """Of one of several launches in a row, after one to warm up."""
    begin, end = Event(device), Event(device)
    launch(0)
    begin.record()
    for n in range(times):
        launch(n)
    end.record()
    device.finish_py()
    return end.since(begin) / 1e3 / times


def bandwidths(device: Device, nbytes: int) -> dict[str, float]:
    """Bytes per second: of memory (a copy inside it reads and writes), and to and from the device, pinned."""
    one, other = device.alloc_py(nbytes), device.alloc_py(nbytes)
    host = np.ones(nbytes, np.uint8)
    device.pin_py(host)
    found = {
        "memory": 2 * nbytes / seconds(device, 10, lambda _: device.copy_py(one, other, nbytes)),
        "to_device": nbytes / seconds(device, 5, lambda _: device.upload_py(one, host)),
        "from_device": nbytes / seconds(device, 5, lambda _: device.download_py(host, one)),
    }
    device.unpin_py(host)
    device.free_py(one)
    device.free_py(other)
    return found


class Bench:
    """Weights of one format in the device's memory, and room for activations and results."""

    def __init__(self, device: Device, name: str, args: argparse.Namespace) -> None:
        self.device, self.name, self.rows, self.cols = device, name, args.rows, args.cols
        self.form = FORMATS[name][0]
        isa = "scalar" if name not in FLOATS else "avx512" if "avx512" in isas() else "avx2"
        self.kernels, self.pool = Kernels(isa), Pool()
        mebibytes = min(args.mib, 16)
        encoded = random_weights(name, mebibytes, args.cols)
        encoded = np.ascontiguousarray(encoded[: max(1, len(encoded) // args.rows) * args.rows])
        if len(encoded) < args.rows:
            raise SystemExit(f"{mebibytes} MiB of {name} are less than {args.rows} rows: --rows")
        self.encoded = encoded
        self.matrix_bytes = encoded.nbytes // len(encoded) * args.rows
        self.matrices = max(1, args.mib * MIB // encoded.nbytes) * (len(encoded) // args.rows)
        self.weights = device.alloc_py(self.matrices * self.matrix_bytes)
        device.upload_py(self.weights, encoded)
        for at in range(encoded.nbytes, self.matrices * self.matrix_bytes, encoded.nbytes):
            device.copy_py(self.weights + at, self.weights, encoded.nbytes)

    def close(self) -> None:
        self.device.free_py(self.weights)

    def prepare(self, x: NDArray[np.float32]) -> tuple[int, int]:
        """Activations on the device as the format takes them, and the bytes from one to the next."""
        acts = x if self.name in FLOATS else self.kernels.prepare_py(self.form, x)
        pointer = self.device.alloc_py(acts.nbytes)
        self.device.upload_py(pointer, acts)
        return pointer, acts.strides[0]

    def run(self, tokens: int, products: int, copy: float, many: bool) -> Result:
        device, rows, cols = self.device, self.rows, self.cols
        x = np.random.default_rng(1).standard_normal((tokens, cols)).astype(np.float32)
        acts, stride = self.prepare(x)
        y = device.alloc_py(4 * products * tokens * rows)
        launches = max(1, self.matrices // products)
        table = np.zeros((launches, products), PRODUCT)
        for n in range(launches):
            for i in range(products):
                at = self.weights + (n * products + i) % self.matrices * self.matrix_bytes
                table[n, i] = (at, 0, y + 4 * i * tokens * rows, 0, 0, tokens)
        listed = device.alloc_py(table.nbytes)
        device.upload_py(listed, table)
        grid = (-(-rows // ROWS), products, 1)
        if many:
            grid = (-(-rows // MANY_ROWS), products, -(-tokens // MANY_TOKENS))
        kernel = f"mer_{'many' if many else 'rows'}_{self.name}"

        def launch(n: int) -> None:
            first = np.uint64(listed + n % launches * products * PRODUCT.itemsize)
            arguments = [first, np.int32(products), np.uint64(acts), np.int64(stride)]
            arguments += [np.int32(rows), np.int32(cols), np.int64(rows)]
            device.launch_py(kernel, grid, THREADS, arguments)

        launch(0)
        self.compare(y, x, min(products, len(self.encoded) // rows, 4))
        took = seconds(device, 3 * launches if tokens < 64 else 3, launch)
        for pointer in (acts, y, listed):
            device.free_py(pointer)
        rate = products * self.matrix_bytes / took
        return Result(
            *(self.name, "many" if many else "few", tokens, took * 1e6),
            *(rate / 1e9, rate / copy, products * tokens * rows * cols / took / 1e9),
        )

    def compare(self, y: int, x: NDArray[np.float32], products: int) -> None:
        """The first products, with the CPU's. Raises SystemExit."""
        for i in range(products):
            got = np.empty((len(x), self.rows), np.float32)
            self.device.download_py(got, y + i * got.nbytes)
            self.device.finish_py()
            matrix = self.encoded[i * self.rows : (i + 1) * self.rows]
            want = self.kernels.linear_py(self.pool, self.form, matrix, x)
            if got.tobytes() != want.tobytes():
                off = np.count_nonzero(got.view(np.uint32) != want.view(np.uint32))
                raise SystemExit(
                    f"{self.name}, {len(x)} tokens: {off} of {got.size} numbers are not the CPU's"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", type=names(FORMATS), default=list(FORMATS))
    parser.add_argument("--tokens", type=counts, default="1,4,16,64,512")
    parser.add_argument("--rows", type=int, default=1024, help="of a matrix")
    parser.add_argument("--cols", type=int, default=2048, help="row length, a multiple of 256")
    parser.add_argument("--products", type=int, default=64, help="of a launch; an eighth from 64 tokens on")
    parser.add_argument("--mib", type=int, default=512, help="weights, beyond every cache")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    device = open_device(EngineConfig(device="cuda"))
    assert device is not None
    console = Console()
    bus = bandwidths(device, args.mib * MIB // 4)
    rates = ", ".join(f"{name.replace('_', ' ')} {rate / 1e9:.1f}" for name, rate in bus.items())
    console.print(f"{device.name}, GB/s: {rates}")
    table = Table("format", "kernel", "tokens", "us", "GB/s", "of a copy", "GMAC/s")
    results: list[Result] = []
    for name in args.formats:
        bench = Bench(device, name, args)
        for tokens in args.tokens:
            products = args.products if tokens < 64 else max(1, args.products // 8)
            for many in (False, True) if 4 <= tokens <= 16 else (tokens > 16,):
                r = bench.run(tokens, products, bus["memory"], many)
                results.append(r)
                table.add_row(
                    r.format, r.kernel, str(r.tokens), f"{r.us:.1f}", f"{r.gb_per_s:.1f}", f"{r.of_copy:.0%}",
                    f"{r.gmac_per_s:.0f}",
                )  # fmt: skip
        bench.close()
    console.print(table)
    if args.json:
        report = {
            "device": device.name,
            "bytes_per_second": bus,
            "rows": args.rows,
            "cols": args.cols,
            "products": args.products,
            "results": [asdict(r) for r in results],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
