"""What every face does with a request: prompt tokens, parameters, and all its answers as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Final, TypeVar

from attrs import evolve

from mer.engine.engine import Engine
from mer.engine.outputs import Delta
from mer.engine.params import SamplingParams
from mer.errors import RequestError, TooLongError

MAX_ANSWERS: Final = 128
# Tokens that a text may have whatever the model's context, where they are only to be told.
MOST_IDS: Final = 1 << 16
# Pieces that may lie between the engine and a client who does not read; then the engine is told to wait.
_UNREAD: Final = 64
# Characters from which on tokenizing would hold up the event loop, so that a thread does it.
_LONG: Final = 8192

_T = TypeVar("_T")
Job = tuple[list[int], SamplingParams]


async def text_tokens(engine: Engine, text: str) -> list[int]:
    """Token ids of a prompt.

    Raises RequestError for a model without a tokenizer, TooLongError for more tokens than its context holds.
    """
    return await off_loop(len(text), lambda: engine.text_tokens(text))


async def told_tokens(engine: Engine, text: str, param: str = "prompt", *, special: bool = True) -> list[int]:
    """Token ids of a text, which are only to be told.

    Raises RequestError for a model without a tokenizer, TooLongError for more tokens than its context holds,
    and than MOST_IDS.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise RequestError("this model came without a tokenizer; send token ids", param)
    most = max(engine.context, MOST_IDS)

    def fits(tokens: int) -> None:
        if tokens > most:
            raise TooLongError(f"{param}: it has {tokens} tokens; {most} is the most here", tokens, param)

    least = tokenizer.at_least(text)
    if least > most:
        raise TooLongError(f"{param}: it has at least {least} tokens; {most} is the most here", None, param)
    return await off_loop(len(text), lambda: tokenizer.encode(text, special=special, fits=fits))


async def texts_tokens(engine: Engine, given: Sequence[str | list[int]]) -> list[list[int]]:
    """Token ids of texts, be they many; lists of ids stay as they are. Raises as `text_tokens`."""
    made: list[list[int]] = []
    for each in given:
        if isinstance(each, str):
            each = await text_tokens(engine, each)
        made.append(each)
        await asyncio.sleep(0)  # others come in between
    return made


async def off_loop(size: int, work: Callable[[], _T]) -> _T:
    """The result of `work`; on a thread where a text of `size` characters makes it long."""
    return await asyncio.to_thread(work) if size > _LONG else work()


def seeded(params: SamplingParams, n: int) -> list[SamplingParams]:
    """The parameters of n answers to one prompt: with a seed, the second has the next one and so on."""
    if params.seed is None:
        return [params] * n
    seeds = [(params.seed + i + 2**63) % 2**64 - 2**63 for i in range(n)]
    return [evolve(params, seed=seed) for seed in seeds]


async def merged(
    engine: Engine, jobs: Sequence[Job], *, idle: float
) -> AsyncGenerator[list[tuple[int, Delta]], None]:
    """Pieces of the answers to all jobs, as (job, piece): in one list what is there at the same time.

    An empty list after `idle` seconds of silence. Who leaves early ends all of them; so does the first
    error, which is raised.
    """
    ready: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue(_UNREAD)
    readers = [
        asyncio.create_task(_read(engine, i, prompt, params, ready))
        for i, (prompt, params) in enumerate(jobs)
    ]
    running = len(jobs)
    try:
        while running:
            try:
                async with asyncio.timeout(idle):
                    items = [await ready.get()]
            except TimeoutError:
                yield []
                continue
            while not ready.empty():
                items.append(ready.get_nowait())
            batch: list[tuple[int, Delta]] = []
            for i, item in items:
                if isinstance(item, Exception):
                    if batch:
                        yield batch
                    try:
                        raise item
                    finally:  # its traceback holds this frame, which need not hold it: prompts would stay
                        del item, items
                batch.append((i, item))
                running -= item.finish_reason is not None
            yield batch
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(
    engine: Engine,
    index: int,
    prompt: list[int],
    params: SamplingParams,
    ready: asyncio.Queue[tuple[int, Delta | Exception]],
) -> None:
    try:
        async with aclosing(engine.stream(prompt, params)) as deltas:
            async for delta in deltas:
                await ready.put((index, delta))
    except Exception as error:
        await ready.put((index, error))
