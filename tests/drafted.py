"""How drafts are had verified: engines that draft what a test tells them to, and what is compared."""

from __future__ import annotations

import asyncio

import attrs
import pytest

from mer import SamplingParams
from mer._ext.acceptance import MOST_DRAFTED, Acceptance
from mer.engine import drafting
from mer.engine import engine as engines
from mer.engine.speculation import Choice, Speculation
from mer.engine.structure import Structure

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=40, ignore_eos=True)
ASKED = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "penalties": attrs.evolve(DRAWN, repetition_penalty=1.2, presence_penalty=0.5, logit_bias={5: 4.0}),
    "logprobs": attrs.evolve(GREEDY, logprobs=3, prompt_logprobs=1),
    "schema": attrs.evolve(
        DRAWN,
        ignore_eos=False,
        structure=Structure.json_schema('{"type": "array", "items": {"type": "integer"}, "maxItems": 8}'),
    ),
    "stop": attrs.evolve(DRAWN, stop=("a", "e"), max_tokens=60),
}


class Told:
    """A drafter that knows the answer, but for every `wrong`th token."""

    def __init__(self, tokens: list[int], answer: tuple[int, ...], wrong: int) -> None:
        self._tokens, self._start, self._answer, self._wrong = tokens, len(tokens), answer, wrong

    def look(self, own: Acceptance, everybody: Acceptance) -> int:
        return 0 if self.draft(1) else -1

    def draft(self, most: int) -> list[int]:
        at = len(self._tokens) - self._start
        rest = self._answer[at : at + most]
        return [t + (i % self._wrong == 0) for i, t in enumerate(rest, at + 1)]

    def verified(self) -> None:
        """It does not look at what comes."""


@pytest.fixture
def always(monkeypatch):
    """Whatever is drafted is verified; returns the Speculations that were made."""
    made = []

    class Always(Speculation):
        def __init__(self, n_engines, experts):
            super().__init__(n_engines, experts)
            made.append(self)

        def affordable(self, source):
            return True

        def ready(self, sequences):
            return True

        def choose(self, offers, room):
            return [
                Choice(MOST_DRAFTED, None) if each.lookup else Choice(MOST_DRAFTED * any(each.engines), 0)
                for each in offers
            ]

    def never(self) -> bool:
        self.resting = False
        return False

    monkeypatch.setattr(drafting, "Speculation", Always)
    monkeypatch.setattr(drafting.Drafting, "rests", never)
    return made


def tell(monkeypatch, answers: dict[tuple[int, ...], tuple[int, ...]], wrong: int) -> None:
    monkeypatch.setattr(
        engines, "NgramDrafter", lambda tokens: Told(tokens, answers.get(tuple(tokens), ()), wrong)
    )


def essence(result):
    """Without what may differ: times, and what a second answer found in the prefix cache."""
    usage = attrs.evolve(result.usage, cached_tokens=0)
    return attrs.evolve(result, timings=None, seed=0, usage=usage)


async def ask(engine, prompts, params):
    return list(map(essence, await asyncio.gather(*(engine.generate(each, params) for each in prompts))))
