"""Small models and askers that the engine's tests share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from oracle.make_checkpoints import IN_PLACE, make
from oracle.make_tokenizer import write_tokenizer

from mer import Delta, Engine, SamplingParams
from mer.engine.request import Request
from mer.engine.runner import Runner
from mer.model import families
from mer.weights import convert as conversion
from mer.weights import formats
from mer.weights.checkpoint import open_checkpoint
from mer.weights.plan import Plan

T = TypeVar("T")

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def prompt(n: int, seed: int = 0, vocab: int = 211) -> list[int]:
    """n random token ids, never 0."""
    return np.random.default_rng([n, seed]).integers(1, vocab, n).tolist()


def write_text_model(path: Path, *, chat: bool = False, **changes) -> Path:
    """A qwen3_moe of 12 experts in all that has a tokenizer; every byte is a token, </s> is 0."""
    make(path, "qwen3_moe", vocab_size=300, num_hidden_layers=2, num_experts=6, eos_token_id=0, **changes)
    write_tokenizer(path, chat=chat)
    return path


# One layer of 16 experts, one a token; of Qwen3-Next a second layer, that transformers may count positions.
SINGLE_CHOICE = {
    "mixtral": {"num_hidden_layers": 1, "num_local_experts": 16},
    "qwen3_next": {"num_hidden_layers": 2, "mlp_only_layers": [1], "num_experts": 16},
}


def write_single_choice(
    path: Path, prompts: list[list[int]], n: int, family: str = "mixtral"
) -> tuple[Path, list[set[int]]]:
    """A store with SINGLE_CHOICE; and by transformers, which experts each prompt and its greedy answer of n
    tokens needs."""
    model = make(path / "hf", family, num_experts_per_tok=1, **SINGLE_CHOICE[family])
    needed = []
    for ids in prompts:
        given = torch.tensor([ids])
        with torch.no_grad():
            seen = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=n, do_sample=False
            )
            # The last token is drawn and never computed.
            router = model(seen[:, :-1], output_router_logits=True).router_logits[0]
        needed.append(set(router.reshape(-1, 16).argmax(-1).tolist()))
    return convert_to(path / "hf", path / "store", None, None), needed


def convert_to(src: Path, dst: Path, experts: str | None, dense: str | None) -> Path:
    """The expert store `dst` of `src`; None: formats as they are."""
    checkpoint = open_checkpoint(src)
    architecture = families.load(checkpoint)
    plan = Plan(architecture.experts, tuple(architecture.dense.values()), architecture.kept)
    form = [formats.by_name(name) if name else None for name in (experts, dense)]
    conversion.convert(checkpoint, dst, plan, experts=form[0], dense=form[1])
    return dst


def runnable(path: Path, family: str) -> Path:
    """The checkpoint itself, or a store of it, in the same formats, beside it."""
    return path if family in IN_PLACE else convert_to(path, path.with_name(path.name + "-store"), None, None)


@asynccontextmanager
async def opened(path: Path, **settings) -> AsyncIterator[Engine]:
    """An engine that must have given back every block and pin when its requests are over."""
    async with Engine.open(path, **{"context": 512} | settings) as engine:
        yield engine
        await settle(engine)
        check_idle(engine)


def answers(path: Path, prompts: list[list[int]], params: SamplingParams) -> list[tuple[int, ...]]:
    """What an engine alone, with its defaults, makes of them, one after the other."""

    async def ask() -> list[tuple[int, ...]]:
        async with opened(path) as engine:
            return [(await engine.generate(ids, params)).token_ids for ids in prompts]

    return asyncio.run(ask())


async def settle(engine: Engine) -> None:
    """Until all that was asked of the engine's thread before has been done."""
    await asyncio.sleep(0)
    await engine.generate([1], SamplingParams(temperature=0, max_tokens=1))


async def begun_together(engine: Engine, asking: Awaitable[T], count: int) -> T:
    """What `asking` returns; none of its `count` requests is computed before the last one is there."""
    engine._worker.hold(True)
    answers = asyncio.ensure_future(asking)
    while len(engine._worker.jobs) < count and not answers.done():  # noqa: ASYNC110 (it happens elsewhere)
        await asyncio.sleep(0.001)
    engine._worker.hold(False)
    return await answers


@contextmanager
def gated() -> Iterator[threading.Event]:
    """No step of an engine is computed before the event is set: what was asked for cannot end by itself."""
    step, go = Runner.step, threading.Event()

    def waiting(self: Runner, chunks):
        assert go.wait(600)
        return step(self, chunks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "step", waiting)
        try:
            yield go
        finally:
            go.set()


def check_idle(engine: Engine) -> None:
    """Nothing is held for nobody."""
    scheduler, experts = engine._worker._scheduler, engine._runner.experts
    assert not engine._worker._jobs
    assert engine._worker._here == 0
    assert not scheduler
    assert scheduler.pool.free == scheduler.pool.n_blocks
    assert scheduler.states.pool.free == scheduler.states.pool.n_blocks
    if experts is None:
        return
    # What the last step read ahead may still be on its way.
    cache, ahead = experts.cache.stats(), experts.streamer.stats()["prefetching"]
    assert cache["in_use"] <= ahead
    assert cache["loading"] <= ahead
    assert cache["failed"] == 0


class Logits:
    """The raw logits that each request drew its tokens from, recorded while they pass."""

    def __init__(self, monkeypatch) -> None:
        self.rows: dict[tuple[int, ...], list[bytes]] = {}
        accept = Request.accept

        def recorded(request: Request, logits: np.ndarray) -> Delta:
            key = tuple(request.tokens[: request.prompt_tokens])
            self.rows.setdefault(key, []).append(logits.tobytes())
            return accept(request, logits)

        monkeypatch.setattr(Request, "accept", recorded)

    def take(self, ids: Iterable[int]) -> bytes:
        """All rows of the request with this prompt, forgotten here."""
        return b"".join(self.rows.pop(tuple(ids)))
