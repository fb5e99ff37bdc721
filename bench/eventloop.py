"""How long does the engine keep an event loop waiting? Streams, long prompts and embeddings, and a clock.

    python -m bench.eventloop MODEL --streams 8 --seconds 10 --ram 3GiB

A coroutine sleeps a millisecond at a time and writes down how late it wakes: a loop that is blocked for n ms
shows as n ms late. At the same time another process does the same; what it finds is what the machine costs,
with the engine's threads and other programs on its CPUs. CPU time in a tick is what ran on the loop itself.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mer import Engine, EngineConfig, SamplingParams

TICK = 0.001
random = np.random.default_rng(0)


async def lateness(seconds: float) -> list[tuple[float, float]]:
    """How late each tick was, and the CPU time of this thread meanwhile, in seconds."""
    found = []
    end = time.perf_counter() + seconds
    while (asked := time.perf_counter()) < end:
        own = time.thread_time()
        await asyncio.sleep(TICK)
        found.append((time.perf_counter() - asked - TICK, time.thread_time() - own))
    return found


def sleeper(seconds: float) -> None:
    """The same in a process that does nothing else; prints a JSON list."""
    found = []
    end = time.perf_counter() + seconds
    while (asked := time.perf_counter()) < end:
        own = time.thread_time()
        time.sleep(TICK)
        found.append((time.perf_counter() - asked - TICK, time.thread_time() - own))
    print(json.dumps(found))


async def load(engine: Engine, streams: int) -> None:
    """Until it is cancelled: streams that are read at once, and long prompts one after the other."""
    most = min(engine.budget.context // 4, engine.context - 64)

    def ids(n: int) -> list[int]:
        return [int(token) for token in random.integers(1, engine.spec.vocab, n)]

    async def stream() -> None:
        while True:
            async for _ in engine.stream(ids(8), SamplingParams(max_tokens=50, ignore_eos=True)):
                pass

    prompts: list[Any] = [ids(most) for _ in range(20)]
    if engine.tokenizer is not None:
        prompts[::2] = [engine.tokenizer.decode(prompt[: most // 2]) for prompt in prompts[::2]]

    async def long() -> None:
        for prompt in itertools.cycle(prompts):
            await engine.generate(prompt, SamplingParams(max_tokens=1))
            await engine.embed(prompt)

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
        group.create_task(long())


async def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    async with Engine.open(args.model, EngineConfig(ram=args.ram, threads=args.threads)) as engine:
        gc.freeze()  # as `mer serve` does
        busy = asyncio.create_task(load(engine, args.streams))
        await asyncio.sleep(1)
        code = f"from bench.eventloop import sleeper; sleeper({args.seconds})"
        with tempfile.TemporaryFile() as printed:
            other = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=printed)
            await asyncio.sleep(1)  # a process that has just forked copies pages
            late = await lateness(args.seconds)
            await other.wait()
            printed.seek(0)
            peer = json.load(printed)
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
    return {"another process": summary(peer), "event loop": summary(late)}


def summary(ticks: list[Any]) -> dict[str, Any]:
    """Milliseconds."""
    late, own = np.array(ticks).T * 1e3
    p50, p99, worst = (float(x) for x in np.percentile(late, [50, 99, 100]))
    found = {"ticks": len(ticks), "p50": p50, "p99": p99, "max": worst}
    return found | {"cpu p99": float(np.percentile(own, 99)), "cpu max": float(own.max())}


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
    table = Table("ms late", *next(iter(found.values())))
    for name, row in found.items():
        table.add_row(
            name, *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
