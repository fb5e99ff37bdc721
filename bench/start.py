"""How fast the dense weights of a model are loaded, beside what the device gives.

    python -m bench.start MODEL

In turn, several times: random reads of 1 MiB, 16 at once, of the file that holds them; the load as an engine
does it; and as many bytes of memory touched for the first time by one thread, which a load can't avoid.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mer.model.dense import dense_bytes, load_dense
from mer.model.families import load
from mer.streaming.reader import Reader
from mer.weights.checkpoint import open_checkpoint


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(path: Path, rounds: int) -> dict[str, Any]:
    """Bytes, and GB/s of each in every round."""
    checkpoint = open_checkpoint(path)
    architecture = load(checkpoint)
    size = dense_bytes(checkpoint, architecture)
    tensors = [checkpoint.tensors[name] for name in architecture.dense.values()]
    file = max(tensors, key=lambda tensor: tensor.nbytes).file
    rates: dict[str, list[float]] = {"device": [], "load": [], "touch": []}
    with Reader(checkpoint.files) as reader:
        for _ in range(rounds):
            done, took = reader.measure(file, 1 << 20, 16, 0.5)
            rates["device"].append(done / took / 1e9)
            rates["load"].append(size / 1e9 / seconds(lambda: load_dense(checkpoint, architecture, reader)))
            rates["touch"].append(size / 1e9 / seconds(lambda: np.empty(size, np.uint8).fill(0)))
    return {"bytes": size, **rates}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.model, args.rounds)
    if args.json:
        print(json.dumps(found))
        return
    print(f"dense weights: {found['bytes'] / 1e9:.2f} GB; median of {args.rounds} rounds, GB/s")
    for name in ("device", "load", "touch"):
        print(f"  {name:8}{median(found[name]):6.2f}   ({', '.join(f'{rate:.2f}' for rate in found[name])})")


if __name__ == "__main__":
    main()
