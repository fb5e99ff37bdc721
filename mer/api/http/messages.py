"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, translated to a conversation and back."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, Final, cast

import msgspec
from quart import Blueprint, Response

from mer.api import conversation
from mer.api.conversation import ChatRequest, Event, Prepared
from mer.api.http import sse
from mer.api.http.answers import new_id
from mer.api.http.anthropic import (
    AnswerBlock,
    AnthropicUsage,
    AppliedEdits,
    BlockDelta,
    BlockStart,
    BlockStop,
    ChoiceAny,
    ChoiceAuto,
    ChoiceNone,
    ChoiceTool,
    CountTokensRequest,
    InputDelta,
    MessageAnswer,
    MessageDelta,
    MessageParam,
    MessagesRequest,
    MessageStart,
    MessageStop,
    Ping,
    StopDelta,
    StopReason,
    StreamEvent,
    TextAnswer,
    TextBlock,
    TextDelta,
    ThinkingAdaptive,
    ThinkingAnswer,
    ThinkingBlock,
    ThinkingDelta,
    ThinkingEnabled,
    TokenCount,
    ToolResultBlock,
    ToolUseAnswer,
    ToolUseBlock,
    error_answer,
    error_bytes,
    tagged,
)
from mer.api.http.call import Call, collect, current_call
from mer.api.http.errors import api_error, invalid
from mer.api.http.gate import ERROR_BODIES
from mer.api.http.service import Service, body_as, json_response, translated
from mer.engine.engine import Engine
from mer.engine.params import SamplingParams
from mer.engine.structure import Structure
from mer.errors import RequestError, TooLongError
from mer.model.pieces import Content, Piece, Reasoning, ToolCall

# What clients of this endpoint call parameters.
_NAMES: Final = {"prompt": "messages", "stop": "stop_sequences", "structure": "output_config.format"}
_EFFORT: Final = {"xhigh": "high", "max": "high"}  # templates know three
_PATH: Final = "/v1/messages"
# Claude Code's first block, for Anthropic's accounting alone. It differs from conversation to conversation:
# none would find the instructions behind it in the prefix cache.
_BILLING: Final = "x-anthropic-billing-header:"

ERROR_BODIES[_PATH] = error_bytes


def blueprint(service: Service) -> Blueprint:
    """The endpoints."""
    made = Blueprint("messages", __name__)

    @made.post(_PATH)
    async def messages() -> Response:
        body = await body_as(MessagesRequest, models=service.loaded)
        (model, engine), call = await service.use(body.model), current_call()
        try:
            request = await translated(lambda: to_request(body, sampling(body)))
            if service.settings.log_prompts:
                call.log["messages"] = request.messages
            prepared = await conversation.prepare(engine, request)
            answer = _Answer(body, model, prepared)
            events = prepared.answers(engine, idle=service.settings.keep_alive)
            if body.stream:
                return await sse.respond(
                    _stream(answer, events, call),
                    lambda error: _sse(error_answer(error)),
                    silence=service.settings.keep_alive,
                    comment=_sse(Ping()),
                )
            await collect(events, answer.add, call)
            return json_response(answer.message)
        except RequestError as error:
            raise api_error(error, _NAMES) from None

    @made.post(f"{_PATH}/count_tokens")
    async def count_tokens() -> Response:
        body = await body_as(CountTokensRequest, models=service.loaded)
        _, engine = await service.use(body.model)
        try:
            return json_response(TokenCount(await _count(engine, body)))
        except RequestError as error:
            raise api_error(error, _NAMES) from None

    return made


async def _count(engine: Engine, body: CountTokensRequest) -> int:
    request = await translated(lambda: to_request(body, SamplingParams()))
    try:
        prepared = await conversation.prepare(engine, request)
    except TooLongError as error:
        if error.tokens is None:
            raise
        return error.tokens  # counted is what may be too much
    return len(prepared.prompt)


def sampling(body: MessagesRequest) -> SamplingParams:
    """Raises RequestError."""
    wanted = body.output_config.format if body.output_config else None
    given = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "structure": Structure.json_schema(wanted.schema) if wanted else None,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def to_request(body: CountTokensRequest, params: SamplingParams) -> ChatRequest:
    """The conversation that is meant. Raises ApiError."""
    if body.messages[-1].role == "assistant":
        raise invalid(
            "messages: the last one is the assistant's, and answers are not continued; end with the user's",
            "messages",
        )
    messages: list[dict[str, Any]] = []
    system = body.system
    if isinstance(system, list):
        system = [block for block in system if not block.text.startswith(_BILLING)]
    if system:
        messages.append({"role": "system", "content": _text(system)})
    for message in body.messages:
        messages += _messages(message)
    choice = body.tool_choice
    thinks = isinstance(body.thinking, ThinkingEnabled | ThinkingAdaptive)
    # Templates that leave the choice to the caller know it by one of these names.
    variables: dict[str, Any] = {"enable_thinking": thinks, "thinking": thinks}
    if body.output_config and (effort := body.output_config.effort):
        variables["reasoning_effort"] = _EFFORT.get(effort, effort)
    return ChatRequest(
        messages=messages,
        params=params,
        tools=[
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    **({"description": tool.description} if tool.description else {}),
                    "parameters": tool.input_schema,
                    **({"strict": True} if tool.strict else {}),
                },
            }
            for tool in body.tools or ()
        ]
        or None,
        tool_choice=(
            "none"
            if isinstance(choice, ChoiceNone)
            else "required"
            if isinstance(choice, ChoiceAny | ChoiceTool)
            else "auto"
        ),
        allowed=[choice.name] if isinstance(choice, ChoiceTool) else None,
        several=not (
            isinstance(choice, ChoiceTool)
            or (isinstance(choice, ChoiceAuto | ChoiceAny) and choice.disable_parallel_tool_use)
        ),
        variables=variables,
    )


def _text(content: str | Iterable[TextBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block.text for block in content)


def _messages(message: MessageParam) -> list[dict[str, Any]]:
    """One message as templates know it; results of tools are messages of their own there."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    if message.role != "assistant":
        results = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}
            for block in message.content
            if isinstance(block, ToolResultBlock)
        ]
        if results and not texts:
            return results
        return [*results, {"role": message.role, "content": _text(texts)}]
    made: dict[str, Any] = {"role": "assistant", "content": _text(texts)}
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    if thoughts:
        made["reasoning_content"] = "\n".join(thoughts)
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in message.content
        if isinstance(block, ToolUseBlock)
    ]
    if calls:
        made["tool_calls"] = calls
    return [made]


class _Answer:
    """An answer while it is made."""

    def __init__(self, body: MessagesRequest, model: str, prepared: Prepared) -> None:
        thinking = body.thinking
        self._shows_thoughts = (
            isinstance(thinking, ThinkingEnabled | ThinkingAdaptive) and thinking.display != "omitted"
        )
        self.message = MessageAnswer(new_id("msg_"), model, [], AnthropicUsage(len(prepared.prompt), 0))
        if body.context_management is not None:
            self.message.context_management = AppliedEdits([])
        self._arguments: dict[int, str] = {}

    def add(self, event: Event) -> list[StreamEvent]:
        """The events that this brings to a stream."""
        events: list[StreamEvent] = []
        for piece in event.pieces:
            events += self._piece(piece)
        if event.finish_reason is None:
            return events
        assert event.delta.usage is not None
        self._close(events)
        stop = event.delta.stop
        reason: StopReason = "stop_sequence" if stop is not None else "end_turn"
        if event.finish_reason == "length":
            reason = "max_tokens"
        elif event.finish_reason == "tool_calls":
            reason, stop = "tool_use", None
        message = self.message
        message.stop_reason, message.stop_sequence = reason, stop
        message.usage = AnthropicUsage.of(event.delta.usage)
        return [*events, MessageDelta(StopDelta(reason, stop), message.usage), MessageStop()]

    def _piece(self, piece: Piece) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        content = self.message.content
        last = content[-1] if content else None
        if isinstance(piece, Content):
            if not isinstance(last, TextAnswer):
                last = self._open(TextAnswer(""), events)
            last.text += piece.text
            events.append(BlockDelta(len(content) - 1, TextDelta(piece.text)))
        elif isinstance(piece, Reasoning):
            if not self._shows_thoughts:
                return []
            if not isinstance(last, ThinkingAnswer):
                last = self._open(ThinkingAnswer(""), events)
            last.thinking += piece.text
            events.append(BlockDelta(len(content) - 1, ThinkingDelta(piece.text)))
        elif isinstance(piece, ToolCall):
            self._open(ToolUseAnswer(piece.id, piece.name, {}), events)
            self._arguments[len(content) - 1] = ""
        else:
            # Text between calls is a block of its own: this belongs to the last call.
            index = max(self._arguments)
            self._arguments[index] += piece.text
            events.append(BlockDelta(index, InputDelta(piece.text)))
        return events

    def _open(self, block: Any, events: list[StreamEvent]) -> Any:
        self._close(events)
        self.message.content.append(block)
        empty = msgspec.structs.replace(block)
        events.append(BlockStart(len(self.message.content) - 1, empty))
        return block

    def _close(self, events: list[StreamEvent]) -> None:
        """The last block is complete."""
        index = len(self.message.content) - 1
        if index < 0:
            return
        events.append(BlockStop(index))
        if index in self._arguments:
            self.message.content[index] = self._called(index)

    def _called(self, index: int) -> AnswerBlock:
        """A call with its input; what is no JSON object (the answer was cut short) is given as text."""
        block = cast(ToolUseAnswer, self.message.content[index])
        text = self._arguments[index]
        try:
            found = json.loads(text or "{}", strict=False)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            return TextAnswer(f"{block.name} {text}")
        return ToolUseAnswer(block.id, block.name, found)


async def _stream(
    answer: _Answer, events: AsyncGenerator[list[Event], None], call: Call
) -> AsyncGenerator[bytes, None]:
    begun = False
    async with aclosing(events):
        async for batch in events:
            parts: list[StreamEvent] = []
            if not begun:
                begun = True
                parts.append(MessageStart(msgspec.structs.replace(answer.message, content=[])))
            if not batch:
                parts.append(Ping())
            for event in batch:
                parts += answer.add(event)
                if event.delta.usage:
                    call.used([event.delta.usage])
            yield b"".join(map(_sse, parts))


def _sse(value: Any) -> bytes:
    return sse.data(value, tagged(value))
