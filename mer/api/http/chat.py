"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final

import msgspec
from attrs import define, field
from quart import Blueprint, Response

from mer.api import generation
from mer.api.generation import ChatRequest, Content, Event, template_messages
from mer.api.http import openai, sse
from mer.api.http.call import Call, current_call
from mer.api.http.errors import api_error, invalid
from mer.api.http.schemas import (
    ChatCompletionRequest,
    ChosenTool,
    JsonObjectFormat,
    JsonSchemaFormat,
    sampling,
)
from mer.api.http.service import Service, body_as
from mer.engine.engine import Engine
from mer.engine.outputs import Usage
from mer.engine.structure import Structure

# What clients of this endpoint call fields of SamplingParams.
_NAMES: Final = {"prompt": "messages", "logprobs": "top_logprobs", "structure": "response_format"}


def blueprint(service: Service) -> Blueprint:
    """The endpoint."""
    made = Blueprint("chat", __name__)

    @made.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        body = await body_as(ChatCompletionRequest)
        model = service.check_model(body.model)
        engine, call = service.engine, current_call()
        try:
            request = to_request(body)
            if service.settings.log_prompts:
                call.log["messages"] = request.messages
            events = generation.chat(engine, request, idle=service.settings.keep_alive)
            if body.stream:
                return await sse.respond(_chunks(engine, body, model, request.n, events, call))
            return await _whole(engine, body, model, request.n, events, call)
        except Exception as error:
            raise api_error(error, _NAMES) from error

    return made


def to_request(body: ChatCompletionRequest) -> ChatRequest:
    """What the engine shall do for this body. Raises ApiError and RequestError."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if body.store:
        raise invalid("store: this server stores no answers", "store", "unsupported_parameter")
    most = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(most) > 1:
        raise invalid("max_tokens and max_completion_tokens differ: give one", "max_completion_tokens")
    params = sampling(
        body,
        _structure(body),
        max_tokens=next(iter(most), None),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    named = isinstance(body.tool_choice, ChosenTool)
    return ChatRequest(
        messages=template_messages(msgspec.to_builtins(body.messages)),
        params=params,
        n=body.n or 1,
        tools=msgspec.to_builtins(body.tools) if body.tools else None,
        tool_choice="required" if named else body.tool_choice or "auto",  # type: ignore[arg-type]
        tool_name=body.tool_choice.function.name if isinstance(body.tool_choice, ChosenTool) else None,
        variables=variables,
    )


def _structure(body: ChatCompletionRequest) -> Structure | None:
    wanted = body.response_format
    if isinstance(wanted, JsonObjectFormat):
        return Structure.json_object()
    if isinstance(wanted, JsonSchemaFormat):
        return Structure.json_schema(wanted.json_schema.schema)
    return None


@define
class _Answer:
    """One of the answers, put together."""

    content: list[str] = field(factory=list)
    logprobs: list[dict[str, Any]] = field(factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None


async def _whole(
    engine: Engine,
    body: ChatCompletionRequest,
    model: str,
    n: int,
    events: AsyncGenerator[list[Event], None],
    call: Call,
) -> Response:
    answers = [_Answer() for _ in range(n)]
    async with aclosing(events):
        async for batch in events:
            for event in batch:
                _add(answers[event.index], event, engine, bool(body.top_logprobs))
    used = [answer.usage for answer in answers if answer.usage]
    for each in used:
        call.used(each)
    whole = {
        **openai.header("chat.completion", "chatcmpl", model),
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(answer.content), "refusal": None},
                "logprobs": {"content": answer.logprobs, "refusal": None} if body.logprobs else None,
                "finish_reason": answer.finish_reason,
            }
            for i, answer in enumerate(answers)
        ],
        "usage": openai.usage(used),
    }
    return Response(msgspec.json.encode(whole), content_type="application/json")


def _add(answer: _Answer, event: Event, engine: Engine, top: bool) -> None:
    for piece in event.pieces:
        if isinstance(piece, Content):
            answer.content.append(piece.text)
    if event.delta.logprobs is not None:
        answer.logprobs += openai.token_logprobs(engine, event.delta.logprobs, top)
    if event.finish_reason is not None:
        answer.finish_reason, answer.usage = event.finish_reason, event.delta.usage


async def _chunks(
    engine: Engine,
    body: ChatCompletionRequest,
    model: str,
    n: int,
    events: AsyncGenerator[list[Event], None],
    call: Call,
) -> AsyncGenerator[bytes, None]:
    head = openai.header("chat.completion.chunk", "chatcmpl", model)
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    if wants_usage:
        head["usage"] = None
    used: list[Usage] = []

    def chunk(index: int, delta: Mapping[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return sse.data({**head, "choices": [choice]})

    async with aclosing(events):
        begun = False
        async for batch in events:
            if not batch:
                yield sse.KEEP_ALIVE
                continue
            parts: list[bytes] = []
            if not begun:
                begun = True
                parts = [chunk(i, {"role": "assistant", "content": ""}) for i in range(n)]
            for event in batch:
                delta = {"content": "".join(piece.text for piece in event.pieces)}
                logprobs = None
                if event.delta.logprobs is not None:
                    entries = openai.token_logprobs(engine, event.delta.logprobs, bool(body.top_logprobs))
                    logprobs = {"content": entries, "refusal": None}
                if delta["content"] or logprobs:
                    parts.append(chunk(event.index, delta, logprobs))
                if event.finish_reason is not None:
                    parts.append(chunk(event.index, {}, None, event.finish_reason))
                    assert event.delta.usage is not None
                    used.append(event.delta.usage)
                    call.used(event.delta.usage)
            yield b"".join(parts)
    last = sse.data({**head, "choices": [], "usage": openai.usage(used)}) if wants_usage else b""
    yield last + sse.DONE
