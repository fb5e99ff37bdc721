"""Long lists of token ids: read as `json` reads them, refused as short ones are, and nobody waits."""

from __future__ import annotations

import json
import random

import msgspec
import pytest
from engine_models import opened, write_text_model
from http_server import asking

from mer.api.http import long_lists
from mer.api.http.errors import ApiError
from mer.api.http.large_bodies import decode_body
from mer.api.http.long_lists import PIECE, decode_large
from mer.api.http.schemas import CompletionRequest, DetokenizeRequest, decode, prompts
from mer.model.chat import ChatTemplate

MANY = 10**9


def read(body: str, most: int = MANY) -> CompletionRequest:
    return decode_large(body.encode(), CompletionRequest, "prompt", most)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n ", " :\t")])
def test_as_json_reads_them(separators):
    draw = random.Random(1)
    for shape in (
        [draw.randrange(150_000) for _ in range(40_000)],
        [[draw.randrange(150_000) for _ in range(draw.randrange(9_000))] for _ in range(30)],
    ):
        given = {"user": 'say "prompt": [1, 2]', "prompt": shape, "max_tokens": 3}
        text = json.dumps(given, separators=separators)
        assert len(text) > 2 * PIECE
        body = read(text)
        assert (body.prompt, body.max_tokens, body.user) == (shape, 3, given["user"])
    # Inside of a text it is text; where something else has the name, that is left to `decode`.
    inside = json.dumps({"user": json.dumps({"prompt": [1] * 80_000}), "prompt": "x"})
    assert read(inside).prompt == "x"
    nested = json.dumps({"guided_json": {"prompt": [12345] * 15_000}, "prompt": "x" * 80_000})
    assert read(nested).prompt == "x" * 80_000
    assert len(read(nested).guided_json["prompt"]) == 15_000


def test_refused_as_short_ones_are():
    long = "1," * 40_000
    for bad in (f"[{long}]", f"[,{long}1]", f"[{long},1]", f"[{long}1 1]", f"[[{long}1],,[1]]", f"[{long}1]]",
                f"[[{long}1][1]]", f"[[{long}1],1]", f"[[{long}1]", f"[[[{long}1]]]"):  # fmt: skip
        body = f'{{"prompt": {bad}}}'
        with pytest.raises(ApiError) as caught:
            read(body)
        with pytest.raises(ApiError):
            prompts(decode(body.encode(), CompletionRequest).prompt, "prompt", 128)
        assert caught.value.status in (400, 413), bad  # 413: looked at as anything else
    for bad in (f"[{long}2147483648]", f"[{long}-1]", f"[{long}1.5]", f'[{long}"x"]', f"[[{long}-1]]"):
        with pytest.raises(ApiError) as caught:
            prompts(read(f'{{"prompt": {bad}}}').prompt, "prompt", 128)
        assert caught.value.status in (400, 413)
        assert caught.value.param.startswith("prompt"), bad
    with pytest.raises(ApiError, match="40001 tokens; 100 is the most") as caught:
        read(f'{{"prompt": [{long}1]}}', 100)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(ApiError, match="unknown parameter: 'x'"):
        read(f'{{"prompt": [{long}1], "x": 1}}')
    edge = "1" + ",1" * (PIECE // 2)  # the first piece ends where the comma is
    for tail in ",", ",1,":
        with pytest.raises(ApiError):
            read(f'{{"prompt": [{edge}{tail}]}}')
    assert decode_large(f'{{"tokens": [{edge}]}}'.encode(), DetokenizeRequest, "tokens", MANY).tokens[-1] == 1


async def test_no_piece_holds_up_others(tmp_path, monkeypatch):
    """Python's lock is held while one is decoded: none is long, however long the list."""
    sizes, whole = [], msgspec.json.decode

    def watched(data, **more):
        sizes.append(len(data))
        return whole(data, **more)

    body = json.dumps({"prompt": [[7] * 500] * 100, "max_tokens": 1}).replace(" ", "").encode()
    too_long = json.dumps({"prompt": [7] * 4_000_000}).replace(" ", "").encode()
    headers = {"Content-Type": "application/json"}
    async with opened(write_text_model(tmp_path), context=4096) as engine, asking(engine) as client:
        with monkeypatch.context() as patched:
            patched.setattr(msgspec.json, "decode", watched)
            served = await client.post("/v1/completions", content=body, headers=headers)
            answer = await client.post("/v1/completions", content=too_long, headers=headers)
        assert served.json()["usage"]["prompt_tokens"] == 50_000
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "4000000 tokens" in answer.json()["error"]["message"]
    assert len(sizes) >= 100
    assert max(sizes) < PIECE + 100


@pytest.mark.parametrize("before", [0, PIECE - 8, PIECE - 4, PIECE - 1, PIECE, 3 * PIECE - 3, 3 * PIECE + 5])
def test_what_stands_across_two_pieces(before):
    key, spaces = b'"prompt"', b" " * (2 * PIECE)
    body = b"x" * before + key + spaces
    assert long_lists._next(body, key, 0) == before
    assert long_lists._next(body, key, before) == before
    assert long_lists._next(body, key, before + 1) == -1
    assert long_lists._count(body, b" ", before, len(body)) == 2 * PIECE
    assert long_lists._stripped(body, 0, len(body)) == before + len(key)
    assert long_lists._stripped(spaces, 0, len(spaces)) == 0


async def test_more_messages_than_tokens(tmp_path):
    """Refused before they are read: each is a token at least."""
    many = [{"role": "user", "content": "x" * 150}] * 9000
    async with (
        opened(write_text_model(tmp_path, chat=True), context=4096) as engine,
        asking(engine) as client,
    ):
        bodies = {
            "/v1/chat/completions": {"messages": many},
            "/v1/messages": {"messages": many, "model": "small", "max_tokens": 1},
            "/v1/responses": {"input": many},
            "/tokenize": {"messages": many},
        }
        for path, body in bodies.items():
            answer = await client.post(path, json=body)
            assert answer.status_code == 400
            assert "9000 messages; 512 tokens" in answer.json()["error"]["message"], path
        some = {"messages": many[:500], "max_tokens": 1}
        assert len(json.dumps(some)) > PIECE
        assert "is the most here" in (await client.post("/v1/chat/completions", json=some)).text


async def test_more_text_than_tokens(tmp_path, monkeypatch):
    """No template gets to see it: to cut or copy it takes milliseconds with Python's lock held."""

    def render(*_args, **_more):
        raise AssertionError("rendered")

    monkeypatch.setattr(ChatTemplate, "render", render)
    whole, much = "word " * 1_100_000, "word " * 300_000
    async with (
        opened(write_text_model(tmp_path, chat=True), context=4096) as engine,
        asking(engine) as client,
    ):
        for text, says in (
            (whole, "the conversation has 5,5"),
            (much, "more than 1,048,576 bytes in one text"),
        ):
            bodies = {
                "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
                "/v1/messages": {
                    "messages": [{"role": "user", "content": text}], "model": "small", "max_tokens": 1
                },
                "/v1/responses": {"input": text},
                "/tokenize": {"messages": [{"role": "user", "content": text}]},
            }  # fmt: skip
            for path, body in bodies.items():
                answer = await client.post(path, json=body)
                assert answer.status_code == 400, path
                assert says in answer.json()["error"]["message"], path
                assert "512 tokens are the most here" in answer.json()["error"]["message"], path
        answer = await client.post("/v1/completions", json={"prompt": ["x", much]})
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert answer.json()["error"]["param"] == "prompt"
        chunks = (b"x" * 70_000 for _ in range(100))  # of a body that does not say its length
        headers = {"Content-Type": "application/json"}
        answer = await client.post("/v1/chat/completions", content=aiter_of(chunks), headers=headers)
        assert "the conversation has 7,000,000 bytes" in answer.json()["error"]["message"]


async def aiter_of(items):
    for item in items:
        yield item


def test_many_biases():
    """Converted some at a time, and refused as few are."""
    given = {str(i): i % 200 - 100 for i in range(20_000)}
    body = json.dumps({"prompt": "x", "logit_bias": given}).encode()
    assert len(body) > PIECE
    assert decode_body(body, CompletionRequest).logit_bias == json.loads(
        json.dumps(given), object_pairs_hook=lambda pairs: {int(key): value for key, value in pairs}
    )
    for bad in {"x": 1}, {"30000": 101}, {"-1": 0}, {"5": "x"}:
        few = json.dumps({"prompt": "x", "logit_bias": bad}).encode()
        many = json.dumps({"prompt": "x", "logit_bias": given | bad}).encode()
        with pytest.raises(ApiError) as expected:
            decode(few, CompletionRequest)
        with pytest.raises(ApiError) as caught:
            decode_body(many, CompletionRequest)
        assert (str(caught.value), caught.value.param) == (str(expected.value), expected.value.param)
