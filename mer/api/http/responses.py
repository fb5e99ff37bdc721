"""POST /v1/responses: OpenAI's newer API, translated to a conversation and back. Nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET
from quart import Blueprint, Response

from mer.api import conversation
from mer.api.conversation import ChatRequest, Event, template_messages, template_variables
from mer.api.http import sse
from mer.api.http.answers import ContentLogprob, chat_logprobs, new_id, now
from mer.api.http.call import Call, collect, current_call
from mer.api.http.errors import ApiError, api_error, invalid
from mer.api.http.responses_types import (
    CallItem,
    IncompleteDetails,
    InputCall,
    InputCallOutput,
    InputItem,
    InputMessage,
    InputReasoning,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningTextAnswer,
    ResponseAllowedTools,
    ResponseAnswer,
    ResponseFailure,
    ResponseRefusal,
    ResponsesRequest,
    ResponseTool,
    ResponseToolChoice,
    ResponseUsage,
    SchemaFormat,
    ToolNamespace,
    WebSearch,
    with_types,
)
from mer.api.http.schemas import JsonObjectFormat, check_prewarm
from mer.api.http.service import Service, body_as, json_response, translated
from mer.engine.engine import Engine
from mer.engine.params import SamplingParams
from mer.engine.structure import Structure
from mer.errors import RequestError
from mer.model.pieces import Content, Piece, Reasoning, ToolCall

# What clients of this endpoint call parameters.
_NAMES: Final = {
    "prompt": "input", "messages": "input", "logprobs": "top_logprobs", "structure": "text.format",
    "max_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort",
}  # fmt: skip
_LOGPROBS: Final = "message.output_text.logprobs"


def blueprint(service: Service) -> Blueprint:
    """The endpoint."""
    made = Blueprint("responses", __name__)

    @made.post("/v1/responses")
    async def responses() -> Response:
        body = await body_as(ResponsesRequest, with_types, models=service.loaded)
        (model, engine), call = await service.use(body.model), current_call()
        try:
            effort = body.reasoning.effort if body.reasoning else None
            variables = template_variables(engine, body.chat_template_kwargs, effort)
            request = await translated(lambda: to_request(body, variables))
            if service.settings.log_prompts:
                call.log["messages"] = request.messages
            events = conversation.chat(engine, request, idle=service.settings.keep_alive)
            answer = _Answer(body, model, engine)
            if body.stream:
                silence = service.settings.keep_alive
                return await sse.respond(_stream(answer, events, call), answer.failed, silence=silence)
            await collect(events, answer.add, call)
            return json_response(answer.response)
        except RequestError as error:
            raise api_error(error, _NAMES) from None

    return made


def to_request(body: ResponsesRequest, variables: Mapping[str, Any]) -> ChatRequest:
    """The conversation that is meant; variables: of the chat template. Raises ApiError and RequestError."""
    if body.store:
        raise invalid("store: this server stores no answers; send false", "store", "unsupported_parameter")
    check_prewarm(body.prompt_cache_options)
    wanted = body.text.format if body.text else None
    structure = None
    if isinstance(wanted, JsonObjectFormat):
        structure = Structure.json_object()
    elif isinstance(wanted, SchemaFormat):
        structure = Structure.json_schema(wanted.schema)
    given = {
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "structure": structure,
        "logprobs": (body.top_logprobs or 0) if _LOGPROBS in (body.include or ()) else None,
        "speculative": body.speculative,
        "priority": body.priority,
        "timeout": body.timeout,
    }
    mode, allowed = _choice(body)
    tools = _functions(body)
    if body.tools and not tools:
        raise invalid(
            "tools: there are no tools here that run on a server; send functions",
            "tools",
            "unsupported_parameter",
        )
    return ChatRequest(
        messages=template_messages(_messages(body)),
        params=SamplingParams(**{name: value for name, value in given.items() if value is not None}),  # type: ignore[arg-type]
        tools=[_tool(name, tool) for name, (_, tool) in tools.items()] or None,
        tool_choice=mode,
        allowed=allowed,
        several=body.parallel_tool_calls is not False
        and not isinstance(body.tool_choice, ResponseToolChoice),
        variables=variables,
    )


def _choice(body: ResponsesRequest) -> tuple[Literal["auto", "none", "required"], list[str] | None]:
    """Whether a tool is called, and which ones may be (None: all)."""
    given = body.tool_choice
    if isinstance(given, ResponseToolChoice):
        return "required", [given.name]
    if isinstance(given, ResponseAllowedTools):
        return given.mode, [tool.name for tool in given.tools]
    return given or "auto", None


def _functions(body: ResponsesRequest) -> dict[str, tuple[str, ResponseTool]]:
    """By the name that the model knows: the namespace ("": none) and the function."""
    found: dict[str, tuple[str, ResponseTool]] = {}
    for tool in body.tools or ():
        space = tool.name if isinstance(tool, ToolNamespace) else ""
        for each in tool.tools if isinstance(tool, ToolNamespace) else (tool,):
            if isinstance(each, ResponseTool):
                name = _joined(space, each.name)
                if name in found:
                    raise invalid(f"tools: two of them are called {name!r}", "tools")
                found[name] = (space, each)
    return found


def _joined(namespace: str | None, name: str) -> str:
    return f"{namespace}__{name}" if namespace else name


def _tool(name: str, tool: ResponseTool) -> dict[str, Any]:
    given = {**msgspec.to_builtins(tool), "name": name}
    function = {key: value for key, value in given.items() if key != "type" and value is not None}
    return {"type": "function", "function": function}


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """As in chat completions: an answer's thoughts, text and calls are one message there."""
    return [
        *_of_items(body.instructions or [], "system"),
        *_of_items(body.input, "user"),
    ]


def _of_items(items: str | Sequence[InputItem], role: str) -> list[dict[str, Any]]:
    """role: who says what is a text."""
    if isinstance(items, str):
        return [{"role": role, "content": items}]
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # an answer to which more may belong
    for item in items:
        if isinstance(item, InputCallOutput):
            turn = None
            output = item.output if isinstance(item.output, str) else _join(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        elif isinstance(item, InputMessage) and item.role != "assistant":
            turn = None
            messages.append({"role": item.role, "content": _content(item)})
        else:
            if turn is None or not _belongs(turn, item):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _add_to(turn, item)
    return messages


def _belongs(turn: dict[str, Any], item: InputItem) -> bool:
    """Whether `item` goes on with this answer: thoughts come first, then text, then calls."""
    if isinstance(item, InputReasoning):
        return not turn["content"] and "tool_calls" not in turn
    return isinstance(item, InputCall) or "tool_calls" not in turn


def _add_to(turn: dict[str, Any], item: InputItem) -> None:
    if isinstance(item, InputReasoning):
        text = _join([*(item.content or ()), *(() if item.content else item.summary or ())])
        turn["reasoning_content"] = "\n".join(filter(None, (turn.get("reasoning_content"), text)))
    elif isinstance(item, InputCall):
        function = {"name": _joined(item.namespace, item.name), "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    elif isinstance(item, InputMessage):
        turn["content"] = "\n".join(filter(None, (turn["content"], _content(item))))


def _content(message: InputMessage) -> str:
    return message.content if isinstance(message.content, str) else _join(message.content)


def _join(parts: Iterable[Any]) -> str:
    return "\n".join(part.refusal if isinstance(part, ResponseRefusal) else part.text for part in parts)


class _Answer:
    """An answer while it is made, and the events that tell of it."""

    def __init__(self, body: ResponsesRequest, model: str, engine: Engine) -> None:
        self._engine = engine
        self._sequence = 0
        self._tokens = self._thought = 0
        self._logprobs: list[ContentLogprob] = []
        self._functions = _functions(body)
        reasoning = msgspec.to_builtins(body.reasoning) if body.reasoning else {}
        text = msgspec.to_builtins(body.text) if body.text else {}
        if not text.get("format"):
            text["format"] = {"type": "text"}
        self.response = ResponseAnswer(
            id=new_id("resp_"),
            created_at=now(),
            model=model,
            output=[],
            instructions=msgspec.to_builtins(body.instructions),
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning={"effort": None, "summary": None, **reasoning},
            temperature=1.0 if body.temperature is None else body.temperature,
            text={name: value for name, value in text.items() if value is not None},
            tool_choice=msgspec.to_builtins(body.tool_choice) or "auto",
            tools=msgspec.to_builtins([tool for tool in body.tools or () if not isinstance(tool, WebSearch)]),
            top_p=1.0 if body.top_p is None else body.top_p,
            top_logprobs=body.top_logprobs or 0,
            user=body.user or UNSET,
        )

    def begin(self) -> bytes:
        return self._event("response.created", response=self.response) + self._event(
            "response.in_progress", response=self.response
        )

    def add(self, event: Event) -> bytes:
        """The events that this brings to a stream."""
        self._tokens += len(event.delta.token_ids)
        if event.delta.logprobs is not None:
            self._logprobs += chat_logprobs(self._engine, event.delta.logprobs)
        parts = [self._piece(piece) for piece in event.pieces]
        if event.pieces and not isinstance(event.pieces[-1], Content):
            self._logprobs.clear()  # thoughts and calls have none
        if event.finish_reason is not None:
            cut = event.finish_reason == "length"
            parts.append(self._close("incomplete" if cut else "completed"))
            response = self.response
            response.status = "incomplete" if cut else "completed"
            if cut:
                response.incomplete_details = IncompleteDetails("max_output_tokens")
            else:
                response.completed_at = now()
            assert event.delta.usage is not None
            response.usage = ResponseUsage.of(event.delta.usage, self._thought)
            parts.append(self._event(f"response.{response.status}", response=response))
        return b"".join(parts)

    def failed(self, error: ApiError) -> bytes:
        """The events that end a stream which can't go on."""
        self.response.status = "failed"
        self.response.error = ResponseFailure(error.code or "server_error", str(error))
        return self._event("response.failed", response=self.response)

    def _piece(self, piece: Piece) -> bytes:
        last = self.response.output[-1] if self.response.output else None
        if isinstance(piece, Reasoning):
            begun = b"" if isinstance(last, ReasoningItem) else self._open_reasoning()
            item = self.response.output[-1]
            assert isinstance(item, ReasoningItem)
            item.content[0].text += piece.text
            self._thought = self._tokens
            return begun + self._event("response.reasoning_text.delta", **self._at(0), delta=piece.text)
        if isinstance(piece, Content):
            begun = b"" if isinstance(last, MessageItem) else self._open_message(piece.text)
            item = self.response.output[-1]
            assert isinstance(item, MessageItem)
            item.content[0].text += piece.text
            logprobs, self._logprobs = self._logprobs, []
            item.content[0].logprobs += logprobs
            return begun + self._event(
                "response.output_text.delta", **self._at(0), delta=piece.text, logprobs=logprobs
            )
        if isinstance(piece, ToolCall):
            closed = self._close("completed")
            space, tool = self._functions.get(piece.name, ("", None))
            name = tool.name if tool else piece.name
            item = CallItem(new_id("fc_"), piece.id, name, namespace=space or UNSET)
            return closed + self._open(item)
        assert isinstance(last, CallItem)
        last.arguments += piece.text
        return self._event("response.function_call_arguments.delta", **self._at(), delta=piece.text)

    def _open_reasoning(self) -> bytes:
        closed = self._close("completed")
        item = ReasoningItem(new_id("rs_"), [], [])
        opened = self._open(item)
        item.content.append(ReasoningTextAnswer(""))
        part = self._event("response.content_part.added", **self._at(0), part=item.content[0])
        return closed + opened + part

    def _open_message(self, text: str) -> bytes:
        """text: what it begins with."""
        if self.response.output:
            self._logprobs = _since(self._logprobs, text.encode())
        closed = self._close("completed")
        item = MessageItem(new_id("msg_"), [])
        opened = self._open(item)
        item.content.append(OutputText("", [], []))
        part = self._event("response.content_part.added", **self._at(0), part=item.content[0])
        return closed + opened + part

    def _open(self, item: OutputItem) -> bytes:
        self.response.output.append(item)
        index = len(self.response.output) - 1
        return self._event("response.output_item.added", output_index=index, item=item)

    def _close(self, status: Any) -> bytes:
        """The last item is complete."""
        if not self.response.output:
            return b""
        item = self.response.output[-1]
        item.status = status
        parts = []
        if isinstance(item, CallItem):
            done = {"arguments": item.arguments, "name": item.name}
            parts.append(self._event("response.function_call_arguments.done", **self._at(), **done))
        else:
            part = item.content[0]
            at = self._at(0)
            if isinstance(part, OutputText):
                text, logprobs = part.text, part.logprobs
                parts.append(self._event("response.output_text.done", **at, text=text, logprobs=logprobs))
            else:
                parts.append(self._event("response.reasoning_text.done", **at, text=part.text))
            parts.append(self._event("response.content_part.done", **at, part=part))
        index = len(self.response.output) - 1
        parts.append(self._event("response.output_item.done", output_index=index, item=item))
        return b"".join(parts)

    def _at(self, content_index: int | None = None) -> dict[str, Any]:
        """Where in the answer something happens: in its last item."""
        at: dict[str, Any] = {
            "item_id": self.response.output[-1].id,
            "output_index": len(self.response.output) - 1,
        }
        return at if content_index is None else {**at, "content_index": content_index}

    def _event(self, kind: str, **fields: Any) -> bytes:
        made = sse.data({"type": kind, "sequence_number": self._sequence, **fields}, kind)
        self._sequence += 1
        return made


def _since(logprobs: list[ContentLogprob], text: bytes) -> list[ContentLogprob]:
    """Those from the token on with which `text` begins: before it stood the tag that ended the thoughts."""
    end = b""
    for i in reversed(range(len(logprobs))):
        end = bytes(logprobs[i].bytes) + end
        if end.startswith(text):
            return logprobs[i:]
    return logprobs[-1:]


async def _stream(
    answer: _Answer, events: AsyncGenerator[list[Event], None], call: Call
) -> AsyncGenerator[bytes, None]:
    begun = False
    async with aclosing(events):
        async for batch in events:
            made = b"" if begun else answer.begin()
            begun = True
            if not batch:
                made += sse.KEEP_ALIVE
            for event in batch:
                made += answer.add(event)
                if event.delta.usage:
                    call.used([event.delta.usage])
            yield made
