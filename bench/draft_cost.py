"""What drafting costs where nothing is accepted: steps with it and without, in turns within the same answers.

    python -m bench.draft_cost [MODEL] [--cache-experts 25% --from-drive] [--seconds 90]

Whole answers differ by more than that costs. Here each answer of bench/speculative.py is given in turns of 16
steps: without drafts (`off`), without them once more (`again`, whose ratio is noise), and with `wrong` ones.
All get the same token from the same step, so the time of a turn is divided by what steps at its places take
(medians of off and again), and that by the same of the off turns nearest to it in the answer. Printed is the
mean of these ratios but for the tenth at either end, and its 95 % interval by resampling turns; beside it the
same by the step thread's processor time, and how many steps verified drafts.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from attrs import define
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from bench.speculative import TEXTS, Way, Wrong, ask, greedy, leave_page_cache, wanted
from mer import Engine, EngineConfig
from mer.demo import model_path
from mer.engine.scheduler import Chunk

WAYS = ("off", "again", "wrong")
TURN = 16  # steps
NEAR = 3  # turns


@define
class Turn:
    """Steps in a row in one way. times: of each its place in the text, seconds, those of the processor."""

    answer: tuple[str, int]
    way: str
    times: list[tuple[int, float, float]]


class Turns:
    """Has an engine's steps go in turns, and keeps what they took. Used by the step thread."""

    def __init__(self, engine: Engine, ways: dict[str, Way]) -> None:
        self.turns: list[Turn] = []
        self.drafting = self.steps = 0  # steps of `wrong` that verified drafts, and all
        self.answer = ("", 0)
        self._worker, self._runner, self._ways = engine._worker, engine._runner, ways
        self._step = self._worker._step
        self._draws = random.Random(0)
        self._order: list[str] = []
        self._last = (0.0, 0.0)
        self._worker._step = self.step  # type: ignore[method-assign]

    def step(self, chunks: list[Chunk]) -> bool:
        done = self._step(chunks)
        turn = self.turns[-1] if self.turns else None
        if turn and turn.answer == self.answer:
            wall, cpu = time.perf_counter() - self._last[0], time.thread_time() - self._last[1]
            turn.times.append((chunks[0].start, wall, cpu))
            if turn.way == "wrong":
                self.steps += 1
                self.drafting += bool(chunks[0].draft)
        if chunks[0].last and (turn is None or turn.answer != self.answer or len(turn.times) == TURN):
            self._order = self._order or self._draws.sample(WAYS, len(WAYS))
            self.turns.append(Turn(self.answer, self._order.pop(), []))
            way = self._ways[self.turns[-1].way]
            self._worker._drafting, self._runner._likely = way.drafting, way.likely
        self._last = time.perf_counter(), time.thread_time()
        return done

    def ratios(self, way: str, column: int) -> NDArray[np.float64]:
        """Of each whole turn of that way, by that column of times, to the off turns near it."""
        plain = defaultdict(list)
        whole = [turn for turn in self.turns if len(turn.times) == TURN]
        for turn in whole:
            if turn.way != "wrong":
                for times in turn.times:
                    plain[turn.answer[0], times[0]].append(times[column])
        middle = {place: statistics.median(seconds) for place, seconds in plain.items()}
        # The first answer fills the cache; what was seen at a place by drafts alone has nothing beside it.
        whole = [
            turn
            for turn in whole
            if turn.answer[1] and all((turn.answer[0], place) in middle for place, *_ in turn.times)
        ]
        level = [
            sum(times[column] for times in turn.times)
            / sum(middle[turn.answer[0], place] for place, *_ in turn.times)
            for turn in whole
        ]
        found = []
        for at, turn in enumerate(whole):
            near = [
                level[i]
                for i in range(max(at - NEAR, 0), min(at + NEAR + 1, len(whole)))
                if whole[i].way == "off" and whole[i].answer == turn.answer
            ]
            if turn.way == way and near:
                found.append(level[at] / statistics.fmean(near))
        return np.array(found)


def middle_mean(ratios: NDArray[np.float64]) -> float:
    tenth = len(ratios) // 10
    return float(np.sort(ratios)[tenth : len(ratios) - tenth].mean())


def interval(ratios: NDArray[np.float64]) -> tuple[float, float]:
    draws = np.random.default_rng(0)
    means = [middle_mean(draws.choice(ratios, len(ratios))) for _ in range(400)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


async def measure(path: Path, tokens: int, seconds: float, from_drive: bool, **settings: Any) -> Turns:
    async with Engine.open(path, EngineConfig(**settings)) as engine:
        if engine.tokenizer is None:
            raise click.ClickException("the texts need a model with a tokenizer")
        Wrong.vocab = engine.spec.vocab
        ways = {name: Way.of(engine, name) for name in WAYS}
        if from_drive:
            leave_page_cache(path)
        await ways["off"].take(engine)
        engine._speculate = "auto"  # requests can have drafts, whether or not their step looks for some
        turns, until, number = Turns(engine, ways), time.monotonic() + seconds, 0
        while number < 2 or time.monotonic() < until:  # the first answers fill the cache
            for name, prompt in TEXTS.items():
                turns.answer = (name, number)
                params, given = wanted(engine.tokenizer, name, greedy(tokens))
                result = (await ask(engine, "wrong", prompt, params, given))["result"]
                if result.timings.accepted:
                    raise click.ClickException(f"{name}: a wrong draft was right")
            number += 1
        return turns


@click.command(help=help_of(__doc__))
@click.argument("model", type=click.Path(exists=True, path_type=Path), default=model_path())
@click.option("--tokens", default=128, show_default=True, help="Of an answer.")
@click.option("--seconds", default=90.0, show_default=True, help="For how long.")
@click.option("--cache-experts", help="As mer run --cache-experts.")
@click.option("--threads", type=int)
@click.option("--from-drive", is_flag=True, help="Have the page cache let go of the model first.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
def main(
    model: Path, tokens: int, seconds: float, from_drive: bool, out: Path | None, **settings: Any
) -> None:
    given = {name: value for name, value in settings.items() if value is not None}
    turns = asyncio.run(measure(model, tokens, seconds, from_drive, **given))
    found: dict[str, Any] = {"steps": turns.steps, "drafting": turns.drafting}
    table = Table("way", "turns", "time", "95 %", "CPU", "95 %")
    for way in WAYS[1:]:
        both = {"time": turns.ratios(way, 1), "cpu": turns.ratios(way, 2)}
        if not len(both["time"]):
            raise click.ClickException(
                f"{way}: no turn of {TURN} steps has others beside it; give more --seconds or --tokens"
            )
        found[way] = {"turns": len(both["time"])}
        row = [way, str(len(both["time"]))]
        for name, ratios in both.items():
            mean, (least, most) = middle_mean(ratios), interval(ratios)
            found[way][name] = {"ratio": mean, "least": least, "most": most}
            row += [f"{mean:.4f}", f"{least:.4f}-{most:.4f}"]
        table.add_row(*row)
    console = Console(width=120)
    console.print(table)
    console.print(f"wrong drafts: {turns.drafting / turns.steps:.2%} of {turns.steps} steps verified some")
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
