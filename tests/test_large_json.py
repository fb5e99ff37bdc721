"""Large bodies are read as msgspec reads small ones, no piece of them keeps others waiting."""

from __future__ import annotations

import json
from types import SimpleNamespace

import msgspec
import pytest
from engine_models import opened, write_text_model
from http_server import asking
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.api import large_json
from mer.api.http import large_bodies
from mer.api.http.errors import ApiError
from mer.api.http.large_bodies import decode_body
from mer.api.http.schemas import ChatCompletionRequest, decode
from mer.api.large_json import MOST_IN_ONE, PIECE, TooLargeError

HELLO = [{"role": "user", "content": "Hello"}]
PARTS = [
    "a",
    "\\",
    '\\"',
    "\\\\",
    "\\n",
    "\\u00e9",
    "\\ud83d\\ude42",
    "\\ud83d",
    "\\ude42",
    "é",
    "🙂",
    '"',
    "\n",
    "\\x",
    "[",
    "]",
    "{",
    "}",
    ":",
    ",",
    " ",
    "1",
    "-2.5e3",
    "true",
    "null",
    "nul",
    '"k":',
    '["x",2]',
]
ANY_FLOAT = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | ANY_FLOAT | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def outcome(read, text):
    try:
        return read(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.DecodeError


@pytest.fixture(params=[16, 40])
def pieces(request, monkeypatch):
    monkeypatch.setattr(large_json, "PIECE", request.param)


@pytest.mark.usefixtures("pieces")
@settings(deadline=None, max_examples=60)
@given(value=VALUES, ascii=st.booleans(), indent=st.sampled_from([None, 1, 9]))
def test_values_are_those_that_were_written(value, ascii, indent):
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    read = outcome(large_json.decode, text.encode("utf-8", "surrogatepass"))
    assert read == outcome(msgspec.json.decode, text.encode("utf-8", "surrogatepass"))


@pytest.mark.usefixtures("pieces")
@settings(deadline=None, max_examples=150)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=60), quoted=st.booleans())
def test_what_is_no_json_is_none_here_either(parts, quoted):
    text = "".join(parts).encode()
    text = b'["' + text + b'"]' if quoted else text
    assert outcome(large_json.decode, text) == outcome(msgspec.json.decode, text)


PADDING = {"user": "x" * PIECE}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 0.5, "stop": ["a"], "logit_bias": {"5": 1, "7": -2.5}},
        {"suffix": ""},
        {"suffix": "x"},
        {"max_tokens": 1.5},
        {"max_tokens": 0},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"5": 1000}},
        {"n": True},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "wizard"}]},
        {"unknown": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"guided_json": {"a": [1, None]}},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tool_choice": "sometimes"},
        {"seed": 2**63},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "y": 1}}},
    ],
)
def test_parameters_are_read_and_refused_as_in_small_bodies(more):
    def read(how, body):
        try:
            return how(json.dumps(body).encode(), ChatCompletionRequest)
        except ApiError as error:
            return error.status, error.object

    body = {"messages": HELLO, **more}
    expected = read(decode, {**body, "user": "x"})
    if isinstance(expected, ChatCompletionRequest):
        expected = msgspec.structs.replace(expected, user=PADDING["user"])
    assert read(decode_body, {**body, **PADDING}) == expected


def test_more_values_than_make_sense(monkeypatch):
    few, many = [[]] * (MOST_IN_ONE - 2), [[]] * MOST_IN_ONE
    decode_body(json.dumps({"messages": HELLO, "guided_json": {"enum": few}}).encode(), ChatCompletionRequest)
    with pytest.raises(ApiError, match=f"guided_json: more than {MOST_IN_ONE:,} values") as caught:
        decode_body(
            json.dumps({"messages": HELLO, "guided_json": {"enum": many}}).encode(), ChatCompletionRequest
        )
    assert (caught.value.status, caught.value.code, caught.value.param) == (
        413,
        "body_too_large",
        "guided_json",
    )
    # Long lists by nature; each of their items may have as much as a parameter.
    choices = json.dumps({"messages": HELLO, "guided_choice": ["choice"] * 30_000}).encode()
    assert len(decode_body(choices, ChatCompletionRequest).guided_choice) == 30_000
    with pytest.raises(TooLargeError):
        large_json.decode(json.dumps({"messages": [1, many]}).encode(), ("messages",))
    with pytest.raises(ApiError, match="guided_regex: more than 1,048,576 bytes"):
        decode_body(b'{"messages": [], "guided_regex": "%s"}' % (b"x" * (1 << 20)), ChatCompletionRequest)
    with pytest.raises(RecursionError):
        large_json.decode(b"[" * 100_000)
    monkeypatch.setattr(large_json, "MOST", 900)
    with pytest.raises(ApiError, match="the request's body: more than 900"):
        decode_body(json.dumps({"messages": HELLO * 300, **PADDING}).encode(), ChatCompletionRequest)


async def test_no_call_gets_more_than_a_piece(tmp_path, monkeypatch):
    """Of the decoders that hold Python's lock: texts, arguments of calls, schemas."""
    sizes, whole = [], msgspec.json.decode

    def watched(data, **more):
        sizes.append(len(data))
        return whole(data, **more)

    def loads(data, **more):
        sizes.append(len(data))
        return json.JSONDecoder(**more).decode(data)

    text = 'Zwölf "Boxkämpfer"\n' * 6_000
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": text})}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"description": text}}}
    bodies = [
        {"messages": [{"role": "user", "content": text}]},
        {"messages": [*HELLO, {"role": "assistant", "tool_calls": [call]}]},
        {"messages": HELLO, "tools": [tool], "tool_choice": "none"},
        {"messages": HELLO, "guided_json": json.dumps({"description": text})},
        {"messages": HELLO, "guided_json": {"enum": [text]}},
    ]
    async with (
        opened(write_text_model(tmp_path, chat=True), context=4096) as engine,
        asking(engine) as client,
    ):
        with monkeypatch.context() as patched:
            patched.setattr(msgspec.json, "decode", watched)
            patched.setattr("mer.api.conversation.json", SimpleNamespace(loads=loads))
            answers = [
                await client.post("/v1/chat/completions", json={**body, "max_tokens": 1}) for body in bodies
            ]
        assert all(answer.status_code in (200, 400) for answer in answers), [a.text for a in answers]
        assert any(answer.status_code == 200 for answer in answers)
    assert len(sizes) > 50
    assert max(sizes) < PIECE + 100
    assert large_bodies.PIECE == PIECE
