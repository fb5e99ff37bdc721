"""Anthropic's Messages API: a real `mer serve`, asked by the official `anthropic` client."""

from __future__ import annotations

import contextlib
import itertools
import json
import re

import anthropic
import httpx
import openai
import pytest
from http_server import PATIENCE, asking, serving
from tool_models import PARAMETERS, write_tool_model

from mer import Engine
from mer.api.http import sse

ASK = [{"role": "user", "content": "What is the weather?"}]
TOOLS = [{"name": name, "description": "d", "input_schema": PARAMETERS} for name in ("weather", "forecast")]
FORCED = {"type": "any", "disable_parallel_tool_use": True}
JSON = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}

REFUSED = anthropic.BadRequestError
GREEDY = {"temperature": 0}  # the client has no name for it any more


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_tool_model(tmp_path_factory.mktemp("messages") / "small")
    with serving(model, "--context", 2048, MER_API_KEYS="secret") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as client:
        yield client


def ask(client, **more):
    return client.messages.create(**{"model": "small", "messages": ASK, "max_tokens": 300} | more)


def test_text_is_the_answer_that_chat_completions_give(server, client):
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
    system = "Be brief."
    expected = other.chat.completions.create(
        model="small", messages=[{"role": "system", "content": system}, *ASK], temperature=0, max_tokens=12
    )
    blocks = [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}]
    answer = ask(client, system=blocks, max_tokens=12, extra_body=GREEDY)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "small")
    assert answer.id.startswith("msg")
    (block,) = answer.content
    assert (block.type, block.text) == ("text", expected.choices[0].message.content)
    assert answer.stop_reason == "max_tokens"
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == expected.usage.prompt_tokens
    assert usage.output_tokens == 12
    count = client.messages.count_tokens(model="small", messages=ASK, system=system)
    assert count.input_tokens == expected.usage.prompt_tokens


def test_what_is_too_long_is_counted(client):
    """Who counts wants to know whether it is."""
    once, twice = (
        client.messages.count_tokens(model="small", messages=[{"role": "user", "content": "word " * n}])
        for n in (2000, 4000)
    )
    assert twice.input_tokens > once.input_tokens > 2048
    with pytest.raises(REFUSED, match=f"{once.input_tokens} tokens"):
        ask(client, messages=[{"role": "user", "content": "word " * 2000}])


def test_a_stream_is_the_whole_answer(client):
    whole = ask(client, max_tokens=12, extra_body=GREEDY)
    with client.messages.stream(model="small", messages=ASK, max_tokens=12, extra_body=GREEDY) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    read = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert read == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    kinds = [event.type for event in events if event.type not in ("text", "content_block_delta", "ping")]
    assert kinds == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert "".join(event.text for event in events if event.type == "text") == whole.content[0].text


def test_a_tool_is_used_and_its_result_sent_back(client):
    answer = ask(client, tools=TOOLS, tool_choice=FORCED)
    assert answer.stop_reason == "tool_use"
    (use,) = answer.content
    assert use.type == "tool_use"
    assert use.name in ("weather", "forecast")
    assert {"city", "unit"} <= set(use.input) <= {"city", "unit", "wind"}
    again = [
        *ASK,
        {"role": "assistant", "content": answer.content},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    assert ask(client, messages=again, tools=TOOLS, max_tokens=1).usage.output_tokens == 1
    named = ask(client, tools=TOOLS, tool_choice={"type": "tool", "name": "forecast"})
    assert [block.name for block in named.content] == ["forecast"]
    assert ask(client, tools=TOOLS, tool_choice={"type": "none"}, max_tokens=3).stop_reason == "max_tokens"


def test_a_streamed_tool_use(client):
    with client.messages.stream(
        model="small", messages=ASK, max_tokens=300, tools=TOOLS, tool_choice=FORCED
    ) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    (use,) = final.content
    assert final.stop_reason == "tool_use"
    assert use.input == json.loads("".join(parts))
    assert len(parts) > 3
    assert use.input["city"] in PARAMETERS["properties"]["city"]["enum"]


def test_a_call_that_was_cut_short_is_text(client):
    answer = ask(client, tools=TOOLS, tool_choice=FORCED, max_tokens=35)
    assert answer.stop_reason == "max_tokens"
    assert all(block.type == "text" for block in answer.content)


def test_stop_sequences_and_structured_answers(client):
    text = ask(client, max_tokens=12, extra_body=GREEDY).content[0].text
    stop = text[-3:]
    answer = ask(client, max_tokens=12, extra_body=GREEDY, stop_sequences=["no such", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == text[: text.index(stop)]
    form = {"format": {"type": "json_schema", "schema": JSON}}
    made = ask(client, output_config=form)
    assert json.loads(made.content[0].text)["a"] in (1, 2)
    assert made.stop_reason == "end_turn"
    assert made.stop_sequence is None


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "'other' is not served here"),
        ({"max_tokens": 0}, REFUSED, "max_tokens"),
        ({"messages": []}, REFUSED, "messages"),
        ({"messages": [*ASK, {"role": "assistant", "content": "It"}]}, REFUSED, "messages"),
        ({"extra_body": {"top_p": 2}}, REFUSED, "top_p"),
        ({"extra_body": {"surprise": 1}}, REFUSED, "'surprise'"),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, REFUSED, r"tools\[0\]"),
        ({"tool_choice": FORCED}, REFUSED, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}},
            REFUSED,
            "tool_choice",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            REFUSED,
            r"messages\[0\].content\[0\]",
        ),
        ({"messages": [{"role": "user", "content": "x" * 40000}]}, REFUSED, "tokens"),
    ],
)
def test_errors_in_anthropics_shape(client, more, error, text):
    with pytest.raises(error, match=text) as caught:
        ask(client, **more)
    assert caught.value.body["type"] == "error"
    kind = "not_found_error" if error is anthropic.NotFoundError else "invalid_request_error"
    assert caught.value.body["error"]["type"] == kind
    with pytest.raises(error, match=text), client.messages.stream(
        **{"model": "small", "messages": ASK, "max_tokens": 300} | more
    ):  # fmt: skip
        pass


def test_keys(server):
    wrong = anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as caught:
        ask(wrong)
    assert caught.value.body["error"]["type"] == "authentication_error"
    bearer = anthropic.Anthropic(base_url=server.url, api_key=None, auth_token="secret", max_retries=0)
    assert ask(bearer, max_tokens=1).usage.output_tokens == 1


def test_what_coding_agents_send_is_taken(server):
    """Parameters that ask for nothing that could go wrong; queries and headers of betas."""
    body = {
        "model": "small", "max_tokens": 2, "messages": ASK, "metadata": {"user_id": "u"},
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "context_management": {"edits": []},
        "service_tier": "auto", "output_config": {"effort": "max"}, "cache_control": {"type": "ephemeral"},
    }  # fmt: skip
    headers = {"x-api-key": "secret", "anthropic-version": "2023-06-01", "anthropic-beta": "some-beta"}
    answer = httpx.post(f"{server.url}/v1/messages?beta=true", json=body, headers=headers, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    assert answer.json()["context_management"] == {"applied_edits": []}
    unknown = httpx.post(f"{server.url}/v1/messages/nothing", json=body, headers=headers, timeout=PATIENCE)
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")


def test_models_in_anthropics_shape(client):
    (found,) = client.models.list().data
    assert (found.type, found.id, found.display_name) == ("model", "small", "small")
    assert found.created_at.tzinfo is not None
    assert client.models.retrieve("small") == found
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("other")


def test_thoughts_are_blocks_where_they_were_asked_for(tmp_path):
    model = write_tool_model(tmp_path / "small", "deepseek_r1")
    with serving(model, "--context", 2048) as server:
        client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        asked = {"model": "small", "messages": ASK, "max_tokens": 8, "extra_body": GREEDY}
        shown = asked | {"thinking": {"type": "enabled", "budget_tokens": 1024}}
        whole = client.messages.create(**shown)
        (block,) = whole.content
        assert block.type == "thinking"
        assert block.thinking
        with client.messages.stream(**shown) as stream:
            thoughts = [event.thinking for event in stream if event.type == "thinking"]
            assert stream.get_final_message().content[0].thinking == block.thinking
        assert "".join(thoughts) == block.thinking
        assert client.messages.create(**asked).content == []
        back = [*ASK, {"role": "assistant", "content": whole.content}, *ASK]
        longer = client.messages.count_tokens(model="small", messages=back).input_tokens
        block.thinking = ""
        empty = [*ASK, {"role": "assistant", "content": whole.content}, *ASK]
        assert longer > client.messages.count_tokens(model="small", messages=empty).input_tokens


async def test_thoughts_that_are_not_shown_are_no_silence(tmp_path, monkeypatch):
    """The model thinks for minutes, and the connection must not look dead: a token is 4 s here."""
    ticks = itertools.count(0, 4)
    monkeypatch.setattr(sse, "monotonic", lambda: next(ticks))
    model = write_tool_model(tmp_path / "small", "deepseek_r1")
    form = {"format": {"type": "json_schema", "schema": JSON}}  # behind thoughts, which do not end here
    asked = {"model": "small", "messages": ASK, "max_tokens": 300, "stream": True, "output_config": form}
    async with Engine.open(model, context=2048) as engine, asking(engine, keep_alive=10) as http:
        answer = await http.post("/v1/messages", json=asked)
    kinds = re.findall("^event: (.*)", answer.text, re.MULTILINE)
    assert len(kinds) > 4
    assert kinds == ["message_start", *["ping"] * (len(kinds) - 3), "message_delta", "message_stop"]


def test_a_stream_that_the_server_ends_says_so_in_its_own_shape(tmp_path):
    """Both kinds of streams, in an answer that never ends by itself, while the server is told to end."""
    schema = {"type": "json_schema", "schema": JSON}
    messages = {"model": "small", "max_tokens": 1900, "messages": ASK, "stream": True,
                "thinking": {"type": "adaptive"}, "output_config": {"format": schema}}  # fmt: skip
    responses = {"model": "small", "input": "?", "stream": True, "text": {"format": schema | {"name": "x"}}}
    model = write_tool_model(tmp_path / "small", "deepseek_r1")
    with serving(model, "--context", 2048, "--drain-timeout", 0) as server, httpx.Client() as client:
        asked = [("messages", messages, "content_block_delta"), ("responses", responses, "text.delta")]
        with contextlib.ExitStack() as streams:
            lines = []
            for path, body, sign in asked:
                stream = client.stream("POST", f"{server.url}/v1/{path}", json=body, timeout=PATIENCE)
                lines.append(streams.enter_context(stream).iter_lines())
                assert any(sign in line for line in iter(lambda i=lines[-1]: next(i), None))
            server.signal()
            ended = ["\n".join(each) for each in lines]
        assert server.ended() == 0
    events = [[json.loads(data) for data in re.findall("^data: (.*)", text, re.MULTILINE)] for text in ended]
    assert events[0][-1]["type"] == "error"
    assert events[0][-1]["error"]["type"] == "overloaded_error"
    assert events[1][-1]["type"] == "response.failed"
    assert events[1][-1]["response"]["error"]["code"] == "shutting_down"
    assert events[1][-1]["response"]["status"] == "failed"
