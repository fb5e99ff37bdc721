"""Whether trees of drafts would pay: what chains and trees of the same size bring, and what a step takes.

    python -m bench.draft_trees HELD.txt [--cost-model MODEL] [--share 25%] [--json FILE]

The bundled model writes answers to held-out text (tools/demo_draft_text.py makes that), greedy and drawn, and
to prompts that repeat themselves. Behind each token of an answer the draft head, or prompt lookup, unfolds
candidates: likely continuations, each with the chance that it is thought to have. Of these are taken

    chain       the likeliest tokens one after another, so many
    confident   of the chain what is likelier than some chance, for which the mean length is that number
    two         chains behind the two likeliest first tokens
    static      the best tree for chances by rank and depth (Sequoia, arXiv 2402.12374), taken from the very
                same answers, which flatters it
    tree        the likeliest candidates (EAGLE-2, arXiv 2406.16858)

and how much of the answer stands in them is counted. That holds for drawn answers, too: a token is drawn from
the model's own distribution, and the next row counts if that was drafted, so a candidate is worth its chance.

Steps are timed by processor time of one thread, of all shapes together, over the tokens that would be
verified, one sequence alone; where a share of the experts is in memory, reading adds its bytes at
--device GB/s. A tree's tokens stand in a row there, as mer verifies chains alone: the same work, nearly
the same experts. A tree counts as many passes of the head as it is deep, each as long as for one token,
which flatters it. Speeds are those at the size that is best for each answer, none included.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
from attrs import asdict, evolve, field, frozen
from rich.console import Console
from rich.table import Table

from bench.draft_candidates import (
    CHILDREN,
    CONFIG,
    DEPTH,
    LENGTH,
    PROMPT,
    SHAPES,
    SHARP,
    SIZES,
    Answers,
    Start,
    TreeHead,
    answers,
    look_up,
    rejection,
)
from bench.help import help_of
from bench.speculative import GIVEN
from mer.demo import model_path
from mer.engine.runner import Runner
from mer.engine.scheduler import Chunk, Sequence
from mer.engine.tied import find_head
from mer.model.families import load
from mer.model.kv import BLOCK
from mer.model.tokenizer import Tokenizer
from mer.weights.checkpoint import open_checkpoint

STEPS = 32  # of an answer that are timed, at the most


@frozen
class Steps:
    """Of steps that verify so many drafted tokens of a shape: CPU seconds, bytes read, experts a layer."""

    layers: int
    seconds: dict[str, dict[int, list[float]]] = field(factory=lambda: defaultdict(lambda: defaultdict(list)))
    read: dict[str, dict[int, list[float]]] = field(factory=lambda: defaultdict(lambda: defaultdict(list)))
    experts: dict[str, dict[int, list[float]]] = field(factory=lambda: defaultdict(lambda: defaultdict(list)))

    def time(self, runner: Runner, tokens: list[int], starts: list[Start], name: str, size: int) -> None:
        """Write one answer, with such drafts."""
        blocks = list(range(-(-(len(tokens) + SIZES[-1]) // BLOCK)))
        sequence = Sequence(tokens=tokens[: starts[0].at - 1], blocks=blocks)
        runner.step([Chunk(sequence, len(sequence.tokens))])
        sequence.computed = len(sequence.tokens)
        by_place, steps = {start.at: start for start in starts}, 0
        while (start := by_place.get(sequence.computed + 1)) is not None and steps < STEPS:
            sequence.tokens = tokens[: start.at]
            (nodes,) = SHAPES[name]([start], size) if size else ([],)
            chunk = Chunk(sequence, 1, tuple(node.token for node in nodes))
            before, began = runner.stats, time.thread_time()
            runner.step([chunk])
            seconds, stats = time.thread_time() - began, runner.stats - before
            if steps >= STEPS // 4 and len(nodes) == size:  # the first ones follow other work
                experts = float(runner.spec.top_k)
                if nodes:
                    wanted = runner._forward.routes
                    assert wanted is not None
                    experts = statistics.mean([len(np.unique(layer[: chunk.width])) for layer in wanted])
                for of, value in zip(
                    (self.seconds, self.read, self.experts), (seconds, stats.bytes_read, experts), strict=True
                ):
                    of[name][size].append(value)
            sequence.computed += 1 + sum(node.hit for node in nodes)
            steps += 1

    def cost(self, name: str, nodes: float, device: float) -> float:
        """Seconds of one; between sizes by a straight line. device: bytes a second."""
        shape = "chain" if name in ("chain", "confident") else "tree"
        sizes = sorted({0, *self.seconds[shape]})
        return float(np.interp(nodes, sizes, [self._one(shape, size, device) for size in sizes]))

    def _one(self, shape: str, size: int, device: float) -> float:
        """To compute takes as long whatever the shape; what is read differs."""
        seconds = [second for times in self.seconds.values() for second in times.get(size, [])]
        return (
            statistics.median(seconds) + statistics.mean(self.read[shape if size else "chain"][size]) / device
        )


def time_steps(model: Path, found: Answers, starts: list[Start], rounds: int, share: str | None) -> Steps:
    """Of chains and trees, in turns."""
    of_window: dict[int, list[Start]] = defaultdict(list)
    for start in starts:
        of_window[start.window].append(start)
    config = evolve(CONFIG, context=2 * LENGTH, max_running=SIZES[-1] + 1, cache_experts=share)
    runner = Runner.open(model, config)
    steps = Steps(len(runner.spec.layers))
    try:
        keys = [("chain", size) for size in (0, *SIZES) if size <= DEPTH] + [("tree", size) for size in SIZES]
        windows = list(of_window)
        for turn in range(rounds):
            for number, key in enumerate(keys):
                window = windows[(turn + number) % len(windows)]
                steps.time(runner, found.tokens[window].tolist(), of_window[window], *key)
    finally:
        runner.close()
    return steps


def head_seconds(model: Path, found: Answers, rounds: int = 40) -> float:
    """Of one token that the head drafts, as the engine asks for it."""
    checkpoint = open_checkpoint(model)
    architecture, seconds = load(checkpoint), []
    runner = Runner.open(model, evolve(CONFIG, context=2 * LENGTH, max_running=1))
    source = find_head(checkpoint, architecture, CONFIG)
    assert source is not None, f"{model} has no draft head"
    engine = source.load(runner)
    tokens = found.tokens[0].tolist()
    sequence = Sequence(tokens=tokens[: found.first], blocks=list(range(2 * LENGTH // BLOCK)))
    for _ in range(rounds):
        chunks = [Chunk(sequence, sequence.pending)]
        runner.step(chunks)
        engine.observe(chunks, runner.states)
        sequence.computed = len(sequence.tokens)
        sequence.tokens.append(tokens[len(sequence.tokens)])
        began = time.thread_time()
        engine.propose([sequence], [DEPTH])
        seconds.append((time.thread_time() - began) / DEPTH)
    engine.close()
    runner.close()
    return statistics.median(seconds)


@frozen
class Worth:
    """What drafts of one shape and size bring. passes: of the head. Each of these by answer."""

    size: int
    nodes: list[float]
    accepted: list[float]
    passes: list[float]


def worth(starts: list[Start], name: str) -> list[Worth]:
    found = []
    windows = np.array([start.window for start in starts])
    for size in SIZES:
        if name not in ("chain", "confident") or size <= DEPTH:
            chosen = SHAPES[name](starts, size)
            passes = [max((len(node.ranks) for node in nodes), default=0) for nodes in chosen]
            if name == "confident":  # one more, which was not likely enough
                passes = [min(each + 1, DEPTH) for each in passes]
            kinds = (
                [len(nodes) for nodes in chosen],
                [sum(node.hit for node in nodes) for nodes in chosen],
                passes,
            )
            by_answer = (
                [float(np.mean(np.array(of)[windows == w])) for w in sorted(set(windows.tolist()))]
                for of in kinds
            )
            found.append(Worth(size, *by_answer))
    return found


def speed(of_sizes: list[Worth], name: str, steps: Steps, head: float, device: float) -> tuple[float, float]:
    """Tokens a second beside plain steps, with the best size for each answer; and the mean of nodes."""
    plain = steps.cost("chain", 0, device)
    times, sizes = [], []
    for answer in range(len(of_sizes[0].nodes)):
        best = [(plain, 0.0)]
        for each in of_sizes:
            seconds = steps.cost(name, each.nodes[answer], device) + each.passes[answer] * head
            best.append((seconds / (1 + each.accepted[answer]), each.nodes[answer]))
        times.append(min(best)[0])
        sizes.append(min(best)[1])
    return plain / statistics.mean(times), statistics.mean(sizes)


def show_worth(console: Console, texts: dict[str, dict[str, list[Worth]]]) -> None:
    table = Table("tokens a step, nodes:", "", *map(str, SIZES))
    for text, found in texts.items():
        for name, of_sizes in found.items():
            by_size = {each.size: f"{1 + statistics.mean(each.accepted):.2f}" for each in of_sizes}
            table.add_row(text if name == "chain" else "", name, *(by_size.get(size, "") for size in SIZES))
    console.print(table)


def show_drawn(console: Console, drawn: dict[str, dict[int, tuple[float, float]]]) -> None:
    table = Table("a first token is right, of", *map(str, range(1, CHILDREN + 1)))
    for name, chances in drawn.items():
        table.add_row(f"{name}: the likeliest", *(f"{each[0]:.3f}" for each in chances.values()))
        table.add_row("drawn, rejection", *(f"{each[1]:.3f}" for each in chances.values()))
    console.print(table)


def show_steps(console: Console, costs: dict[str, tuple[Steps, float]]) -> None:
    table = Table("processor ms of a step, experts a layer, MiB read; nodes:", "", *map(str, (0, *SIZES)))
    for cost, (steps, head) in costs.items():
        for name, of_sizes in steps.seconds.items():
            cells = [
                f"{1e3 * statistics.median(of_sizes[size]):.2f} {np.mean(steps.experts[name][size]):.1f} "
                f"{np.mean(steps.read[name][size]) / 2**20:.1f}"
                if size in of_sizes
                else ""
                for size in (0, *SIZES)
            ]
            table.add_row(f"{cost}, head {1e3 * head:.3f}" if name == "chain" else "", name, *cells)
    console.print(table)


@click.command(help=help_of(__doc__))
@click.argument("held", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--windows", default=24, show_default=True, help="Of held-out text.")
@click.option("--rounds", default=3, show_default=True, help="Answers for each number that is timed.")
@click.option(
    "--share", default="25%", show_default=True, help="Of the experts in memory, beside all of them."
)
@click.option("--device", default=1.3, show_default=True, help="GB/s at which experts are read.")
@click.option(
    "--cost-model",
    type=click.Path(exists=True, path_type=Path),
    help="Time its steps, too, with a head that takes a layer's share of a step.",
)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
def main(
    held: Path,
    windows: int,
    rounds: int,
    share: str,
    device: float,
    cost_model: Path | None,
    out: Path | None,
) -> None:
    model = model_path()
    tokenizer = Tokenizer.open(model)
    assert tokenizer is not None
    ids = tokenizer.encode(held.read_text())
    prompts = np.array(ids[: len(ids) // PROMPT * PROMPT], np.int32).reshape(-1, PROMPT)
    prompts = prompts[np.linspace(0, len(prompts) - 1, windows).astype(int)]
    texts: dict[str, list[Start]] = {}
    drawn: dict[str, dict[int, tuple[float, float]]] = {}
    first: Answers | None = None
    for name, temperature in (("held-out, greedy", 0.0), ("held-out, drawn", 0.7)):
        found, spec, dense = answers(model, prompts, LENGTH, temperature)
        first = first or found
        head = TreeHead(model / "draft", spec, dense)
        texts[name] = [
            start for window in range(windows) for start in head.unfold(found, window, temperature or SHARP)
        ]
        texts[f"{name}, prompt lookup"] = [
            start
            for window, each in enumerate(found.tokens.tolist())
            for start in look_up(each, window, found.first)
        ]
        if temperature:
            drawn[name] = rejection(found, head, texts[name][::4], temperature)
    for name, (prompt, _) in GIVEN.items():
        start = np.array([tokenizer.encode(prompt)], np.int32)
        found, *_ = answers(model, start, start.shape[1] + LENGTH - PROMPT, 0.0)
        texts[f"{name}, head"] = head.unfold(found, 0, SHARP)
        texts[f"{name}, prompt lookup"] = look_up(found.tokens[0].tolist(), 0, found.first)
    values = {text: {name: worth(starts, name) for name in SHAPES} for text, starts in texts.items()}
    assert first is not None
    starts = texts["held-out, greedy"]
    costs: dict[str, tuple[Steps, float]] = {}
    for path in [model] + ([cost_model] if cost_model else []):
        for kept in (None, share):
            steps = time_steps(path, first, starts, rounds, kept)
            plain = steps.cost("chain", 0, 1e9 * device)
            price = plain / steps.layers if path is cost_model else head_seconds(model, first)
            costs[f"{path.name}, {kept or 'resident'}"] = steps, price
    console = Console(width=150)
    show_worth(console, values)
    show_steps(console, costs)
    table = Table("tokens/s beside plain steps (nodes)", "", *SHAPES)
    best: dict[str, dict[str, dict[str, tuple[float, float]]]] = defaultdict(dict)
    for text, value in values.items():
        for name, (steps, price) in costs.items():
            head_price = 0.0 if "lookup" in text else price
            of_shape = {
                shape: speed(value[shape], shape, steps, head_price, 1e9 * device) for shape in SHAPES
            }
            best[text][name] = of_shape
            cells = [f"{gain:.3f} ({size:.1f})" for gain, size in of_shape.values()]
            table.add_row(text if name == next(iter(costs)) else "", name, *cells)
    console.print(table)
    show_drawn(console, drawn)
    if out:
        tokens = {
            text: {name: [asdict(each) for each in of] for name, of in value.items()}
            for text, value in values.items()
        }
        timed = {name: {"head": price, **asdict(steps)} for name, (steps, price) in costs.items()}
        out.write_text(json.dumps({"tokens": tokens, "steps": timed, "best": best, "drawn": drawn}) + "\n")


if __name__ == "__main__":
    main()
