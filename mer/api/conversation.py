"""A conversation, whatever the face: its prompt, what its answer may be, the answer's parts as they come."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Literal

from attrs import evolve, field, frozen

from mer.api import large_json
from mer.api.generation import merged, off_loop, seeded
from mer.api.large_json import PIECE, TooLargeError
from mer.api.roles import folded
from mer.engine.constraint import expression, unusable
from mer.engine.engine import Engine
from mer.engine.outputs import Delta
from mer.engine.params import SamplingParams
from mer.engine.structure import Structure
from mer.errors import RequestError
from mer.model.output_parser import OutputFormat, Piece, ToolCall
from mer.model.tool_formats import Harmony
from mer.model.tool_formats.lark import Lark

ChatFinishReason = Literal["stop", "length", "tool_calls"]
# So many of a prompt's last tokens are looked at: whether its template opened the reasoning there.
_TAIL: Final = 16
# More messages than these are a thread's work, however short: 10,000 are 50 ms.
_MANY: Final = 64


@frozen(kw_only=True)
class ChatRequest:
    """A conversation to be continued.

    messages, tools: in OpenAI's shape, contents as text (see `template_messages`); a tool's "strict" is
    obeyed. allowed: the functions that may be called (None: all); the prompt shows the others, too. several:
    an answer may call more than one tool. variables: further ones of the chat template. reasoning: part the
    model's thoughts from its answer.
    """

    messages: list[dict[str, Any]]
    params: SamplingParams
    n: int = 1
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] = "auto"
    allowed: Collection[str] | None = None
    several: bool = True
    variables: Mapping[str, Any] = field(factory=dict)
    reasoning: bool = True


@frozen
class Event:
    """What a token brought to one of the answers. index: which one; delta: as the engine gave it."""

    index: int
    delta: Delta
    pieces: Sequence[Piece]
    finish_reason: ChatFinishReason | None


@frozen
class Prepared:
    """A request as the engine takes it. tools: those that may be called; prompt: token ids."""

    request: ChatRequest
    prompt: list[int]
    params: SamplingParams
    format: OutputFormat
    tail: str
    tools: list[dict[str, Any]]

    async def answers(self, engine: Engine, *, idle: float) -> AsyncGenerator[list[Event], None]:
        """The answers as they come; see `merged`. Raises RequestError and what `Engine.stream` raises."""
        readings = [_Reading(self) for _ in range(self.request.n)]
        jobs = [(self.prompt, params) for params in seeded(self.params, self.request.n)]
        try:
            async with aclosing(merged(engine, jobs, idle=idle)) as batches:
                async for batch in batches:
                    yield [readings[index].event(index, delta) for index, delta in batch]
        except RequestError as error:
            if error.param != "structure":
                raise
            raise await asyncio.to_thread(self._named, error) from None

    def _named(self, error: RequestError) -> RequestError:
        """`error`, which is about the grammar of the whole answer, by what was sent."""
        wanted, forced = self.request.params.structure, self.request.tool_choice == "required"
        if wanted is not None and wanted.kind == "json_schema" and (why := unusable(wanted.source)):
            return RequestError(f"structure: this JSON schema can't be used: {why}", "structure")
        for function in (tool["function"] for tool in self.tools):
            held = forced or wanted is not None or function.get("strict")
            if held and (why := unusable(json.dumps(function.get("parameters") or {}))):
                text = f"tools: the parameters of {function['name']!r} can't be enforced: {why}"
                return RequestError(text, "tools")
        if wanted is not None:
            return error
        text = str(error).removeprefix("structure: ")
        return RequestError(f"tools: their parameters can't be enforced: {text}", "tools")


class _Reading:
    """One answer while it is read."""

    def __init__(self, prepared: Prepared) -> None:
        self._parser = prepared.format.parser(prepared.tail, prepared.tools)
        self._several = prepared.request.several
        self._called = False
        self._full = False

    def event(self, index: int, delta: Delta) -> Event:
        pieces = self._parser.push(delta.text)
        reason: ChatFinishReason | None = delta.finish_reason
        if reason is not None:
            pieces += self._parser.finish()
        pieces = [piece for piece in pieces if self._wanted(piece)]
        return Event(index, delta, pieces, "tool_calls" if reason == "stop" and self._called else reason)

    def _wanted(self, piece: Piece) -> bool:
        """False for what comes after the one call that is allowed."""
        if isinstance(piece, ToolCall):
            self._full = self._called and not self._several
            self._called = True
        return not self._full


async def prepare(engine: Engine, request: ChatRequest) -> Prepared:
    """Prompt and parameters of a conversation. Raises RequestError."""
    template = engine.tokenizer.chat_template if engine.tokenizer else None
    format = OutputFormat.of(template.source if template else "")
    if not request.reasoning:
        format = evolve(format, thinking=None)
    tools = _tools(request, format)
    prompt = await chat_tokens(engine, request)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    tail = tokenizer.decode(prompt[-_TAIL:], skip_special=False)
    params = request.params

    def special(text: str) -> int | None:
        return tokenizer.special_id(text)

    wanted = request.params.structure
    size = len(wanted.source) if wanted else 2048 * len(tools)
    try:
        grammar = await off_loop(size, lambda: _grammar(request, format, tools, special, tail))
    except RecursionError:
        raise RequestError("tools: their parameters are nested too deeply", "tools") from None
    params = evolve(params, structure=grammar, show_special=format.shown(bool(tools)))
    return Prepared(request, prompt, params, format, tail, tools)


def _grammar(
    request: ChatRequest,
    format: OutputFormat,
    tools: list[dict[str, Any]],
    special: Callable[[str], int | None],
    tail: str,
) -> Structure | None:
    """What the whole answer must be: with its reasoning and the tags of calls.

    What somebody asked for begins behind the reasoning, or where the model begins to call a strict tool.
    """
    structure = request.params.structure
    format.check_strict(tools)
    if tools and request.tool_choice == "required":
        return Structure.grammar(format.forced_call(tools, special, prompt=tail, several=request.several))
    if structure is None:
        fewer = len(tools) < len(request.tools or ()) and request.tool_choice != "none"
        if not fewer and not any(tool["function"].get("strict") for tool in tools):
            return None
        return Structure.grammar(format.strict_calls(tools, special, prompt=tail, several=request.several))
    if structure.behind or (not tools and format.plain(tail)):
        return structure

    def body(lark: Lark) -> str:
        return expression(structure, lark)

    return Structure.grammar(format.structured(body, special, tools, prompt=tail, several=request.several))


def behind_thoughts(engine: Engine, prompt: list[int], params: SamplingParams) -> SamplingParams:
    """Of a raw prompt that opened the model's reasoning: a structure is for what stands behind that."""
    structure, tokenizer = params.structure, engine.tokenizer
    if structure is None or structure.behind or tokenizer is None or tokenizer.chat_template is None:
        return params
    format = OutputFormat.of(tokenizer.chat_template.source)
    if not format.begins(tokenizer.decode(prompt[-_TAIL:], skip_special=False)):
        return params
    assert format.thinking is not None
    end = format.thinking[1]
    shown = (*params.show_special, end)
    return evolve(params, structure=structure.after(end), show_special=shown)


async def chat(engine: Engine, request: ChatRequest, *, idle: float) -> AsyncGenerator[list[Event], None]:
    """The answers as they come. Raises RequestError and what `Engine.stream` raises."""
    prepared = await prepare(engine, request)
    async with aclosing(prepared.answers(engine, idle=idle)) as batches:
        async for batch in batches:
            yield batch


def _tools(request: ChatRequest, format: OutputFormat) -> list[dict[str, Any]]:
    """The tools that the answer may call. Raises RequestError."""
    tools = request.tools or []
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise RequestError(f"tools: two of them are called {twice!r}", "tools")
    if request.tool_choice == "none":
        return []
    if other := next((name for name in request.allowed or () if name not in names), None):
        raise RequestError(f"tool_choice: {other!r} is none of the tools", "tool_choice")
    if not tools:
        if request.tool_choice == "required":
            raise RequestError("tool_choice: there are no tools to choose from; send 'tools'", "tool_choice")
        return []
    if not format.takes_tools:
        raise RequestError(
            "tools: this model's chat template does not show tools to the model, so it can't call them; "
            "leave them out, or put a chat_template.jinja that does into the model's directory",
            "tools",
        )
    if request.allowed is None:
        return tools
    return [tool for name, tool in zip(names, tools, strict=True) if name in request.allowed]


async def chat_tokens(engine: Engine, request: ChatRequest) -> list[int]:
    """The prompt of a conversation."""
    variables = dict(request.variables)
    if request.tools and request.tool_choice != "none":
        variables["tools"] = [_shown(tool) for tool in request.tools]
    return await template_tokens(engine, request.messages, variables)


def _shown(tool: dict[str, Any]) -> dict[str, Any]:
    """As a model is told of it: nothing of "strict", which is no business of its."""
    return {**tool, "function": {name: value for name, value in tool["function"].items() if name != "strict"}}


async def template_tokens(
    engine: Engine, messages: list[dict[str, Any]], variables: Mapping[str, Any]
) -> list[int]:
    """What the chat template makes of messages and variables, in tokens. Raises RequestError."""

    def work() -> list[int]:
        return _template_tokens(engine, messages, variables)

    if len(messages) > _MANY:
        return await asyncio.to_thread(work)
    values = [value for each in (variables, *messages) for value in each.values()]
    if any(isinstance(value, list | dict) and value for value in values):  # calls, tools: written as JSON
        return await asyncio.to_thread(work)
    return await off_loop(sum(len(value) for value in values if isinstance(value, str)), work)


def _template_tokens(
    engine: Engine, messages: list[dict[str, Any]], variables: Mapping[str, Any]
) -> list[int]:
    other = folded(messages)
    template = engine.tokenizer.chat_template if engine.tokenizer else None
    if template and isinstance(OutputFormat.of(template.source).calls, Harmony):
        return engine.chat_prompt(other, **variables)
    try:
        return engine.chat_prompt(messages, **variables)
    except RequestError as error:
        if error.param != "messages" or other == messages:
            raise
        try:
            return engine.chat_prompt(other, **variables)
        except RequestError:
            raise error from None


def template_variables(engine: Engine, given: Mapping[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """What the chat template is told beside the messages. Raises RequestError for what it would ignore.

    given: by name ("chat_template_kwargs"). effort: how much the model shall think ("reasoning_effort").
    """
    template = engine.tokenizer.chat_template if engine.tokenizer else None
    source = template.source if template else ""
    variables = dict(given or {})
    check_variables(variables, "chat_template_kwargs")
    for name in variables:
        if name not in source:
            where = f"chat_template_kwargs.{name}"
            raise RequestError(f"{where}: this model's chat template does not use it", where)
    if effort is None:
        return variables
    if "reasoning_effort" in source:
        return variables | {"reasoning_effort": effort}
    if "enable_thinking" in source:  # which knows no degrees
        return variables | {"enable_thinking": effort not in ("none", "minimal")}
    raise RequestError("reasoning_effort: this model's chat template knows no such thing", "reasoning_effort")


def check_variables(given: Mapping[str, Any], where: str) -> None:
    """Raises RequestError for what is no variable, but Python's names of what is rendered."""
    for name in given.keys() & {"messages", "self"}:
        raise RequestError(f"{where}.{name}: this is no variable of a chat template", f"{where}.{name}")


def template_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in OpenAI's shape as chat templates read them.

    Text parts are joined by newlines, the arguments of tool calls are objects (or a text, where they are
    none), a developer speaks as the system. Raises RequestError ("messages[i]...").
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
    """A model wrote the arguments: what is no JSON object stays a text, for the template to show."""
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            value = _json(arguments)
        except TooLargeError as error:
            raise RequestError(f"{where}: {error}", where) from None
        except (ValueError, RecursionError):
            value = arguments
        arguments = {} if value is None else value if isinstance(value, dict) else arguments
    return {**function, "arguments": arguments}


def json_schema(text: str, where: str) -> dict[str, Any] | str:
    """A schema that came as a text, read here if it is long. Raises RequestError."""
    return json_object(text, where) if len(text) > PIECE else text


def json_object(text: str, where: str) -> dict[str, Any]:
    """What a text of a request says; {} for an empty one. Raises RequestError for what is no JSON object."""
    try:
        value = _json(text)
    except TooLargeError as error:
        raise RequestError(f"{where}: {error}", where) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {error or 'nested too deeply'}", where) from None
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be a JSON object", where)
    return value


def _json(text: str) -> Any:
    """{} for an empty text. Raises TooLargeError, ValueError, RecursionError."""
    return large_json.decode(text.encode()) if len(text) > PIECE else json.loads(text.strip() or "{}")
