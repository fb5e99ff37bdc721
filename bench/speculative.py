"""What drafting gains: the same greedy answers with it and without, in turns.

    python -m bench.speculative MODEL [--ram 3GiB] [--cache-experts 25%]

Two engines in one process, of which one computes at a time. Prompts are texts where the model has a
tokenizer. Those that bench/make_model.py writes have none and count upward, so that token ids can have them
quote the prompt, meet nothing that they have seen, or always be misled: each two tokens stood in the prompt
before, and went on otherwise there.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer import Engine, EngineConfig, SamplingParams
from mer.demo import model_path
from mer.engine.outputs import Result

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
    path: Path, tokens: int, rounds: int, **settings: Any
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By prompt and mode, what each round gave."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    async with (
        Engine.open(path, EngineConfig(**settings, speculate="off")) as plain,
        Engine.open(path, EngineConfig(**settings, speculate="auto")) as drafting,
    ):
        prompts = counting(tokens) if plain.tokenizer is None else TEXTS
        for name, prompt in prompts.items():
            found[name] = {"off": [], "auto": []}
            for number in range(rounds + 1):
                answers: dict[str, Result] = {}
                for mode, engine in (("off", plain), ("auto", drafting)):
                    answers[mode] = await engine.generate(prompt, params)
                    if number:  # the first one fills the cache
                        found[name][mode].append(numbers(answers[mode]))
                if answers["off"].token_ids != answers["auto"].token_ids:
                    raise click.ClickException(f"{name}: the answers differ, which is a bug of mer")
    return found


def numbers(result: Result) -> dict[str, Any]:
    timings, count = result.timings, len(result.token_ids)
    return {
        "tokens_per_s": (count - 1) / timings.decode_s,
        "drafted": timings.drafted,
        "accepted": timings.accepted,
        "tokens_per_pass": (count - 1) / (count - 1 - timings.accepted),
        "read_per_token": timings.bytes_read / count,
    }


def median(runs: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


@click.command(help=help_of(__doc__))
@click.argument("model", type=click.Path(exists=True, path_type=Path), default=model_path())
@click.option("--tokens", default=128, show_default=True, help="Of an answer.")
@click.option("--rounds", default=3, show_default=True, help="Answers of each kind.")
@click.option("--ram", help="As mer run --ram, for each engine.")
@click.option("--cache-experts", help="As mer run --cache-experts.")
@click.option("--threads", type=int)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
def main(model: Path, tokens: int, rounds: int, out: Path | None, **settings: Any) -> None:
    given = {name: value for name, value in settings.items() if value is not None}
    found = asyncio.run(measure(model, tokens, rounds, **given))
    table = Table(
        "prompt",
        "off, tokens/s",
        "auto, tokens/s",
        "ratio",
        "accepted",
        "tokens/pass",
        "read/token, off → auto",
    )
    for name, modes in found.items():
        off, auto = modes["off"], modes["auto"]
        speeds = median(off, "tokens_per_s"), median(auto, "tokens_per_s")
        drafted = sum(run["drafted"] for run in auto)
        accepted = sum(run["accepted"] for run in auto)
        reads = [f"{median(runs, 'read_per_token') / 2**20:.1f}" for runs in (off, auto)]
        table.add_row(
            name,
            *(f"{speed:.1f}" for speed in speeds),
            f"{speeds[1] / speeds[0]:.2f}",
            f"{accepted} of {drafted}",
            f"{median(auto, 'tokens_per_pass'):.2f}",
            f"{reads[0]} → {reads[1]} MiB",
        )
    Console(width=130).print(table)
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
