"""Several engines with the whole model each against one, and what the choice among them is worth.

    python -m bench.replicas demo
    python -m bench.replicas /tmp/model --replicas 2 --threads 1 --cache-experts 25% --json replicas.json

Each replica is a `mer serve` of its own. Prompts are token ids: `--groups` beginnings, each asked `--each`
times with other ends, in an order drawn anew in each round; so many streams ask again when their answer is
there. Beside one replica alone all are asked in turn, and as `mer cluster` does it: by what a request
begins with and how many each has (mer/deploy/affinity.py; nothing of Ray carries a request here). Figures are
medians of the rounds, each with other prompts. Client and replicas share the machine: of two replicas on two
cores each has less than one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import click
from attrs import asdict, define, frozen
from rich.console import Console
from rich.table import Table

from bench.faces import Http, Record, served
from bench.help import help_of
from mer.cli.common import model_argument
from mer.deploy.affinity import Affinity, beginnings, text_of
from mer.errors import MerError
from mer.model.families import load
from mer.weights.checkpoint import open_checkpoint

ONE, IN_TURN, AFFINITY = "one replica", "in turn", "by beginning and load"


@define
class Load:
    """One run. cached: share of the prompts' tokens whose keys and values were there already."""

    way: str
    replicas: int
    requests_per_s: float
    tokens_per_s: float
    answer_s: float  # median, from asking to the last token
    cached: float


@frozen(kw_only=True)
class Plan:
    """beginning, end, tokens: of each request, in tokens."""

    groups: int = 8
    each: int = 8
    beginning: int = 256
    end: int = 16
    tokens: int = 32
    streams: int = 4
    rounds: int = 3

    def prompts(self, vocab: int, seed: int) -> list[list[int]]:
        draw = random.Random(seed)

        def ids(count: int) -> list[int]:
            return [draw.randrange(1, vocab) for _ in range(count)]

        starts = [ids(self.beginning) for _ in range(self.groups)]
        found = [start + ids(self.end) for start in starts for _ in range(self.each)]
        draw.shuffle(found)
        return found


class InTurn:
    """Each replica after the other."""

    def __init__(self, replicas: int) -> None:
        self._next = itertools.cycle(range(replicas))

    def choose(self, prompt: list[int]) -> int:
        return next(self._next)

    def done(self, replica: int) -> None:
        pass


class ByAffinity:
    """As mer/deploy/ray_router.py."""

    def __init__(self, replicas: int) -> None:
        self._affinity, self._loads = Affinity(), dict.fromkeys(range(replicas), 0)

    def choose(self, prompt: list[int]) -> int:
        keys = beginnings(text_of(json.dumps({"prompt": prompt}).encode()))
        replica: int = self._affinity.order(keys, self._loads)[0]
        self._affinity.sent(keys, replica)
        self._loads[replica] += 1
        return replica

    def done(self, replica: int) -> None:
        self._loads[replica] -= 1


async def run(way: str, replicas: list[Http], prompts: list[list[int]], plan: Plan) -> Load:
    """Raises RuntimeError for a request that failed."""
    router = (ByAffinity if way == AFFINITY else InTurn)(len(replicas))
    left: Iterator[list[int]] = iter(prompts)
    records: list[Record] = []

    async def stream() -> None:
        for prompt in left:
            chosen = router.choose(prompt)
            try:
                record = await replicas[chosen].ask(prompt, plan.tokens)
            finally:
                router.done(chosen)
            if record.error:
                raise RuntimeError(record.error)
            records.append(record)

    begun = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(plan.streams)))
    seconds = time.perf_counter() - begun
    return Load(
        way, len(replicas), len(records) / seconds, sum(each.tokens for each in records) / seconds,
        statistics.median(each.arrivals[-1] - each.asked for each in records),
        sum(each.cached for each in records) / sum(map(len, prompts)),
    )  # fmt: skip


async def measure(model: Path, vocab: int, replicas: int, plan: Plan, settings: dict[str, Any]) -> list[Load]:
    """All runs, in order."""
    loads = []
    async with AsyncExitStack() as stack:
        running = [(await stack.enter_async_context(served(model, settings)))[0] for _ in range(replicas)]
        ways = [(ONE, running[:1]), (IN_TURN, running), (AFFINITY, running)]
        for way, used in ways:  # code is loaded, experts are in memory
            await run(way, used, plan.prompts(vocab, 0)[: 2 * replicas], plan)
        seeds = itertools.count(1)
        for _ in range(plan.rounds):
            for way, used in ways:
                loads.append(await run(way, used, plan.prompts(vocab, next(seeds)), plan))
    return loads


def median(loads: list[Load]) -> Load:
    """Of each figure."""
    names = ("requests_per_s", "tokens_per_s", "answer_s", "cached")
    found = {name: statistics.median(getattr(each, name) for each in loads) for name in names}
    return Load(loads[0].way, loads[0].replicas, **found)


def table(loads: list[Load], plan: Plan) -> Table:
    made = Table("asked", "replicas", "requests/s", "tokens/s", "an answer, s", "found in the cache")
    made.title = f"{plan.groups} beginnings of {plan.beginning} tokens, {plan.each} requests of each"
    for way in dict.fromkeys(each.way for each in loads):
        each = median([load for load in loads if load.way == way])
        made.add_row(
            each.way, f"{each.replicas}", f"{each.requests_per_s:.2f}", f"{each.tokens_per_s:.1f}",
            f"{each.answer_s:.2f}", f"{each.cached:.0%}",
        )  # fmt: skip
    return made


@click.command(help=help_of(__doc__))
@click.argument("model", callback=model_argument)
@click.option("--replicas", type=click.IntRange(1, 16), default=2, show_default=True)
@click.option("--groups", type=click.IntRange(1), default=8, show_default=True, help="Beginnings.")
@click.option("--each", type=click.IntRange(1), default=8, show_default=True, help="Requests of each.")
@click.option("--beginning", type=click.IntRange(1), default=256, show_default=True, help="Tokens of it.")
@click.option("--end", type=click.IntRange(1), default=16, show_default=True, help="Tokens behind it.")
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True, help="Of each answer.")
@click.option("--streams", type=click.IntRange(1), default=4, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each replica.")
@click.option("--cache-experts", help="Of each replica.")
@click.option("--ram", help="Of each replica.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
def main(
    model: Path,
    replicas: int,
    threads: int,
    cache_experts: str | None,
    ram: str | None,
    out: Path | None,
    **options: int,
) -> None:
    plan = Plan(**options)
    given = {"threads": threads, "cache_experts": cache_experts, "ram": ram}
    settings = {name: value for name, value in given.items() if value is not None}
    try:
        vocab = load(open_checkpoint(model)).spec.vocab
        loads = asyncio.run(measure(model, vocab, replicas, plan, settings))
    except (MerError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    Console(width=110).print(table(loads, plan))
    if out is not None:
        out.write_text(json.dumps([asdict(each) for each in loads], indent=1))


if __name__ == "__main__":
    main()
