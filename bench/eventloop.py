"""How long does the engine keep an event loop waiting? Streams, long prompts and embeddings, and a clock.

    python -m bench.eventloop MODEL --streams 8 --seconds 10 --ram 3GiB

A coroutine sleeps a millisecond at a time and writes down how late it wakes: first with nothing else to do
(what the machine itself costs), then under load. A loop that is blocked for n ms shows as n ms late.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mer import Engine, EngineConfig, SamplingParams

TICK = 0.001


async def lateness(seconds: float) -> list[float]:
    """How late each tick was, in seconds."""
    found = []
    end = time.perf_counter() + seconds
    while (asked := time.perf_counter()) < end:
        await asyncio.sleep(TICK)
        found.append(time.perf_counter() - asked - TICK)
    return found


async def load(engine: Engine, streams: int) -> None:
    """Until it is cancelled: streams that are read at once, and long prompts one after the other."""
    random = np.random.default_rng(0)
    most = min(engine.budget.context // 4, engine.spec.max_positions - 64)

    def ids(n: int) -> list[int]:
        return [int(token) for token in random.integers(1, engine.spec.vocab, n)]

    async def stream() -> None:
        while True:
            async for _ in engine.stream(ids(8), SamplingParams(max_tokens=50, ignore_eos=True)):
                pass

    async def long() -> None:
        while True:
            text = "" if engine.tokenizer is None else engine.tokenizer.decode(ids(most // 2))
            await engine.generate(text or ids(most), SamplingParams(max_tokens=1))
            await engine.embed(ids(most))

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
        group.create_task(long())


async def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    async with Engine.open(args.model, EngineConfig(ram=args.ram, threads=args.threads)) as engine:
        idle = await lateness(args.seconds / 2)
        busy = asyncio.create_task(load(engine, args.streams))
        loaded = await lateness(args.seconds)
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
    return {"idle": summary(idle), "under load": summary(loaded)}


def summary(late: list[float]) -> dict[str, Any]:
    """Milliseconds."""
    p50, p99, p999, worst = (float(x) for x in np.percentile(late, [50, 99, 99.9, 100]) * 1e3)
    return {"ticks": len(late), "p50_ms": p50, "p99_ms": p99, "p99.9_ms": p999, "max_ms": worst}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--ram")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="a file for the same as JSON")
    args = parser.parse_args()
    found = asyncio.run(run(args))
    table = Table("late", *next(iter(found.values())))
    for name, row in found.items():
        table.add_row(
            name, *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
