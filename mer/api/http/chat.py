"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET
from quart import Blueprint, Response

from mer.api import conversation
from mer.api.conversation import ChatRequest, Event, template_messages, template_variables
from mer.api.http import sse
from mer.api.http.answers import (
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    ContentLogprob,
    FinishReason,
    FunctionDelta,
    ToolCallAnswer,
    ToolCallDelta,
    UsageAnswer,
    chat_logprobs,
    new_id,
    now,
)
from mer.api.http.call import Call, current_call
from mer.api.http.errors import api_error, invalid
from mer.api.http.schemas import (
    AllowedToolChoice,
    ChatCompletionRequest,
    ChosenTool,
    JsonObjectFormat,
    JsonSchemaFormat,
    check_prewarm,
    sampling,
    structure_name,
)
from mer.api.http.service import Service, body_as, json_response, translated
from mer.engine.engine import Engine
from mer.engine.outputs import Usage
from mer.engine.structure import Structure
from mer.errors import RequestError
from mer.model.pieces import Content, Piece, Reasoning, ToolCall

_ToolChoice = Literal["none", "auto", "required"] | ChosenTool | AllowedToolChoice | None
# What clients of this endpoint call fields of SamplingParams.
_NAMES: Final = {"prompt": "messages", "logprobs": "top_logprobs"}


def blueprint(service: Service) -> Blueprint:
    """The endpoint."""
    made = Blueprint("chat", __name__)

    @made.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        body = await body_as(ChatCompletionRequest, models=service.loaded)
        (model, engine), call = await service.use(body.model), current_call()
        try:
            variables = template_variables(engine, body.chat_template_kwargs, body.reasoning_effort)
            request = await translated(lambda: to_request(body, variables))
            if service.settings.log_prompts:
                call.log["messages"] = request.messages
            events = conversation.chat(engine, request, idle=service.settings.keep_alive)
            if body.stream:
                chunks = _chunks(engine, body, model, request.n, events, call)
                return await sse.respond(chunks, silence=service.settings.keep_alive)
            return await _whole(engine, body, model, request.n, events, call)
        except RequestError as error:
            raise api_error(error, _NAMES | structure_name(body)) from None

    return made


def to_request(body: ChatCompletionRequest, variables: Mapping[str, Any]) -> ChatRequest:
    """What the engine shall do; variables: of the chat template. Raises ApiError and RequestError."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if body.store:
        raise invalid("store: this server stores no answers", "store", "unsupported_parameter")
    check_prewarm(body.prompt_cache_options)
    most = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(most) > 1:
        raise invalid("max_tokens and max_completion_tokens differ: give one", "max_completion_tokens")
    params = sampling(
        body,
        _structure(body),
        max_tokens=next(iter(most), None),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    mode, allowed = _choice(body.tool_choice)
    named = isinstance(body.tool_choice, ChosenTool)
    return ChatRequest(
        messages=template_messages(msgspec.to_builtins(body.messages)),
        params=params,
        n=body.n or 1,
        tools=msgspec.to_builtins(body.tools) if body.tools else None,
        tool_choice=mode,
        allowed=allowed,
        several=body.parallel_tool_calls is not False and not named,
        variables=variables,
    )


def _choice(given: _ToolChoice) -> tuple[Literal["auto", "none", "required"], list[str] | None]:
    """Whether a tool is called, and which ones may be (None: all)."""
    if isinstance(given, ChosenTool):
        return "required", [given.function.name]
    if isinstance(given, AllowedToolChoice):
        return given.allowed_tools.mode, [tool.function.name for tool in given.allowed_tools.tools]
    return given or "auto", None


def _structure(body: ChatCompletionRequest) -> Structure | None:
    wanted = body.response_format
    if isinstance(wanted, JsonObjectFormat):
        return Structure.json_object()
    if isinstance(wanted, JsonSchemaFormat):
        return Structure.json_schema(wanted.json_schema.schema)
    return None


class _Answer:
    """One of the answers, put together from its events."""

    def __init__(self) -> None:
        self.content = self.reasoning = ""
        self.calls: list[ToolCallAnswer] = []
        self.logprobs: list[ContentLogprob] = []
        self.finish_reason: FinishReason = "length"
        self.usage: Usage | None = None

    def add(self, event: Event, engine: Engine) -> None:
        for piece in event.pieces:
            if isinstance(piece, Content):
                self.content += piece.text
            elif isinstance(piece, Reasoning):
                self.reasoning += piece.text
            elif isinstance(piece, ToolCall):
                self.calls.append(ToolCallAnswer(piece.id, CalledFunction(piece.name, "")))
            else:
                self.calls[piece.index].function.arguments += piece.text
        if event.delta.logprobs is not None:
            self.logprobs += chat_logprobs(engine, event.delta.logprobs)
        if event.finish_reason is not None:
            self.finish_reason, self.usage = event.finish_reason, event.delta.usage

    def choice(self, index: int, logprobs: bool) -> ChatChoice:
        message = ChatMessage(
            self.content or (None if self.calls else ""), self.reasoning or UNSET, self.calls or UNSET
        )
        return ChatChoice(
            index, message, ChatLogprobs(self.logprobs) if logprobs else None, self.finish_reason
        )


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
                answers[event.index].add(event, engine)
    used = [answer.usage for answer in answers if answer.usage]
    call.used(used)
    choices = [answer.choice(i, bool(body.logprobs)) for i, answer in enumerate(answers)]
    return json_response(ChatCompletion(new_id("chatcmpl-"), now(), model, choices, UsageAnswer.of([used])))


def _delta(piece: Piece) -> ChatDelta:
    if isinstance(piece, Content):
        return ChatDelta(content=piece.text)
    if isinstance(piece, Reasoning):
        return ChatDelta(reasoning_content=piece.text)
    if isinstance(piece, ToolCall):
        begun = ToolCallDelta(piece.index, FunctionDelta(piece.name, ""), piece.id, "function")
        return ChatDelta(tool_calls=[begun])
    return ChatDelta(tool_calls=[ToolCallDelta(piece.index, FunctionDelta(arguments=piece.text))])


async def _chunks(
    engine: Engine,
    body: ChatCompletionRequest,
    model: str,
    n: int,
    events: AsyncGenerator[list[Event], None],
    call: Call,
) -> AsyncGenerator[bytes, None]:
    id, created = new_id("chatcmpl-"), now()
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    no_usage = None if wants_usage else UNSET
    used: list[Usage] = []

    def chunk(index: int, delta: ChatDelta, **more: Any) -> bytes:
        choice = ChunkChoice(index, delta, **more)
        return sse.data(ChatCompletionChunk(id, created, model, [choice], no_usage))

    async with aclosing(events):
        begun = False
        async for batch in events:
            if not batch:
                yield sse.KEEP_ALIVE
                continue
            parts: list[bytes] = []
            if not begun:
                begun = True
                parts = [chunk(i, ChatDelta("assistant", "")) for i in range(n)]
            for event in batch:
                deltas = [_delta(piece) for piece in event.pieces]
                logprobs = None
                if event.delta.logprobs is not None:
                    logprobs = ChatLogprobs(chat_logprobs(engine, event.delta.logprobs))
                    deltas = deltas or [ChatDelta(content="")]
                for delta in deltas:
                    parts.append(chunk(event.index, delta, logprobs=logprobs))
                    logprobs = None
                if event.finish_reason is not None:
                    parts.append(chunk(event.index, ChatDelta(), finish_reason=event.finish_reason))
                    assert event.delta.usage is not None
                    used.append(event.delta.usage)
            yield b"".join(parts)
    call.used(used)
    if wants_usage:
        yield sse.data(ChatCompletionChunk(id, created, model, [], UsageAnswer.of([used])))
    yield sse.DONE
