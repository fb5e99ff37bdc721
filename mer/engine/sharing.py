"""Several engines in one process, one memory budget: who gets which part of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import attrs

from mer.config import EngineConfig
from mer.engine import budget as budgets
from mer.engine import drafting
from mer.engine.budget import Budget
from mer.errors import BudgetError
from mer.model.families import load
from mer.model.tokenizer import Tokenizer
from mer.streaming.experts import expert_tables
from mer.weights.checkpoint import open_checkpoint, require_streamable
from mer.weights.hub import locate


def survey(
    path: str | os.PathLike[str], config: EngineConfig, process: int, leaving: Iterable[Budget] | None = None
) -> Budget:
    """What an engine would take: its headers are read, no weights. It need not fit.

    process: bytes of the process without any engine. leaving: all others that are there, when this one is to
    take their place; None: some will stay, or come. Their caches can shrink, so where `config` leaves the
    size of the KV cache open it goes by what they leave of `config.ram` without those. Raises what
    Engine.open raises, but for BudgetError.
    """
    found = locate(path)
    checkpoint = open_checkpoint(found)
    require_streamable(checkpoint)
    architecture = load(checkpoint)
    tables = expert_tables(architecture.experts, found)
    # A draft model is compared with it; else nobody asks.
    tokenizer = Tokenizer.open(checkpoint.path) if config.draft_model is not None else None
    sources = drafting.sources(checkpoint, architecture, tokenizer, config)
    plain = budgets.measure(checkpoint, architecture, tables, config, sources, process)
    if leaving is None:
        return plain
    left = plain.ram - sum(each.fixed - each.interpreter for each in leaving)
    config = attrs.evolve(config, ram=max(left, 1))
    larger = budgets.measure(checkpoint, architecture, tables, config, sources, process, alone=True)
    return larger if larger.context > plain.context else plain


def needed(engines: Sequence[Budget], slots: Sequence[int]) -> int:
    """The smallest `ram` with which all of them can have caches of so many slots each."""
    taken = sum(each.fixed - each.interpreter + each.slot * n for each, n in zip(engines, slots, strict=True))
    return budgets.with_page_tables(max((each.interpreter for each in engines), default=0) + taken)


def shares(ram: int, engines: Sequence[Budget], comfort: float = 0.0) -> list[int]:
    """The `ram` of each engine, so that all of them together keep to `ram` bytes of the process.

    What is fixed each of them gets; what is left for caches is divided by what the engines could use. Raises
    BudgetError where that leaves one without the least it needs, or without `comfort`, a share of its
    experts.
    """
    process = max(each.interpreter for each in engines)
    own = [each.fixed - each.interpreter for each in engines]
    some = [each.slot * max(each.least_slots, int(comfort * each.experts)) for each in engines]
    room = budgets.usable(ram) - process - sum(own) - sum(some)
    if room < 0:
        needed = budgets.with_page_tables(process + sum(own) + sum(some))
        raise BudgetError(
            f"ram {budgets.mib(ram)} is too little for {len(engines)} models at a time: they need "
            f"{budgets.mib(needed)} with the smallest caches that do"
        )
    wants = [each.slot * each.experts - its for each, its in zip(engines, some, strict=True)]
    # With room for all of them the division does not matter; a cache never takes more than it can use.
    part = min(1.0, room / max(1, sum(wants)))
    return [
        budgets.with_page_tables(each.interpreter + fixed + its + int(part * want))
        for each, fixed, its, want in zip(engines, own, some, wants, strict=True)
    ]
