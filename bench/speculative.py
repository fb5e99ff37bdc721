"""What drafting gains: the same answers with it and without, in turns.

    python -m bench.speculative MODEL [--draft-model SMALL] [--ram 3GiB] [--cache-experts 25%]

One engine for each way of drafting in one process, of which one computes at a time; each round begins with
another. `wrong` is auto where whatever is drafted, by prompt lookup or an engine, is wrong, and says that it
is sure: what the worst text could cost. `CPU` is the ratio by processor time, which says something on a busy
machine, too. `late` is auto without what drafted tokens probably want being read before their step:

    python -m bench.speculative --modes auto,late --cache-experts 25% --from-drive --rounds 12

Prose is a greedy answer to text that the bundled model has not seen. Code, JSON and what is quoted from the
prompt are given: at each place one token may be drawn, so each model, even one that can't quote, writes what
such an answer would be. Models that bench/make_model.py writes have no tokenizer and count upward, so that
token ids can have them quote the prompt, meet nothing that they have seen, or be misled: each two tokens
stood in the prompt before, and went on otherwise there.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import click
import numpy as np
from attrs import evolve
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer import Engine, EngineConfig, SamplingParams
from mer._ext.acceptance import Acceptance
from mer.config import Speculate
from mer.demo import model_path
from mer.engine import engine as engine_module
from mer.engine.draft import DraftEngine
from mer.engine.outputs import Result
from mer.engine.structure import Structure
from mer.errors import MerError

# The ends of Pride and Prejudice and of Emma, which the bundled model was not trained on.
HELD_OUT = {
    "prose": "Happy for all her maternal feelings was the day on which Mrs. Bennet got rid of her two most "
    "deserving daughters. With what delighted pride she afterwards visited Mrs. Bingley, and talked of Mrs. "
    "Darcy, may be guessed.",
    "prose, another": "The wedding was very much like other weddings, where the parties have no taste for "
    "finery or parade; and Mrs. Elton, from the particulars detailed by her husband, thought it all "
    "extremely shabby, and very inferior to her own.",
}
PASSAGE = (
    "It was late in the autumn when the ship came home, and the whole town went down to the harbour to see "
    "it. The captain stood upon the deck, with his hat in his hand, and looked for his wife among the "
    "people; but she had been told that he was lost, and had gone to live with her sister in the country."
)


def _function(name: str, sign: str) -> str:
    return f"def {name}(a, b):\n    return a {sign} b\n\n\n"


def _person(name: str, age: int, town: str) -> str:
    return f'{{"name": "{name}", "age": {age}, "town": "{town}"}},\n '


# A prompt, and the answer that is let pass.
GIVEN = {
    "code": (
        "".join(map(_function, ("add", "sub"), "+-")),
        "".join(map(_function, ("mul", "div", "mod", "power"), ("*", "/", "%", "**"))),
    ),
    "JSON": (
        "[" + "".join(map(_person, ("Ann", "Bob", "Eve"), (31, 24, 57), ("London", "Bath", "Lyme"))),
        "".join(
            map(
                _person,
                ("Joe", "Kate", "Tom", "Mary"),
                (42, 19, 33, 28),
                ("Bath", "London", "Lyme", "London"),
            )
        ),
    ),
    "quoting": (f"{PASSAGE}\n\n", PASSAGE),
}
TEXTS = HELD_OUT | {name: prompt for name, (prompt, _) in GIVEN.items()}

# Ways beside those that an engine has.
BESIDES = ("wrong", "late")


class Wrong:
    """In place of prompt lookup: tokens that do not come, behind what looks like a long match."""

    vocab = 1

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def look(self, own: Acceptance, everybody: Acceptance) -> int:
        return 0

    def draft(self, most: int) -> list[int]:
        last = self._tokens[-1] + 31 * len(self._tokens)
        return [(7919 * (last + 13 * i) + 1) % self.vocab for i in range(most)]

    def verified(self) -> None:
        """It learns nothing from that."""


class Dictated:
    """In place of a structure's grammar: lets one text pass, and takes next to no time for that."""

    def __init__(self, tokens: list[int], vocab: int) -> None:
        self._tokens, self._at, self._mask = tokens, 0, np.zeros(vocab, np.bool_)

    def allowed(self, ends: object) -> NDArray[np.bool_]:
        self._mask[:] = False
        self._mask[self._tokens[self._at]] = True
        return self._mask

    def accept(self, token: int) -> bool:
        self._at += 1
        return self._at == len(self._tokens)

    def begin(self) -> None:
        """There is nothing to work out."""


class WrongEngine:
    """A draft engine that says another token each time."""

    def __init__(self, engine: DraftEngine, vocab: int) -> None:
        self._engine, self._vocab = engine, vocab

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def propose(self, sequences: Sequence[Any], lengths: list[int]) -> list[list[int]]:
        found = self._engine.propose(sequences, lengths)
        return [[(token + 1) % self._vocab for token in draft] for draft in found]


def counting(length: int) -> dict[str, list[int]]:
    """Prompts of token ids for a model that counts upward, for answers of that length."""
    first = 1000
    answer = list(range(first, first + length + 16))
    misled = [token for each in answer for token in (each, each + 1, 7 + each % 5)]
    return {
        "quoting": [*answer, 5, *answer[:8]],
        "nothing repeats": list(range(500, 564)),
        "misled": misled + answer[:8],
    }


async def opened(
    stack: AsyncExitStack, path: Path, mode: str, drafts: dict[str, Any], settings: dict[str, Any]
) -> Engine:
    how: Any = "auto" if mode in BESIDES else mode
    more = drafts if how in ("draft", "auto") else {}
    engine = await stack.enter_async_context(
        Engine.open(path, EngineConfig(**settings, **more, speculate=how))
    )
    if mode == "late":
        engine._runner._likely = None
    if mode == "wrong":
        Wrong.vocab = engine.spec.vocab
        drafting = engine._drafting
        assert drafting is not None
        drafting._engines = [WrongEngine(each, engine.spec.vocab) for each in drafting._engines]
    return engine


async def ask(
    engine: Engine, mode: str, prompt: str | list[int], params: SamplingParams, given: list[int] | None = None
) -> dict[str, Any]:
    """One answer, and what it took. given: the tokens that are dictated; params must ask for a structure."""
    drafter = Wrong if mode == "wrong" else engine_module.NgramDrafter
    dictated = Dictated(given or [], engine.spec.vocab)
    began = time.process_time()
    with (
        mock.patch.object(engine_module, "NgramDrafter", drafter),
        mock.patch.object(engine._constraints, "compile", return_value=dictated),
    ):
        result = await engine.generate(prompt, params)
    return {"result": result, "cpu_s": time.process_time() - began}


async def measure(
    path: Path,
    modes: list[str],
    tokens: int,
    rounds: int,
    drafts: dict[str, Any],
    *,
    from_drive: bool = False,
    **settings: Any,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By prompt and mode, what each round gave. drafts: settings of those modes that use draft engines."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    async with AsyncExitStack() as stack:
        engines = {mode: await opened(stack, path, mode, drafts, settings) for mode in modes}
        if from_drive:
            leave_page_cache(path)
        prompts = counting(tokens) if engines["off"].tokenizer is None else TEXTS
        for name, prompt in prompts.items():
            found[name] = {mode: [] for mode in modes}
            params, given = greedy, None
            tokenizer = engines["off"].tokenizer
            if tokenizer is not None and name in GIVEN:
                params = evolve(greedy, structure=Structure.choice([GIVEN[name][1]]))
                given = tokenizer.encode(GIVEN[name][1], special=False)
            for number in range(rounds + 1):
                answers: dict[str, Result] = {}
                first = number % len(modes)
                for mode in modes[first:] + modes[:first]:
                    got = await ask(engines[mode], mode, prompt, params, given)
                    answers[mode] = got["result"]
                    if number:  # the first one fills the cache
                        found[name][mode].append(numbers(**got))
                for mode, answer in answers.items():
                    if answer.token_ids != answers["off"].token_ids:
                        raise click.ClickException(
                            f"{name}, {mode}: the answers differ, which is a bug of mer"
                        )
    return found


def leave_page_cache(model: Path) -> None:
    """Have reads come from the drive; those of an engine fill no page cache."""
    os.sync()
    for file in (each for each in (model, *model.rglob("*")) if each.is_file()):
        with file.open("rb") as opened_file:
            os.posix_fadvise(opened_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def numbers(result: Result, cpu_s: float) -> dict[str, Any]:
    timings, count = result.timings, len(result.token_ids)
    return {
        "tokens_per_s": (count - 1) / timings.decode_s,
        "tokens_per_cpu_s": count / cpu_s,
        "drafted": timings.drafted,
        "accepted": timings.accepted,
        "draft_experts": timings.draft_experts,
        "tokens_per_pass": (count - 1) / (count - 1 - timings.accepted),
        "read_per_token": timings.bytes_read / count,
        "wait_per_token": timings.io_wait_s / count,
    }


def median(runs: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


@click.command(help=help_of(__doc__))
@click.argument("model", type=click.Path(exists=True, path_type=Path), default=model_path())
@click.option(
    "--modes",
    default="off,ngram,draft,auto,wrong",
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
@click.option("--from-drive", is_flag=True, help="Have the page cache let go of the model first.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
def main(
    model: Path,
    modes: str,
    tokens: int,
    rounds: int,
    draft_model: str | None,
    draft_head: Path | None,
    from_drive: bool,
    out: Path | None,
    **settings: Any,
) -> None:
    given = {name: value for name, value in settings.items() if value is not None}
    asked = modes.split(",")
    known = [*get_args(Speculate), *BESIDES]
    unknown = set(asked) - set(known)
    if unknown:
        raise click.BadParameter(f"no such mode: {', '.join(sorted(unknown))}", param_hint="--modes")
    named = {"draft_model": draft_model, "draft_head": draft_head}
    drafts = {name: value for name, value in named.items() if value is not None}
    ways = ["off", *(mode for mode in asked if mode != "off")]
    try:
        found = asyncio.run(measure(model, ways, tokens, rounds, drafts, from_drive=from_drive, **given))
    except MerError as error:
        raise click.ClickException(str(error)) from error
    table = Table(
        "prompt", "drafts", "tokens/s", "ratio", "CPU", "accepted", "tokens/pass", "read/token", "wait/token"
    )
    for name, by_mode in found.items():
        plain, plain_cpu = (median(by_mode["off"], key) for key in ("tokens_per_s", "tokens_per_cpu_s"))
        for mode, runs in by_mode.items():
            drafted = sum(run["drafted"] for run in runs)
            accepted = sum(run["accepted"] for run in runs)
            speed = median(runs, "tokens_per_s")
            table.add_row(
                name if mode == "off" else "",
                mode,
                f"{speed:.1f}",
                f"{speed / plain:.2f}",
                f"{median(runs, 'tokens_per_cpu_s') / plain_cpu:.2f}",
                f"{accepted / drafted:.0%} of {drafted / len(runs):.0f}" if drafted else "",
                f"{median(runs, 'tokens_per_pass'):.2f}",
                f"{median(runs, 'read_per_token') / 2**20:.2f} MiB",
                f"{median(runs, 'wait_per_token') * 1e3:.2f} ms",
            )
    Console(width=140).print(table)
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
