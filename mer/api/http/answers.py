"""What clients get: OpenAI's objects. The OpenAPI document is made from these classes, too."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Final, Literal

from msgspec import UNSET, Struct, UnsetType

from mer.engine.engine import Engine
from mer.engine.outputs import TokenLogprob, Usage

# JSON has no -inf; OpenAI writes this for what is next to impossible.
_LEAST: Final = -9999.0

FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetails(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Struct):
    error: ErrorDetails


class CachedTokens(Struct):
    cached_tokens: int


class DraftsUsed(Struct):
    """drafted: tokens of drafts that were verified; accepted: those that were right.

    draft_experts: experts, of all layers, that drafted tokens wanted and none of the others in their step.
    """

    drafted: int
    accepted: int
    draft_experts: int

    @classmethod
    def of(cls, *answers: Usage) -> DraftsUsed | UnsetType:
        """Of all these answers; UNSET where nothing was drafted."""
        drafted = sum(each.drafted for each in answers)
        accepted = sum(each.accepted for each in answers)
        return cls(drafted, accepted, sum(each.draft_experts for each in answers)) if drafted else UNSET


class UsageAnswer(Struct):
    """drafts: where there were any."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    drafts: DraftsUsed | UnsetType = UNSET

    @classmethod
    def of(cls, prompts: Iterable[Iterable[Usage]]) -> UsageAnswer:
        """Of several answers to each of several prompts; a prompt counts once."""
        prompt = completion = cached = 0
        every: list[Usage] = []
        for answers in prompts:
            every += (each := list(answers))
            prompt += each[0].prompt_tokens
            cached += min(one.cached_tokens for one in each)  # the others find the first one's
            completion += sum(one.completion_tokens for one in each)
        return cls(prompt, completion, prompt + completion, CachedTokens(cached), DraftsUsed.of(*every))


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[ContentLogprob]
    refusal: None = None


class CalledFunction(Struct):
    name: str
    arguments: str


class ToolCallAnswer(Struct):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class ChatMessage(Struct):
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallAnswer] | UnsetType = UNSET
    refusal: None = None
    role: Literal["assistant"] = "assistant"


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Struct, tag_field="object", tag="chat.completion"):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class FunctionDelta(Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(Struct, tag_field="object", tag="chat.completion.chunk"):
    """One event of a stream. usage: in the last one, where it was asked for; null before."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageAnswer | UnsetType | None = UNSET


class CompletionLogprobs(Struct):
    """Lists of the same length. text_offset: characters of `text` before each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(Struct, tag_field="object", tag="text_completion"):
    """A whole answer, or one event of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer | UnsetType | None = UNSET


class Embedding(Struct, tag_field="object", tag="embedding"):
    """embedding: f32 numbers, or with encoding_format base64 their bytes, little-endian."""

    index: int
    embedding: list[float] | str


class PromptUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct, tag_field="object", tag="list"):
    data: list[Embedding]
    model: str
    usage: PromptUsage


class Model(Struct, tag_field="object", tag="model"):
    """max_model_len: tokens of prompt and answer together; 0 while it is not loaded.

    state: unloaded (loaded by the first request that names it), loading, ready, reloading or failed.
    """

    id: str
    created: int
    max_model_len: int
    owned_by: str = "mer"
    state: str = "ready"


class Models(Struct, tag_field="object", tag="list"):
    data: list[Model]


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class DetokenizedText(Struct):
    prompt: str


class Status(Struct):
    status: Literal["ok", "ready", "loading", "draining", "failed"]


class Version(Struct):
    version: str


def new_id(prefix: str) -> str:
    """A name for an answer: 'chatcmpl-...', 'resp_...'."""
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def chat_logprobs(engine: Engine, logprobs: Iterable[TokenLogprob]) -> list[ContentLogprob]:
    """OpenAI's form for chat answers."""

    def token_bytes(token: int) -> list[int]:
        return list(engine.tokenizer.token_bytes(token)) if engine.tokenizer else []

    return [
        ContentLogprob(
            each.text,
            finite(each.logprob),
            token_bytes(each.token_id),
            [TopLogprob(text, finite(logprob), token_bytes(token)) for token, text, logprob in each.top],
        )
        for each in logprobs
    ]
