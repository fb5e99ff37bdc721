"""Askers for the tests of prefix stores, in memory and with a GPU."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from pathlib import Path

from engine_models import check_idle, opened, prompt, settle

from mer import Engine, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=20, ignore_eos=True)
LONG = [prompt(n) for n in (100, 90, 80)]

Answer = tuple[tuple[int, ...], object]


async def ask(
    path: Path, prompts: Sequence[list[int]] = LONG, **settings
) -> tuple[list[Answer], list[int], Engine]:
    """(answers, cached tokens of each, the engine) one after the other."""
    async with opened(path, **{"context": 512} | settings) as engine:
        results = [await engine.generate(ids, PARAMS) for ids in prompts]
        await quiet(engine)
    answers = [(result.token_ids, result.logprobs) for result in results]
    return answers, [result.usage.cached_tokens for result in results], engine


async def quiet(engine: Engine) -> None:
    """Until the store has written and read what it was asked to."""
    store = engine._store
    while store is not None and (store._pending or engine._scheduler._loading):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    await settle(engine)


async def take_turns(
    engine: Engine, expected: list[Answer], prompts: Sequence[list[int]] = LONG, together: int = 5
) -> None:
    """Three prompts again and again, in memory for one of them: each comes back, whoever is cancelled."""
    for turn in range(3):
        for ids, answer in zip(prompts, expected, strict=True):
            result = await engine.generate(ids, PARAMS)
            await quiet(engine)
            assert (result.token_ids, result.logprobs) == answer
            assert (result.usage.cached_tokens >= 32) == (turn > 0)
    # All at once, some of them cancelled while blocks are on their way.
    for _ in range(together):
        tasks = [asyncio.create_task(engine.generate(ids, PARAMS)) for ids in list(prompts) * 2]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        tasks[3].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for n, result in enumerate(done):
            if not isinstance(result, asyncio.CancelledError):
                assert (result.token_ids, result.logprobs) == expected[n % 3]
        await quiet(engine)
        check_idle(engine)


def stored(directory: Path) -> dict[bytes, int]:
    """Of each block in a closed store, its key, which hangs on the model and the tokens, and its checksum."""
    content = (directory / "prefix.index").read_bytes()[40:]
    return {key: checksum for key, _, checksum in struct.iter_unpack("<16sII", content)}
