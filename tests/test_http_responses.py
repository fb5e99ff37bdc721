"""OpenAI's Responses API: a real `mer serve`, asked by the official `openai` client."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import msgspec
import openai
import pytest
from http_server import serving
from pydantic import BaseModel
from tool_models import PARAMETERS, write_tool_model

from mer.api.conversation import Event
from mer.api.http.anthropic import MessagesRequest
from mer.api.http.responses import _Answer
from mer.api.http.responses_types import ResponsesRequest
from mer.engine.outputs import Delta, TokenLogprob
from mer.model.pieces import Content, Reasoning

TOOLS = [
    {"type": "function", "name": name, "description": "d", "parameters": PARAMETERS, "strict": True}
    for name in ("weather", "forecast")
]
FORCED = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}


class Form(BaseModel):
    model_config = {"extra": "forbid"}
    a: Literal[1, 2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_tool_model(tmp_path_factory.mktemp("responses") / "small")
    with serving(model, "--context", 2048) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, **more):
    body = {"seed": 1, **more.pop("extra_body", {})}
    asked = {"model": "small", "input": "What is the weather?", "max_output_tokens": 300}
    return client.responses.create(**asked | more, extra_body=body)


def stream(client, **more):
    asked = {"model": "small", "input": "What is the weather?", "max_output_tokens": 300}
    with client.responses.stream(**asked | more, extra_body={"seed": 1}) as stream:
        events = list(stream)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        return events, events[-1].response


def test_text_is_the_answer_that_chat_completions_give(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = client.chat.completions.create(model="small", messages=messages, temperature=0, max_tokens=12)
    for instructions, given in [
        ("Be brief.", "Hello"),
        (None, messages),
        (
            "Be brief.",
            [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        ),
    ]:
        answer = ask(client, instructions=instructions, input=given, temperature=0, max_output_tokens=12)
        assert answer.output_text == expected.choices[0].message.content
        assert answer.usage.input_tokens == expected.usage.prompt_tokens
        assert answer.usage.output_tokens == 12
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (answer.id[:5], answer.output[0].id[:4]) == ("resp_", "msg_")
        assert (answer.store, answer.instructions, answer.previous_response_id) == (False, instructions, None)
    assert answer.usage.input_tokens_details.cached_tokens >= 0


def test_a_stream_is_the_whole_answer(client):
    whole = ask(client, temperature=0, max_output_tokens=12)
    events, final = stream(client, temperature=0, max_output_tokens=12)
    assert final.output_text == whole.output_text
    # What the cache had, and what was drafted, may differ.
    counts = ("input_tokens", "output_tokens", "total_tokens", "output_tokens_details")
    assert all(getattr(final.usage, name) == getattr(whole.usage, name) for name in counts)
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) > 1


def test_a_function_is_called_and_its_output_sent_back(client):
    answer = ask(client, **FORCED)
    assert answer.status == "completed"
    (call,) = answer.output
    assert call.type == "function_call"
    assert call.name in ("weather", "forecast")
    assert {"city", "unit"} <= set(json.loads(call.arguments)) <= {"city", "unit", "wind"}
    again = [
        {"role": "user", "content": "What is the weather?"},
        *answer.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    longer = ask(client, input=again, tools=TOOLS, max_output_tokens=1)
    assert longer.usage.input_tokens > answer.usage.input_tokens
    named = ask(client, tools=TOOLS, tool_choice={"type": "function", "name": "forecast"})
    assert [item.name for item in named.output] == ["forecast"]


def test_a_streamed_call(client):
    whole = ask(client, **FORCED)
    events, final = stream(client, **FORCED)
    (call,), (expected,) = final.output, whole.output
    assert (call.name, call.arguments) == (expected.name, expected.arguments)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    assert len(deltas) > 3
    assert events[-1].type == "response.completed"


def test_structured_text(client):
    answer = client.responses.parse(model="small", input="?", text_format=Form, max_output_tokens=300)
    assert answer.output_parsed.a in (1, 2)
    _, final = stream(client, text_format=Form)
    assert final.output_parsed.a in (1, 2)
    assert json.loads(final.output_text) == {"a": final.output_parsed.a}
    mode = ask(client, text={"format": {"type": "json_object"}}, max_output_tokens=1)
    assert mode.output_text == "{"


def test_logprobs(client):
    include = ["message.output_text.logprobs"]
    answer = ask(client, max_output_tokens=6, include=include, top_logprobs=2, temperature=0)
    found = answer.output[0].content[0].logprobs
    assert b"".join(bytes(each.bytes) for each in found).decode(errors="replace") == answer.output_text
    assert [len(each.top_logprobs) for each in found] == [2] * len(found)


@pytest.mark.parametrize(
    "batches",
    [
        [("hm", [Reasoning("hm")]), ("</t>", []), ("yes", [Content("yes")]), ("!", [Content("!")])],
        [("h", [Reasoning("h")]), ("m</t>yes", [Reasoning("m"), Content("yes")]), ("!", [Content("!")])],
    ],
)
def test_logprobs_behind_thoughts(batches):
    """Those of the text alone, however many tokens come at a time; a token is a letter here."""
    tokenizer = SimpleNamespace(token_bytes=lambda token: bytes([token]))
    answer = _Answer(ResponsesRequest(input="?"), "small", SimpleNamespace(tokenizer=tokenizer))
    for drawn, pieces in batches:
        logprobs = tuple(TokenLogprob(ord(letter), letter, -1.0, ()) for letter in drawn)
        answer.add(Event(0, Delta("", tuple(map(ord, drawn)), logprobs), pieces, None))
    (_, message) = answer.response.output
    assert "".join(each.token for each in message.content[0].logprobs) == message.content[0].text == "yes!"


def test_thoughts_are_an_item(tmp_path):
    model = write_tool_model(tmp_path / "small", "deepseek_r1")
    with serving(model, "--context", 2048) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        asked = {"temperature": 0, "max_output_tokens": 8}
        whole = ask(client, **asked)
        (item,) = whole.output
        assert (item.type, item.summary) == ("reasoning", [])
        assert item.content[0].text
        usage = whole.usage  # without the token that ended it
        assert usage.output_tokens_details.reasoning_tokens in (usage.output_tokens, usage.output_tokens - 1)
        events, final = stream(client, **asked)
        assert final.output[0].content[0].text == item.content[0].text
        deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(deltas) == item.content[0].text
        question = {"role": "user", "content": "?"}
        back = ask(client, input=[question, item, {"role": "assistant", "content": "x"}, question])
        assert back.usage.input_tokens > whole.usage.input_tokens


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "image_generation"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"extra_body": {"surprise": 1}}, "surprise"),
        ({"input": "x" * 40000}, "input"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"extra_body": {"chat_template_kwargs": {"x": 1}}}, "chat_template_kwargs.x"),
    ],
)
def test_refusals(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **more)
    assert caught.value.param == param
    assert (
        ask(client, store=False, background=False, truncation="disabled", max_output_tokens=1).store is False
    )


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError):
        ask(client, model="other")


@pytest.mark.parametrize(("name", "kind"), [("Responses", ResponsesRequest), ("Messages", MessagesRequest)])
def test_the_docs_name_every_parameter(name, kind):
    text = (Path(__file__).parent.parent / "docs/http.md").read_text()
    section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
    told = {word.partition(".")[0].partition(":")[0] for word in re.findall(r"`([^`]+)`", section)}
    assert {field.name for field in msgspec.structs.fields(kind)} <= told
