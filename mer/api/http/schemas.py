"""What clients may send. The OpenAPI document is made from these classes, and so are the refusals."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from mer.api.conversation import json_schema
from mer.api.generation import MAX_ANSWERS
from mer.api.http.errors import ApiError, invalid
from mer.config import Speculate
from mer.engine.params import MAX_LOGPROBS, SamplingParams
from mer.engine.structure import Structure
from mer.errors import RequestError

_INT64: Final = 2**63 - 1
_T = TypeVar("_T")

Count = Annotated[int, Meta(ge=1, le=_INT64)]
Int64 = Annotated[int, Meta(ge=-_INT64 - 1, le=_INT64)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Text = Annotated[str, Meta(min_length=1)]
Stop = Annotated[list[Text], Meta(max_length=64)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
_ID_NAMES: Final = {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}}
Biases = Annotated[dict[TokenId, Bias], Meta(extra_json_schema=_ID_NAMES)]
JsonObject = dict[str, Any]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority"]
_TOKEN: Final = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_STRING: Final = {"type": "string", "minLength": 1}
_TOKENS: Final = {"type": "array", "items": _TOKEN, "minItems": 1}
# Texts of one request for embeddings, as in OpenAI's API.
MAX_TEXTS: Final = 2048


def _several(most: int) -> Meta:
    """Of a text, several, token ids, or several lists of them; `prompts` refuses what else the type takes."""
    lists = [{"type": "array", "items": each, "minItems": 1, "maxItems": most} for each in (_STRING, _TOKENS)]
    return Meta(extra_json_schema={"anyOf": [_STRING, _TOKENS, *lists]})


Prompts = Annotated[str | list[str | TokenId | list[TokenId]], _several(MAX_ANSWERS)]
Texts = Annotated[str | list[str | TokenId | list[TokenId]], _several(MAX_TEXTS)]

# What OpenAI's API has and this server does not: what to do instead, and values that ask for nothing.
UNSUPPORTED: Final[dict[str, tuple[str, tuple[Any, ...]]]] = {
    "access_programs": ("there are none here", ()),
    "audio": ("this server answers in text", ()),
    "background": ("answers are not made in the background; stream them", (False,)),
    "background_options": ("answers are not made in the background; stream them", ()),
    "best_of": ("send 'n' and choose", (1,)),
    "compaction": ("nothing is left out of a conversation", ()),
    "container": ("this server has no tools of its own", ()),
    "context_management": ("nothing is left out of a conversation", ([],)),
    "conversation": ("this server stores no answers: send the whole conversation", ()),
    "diagnostics": ("this server stores no answers to compare with", ()),
    "dimensions": ("embeddings have the size of the model's hidden state", ()),
    "fallbacks": ("this server tries no other model", ([],)),
    "fallback_credit_token": ("this server tries no other model", ()),
    "functions": ("send 'tools' instead", ()),
    "function_call": ("send 'tool_choice' instead", ()),
    "image": ("this server reads text only", ()),
    "max_tool_calls": ("it limits built-in tools, of which this server has none", ()),
    "mcp_servers": ("this server has no tools of its own: send functions", ([],)),
    "modalities": ("this server answers in text", (["text"],)),
    "moderation": ("this server does not moderate", ()),
    "prediction": ("predicted outputs are not known here", ()),
    "prompt": ("this server stores no prompts: send the conversation itself", ()),
    "previous_response_id": ("this server stores no answers: send the whole conversation as 'input'", ()),
    "speed": ("every answer is as fast as this machine", ("standard",)),
    "suffix": ("the models that this server runs continue a text and don't fill gaps", ("",)),
    "thread": ("this server stores no answers: send the whole conversation", ()),
    "truncation": ("nothing is left out of a conversation", ("disabled",)),
    "verbosity": ("say so in a message", ("medium",)),
    "web_search_options": ("this server does not search the web", ()),
}


class Body(Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a request: what is not named is refused."""


class StreamOptions(Body):
    """include_obfuscation: padding against who guesses texts by the length of events; there is none here."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class PromptCacheOptions(Body):
    """Prompts are cached anyway. prewarm: asks for no answer, which is something else."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: str | None = None
    prewarm: Annotated[bool, Meta(extra_json_schema={"enum": [False]})] | None = None


def check_prewarm(options: PromptCacheOptions | None) -> None:
    """Raises ApiError."""
    if options is not None and options.prewarm:
        name = "prompt_cache_options.prewarm"
        raise invalid(f"{name}: every request is answered here", name, "unsupported_parameter")


class Generating(Body):
    """What completions and chat completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_INT64)] | None = None
    min_p: Probability | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_ANSWERS)] | None = None
    seed: Int64 | None = None
    stop: str | Stop | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: Biases | None = None
    user: str | None = None
    speculative: bool | Speculate | None = None
    priority: Int64 | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None
    guided_json: JsonObject | str | None = None
    guided_regex: Text | None = None
    guided_grammar: Text | None = None
    guided_choice: Annotated[list[Text], Meta(min_length=1)] | None = None


def sampling(body: Generating, structure: Structure | None = None, **more: Any) -> SamplingParams:
    """The parameters that `body` asks for. Raises RequestError and ApiError."""
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "seed": body.seed,
        "stop": body.stop or None,
        "stop_token_ids": body.stop_token_ids,
        "ignore_eos": body.ignore_eos,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": body.logit_bias,
        "speculative": body.speculative,
        "priority": body.priority,
        "timeout": body.timeout,
        "structure": _structure(body, structure),
        **more,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _structure(body: Generating, formatted: Structure | None) -> Structure | None:
    found = {} if formatted is None else {"response_format": formatted}
    for kind, make in (
        ("json", Structure.json_schema),
        ("regex", Structure.regex),
        ("grammar", Structure.grammar),
        ("choice", Structure.choice),
    ):
        value = getattr(body, name := f"guided_{kind}")
        if value is not None:
            try:
                if name == "guided_json" and isinstance(value, str):
                    value = json_schema(value, "structure")
                found[name] = make(value)
            except RequestError as error:
                raise invalid(str(error).replace("structure: ", f"{name}: "), name) from None
    if len(found) > 1:
        raise invalid(f"{' and '.join(found)} can't be combined: choose one", list(found)[1])
    return next(iter(found.values()), None)


def structure_name(body: Generating) -> dict[str, str]:
    """What `body` calls the field "structure" of SamplingParams: for `api_error`."""
    names = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
    given = (name for name in names if getattr(body, name) is not None)
    return {"structure": next(given, "response_format")}


class TextPart(Body, tag_field="type", tag="text"):
    """prompt_cache_breakpoint, cache_control: hints for OpenAI's and Anthropic's caches."""

    text: str
    prompt_cache_breakpoint: JsonObject | None = None
    cache_control: JsonObject | None = None


class RefusalPart(Body, tag_field="type", tag="refusal"):
    refusal: str


class SystemMessage(Body, tag_field="role", tag="system"):
    content: str | list[TextPart]
    name: str | None = None


class DeveloperMessage(Body, tag_field="role", tag="developer"):
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Body, tag_field="role", tag="user"):
    content: str | list[TextPart]
    name: str | None = None


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class AssistantMessage(Body, tag_field="role", tag="assistant"):
    """What an earlier answer was; clients send it back as they got it, so nulls are allowed."""

    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class ToolMessage(Body, tag_field="role", tag="tool"):
    content: str | list[TextPart]
    tool_call_id: str
    name: str | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class Function(Body, omit_defaults=True):  # what was not given must not show in the prompt as null
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.:-]{1,128}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Body, tag_field="type", tag="function"):
    function: Function


class ChosenFunction(Body):
    name: str


class ChosenTool(Body, tag_field="type", tag="function"):
    function: ChosenFunction


class AllowedTools(Body):
    """tools: by their names; what else is said of them is said in the request's `tools`."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=512)]


class AllowedToolChoice(Body, tag_field="type", tag="allowed_tools"):
    """Only these may be called. The prompt has all tools, so that its beginning stays in the cache."""

    allowed_tools: AllowedTools


class TextFormat(Body, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(Body, tag_field="type", tag="json_object"):
    """A JSON object."""


class NamedSchema(Body):
    name: str
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Body, tag_field="type", tag="json_schema"):
    """JSON that is valid by a schema; it always is, with `strict` or without."""

    json_schema: NamedSchema


class ChatCompletionRequest(Generating, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | AllowedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: JsonObject | None = None
    store: Annotated[bool, Meta(extra_json_schema={"enum": [False]})] | None = None
    service_tier: ServiceTier | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: PromptCacheOptions | None = None


class CompletionRequest(Generating, kw_only=True):
    prompt: Prompts
    max_tokens: Annotated[int, Meta(ge=0, le=_INT64)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class EmbeddingsRequest(Body, kw_only=True):
    input: Texts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class TokenizeRequest(Body, kw_only=True):
    """A text, or a conversation; just one of them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: JsonObject | None = None


class DetokenizeRequest(Body, kw_only=True):
    tokens: list[TokenId]
    model: str | None = None


def prompts(given: str | list[Any], name: str, most: int) -> list[str | list[int]]:
    """What `Prompts` stands for: up to `most` texts or lists of token ids. Raises ApiError."""
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(each, int) for each in given):
        return [given]
    if not given or not (
        all(isinstance(each, str) for each in given) or all(isinstance(each, list) for each in given)
    ):
        raise invalid(f"{name}: must be a text, token ids, or a list of one of them", name)
    if len(given) > most:
        raise invalid(f"{name}: {len(given)} of them; at most {most} at a time", name)
    return given


_WHERE: Final = re.compile(r"(.*?)(?: - at (?:`key` in )?`\$\.?(.*?)(?:\[\.\.\.\])?`)?$", re.DOTALL)


def decode(body: bytes, kind: type[_T]) -> _T:
    """The JSON text `body` as a `kind`. Raises ApiError, naming the parameter."""
    try:
        return _decode(body, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise malformed(error) from None


def _decode(body: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        given = msgspec.json.decode(body)
        if isinstance(given, dict):
            asked = {name: value for name, value in given.items() if not _asks_nothing(name, value)}
            if len(asked) < len(given):
                return _decode(msgspec.json.encode(asked), kind)
        raise refusal(str(error)) from None


def converted(given: Any, kind: type[_T]) -> _T:
    """As `decode`, of what a JSON text says. Raises ApiError, naming the parameter."""
    if isinstance(given, dict):
        given = {name: value for name, value in given.items() if not _asks_nothing(name, value)}
    try:
        return msgspec.convert(given, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise refusal(str(error)) from None


def malformed(error: Exception) -> ApiError:
    """For what is no JSON, or too deep."""
    if isinstance(error, RecursionError):
        return ApiError(400, "the request's body is nested too deeply", code="invalid_json")
    why = str(error).partition(" - at ")[0]
    return ApiError(400, f"the request's body is not valid JSON: {why}", code="invalid_json")


def _asks_nothing(name: str, value: Any) -> bool:
    """A parameter that is not supported, with a value that changes nothing."""
    return name in UNSUPPORTED and (value is None or value in UNSUPPORTED[name][1])


def refusal(text: str) -> ApiError:
    """What a client is told of this error of msgspec."""
    match = _WHERE.match(text)
    assert match is not None
    what, where = match[1], match[2] or ""
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", what):
        name = f"{where}.{unknown[1]}" if where else unknown[1]
        if name in UNSUPPORTED:
            why = UNSUPPORTED[name][0]
            return invalid(f"parameter {name!r} is not supported: {why}", name, "unsupported_parameter")
        return invalid(f"unknown parameter: {name!r}", name, "unknown_parameter")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
        name = f"{where}.{missing[1]}" if where else missing[1]
        return invalid(f"missing parameter: {name!r}", name, "missing_required_parameter")
    if re.search(r"content\[\d+\]\.type$", where):
        what += "; this server reads text only"
    if re.fullmatch(r"tools\[\d+\]\.type", where):
        what += "; this server has no tools of its own: send functions"
    what = what.replace("`", "").replace("| null", "or null")
    if not where:
        return ApiError(400, f"the request's body: {what[:1].lower()}{what[1:]}", code="invalid_type")
    return invalid(f"{where}: {what[:1].lower()}{what[1:]}", where)
