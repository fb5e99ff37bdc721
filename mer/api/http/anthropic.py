"""What clients of Anthropic's Messages API send and get."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from mer.api.http.answers import DraftsUsed
from mer.api.http.errors import ApiError
from mer.api.http.schemas import Body, Count, JsonObject, Probability, Text
from mer.engine.outputs import Usage

# The kind of an error by its HTTP status.
_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class Block(Struct, kw_only=True, tag_field="type"):
    """A part of a message. Clients send back what they got: fields that mean nothing here are passed over."""

    cache_control: JsonObject | None = None


class TextBlock(Block, tag="text"):
    text: str


class ThinkingBlock(Block, tag="thinking"):
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Block, tag="redacted_thinking"):
    """Other servers' thoughts, which nobody here can read: left out."""

    data: str = ""


class ToolUseBlock(Block, tag="tool_use"):
    id: str
    name: str
    input: JsonObject


class ToolResultBlock(Block, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


ContentBlock = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


class MessageParam(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class AnthropicTool(Body):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.:-]{1,128}$")]
    input_schema: JsonObject
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    cache_control: JsonObject | None = None


class _Choice(Body, tag_field="type"):
    disable_parallel_tool_use: bool | None = None


class ChoiceAuto(_Choice, tag="auto"):
    """The model decides."""


class ChoiceAny(_Choice, tag="any"):
    """Some tool is called."""


class ChoiceTool(_Choice, kw_only=True, tag="tool"):
    """This tool is called."""

    name: str


class ChoiceNone(Body, tag_field="type", tag="none"):
    """No tool is called."""


class ThinkingEnabled(Body, tag_field="type", tag="enabled"):
    """budget_tokens: asked for by the API; nothing here can hold a model to it."""

    budget_tokens: Count
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(Body, tag_field="type", tag="adaptive"):
    display: Literal["summarized", "omitted"] | None = None


class ThinkingDisabled(Body, tag_field="type", tag="disabled"):
    """Templates that can leave thinking out do; thoughts of others are not shown."""


class JsonOutput(Body, tag_field="type", tag="json_schema"):
    schema: JsonObject


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutput | None = None


class CountTokensRequest(Body, kw_only=True):
    model: str
    messages: Annotated[list[MessageParam], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=512)] | None = None
    tool_choice: ChoiceAuto | ChoiceAny | ChoiceTool | ChoiceNone | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None
    cache_control: JsonObject | None = None
    context_management: JsonObject | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """cache_control: prompts are cached anyway. context_management: nothing is left out of a conversation."""

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: Annotated[list[Text], Meta(max_length=64)] | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    metadata: JsonObject | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
    billing_policy: JsonObject | None = None


class TextAnswer(Struct, tag_field="type", tag="text"):
    text: str


class ThinkingAnswer(Struct, tag_field="type", tag="thinking"):
    """signature: always empty; the thoughts may be sent back as they are."""

    thinking: str
    signature: str = ""


class ToolUseAnswer(Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: JsonObject


AnswerBlock = TextAnswer | ThinkingAnswer | ToolUseAnswer


class AnthropicUsage(Struct):
    """input_tokens: without those that were found in the cache. drafts: where there were any."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    drafts: DraftsUsed | UnsetType = UNSET

    @classmethod
    def of(cls, usage: Usage) -> AnthropicUsage:
        cached = usage.cached_tokens
        return cls(usage.prompt_tokens - cached, usage.completion_tokens, cached, drafts=DraftsUsed.of(usage))


class AppliedEdits(Struct):
    applied_edits: list[JsonObject]


class MessageAnswer(Struct, tag_field="type", tag="message"):
    id: str
    model: str
    content: list[AnswerBlock]
    usage: AnthropicUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    role: Literal["assistant"] = "assistant"
    context_management: AppliedEdits | UnsetType = UNSET


class TokenCount(Struct):
    input_tokens: int


class MessageStart(Struct, tag_field="type", tag="message_start"):
    message: MessageAnswer


class BlockStart(Struct, tag_field="type", tag="content_block_start"):
    index: int
    content_block: AnswerBlock


class TextDelta(Struct, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class InputDelta(Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


class BlockDelta(Struct, tag_field="type", tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | InputDelta


class BlockStop(Struct, tag_field="type", tag="content_block_stop"):
    index: int


class StopDelta(Struct):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, tag_field="type", tag="message_delta"):
    delta: StopDelta
    usage: AnthropicUsage


class MessageStop(Struct, tag_field="type", tag="message_stop"):
    """The end."""


class Ping(Struct, tag_field="type", tag="ping"):
    """Nothing new; the connection stays open."""


class MessageEvent(Struct):
    """type: 'message_start', 'content_block_delta' and so on, also the event's name."""

    type: str


StreamEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping


class AnthropicModel(Struct, tag_field="type", tag="model"):
    """created_at: as in RFC 3339."""

    id: str
    display_name: str
    created_at: str
    max_input_tokens: int


class AnthropicModels(Struct):
    data: list[AnthropicModel]
    first_id: str
    last_id: str
    has_more: bool = False


class AnthropicErrorDetails(Struct):
    type: str
    message: str


class AnthropicError(Struct, tag_field="type", tag="error"):
    error: AnthropicErrorDetails


def error_answer(error: ApiError) -> AnthropicError:
    """An error in Anthropic's shape."""
    return AnthropicError(AnthropicErrorDetails(_KINDS.get(error.status, "api_error"), str(error)))


def error_bytes(error: ApiError) -> bytes:
    return msgspec.json.encode(error_answer(error))


def tagged(value: Any) -> str:
    """The `type` of one of these objects."""
    return str(type(value).__struct_config__.tag)
