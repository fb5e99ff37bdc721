"""Every parameter that the official clients can send: taken, or refused by its name.

The clients' own types are read, so that a newer client's new parameters are found.
"""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_params
from engine_models import opened
from http_server import asking
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from tool_models import write_tool_model
from typing_extensions import get_type_hints

HELLO = [{"role": "user", "content": "Hello"}]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
FLAT = {"type": "function", **FUNCTION}
BETA_TOOL = {"name": "f", "input_schema": {"type": "object"}}
CACHE = {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}, "prompt_cache_retention": "24h"}
# What both of OpenAI's APIs have. Taken, with a value; the rest of the request is there, too.
OPENAI = CACHE | {
    "metadata": {"a": "b"}, "parallel_tool_calls": True, "prompt_cache_key": "x", "safety_identifier": "x",
    "service_tier": "flex", "store": False, "temperature": 0.5, "tool_choice": "auto", "top_p": 0.5,
    "user": "x", "model": "small",
}  # fmt: skip
ANTHROPIC = {
    "messages": HELLO, "model": "small", "cache_control": {"type": "ephemeral"}, "system": "Be brief.",
    "output_config": {}, "thinking": {"type": "disabled"}, "tool_choice": {"type": "auto"},
    "tools": [BETA_TOOL], "user_profile_id": "x", "workspace_id": "x",
}  # fmt: skip
MESSAGES = ANTHROPIC | {
    "max_tokens": 3, "inference_geo": "eu", "metadata": {"user_id": "x"}, "service_tier": "auto",
    "stop_sequences": ["x"],
}  # fmt: skip
NOT_MESSAGES = {"container": "x", "diagnostics": {"previous_message_id": None}, "speed": "fast"}
# Endpoint, the client's type, what is sent in any case, what is taken, what is refused.
CASES: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "chat": (
        "/v1/chat/completions",
        chat_params.CompletionCreateParamsBase,
        {"messages": HELLO, "max_tokens": 3},
        OPENAI | {
            "messages": HELLO, "frequency_penalty": 1, "logit_bias": {"5": 1}, "logprobs": True,
            "max_completion_tokens": 3, "max_tokens": 3, "n": 2, "presence_penalty": 1,
            "response_format": {"type": "text"}, "seed": 1, "stop": "x", "stream_options": None,
            "tools": [TOOL], "top_logprobs": None,
        },
        {
            "audio": {"voice": "x", "format": "wav"}, "function_call": "auto", "functions": [FUNCTION],
            "modalities": ["text", "audio"], "moderation": {"model": "x"},
            "prediction": {"type": "content", "content": "x"}, "reasoning_effort": "low", "verbosity": "low",
            "web_search_options": {}, "store": True, "prompt_cache_options": {"prewarm": True},
        },
    ),
    "completions": (
        "/v1/completions",
        completion_create_params.CompletionCreateParamsBase,
        {"prompt": "Hello", "max_tokens": 3},
        {
            "model": "small", "prompt": "Hello", "echo": True, "frequency_penalty": 1, "logit_bias": {"5": 1},
            "logprobs": 2, "max_tokens": 3, "n": 2, "presence_penalty": 1, "seed": 1, "stop": ["x"],
            "stream_options": None, "temperature": 0.5, "top_p": 0.5, "user": "x", "best_of": 1, "suffix": "",
        },
        {"best_of": 2, "suffix": "x"},
    ),
    "embeddings": (
        "/v1/embeddings",
        embedding_create_params.EmbeddingCreateParams,
        {"input": "Hello"},
        {"input": "Hello", "model": "small", "encoding_format": "base64", "user": "x"},
        {"dimensions": 8},
    ),
    "responses": (
        "/v1/responses",
        response_create_params.ResponseCreateParamsBase,
        {"input": HELLO, "max_output_tokens": 3},
        OPENAI | {
            "input": "Hello", "include": ["reasoning.encrypted_content"], "instructions": "Be brief.",
            "max_output_tokens": 3, "reasoning": {"summary": "auto"}, "stream_options": {}, "text": {},
            "tools": [FLAT], "top_logprobs": 2, "background": False, "truncation": "disabled",
        },
        {
            "access_programs": {"x": 1}, "background": True, "background_options": {"x": 1},
            "context_management": [{"type": "compaction"}], "conversation": "x", "image": {"x": 1},
            "max_tool_calls": 3, "moderation": {"model": "x"}, "previous_response_id": "x",
            "prompt": {"id": "x"}, "truncation": "auto", "store": True,
            "prompt_cache_options": {"prewarm": True},
        },
    ),
    "messages": (
        "/v1/messages",
        message_create_params.MessageCreateParamsBase,
        {"model": "small", "messages": HELLO, "max_tokens": 3},
        MESSAGES,
        NOT_MESSAGES,
    ),
    "beta messages": (
        "/v1/messages",
        beta_params.MessageCreateParamsBase,
        {"model": "small", "messages": HELLO, "max_tokens": 3},
        MESSAGES | {"billing_policy": {"type": "billing_policy"}, "context_management": {"edits": []}},
        NOT_MESSAGES | {
            "compaction": {"type": "x"}, "fallback_credit_token": "x", "fallbacks": [{"model": "x"}],
            "mcp_servers": [{"type": "url", "url": "x", "name": "x"}], "thread": {"id": "x"},
        },
    ),
    "count tokens": (
        "/v1/messages/count_tokens",
        message_count_tokens_params.MessageCountTokensParams,
        {"model": "small", "messages": HELLO},
        ANTHROPIC,
        {"speed": "fast"},
    ),
}  # fmt: skip
HEADERS = {"betas"}  # what a client's type calls a parameter, and is none of the body


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tool_model(tmp_path_factory.mktemp("parameters") / "small")


@pytest.mark.parametrize("name", CASES)
def test_the_lists_are_complete(name):
    _, kind, _, taken, refused = CASES[name]
    assert set(get_type_hints(kind)) - HEADERS == set(taken) | set(refused)


@pytest.mark.parametrize("name", CASES)
async def test_taken_or_refused_by_name(model, name):
    path, _, right, taken, refused = CASES[name]
    async with opened(model) as engine, asking(engine) as http:
        for param, value in taken.items():
            tools = {"tools": taken["tools"]} if param == "tool_choice" else {}
            answer = await http.post(path, json=right | tools | {param: value})
            assert answer.status_code == 200, (param, answer.text)
        for param, value in refused.items():
            answer = await http.post(path, json=right | {param: value})
            assert answer.status_code == 400, (param, answer.text)
            error = answer.json()["error"]
            assert param in error["message"], error
            assert error.get("param", param).split(".")[0] == param, error


async def test_hints_change_nothing(model):
    hints = CACHE | {"prompt_cache_key": "x", "service_tier": "priority", "safety_identifier": "x"}
    async with opened(model) as engine, asking(engine) as http:
        path, _, right, *_ = CASES["chat"]
        asked = right | {"temperature": 0, "ignore_eos": True}
        first, second = [(await http.post(path, json=asked | more)).json()["choices"] for more in ({}, hints)]
        assert first == second


async def test_instructions_of_several_items(model):
    """Each is the message that it is; the rest of the conversation follows."""
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": "An example"},
        {"role": "assistant", "content": "Its answer"},
    ]
    async with opened(model) as engine, asking(engine) as http:
        asked = {"input": "Hello", "instructions": items, "max_output_tokens": 1}
        answer = (await http.post("/v1/responses", json=asked)).json()
        messages = [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "An example"},
            {"role": "assistant", "content": "Its answer"}, *HELLO,
        ]  # fmt: skip
        prompt = (await http.post("/tokenize", json={"messages": messages})).json()["tokens"]
        assert answer["usage"]["input_tokens"] == len(prompt)
        assert [item["role"] for item in answer["instructions"]] == ["developer", "user", "assistant"]


async def test_an_answer_ends_where_the_context_does(model):
    """However many tokens were asked for; only a prompt that does not fit is refused."""
    asked = {"temperature": 0, "ignore_eos": True}
    async with opened(model, context=64) as engine, asking(engine) as http:
        for path, more, name in (
            ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 10**9}, "messages"),
            ("/v1/completions", {"prompt": "Hello", "max_tokens": 10**9}, "prompt"),
        ):
            body = (await http.post(path, json=asked | more)).json()
            assert body["choices"][0]["finish_reason"] == "length"
            assert body["usage"]["total_tokens"] == 64
            long = "word " * 100
            more |= {name: long if name == "prompt" else [{"role": "user", "content": long}]}
            error = (await http.post(path, json=asked | more)).json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", name)
        body = (await http.post("/v1/responses", json={"input": HELLO, "max_output_tokens": 10**9})).json()
        if body["status"] == "incomplete":  # it may end by itself
            assert body["usage"]["total_tokens"] == 64
