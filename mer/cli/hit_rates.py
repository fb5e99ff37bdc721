"""What more memory would bring a model here: hit rates by stack distance, from its own routing."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from mer.config import EngineConfig
from mer.engine.budget import Budget, usable
from mer.engine.engine import Engine
from mer.engine.params import SamplingParams
from mer.engine.sharing import survey
from mer.errors import ConfigError
from mer.model.families import load
from mer.streaming.distance import Distances, distances
from mer.weights.checkpoint import open_checkpoint

# Where no trace is given the model runs for so long; different texts, so that more experts have their turn.
_SECONDS: Final = 15.0
_TOKENS: Final = 160
_PROMPTS: Final = ("Once upon a time", "def main():\n", "The capital of France", "1. Introduction\n")
# Caches that are looked at, as shares of all experts, and so much more memory than there is here.
_SHARES: Final = (0.05, 0.1, 0.25, 0.5, 0.75)
_MORE: Final = 1.25
# A hit rate that rises by less is not worth mentioning.
_WORTH: Final = 0.01


@frozen
class HitRate:
    """With `ram` bytes the cache has `slots` experts; read_bytes: by a token that is decoded."""

    ram: int
    slots: int
    hit_rate: float
    read_bytes: float


@frozen
class HitRates:
    """tokens: that the routing is of. ram: bytes that the model has here. advice: '' where there is none."""

    tokens: int
    ram: int
    rates: tuple[HitRate, ...]
    advice: str

    @classmethod
    def of(cls, budget: Budget, found: Distances, bandwidth: float) -> HitRates:
        """bandwidth: bytes a second that the device reads."""
        per_token = found.accesses / found.tokens * budget.slot
        most = budget.enough_for(budget.experts)

        def rate(ram: int, slots: int) -> HitRate:
            hit = float(found.hits[slots])
            return HitRate(ram, slots, hit, (1 - hit) * per_token)

        def filled(ram: int) -> HitRate:
            room = (usable(ram) - budget.fixed) // budget.slot
            return rate(ram, max(budget.least_slots, min(budget.experts, room)))

        now, further = filled(min(budget.ram, most)), filled(min(most, int(_MORE * budget.ram)))
        looked = [int(share * budget.experts) for share in _SHARES] + [budget.experts]
        others = [rate(budget.enough_for(n), n) for n in looked if n >= budget.least_slots]
        # What is enough at any start may hold one more at this one.
        others = [each for each in others if (each.ram < now.ram) == (each.slots < now.slots)]
        rates = {each.ram: each for each in (*others, further, now)}
        more = further if further.ram > now.ram else None
        return cls(
            found.tokens,
            now.ram,
            tuple(rates[ram] for ram in sorted(rates)),
            _advice(now, more, bandwidth),
        )


def _advice(now: HitRate, more: HitRate | None, bandwidth: float) -> str:
    if more is None:
        return ""
    if more.hit_rate - now.hit_rate < _WORTH:
        return "more memory would change little: what is read is wanted too seldom"
    saved = (now.read_bytes - more.read_bytes) / bandwidth
    return (
        f"{_gib(more.ram - now.ram)} more would lift the hit rate from {now.hit_rate:.2f} to "
        f"{more.hit_rate:.2f}: {saved * 1000:.1f} ms less to read for a token"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{-(-size // 2**20)} MiB"


def hit_rates(path: Path, config: EngineConfig, trace: Path | None, bandwidth: float) -> HitRates | None:
    """None for a dense model. config: memory and devices that it may have.

    trace: of its routing; None: it is run for a while, and that is recorded.

    Raises what Engine.open raises, and ConfigError for a file that is no trace.
    """
    if not load(open_checkpoint(path)).experts:
        return None
    with tempfile.TemporaryDirectory(prefix="mer-doctor-") as place:
        recorded = Path(place) / "trace.csv"
        budget = asyncio.run(_run(path, evolve(config, max_running=1, trace=None if trace else recorded)))
        if trace is None:
            budget = _drafting(path, config, budget)
        found = distances(trace or recorded)
        if len(found.hits) != budget.experts + 1:
            raise ConfigError(
                f"trace {trace}: is of a model with {len(found.hits) - 1} experts, and {path} has "
                f"{budget.experts}; name the model that it was recorded of"
            )
        return HitRates.of(budget, found, bandwidth)


def _drafting(path: Path, config: EngineConfig, budget: Budget) -> Budget:
    """The same without a trace, with which nothing is drafted."""
    with_drafts, without = (
        survey(path, evolve(config, max_running=1, speculate=speculate), budget.interpreter)
        for speculate in (config.speculate, "off")
    )
    drafting = with_drafts.drafting + with_drafts.buffers - without.buffers
    return evolve(budget, drafting=drafting)


async def _run(path: Path, config: EngineConfig) -> Budget:
    """Its budget. Without a trace, where its routing would go, it is not run."""
    async with Engine.open(path, config) as engine:
        if config.trace is None:
            return engine.budget
        end = time.monotonic() + _SECONDS
        for seed, prompt in enumerate(_PROMPTS):
            ids = engine.tokenizer.encode(prompt) if engine.tokenizer else [1 + seed, 2, 3]
            params = SamplingParams(max_tokens=_TOKENS, seed=seed, ignore_eos=True)
            async for _ in engine.stream(ids[: engine.budget.context // 2], params):
                if time.monotonic() > end:
                    break
        return engine.budget
