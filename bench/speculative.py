"""What drafting gains: the same answers with it and without, in turns.

    python -m bench.speculative MODEL [--draft-model SMALL] [--ram 3GiB] [--cache-experts 25%]

One engine answers in all ways, so that all have the same memory and cache; each round takes them in another
order. `again` is `off` once more: what it differs by is noise. The ratio is the median over the rounds of a
way's speed by that of `off` in the same round, with its 95 % interval. `CPU` is the same by processor time,
which says something on a busy machine, too. `wrong` is auto where whatever is drafted, by prompt lookup or an
engine, is wrong, and says that it is sure: what the worst text could cost. `late` is auto without what
drafted tokens probably want being read before their step:

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
import math
import os
import random
import statistics
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast, get_args
from unittest import mock

import click
import numpy as np
from attrs import evolve, frozen
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
from mer.engine.drafting import Drafting
from mer.engine.likely import LikelyExperts
from mer.engine.outputs import Result
from mer.engine.speculation import Speculation
from mer.engine.structure import Structure
from mer.errors import MerError
from mer.model.tokenizer import Tokenizer

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

# Ways beside those that an engine has, and what an engine that answers so is set to.
BESIDES: dict[str, Speculate] = {"again": "off", "wrong": "auto", "late": "auto"}


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

    def propose(self, sequences: Collection[Any], lengths: list[int]) -> list[list[int]]:
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


@frozen
class Way:
    """How an engine is to draft. Each has an experience of its own."""

    speculate: Speculate
    drafting: Drafting | None
    likely: LikelyExperts | None

    @classmethod
    def of(cls, engine: Engine, mode: str) -> Way:
        """engine: as it was opened, to draft in any way."""
        speculate = BESIDES.get(mode) or cast(Speculate, mode)
        if speculate == "off":
            return cls(speculate, None, None)
        drafting = engine._drafting
        assert drafting is not None
        engines: list[DraftEngine] = [] if speculate == "ngram" else list(drafting._engines)
        if mode == "draft" and not engines:
            raise click.ClickException("draft: there is nothing to draft with; see --draft-model and --modes")
        if mode == "wrong":
            engines = [WrongEngine(each, engine.spec.vocab) for each in engines]
        experts = engine.spec.n_moe_layers * engine.spec.n_experts if engine.spec.router else 0
        likely = None if mode == "late" else engine._runner._likely
        return cls(speculate, Drafting(engines, Speculation(len(engines), experts)), likely)

    async def take(self, engine: Engine) -> None:
        """It answers so from now on; nothing is asked of it meanwhile."""

        def change() -> None:
            engine._worker._drafting, engine._runner._likely = self.drafting, self.likely

        await asyncio.wrap_future(engine._worker.call(change))  # behind the last step's end
        engine._speculate = self.speculate


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


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def wanted(
    tokenizer: Tokenizer | None, name: str, params: SamplingParams
) -> tuple[SamplingParams, list[int] | None]:
    """How the answer to one of TEXTS is asked for, and its tokens where it is dictated."""
    if tokenizer is None or name not in GIVEN:
        return params, None
    answer = GIVEN[name][1]
    return evolve(params, structure=Structure.choice([answer])), tokenizer.encode(answer, special=False)


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
    turns = random.Random(0)
    async with Engine.open(path, EngineConfig(**settings, **drafts)) as engine:
        Wrong.vocab = engine.spec.vocab
        ways = {mode: Way.of(engine, mode) for mode in modes}
        if from_drive:
            leave_page_cache(path)
        tokenizer = engine.tokenizer
        for name, prompt in (counting(tokens) if tokenizer is None else TEXTS).items():
            found[name] = {mode: [] for mode in modes}
            params, given = wanted(tokenizer, name, greedy(tokens))
            for number in range(rounds + 1):
                answers: dict[str, Result] = {}
                for mode in turns.sample(modes, len(modes)):
                    await ways[mode].take(engine)
                    got = await ask(engine, mode, prompt, params, given)
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


def ratio(runs: list[dict[str, Any]], plain: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """The median by that of plain answers of the same rounds, and its 95 % interval."""
    each = sorted(run[key] / beside[key] for run, beside in zip(runs, plain, strict=True))
    rank = math.floor(len(each) / 2 - 0.98 * math.sqrt(len(each)))
    at = max(rank - 1, 0)
    return statistics.median(each), each[at], each[-1 - at]


def median(runs: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


@click.command(help=help_of(__doc__))
@click.argument("model", type=click.Path(exists=True, path_type=Path), default=model_path())
@click.option(
    "--modes",
    default="ngram,draft,auto,wrong",
    show_default=True,
    help="Beside off and again, which always are measured. draft needs a head or a draft model.",
)
@click.option("--draft-model", help="As mer run --draft-model; else the model's draft head, if it has one.")
@click.option("--draft-head", type=click.Path(exists=True, path_type=Path), help="As mer run --draft-head.")
@click.option("--tokens", default=128, show_default=True, help="Of an answer.")
@click.option("--rounds", default=4, show_default=True, help="Answers of each kind.")
@click.option("--ram", help="As mer run --ram.")
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
    ways = ["off", "again", *(mode for mode in asked if mode not in ("off", "again"))]
    try:
        found = asyncio.run(measure(model, ways, tokens, rounds, drafts, from_drive=from_drive, **given))
    except MerError as error:
        raise click.ClickException(str(error)) from error
    columns = "prompt, drafts, tokens/s, ratio, 95 %, CPU, accepted, tokens/pass, read/token, wait/token"
    table = Table(*columns.split(", "))
    whole = {mode: [run for by_mode in found.values() for run in by_mode[mode]] for mode in ways}
    for name, by_mode in (found | {"all": whole}).items():
        for mode, runs in by_mode.items():
            drafted = sum(run["drafted"] for run in runs)
            accepted = sum(run["accepted"] for run in runs)
            middle, least, most = ratio(runs, by_mode["off"], "tokens_per_s")
            table.add_row(
                name if mode == "off" else "",
                mode,
                f"{median(runs, 'tokens_per_s'):.1f}",
                f"{middle:.3f}",
                "" if mode == "off" else f"{least:.3f}-{most:.3f}",
                f"{ratio(runs, by_mode['off'], 'tokens_per_cpu_s')[0]:.3f}",
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
