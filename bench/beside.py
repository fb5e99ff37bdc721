"""What does a long prompt do to a stream beside it, and the stream to the prompt?

    python -m bench.beside MODEL --prompt 2000 --ram 3GiB --cache-experts 25%

A stream runs alone, then a prompt of random tokens comes, until its first token. Twice: with chunks that
adapt to what steps take (mer.engine.pace), as an engine does it, and with whole ones, as if nobody waited.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import click
import numpy as np
from attrs import frozen
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer import Engine, SamplingParams
from mer.cli.common import model_argument
from mer.errors import MerError

random = np.random.default_rng(1)


@frozen
class Found:
    """Seconds. chunks: tokens of prompts in each step beside the stream, none left out."""

    alone: float  # from token to token, at the median
    gaps: list[float]  # the same while the prompt was computed
    first: float  # of the prompt, to its first token
    chunks: list[int]


class Chunks:
    """An observer that writes down how much of a prompt each step had, beside the one token of the stream."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def queued(self, request_id: int) -> None: ...

    def started(self, queue_s: float) -> None: ...

    def token(self, first: bool, seconds: float) -> None: ...

    def step(self, tokens: int, requests: int, stats: Any) -> None:
        if requests > 1:
            self.sizes.append(tokens - 1)

    def ended(self, reason: Any, usage: Any) -> None: ...


def ids(engine: Engine, count: int) -> list[int]:
    return [int(token) for token in random.integers(1, engine.spec.vocab, count)]


async def measure(model: Path, prompt: int, seconds: float, whole: bool, settings: dict[str, Any]) -> Found:
    async with Engine.open(model, **settings) as engine:
        if whole:
            engine._worker._pace.observe = lambda decoding, tokens, taken: None  # of which it learns nothing
        await engine.generate(ids(engine, min(600, prompt)), SamplingParams(max_tokens=4, ignore_eos=True))
        times: list[float] = []
        known = asyncio.Event()  # how long a token takes alone

        async def stream() -> None:
            params = SamplingParams(ignore_eos=True)
            async with aclosing(engine.stream(ids(engine, 16), params)) as deltas:
                async for _ in deltas:
                    times.append(time.perf_counter())
                    if len(times) > 8:
                        known.set()

        running = asyncio.create_task(stream())
        await asyncio.sleep(seconds)
        await known.wait()
        chunks = Chunks()
        engine.observe(chunks)
        begun = time.perf_counter()
        await engine.generate(ids(engine, prompt), SamplingParams(max_tokens=1))
        ended = time.perf_counter()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    gaps = [(at, at - before) for before, at in itertools.pairwise(times)]
    alone = statistics.median(gap for at, gap in gaps if at < begun)
    return Found(alone, [gap for at, gap in gaps if begun <= at <= ended], ended - begun, chunks.sizes)


@click.command(help=help_of(__doc__))
@click.argument("model", callback=model_argument)
@click.option("--prompt", type=click.IntRange(1), default=1000, show_default=True, help="Its tokens.")
@click.option("--seconds", default=5.0, show_default=True, help="That the stream runs alone.")
@click.option("--ram")
@click.option("--context", type=int, default=8192, show_default=True)
@click.option("--cache-experts")
@click.option("--threads", type=int)
def main(model: Path, prompt: int, seconds: float, **options: Any) -> None:
    settings = {name: value for name, value in options.items() if value is not None}
    table = Table("chunks", "alone ms", "tokens meanwhile", "worst gap s", "first token s", "sizes", box=None)
    for name, whole in ("adapted", False), ("whole", True):
        try:
            found = asyncio.run(measure(model, prompt, seconds, whole, settings))
        except MerError as error:
            raise click.ClickException(str(error)) from None
        table.add_row(
            name,
            f"{1e3 * found.alone:.1f}",
            str(len(found.gaps)),
            f"{max(found.gaps):.2f}",
            f"{found.first:.2f}",
            " ".join(map(str, found.chunks[:12])) + (" ..." if len(found.chunks) > 12 else ""),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
