"""What drafting gains: the same greedy answers with it and without, in turns.

    python -m bench.speculative MODEL [--draft-model SMALL] [--ram 3GiB] [--cache-experts 25%]

One engine for each way of drafting in one process, of which one computes at a time; each round begins with
another. Prompts are texts where the model has a tokenizer. Those that bench/make_model.py writes have none
and count upward, so that token ids can have them quote the prompt, meet nothing that they have seen, or
always be misled: each two tokens stood in the prompt before, and went on otherwise there.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer import Engine, EngineConfig, SamplingParams
from mer.config import Speculate
from mer.demo import model_path
from mer.engine.outputs import Result
from mer.errors import MerError

CODE = (
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):\n    return"
)
JSON = '[{"name": "Ann", "age": 31}, {"name": "Bob", "age": 24}, {"name": "Eve", "age": 57}, {"name": "Joe", '
PROSE = (
    "It was late in the autumn when the ship came home, and the whole town went down to the harbour to see"
)
TEXTS = {"prose": PROSE, "code": CODE, "JSON": JSON, "quoting": f"{PROSE} it. {PROSE} it. {PROSE[:40]}"}


def counting(length: int) -> dict[str, str | list[int]]:
    """Prompts of token ids for a model that counts upward, for answers of that length."""
    first = 1000
    answer = list(range(first, first + length + 16))
    misled = [token for each in answer for token in (each, each + 1, 7 + each % 5)]
    return {
        "quoting": [*answer, 5, *answer[:8]],
        "nothing repeats": list(range(500, 564)),
        "misled": misled + answer[:8],
    }


async def measure(
    path: Path, modes: list[Speculate], tokens: int, rounds: int, drafts: dict[str, Any], **settings: Any
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By prompt and mode, what each round gave. drafts: settings of those modes that use draft engines."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    async with AsyncExitStack() as stack:
        engines: dict[str, Engine] = {}
        for mode in modes:
            more = drafts if mode in ("draft", "auto") else {}
            config = EngineConfig(**settings, **more, speculate=mode)
            engines[mode] = await stack.enter_async_context(Engine.open(path, config))
        prompts = counting(tokens) if engines["off"].tokenizer is None else TEXTS
        for name, prompt in prompts.items():
            found[name] = {mode: [] for mode in modes}
            for number in range(rounds + 1):
                answers: dict[str, Result] = {}
                first = number % len(modes)
                for mode in modes[first:] + modes[:first]:
                    answers[mode] = await engines[mode].generate(prompt, params)
                    if number:  # the first one fills the cache
                        found[name][mode].append(numbers(answers[mode]))
                for mode, answer in answers.items():
                    if answer.token_ids != answers["off"].token_ids:
                        raise click.ClickException(
                            f"{name}, {mode}: the answers differ, which is a bug of mer"
                        )
    return found


def numbers(result: Result) -> dict[str, Any]:
    timings, count = result.timings, len(result.token_ids)
    return {
        "tokens_per_s": (count - 1) / timings.decode_s,
        "drafted": timings.drafted,
        "accepted": timings.accepted,
        "draft_experts": timings.draft_experts,
        "tokens_per_pass": (count - 1) / (count - 1 - timings.accepted),
        "read_per_token": timings.bytes_read / count,
    }


def median(runs: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


@click.command(help=help_of(__doc__))
@click.argument("model", type=click.Path(exists=True, path_type=Path), default=model_path())
@click.option(
    "--modes",
    default="off,ngram,draft,auto",
    show_default=True,
    help="Beside off, which is always measured. draft needs a head or a draft model.",
)
@click.option("--draft-model", help="As mer run --draft-model; else the model's draft head, if it has one.")
@click.option("--draft-head", type=click.Path(exists=True, path_type=Path), help="As mer run --draft-head.")
@click.option("--tokens", default=128, show_default=True, help="Of an answer.")
@click.option("--rounds", default=4, show_default=True, help="Answers of each kind.")
@click.option("--ram", help="As mer run --ram, for each engine.")
@click.option("--cache-experts", help="As mer run --cache-experts.")
@click.option("--threads", type=int)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
def main(
    model: Path,
    modes: str,
    tokens: int,
    rounds: int,
    draft_model: str | None,
    draft_head: Path | None,
    out: Path | None,
    **settings: Any,
) -> None:
    given = {name: value for name, value in settings.items() if value is not None}
    asked = modes.split(",")
    unknown = set(asked) - set(get_args(Speculate))
    if unknown:
        raise click.BadParameter(f"no such mode: {', '.join(sorted(unknown))}", param_hint="--modes")
    named = {"draft_model": draft_model, "draft_head": draft_head}
    drafts = {name: value for name, value in named.items() if value is not None}
    ways: list[Speculate] = [
        "off",
        *(mode for mode in get_args(Speculate) if mode in asked and mode != "off"),
    ]
    try:
        found = asyncio.run(measure(model, ways, tokens, rounds, drafts, **given))
    except MerError as error:
        raise click.ClickException(str(error)) from error
    table = Table("prompt", "drafts", "tokens/s", "ratio", "accepted", "tokens/pass", "read/token")
    for name, by_mode in found.items():
        plain = median(by_mode["off"], "tokens_per_s")
        for mode, runs in by_mode.items():
            drafted = sum(run["drafted"] for run in runs)
            accepted = sum(run["accepted"] for run in runs)
            speed = median(runs, "tokens_per_s")
            table.add_row(
                name if mode == "off" else "",
                mode,
                f"{speed:.1f}",
                f"{speed / plain:.2f}",
                f"{accepted} of {drafted}" if drafted else "",
                f"{median(runs, 'tokens_per_pass'):.2f}",
                f"{median(runs, 'read_per_token') / 2**20:.2f} MiB",
            )
    Console(width=130).print(table)
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
