"""What every face does with a request: prompt tokens, parameters, and the answers as one stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Literal, TypeVar

from attrs import evolve, field, frozen

from mer.engine.engine import Engine
from mer.engine.outputs import Delta
from mer.engine.params import SamplingParams
from mer.errors import RequestError

MAX_ANSWERS: Final = 128
# Pieces that may lie between the engine and a client who does not read; then the engine is told to wait.
_UNREAD: Final = 64
# Characters from which on tokenizing would hold up the event loop, so that a thread does it.
_LONG: Final = 8192

_T = TypeVar("_T")
Job = tuple[list[int], SamplingParams]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


@frozen(kw_only=True)
class ChatRequest:
    """A conversation to be continued, whatever the face.

    messages, tools: in OpenAI's shape, contents as text (see `template_messages`). tool_name: the function
    that must be called. variables: further ones of the chat template. reasoning: part the model's thoughts
    from its answer.
    """

    messages: list[dict[str, Any]]
    params: SamplingParams
    n: int = 1
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_name: str | None = None
    variables: Mapping[str, Any] = field(factory=dict)
    reasoning: bool = True


@frozen
class Content:
    text: str


@frozen
class Event:
    """What a token brought to one of the answers. index: which one; delta: as the engine gave it."""

    index: int
    delta: Delta
    pieces: Sequence[Content]
    finish_reason: ChatFinishReason | None


async def chat(engine: Engine, request: ChatRequest, *, idle: float) -> AsyncGenerator[list[Event], None]:
    """The answers as they come; see `merged`. Raises RequestError and what `Engine.stream` raises."""
    prompt = await chat_tokens(engine, request)
    jobs = [(prompt, params) for params in seeded(request.params, request.n)]
    async with aclosing(merged(engine, jobs, idle=idle)) as batches:
        async for batch in batches:
            yield [
                Event(index, delta, (Content(delta.text),) if delta.text else (), delta.finish_reason)
                for index, delta in batch
            ]


async def chat_tokens(engine: Engine, request: ChatRequest) -> list[int]:
    """The prompt of a conversation."""
    variables = dict(request.variables)
    if request.tools:
        variables["tools"] = request.tools
    size = sum(len(str(message.get("content"))) for message in request.messages)
    return await off_loop(size, lambda: engine.chat_prompt(request.messages, **variables))


async def text_tokens(engine: Engine, text: str, param: str = "prompt", *, special: bool = True) -> list[int]:
    """Token ids of a text. Raises RequestError for a model without a tokenizer."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise RequestError("this model came without a tokenizer; send token ids", param)
    return await off_loop(len(text), lambda: tokenizer.encode(text, special=special))


async def off_loop(size: int, work: Callable[[], _T]) -> _T:
    """The result of `work`; on a thread where a text of `size` characters makes it long."""
    return await asyncio.to_thread(work) if size > _LONG else work()


def seeded(params: SamplingParams, n: int) -> list[SamplingParams]:
    """The parameters of n answers to one prompt: with a seed, the second has the next one and so on."""
    if params.seed is None:
        return [params] * n
    seeds = [(params.seed + i + 2**63) % 2**64 - 2**63 for i in range(n)]
    return [evolve(params, seed=seed) for seed in seeds]


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in OpenAI's shape as chat templates read them.

    Text parts are joined by newlines, the arguments of tool calls are objects, a developer speaks as the
    system. Raises RequestError ("messages[i]...").
    """
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _template_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    made = dict(message)
    if made.get("role") == "developer":
        made["role"] = "system"
    content = made.get("content")
    if isinstance(content, list):
        made["content"] = "\n".join(part.get("text", part.get("refusal", "")) for part in content)
    elif content is None:
        made["content"] = ""
    if calls := made.pop("tool_calls", None):
        made["tool_calls"] = [
            {**call, "function": _function(call["function"], f"{where}.tool_calls[{i}].function.arguments")}
            for i, call in enumerate(calls)
        ]
    return made


def _function(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise RequestError(f"{where} is no JSON: {error}", where) from None
    if not isinstance(arguments, dict):
        raise RequestError(f"{where} must be a JSON object", where)
    return {**function, "arguments": arguments}


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
                    raise item
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
