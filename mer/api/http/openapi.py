"""The OpenAPI document, made from the classes that requests are checked by and answers are made of."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

import msgspec
from attrs import frozen

from mer.api.http import answers, anthropic, live, responses_types, schemas

_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"
_TEXT: Final = "text/plain"


@frozen
class _Operation:
    """answer: of status 200 (str: plain text). chunk: the event of a stream. errors: further statuses."""

    method: str
    path: str
    summary: str
    answer: type
    body: type | None = None
    chunk: type | None = None
    errors: tuple[int, ...] = ()
    open: bool = False
    failure: type = answers.ErrorAnswer


_WORK: Final = (400, 404, 408, 413, 415, 429, 500, 503)
_OPERATIONS: Final = [
    _Operation(
        "post", "/v1/chat/completions", "Continue a conversation.", answers.ChatCompletion,
        schemas.ChatCompletionRequest, answers.ChatCompletionChunk, _WORK,
    ),
    _Operation(
        "post", "/v1/responses", "Continue a conversation, by OpenAI's newer API; nothing is stored.",
        responses_types.ResponseAnswer, responses_types.ResponsesRequest, responses_types.ResponseEvent,
        _WORK,
    ),
    _Operation(
        "post", "/v1/messages", "Continue a conversation, by Anthropic's API.", anthropic.MessageAnswer,
        anthropic.MessagesRequest, anthropic.MessageEvent, _WORK, failure=anthropic.AnthropicError,
    ),
    _Operation(
        "post", "/v1/messages/count_tokens", "Tokens of a conversation, by Anthropic's API.",
        anthropic.TokenCount, anthropic.CountTokensRequest, None, _WORK, failure=anthropic.AnthropicError,
    ),
    _Operation(
        "post", "/v1/completions", "Continue a text.", answers.Completion,
        schemas.CompletionRequest, answers.Completion, _WORK,
    ),
    _Operation(
        "post", "/v1/embeddings", "Vectors of texts: the mean of the last hidden state, of length 1.",
        answers.Embeddings, schemas.EmbeddingsRequest, None, _WORK,
    ),
    _Operation(
        "post", "/tokenize", "Token ids of a text or a conversation.", answers.Tokens,
        schemas.TokenizeRequest, None, _WORK,
    ),
    _Operation(
        "post", "/detokenize", "Text of token ids.", answers.DetokenizedText,
        schemas.DetokenizeRequest, None, _WORK,
    ),
    _Operation("get", "/v1/models", "The model that is served.", answers.Models, errors=(503,)),
    _Operation("get", "/v1/models/{model}", "The same, by name.", answers.Model, errors=(404, 503)),
    _Operation("get", "/health", "The process is alive.", answers.Status, open=True),
    _Operation("get", "/ready", "It can serve: the model is loaded.", answers.Status, open=True),
    _Operation("get", "/metrics", "Counters and histograms, as Prometheus reads them.", str, errors=(503,)),
    _Operation(
        "get", "/live", "What the server does now; every second anew, as events, to who accepts those.",
        live.Live, errors=(404, 503),
    ),
    _Operation("get", "/version", "The version of mer.", answers.Version),
]  # fmt: skip
_REASONS: Final = {
    400: "A parameter that can't be used; `param` names it.",
    401: "No API key, or one that is not known.",
    403: "The request calls a server on the loopback address by another name, or comes from a web page.",
    404: "No such model.",
    408: "The request's own `timeout` is over.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    429: "Too many requests of this key; Retry-After says when to come again.",
    500: "An error inside the server.",
    503: "The queue is full, the model is being loaded, or the server is shutting down.",
}


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    types: set[type] = {answers.ErrorAnswer}
    for each in _OPERATIONS:
        kinds = (each.answer, each.body, each.chunk, each.failure)
        types |= {kind for kind in kinds if kind not in (None, str)}
    ordered = sorted(types, key=lambda kind: kind.__name__)
    _, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for each in _OPERATIONS:
        paths.setdefault(each.path, {})[each.method] = _operation(each)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mer",
            "version": version("mer"),
            "description": "OpenAI-compatible inference of Mixture-of-Experts models.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(each: _Operation) -> dict[str, Any]:
    content: dict[str, Any] = {_JSON: {"schema": _ref(each.answer)}}
    if each.answer is str:
        content = {_TEXT: {"schema": {"type": "string"}}}
    if each.chunk is not None:
        events = f"With `stream`: events whose data is a {each.chunk.__name__}."
        if each.chunk in (answers.ChatCompletionChunk, answers.Completion):
            events += " The last one is `data: [DONE]`."
        # Without a type: for some readers it is that of the body, a string, for others that of an event.
        content[_EVENTS] = {"schema": {"description": events}}
    responses = {"200": {"description": "The answer.", "content": content}}
    for status in each.errors if each.open else (401, 403, *each.errors):
        responses[str(status)] = {
            "description": _REASONS[status],
            "content": {_JSON: {"schema": _ref(each.failure)}},
        }
    if each.open:
        responses["503"] = {"description": "Not yet, or no longer.", "content": content}
    made: dict[str, Any] = {
        "operationId": each.path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
        "summary": each.summary,
        "security": [] if each.open else [{}, {"key": []}, {"x-api-key": []}],
        "responses": responses,
    }
    if each.body is not None:
        made["requestBody"] = {"required": True, "content": {_JSON: {"schema": _ref(each.body)}}}
    if "{model}" in each.path:
        name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        made["parameters"] = [name]
    if each.path == "/live":
        which = "Of a server with several models; default: the first."
        made["parameters"] = [
            {"name": "model", "in": "query", "description": which, "schema": {"type": "string"}}
        ]
    return made


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
