"""A load on `mer serve`, by HTTP and gRPC, and on the engine in process: speed, latencies, what a face costs.

    python -m bench.serve demo
    python -m bench.serve /tmp/model --streams 1,8 --cache-experts 25% --rate 2 --json load.json
    python -m bench.serve demo --no-server --threads 1 --temperature 0.8 --speculate off --tokens 200

Closed loop: so many streams, each asks again when its answer is there. Open loop (`--rate`): requests come as
a Poisson process, whatever became of those before. Each round runs every face once, on the same requests, one
after the other; figures are medians of the rounds. What a face costs is the difference to the engine in
process in the same round, per token: of the time that all took, and of the processor time of the process that
has the engine. The lag of the event loop is how late a timer of 5 ms fires in process, and how long GET
/health takes of a server. Prompts are token ids, other ones in each round; all answers have the same length.
HTTP sends texts, so of a model without a tokenizer its latencies say nothing: all comes with the last token.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
from attrs import asdict, define, frozen
from rich.console import Console
from rich.table import Table

from bench.faces import Face, InProcess, Record, in_process, served
from bench.help import help_of
from mer.cli.common import model_argument
from mer.errors import MerError

_PING_S = 0.02


@define
class Load:
    """One run. Rates are per second, latencies in seconds at the 50th, 95th and 99th percentile."""

    face: str
    load: str
    requests: int
    failed: int
    tokens: int
    seconds: float
    tokens_per_s: float
    cpu_s_per_token: float
    first_token_s: tuple[float, ...]
    next_token_s: tuple[float, ...]
    lag_s: tuple[float, ...]
    goodput: float  # requests per second that met both goals


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(np.percentile(values, p)) for p in (50, 95, 99)) if values else (0.0, 0.0, 0.0)


def summary(
    face: str, load: str, records: list[Record], seconds: float, cpu_s: float, lags: list[float],
    goals: tuple[float, float],
) -> Load:  # fmt: skip
    """goals: seconds to the first token, and from token to token on an average."""
    done = [each for each in records if not each.error and each.arrivals]
    first = [each.arrivals[0] - each.asked for each in done]
    gaps = [b - a for each in done for a, b in zip(each.arrivals, each.arrivals[1:], strict=False)]
    met = 0
    for each in done:
        mean = (each.arrivals[-1] - each.arrivals[0]) / max(len(each.arrivals) - 1, 1)
        met += each.arrivals[0] - each.asked <= goals[0] and mean <= goals[1]
    tokens = sum(each.tokens for each in done)
    return Load(
        face, load, len(records), len(records) - len(done), tokens, seconds, tokens / seconds,
        cpu_s / max(tokens, 1), percentiles(first), percentiles(gaps), percentiles(lags), met / seconds,
    )  # fmt: skip


async def closed(face: Face, prompts: list[list[int]], tokens: int, streams: int) -> list[Record]:
    left = list(reversed(prompts))
    records: list[Record] = []

    async def stream() -> None:
        while left:
            records.append(await face.ask(left.pop(), tokens))

    await asyncio.gather(*(stream() for _ in range(streams)))
    return records


async def opened(face: Face, prompts: list[list[int]], tokens: int, rate: float, seed: int) -> list[Record]:
    draw = random.Random(seed)
    asked = []
    due = time.perf_counter()
    for prompt in prompts:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        asked.append(asyncio.create_task(face.ask(prompt, tokens)))
    return list(await asyncio.gather(*asked))


async def run(
    face: Face, load: str, sent: Coroutine[Any, Any, list[Record]], goals: tuple[float, float]
) -> Load:
    """One load on one face, and how late its event loop is meanwhile."""
    lags: list[float] = []

    async def watch() -> None:
        while True:
            lags.append(await face.ping())
            await asyncio.sleep(_PING_S)

    watching = asyncio.create_task(watch())
    cpu_s, begun = face.cpu_s(), time.perf_counter()
    records = await sent
    seconds, cpu_s = time.perf_counter() - begun, face.cpu_s() - cpu_s
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    return summary(face.name, load, records, seconds, cpu_s, lags, goals)


def costs(loads: list[Load]) -> dict[str, dict[str, float]]:
    """Of each face and closed loop: medians over the rounds of what it adds per token, in seconds."""
    rounds: dict[tuple[str, str], list[Load]] = {}
    for each in loads:
        rounds.setdefault((each.face, each.load), []).append(each)
    found: dict[str, dict[str, float]] = {}
    for (face, load), mine in rounds.items():
        if face == InProcess.name or not load.startswith("closed"):
            continue
        pairs = list(zip(mine, rounds[InProcess.name, load], strict=True))
        found[f"{face}, {load}"] = {
            "wall_s": statistics.median(1 / a.tokens_per_s - 1 / b.tokens_per_s for a, b in pairs),
            "cpu_s": statistics.median(a.cpu_s_per_token - b.cpu_s_per_token for a, b in pairs),
        }
    return found


def median(loads: list[Load]) -> Load:
    """Of each figure."""
    values: dict[str, Any] = asdict(loads[0])
    for name, value in values.items():
        every = [getattr(each, name) for each in loads]
        if isinstance(value, tuple):
            values[name] = tuple(statistics.median(column) for column in zip(*every, strict=True))
        elif not isinstance(value, str):
            values[name] = statistics.median(every)
    return Load(**values)


@frozen(kw_only=True)
class Plan:
    """settings: of EngineConfig, for both processes. rate: None for no open loop. goals: see `summary`."""

    settings: dict[str, Any]
    streams: Sequence[int] = (1, 8)
    rate: float | None = None
    requests: int = 16
    tokens: int = 64
    prompt: int = 32
    rounds: int = 3
    goals: tuple[float, float] = (1.0, 0.1)
    server: bool = True  # else the engine in process alone
    temperature: float = 0.0

    def prompts(self, vocab: int, *seed: int) -> list[list[int]]:
        draw = np.random.default_rng(seed)
        return [draw.integers(1, vocab, self.prompt).tolist() for _ in range(self.requests)]


async def measure(model: Path, plan: Plan) -> list[Load]:
    """All runs, in order."""
    loads: list[Load] = []
    async with AsyncExitStack() as stack:
        plain = await stack.enter_async_context(in_process(model, plan.settings))
        faces: list[Face] = [plain]
        if plan.server:
            faces += await stack.enter_async_context(served(model, plan.settings))
        for face in faces:  # the cache is filled, code is loaded
            face.temperature = plan.temperature
            await closed(face, plan.prompts(plain.vocab, 0), plan.tokens, max(plan.streams))
        for number in range(1, plan.rounds + 1):
            for streams in plan.streams:
                prompts = plan.prompts(plain.vocab, number, streams)
                for face in faces:
                    sent = closed(face, prompts, plan.tokens, streams)
                    loads.append(await run(face, f"closed, {streams}", sent, plan.goals))
            if plan.rate is not None:
                prompts = plan.prompts(plain.vocab, number, 0)
                for face in faces:
                    sent = opened(face, prompts, plan.tokens, plan.rate, number)
                    loads.append(await run(face, f"open, {plan.rate:g}/s", sent, plan.goals))
    return loads


def show(loads: list[Load], streams: Sequence[int]) -> dict[str, Any]:
    """Print the tables; returns what stands in them."""
    console = Console(width=120, highlight=False)
    table = Table(
        "face",
        "load",
        "failed",
        "tokens/s",
        "CPU us",
        "first token ms",
        "next token ms",
        "lag ms",
        "goodput/s",
    )
    medians = []
    for name in dict.fromkeys((each.face, each.load) for each in loads):
        each = median([load for load in loads if (load.face, load.load) == name])
        medians.append(each)
        spread = ["/".join(f"{1e3 * s:.1f}" for s in each_s)
                  for each_s in (each.first_token_s, each.next_token_s, each.lag_s)]  # fmt: skip
        table.add_row(
            each.face,
            each.load,
            f"{each.failed:g}",
            f"{each.tokens_per_s:.1f}",
            f"{1e6 * each.cpu_s_per_token:.0f}",
            *spread,
            f"{each.goodput:.2f}",
        )
    console.print(table)
    console.print("CPU: processor time a token. Latencies: 50th/95th/99th percentile.")
    cost = costs(loads)
    for name, added in cost.items():
        wall, cpu = 1e3 * added["wall_s"], 1e3 * added["cpu_s"]
        console.print(f"{name}: {wall:+.3f} ms a token beside the engine in process, processor {cpu:+.3f} ms")
    scaling, cpu_scaling = {}, {}
    if len(streams) > 1:
        few, many = f"closed, {streams[0]}", f"closed, {streams[-1]}"
        for face in dict.fromkeys(each.face for each in loads):
            by_load = {each.load: each for each in medians if each.face == face}
            scaling[face] = by_load[many].tokens_per_s / by_load[few].tokens_per_s
            # of short runs the system's clock has counted nothing
            cpu_scaling[face] = by_load[few].cpu_s_per_token / max(by_load[many].cpu_s_per_token, 1e-9)
            console.print(
                f"{face}: {streams[-1]} streams give {scaling[face]:.2f} times the tokens/s of {streams[0]}, "
                f"{cpu_scaling[face]:.2f} times by processor time"
            )
    found = {"medians": [asdict(each) for each in medians], "cost_per_token": cost}
    return found | {"scaling": scaling, "cpu_scaling": cpu_scaling}


def numbers(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    try:
        found = [int(each) for each in value.split(",")]
    except ValueError:
        raise click.BadParameter("write numbers with commas, as 1,8") from None
    if min(found) < 1:
        raise click.BadParameter("at least 1 each")
    return found


@click.command(help=help_of(__doc__))
@click.argument("model", callback=model_argument)
@click.option("--streams", callback=numbers, default="1,8", show_default=True, help="Of closed loops.")
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Requests a second of an open loop, too."
)
@click.option("--requests", type=click.IntRange(1), default=16, show_default=True, help="Of each run.")
@click.option("--tokens", type=click.IntRange(2), default=64, show_default=True, help="Of each answer.")
@click.option("--prompt", type=click.IntRange(1), default=32, show_default=True, help="Tokens of each.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--goal-first", default=1.0, show_default=True, help="Seconds to the first token.")
@click.option("--goal-next", default=0.1, show_default=True, help="From token to token, on an average.")
@click.option("--server/--no-server", default=True, help="Without: the engine in process alone.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--speculate", type=click.Choice(["auto", "off"]), help="off: nothing is drafted.")
@click.option("--ram", help="Of each of the two processes.")
@click.option("--context", type=int)
@click.option("--cache-experts")
@click.option("--threads", type=int)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
def main(
    model: Path,
    goal_first: float,
    goal_next: float,
    out: Path | None,
    ram: str | None,
    context: int | None,
    cache_experts: str | None,
    threads: int | None,
    speculate: str | None,
    **options: Any,
) -> None:
    given = {"ram": ram, "context": context, "cache_experts": cache_experts, "threads": threads}
    given["speculate"] = speculate
    settings = {name: value for name, value in given.items() if value is not None}
    plan = Plan(settings=settings, goals=(goal_first, goal_next), **options)
    try:
        loads = asyncio.run(measure(model, plan))
    except (MerError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    shown = show(loads, plan.streams)
    if out is not None:
        out.write_text(json.dumps(shown | {"runs": [asdict(each) for each in loads]}, indent=2))


if __name__ == "__main__":
    main()
