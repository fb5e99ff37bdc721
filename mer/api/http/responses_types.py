"""What clients of OpenAI's Responses API send and get."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from mer.api.http.answers import ContentLogprob, DraftsUsed
from mer.api.http.schemas import (
    Body,
    Count,
    Int64,
    JsonObject,
    JsonObjectFormat,
    Probability,
    PromptCacheOptions,
    ServiceTier,
    TextFormat,
)
from mer.config import Speculate
from mer.engine.outputs import Usage
from mer.engine.params import MAX_LOGPROBS

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class Part(Struct, kw_only=True, tag_field="type"):
    """A part of an item. Clients send back what they got: fields that mean nothing here are passed over."""


class InputText(Part, tag="input_text"):
    text: str


class OutputTextPart(Part, tag="output_text"):
    text: str


class ResponseRefusal(Part, tag="refusal"):
    refusal: str


class ReasoningText(Part, tag="reasoning_text"):
    text: str


class SummaryText(Part, tag="summary_text"):
    text: str


class InputMessage(Part, tag="message"):
    """`type` may be left out."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputTextPart | ResponseRefusal]


class InputCall(Part, tag="function_call"):
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class InputCallOutput(Part, tag="function_call_output"):
    call_id: str
    output: str | list[InputText]


class InputReasoning(Part, tag="reasoning"):
    """An earlier answer's thoughts; what another server encrypted can't be read."""

    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None


InputItem = InputMessage | InputCall | InputCallOutput | InputReasoning


class ResponseTool(Body, kw_only=True, tag_field="type", tag="function"):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.:-]{1,128}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class ToolNamespace(Body, kw_only=True, tag_field="type", tag="namespace"):
    """Functions that belong together. The model knows each as NAMESPACE__NAME."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.:-]{1,128}$")]
    tools: list[ResponseTool]
    description: str | None = None


class WebSearch(Struct, tag_field="type", tag="web_search"):
    """It runs on OpenAI's servers: beside other tools it is left out, as if nobody had offered it."""


class ResponseToolChoice(Body, tag_field="type", tag="function"):
    name: str


class AllowedFunction(ResponseTool, kw_only=True, tag="function", omit_defaults=True):
    """One of the tools, by its name."""


class ResponseAllowedTools(Body, tag_field="type", tag="allowed_tools"):
    """As `AllowedTools` in chat completions."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedFunction], Meta(min_length=1, max_length=512)]


class SchemaFormat(Body, kw_only=True, tag_field="type", tag="json_schema"):
    """JSON that is valid by a schema; it always is, with `strict` or without."""

    name: str
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


class TextConfig(Body):
    format: TextFormat | JsonObjectFormat | SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Body):
    """summary: thoughts are given as they are, not summed up."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = None


class ResponsesRequest(Body, kw_only=True):
    """include: logprobs need `top_logprobs` as well; thoughts are never encrypted."""

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    model: str | None = None
    instructions: str | list[InputItem] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    seed: Int64 | None = None
    tools: Annotated[list[ResponseTool | ToolNamespace | WebSearch], Meta(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | ResponseAllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = None
    store: Annotated[bool, Meta(extra_json_schema={"enum": [False]})] | None = None
    metadata: dict[str, str] | None = None
    client_metadata: JsonObject | None = None
    service_tier: ServiceTier | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    speculative: bool | Speculate | None = None
    priority: Int64 | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None
    chat_template_kwargs: JsonObject | None = None


class OutputText(Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[JsonObject]
    logprobs: list[ContentLogprob]


class ReasoningTextAnswer(Struct, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(Struct, tag_field="type", tag="message"):
    id: str
    content: list[OutputText]
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"


class CallItem(Struct, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    namespace: str | UnsetType = UNSET
    status: Status = "in_progress"


class ReasoningItem(Struct, tag_field="type", tag="reasoning"):
    id: str
    content: list[ReasoningTextAnswer]
    summary: list[JsonObject]
    status: Status = "in_progress"


OutputItem = MessageItem | CallItem | ReasoningItem


class InputDetails(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    """drafts: where there were any."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails
    drafts: DraftsUsed | UnsetType = UNSET

    @classmethod
    def of(cls, usage: Usage, reasoning_tokens: int) -> ResponseUsage:
        return cls(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
            InputDetails(usage.cached_tokens),
            OutputDetails(reasoning_tokens),
            DraftsUsed.of(usage),
        )


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens"]


class ResponseFailure(Struct):
    code: str
    message: str


class ResponseAnswer(Struct, kw_only=True, tag_field="object", tag="response"):
    """The request's own parameters are in it as they were understood."""

    id: str
    created_at: int
    model: str
    output: list[OutputItem]
    status: Status = "in_progress"
    completed_at: int | None = None
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    instructions: str | list[Any] | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    reasoning: JsonObject
    temperature: float
    text: JsonObject
    tool_choice: Any
    tools: list[Any]
    top_p: float
    top_logprobs: int
    background: bool = False
    previous_response_id: None = None
    service_tier: str = "default"
    store: bool = False
    truncation: Literal["disabled"] = "disabled"
    user: str | UnsetType = UNSET


class ResponseEvent(Struct):
    """type: 'response.output_text.delta' and so on; sequence_number: from 0. The rest depends on the type."""

    type: str
    sequence_number: int


def with_types(body: Any) -> Any:
    """The body of a request in which every item of its lists says its type: messages may leave it out."""
    if not isinstance(body, dict):
        return body
    typed = {
        name: [
            {"type": "message", **item} if isinstance(item, dict) and "role" in item else item
            for item in body[name]
        ]
        for name in ("input", "instructions")
        if isinstance(body.get(name), list)
    }
    return {**body, **typed}
