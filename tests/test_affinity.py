"""Which engine a request goes to, and how many there should be: pure logic of mer/deploy."""

from __future__ import annotations

import json

import pytest

from mer.deploy.affinity import PIECE, Affinity, beginnings, prompt_of, text_of
from mer.deploy.waiting import WINDOW, QueueTimes, wanted_engines
from mer.v1 import inference_pb2 as pb


def chat(*contents: str, **more: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": each} for each in contents], **more}).encode()


def common(a: bytes, b: bytes) -> int:
    """Pieces that two bodies begin with alike."""
    count = 0
    for one, other in zip(beginnings(text_of(a)), beginnings(text_of(b)), strict=False):
        if one != other:
            break
        count += 1
    return count


def test_the_same_beginning_has_the_same_keys():
    long = "x" * PIECE * 4
    assert common(chat(long, "one"), chat(long, "another")) == 4
    assert common(chat(long, "a"), chat(long, "a", "b", "c")) == 4
    assert common(chat(long, temperature=0), chat(long, temperature=1, model="m")) == 0, "of another model"
    assert common(chat(long, temperature=0), chat(long, temperature=1, max_tokens=5)) == 4
    assert common(chat("y" + long), chat("z" + long)) == 0
    assert common(json.dumps({"prompt": long}).encode(), json.dumps({"prompt": long + "z"}).encode()) == 4
    ids = list(range(2000))
    assert common(json.dumps({"prompt": ids}).encode(), json.dumps({"prompt": [*ids, 7]}).encode()) > 4


def test_requests_of_grpc():
    """The same prompt begins alike, asked by itself or in a session; of another model it does not."""
    text = pb.GenerateRequest(text="x" * 1000)
    assert prompt_of(text) == b"x" * 1000
    assert prompt_of(pb.SessionRequest(id="a", generate=text)) == prompt_of(text)
    assert prompt_of(pb.GenerateRequest(text="x", model="m")) != prompt_of(pb.GenerateRequest(text="x"))
    chat = pb.ChatRequest(messages=[pb.Message(role="user", content="y" * 1000)])
    longer = pb.ChatRequest(messages=[*chat.messages, pb.Message(role="user", content="z")])
    assert prompt_of(longer).startswith(prompt_of(chat))
    assert len(prompt_of(chat)) > 1000
    assert prompt_of(pb.SessionRequest(id="b", chat=chat)) == prompt_of(chat)
    assert prompt_of(pb.TokenizeRequest(text="x")) == b""


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"3", chat("short"), b'{"prompt": ""}'])
def test_what_has_no_beginning(body):
    assert beginnings(text_of(body)) == []


def test_a_large_body_is_taken_as_it_is():
    long = chat("x" * 3_000_000)
    assert common(long, chat("x" * 3_000_000, "y")) == len(beginnings(text_of(long))) > 100


def test_who_knows_the_beginning_comes_first_unless_it_has_much_more_to_do():
    affinity = Affinity(slack=3)
    short, long = [b"1"], [b"1", b"2", b"3"]
    assert affinity.order(long, {"a": 1, "b": 0, "c": 2}) == ["b", "a", "c"]
    affinity.sent(short, "a")
    affinity.sent([b"1", b"2"], "c")
    assert affinity.order([b"1", b"9"], {"a": 0, "b": 0, "c": 0})[0] == "c", "it was the last one"
    affinity.sent(short, "a")
    loads = {"a": 2, "b": 0, "c": 2}
    assert affinity.order(long, loads) == ["c", "b", "a"], "two pieces are more than one"
    assert affinity.order(short, loads) == ["a", "b", "c"]
    assert affinity.order(long, {"a": 2, "b": 0, "c": 3}) == ["b", "a", "c"]
    assert affinity.order(long, {"a": 2, "b": 0}) == ["a", "b"]
    affinity.gone("a")
    assert affinity.order(short, loads) == ["b", "a", "c"]
    assert affinity.order([], {}) == []


def test_little_is_remembered():
    affinity = Affinity(remembered=3)
    for number in range(5):
        affinity.sent([bytes([number])], "b")
    loads = {"a": 0, "b": 1}
    assert [affinity.order([bytes([each])], loads)[0] for each in range(5)] == ["a", "a", "b", "b", "b"]


def test_how_long_requests_wait():
    now = 100.0
    times = QueueTimes(lambda: now)
    now = 110.0
    assert times.worst(0) == 0
    now = 113.0
    assert times.worst(2) == 3, "nothing has begun since there was nothing to begin"
    times.started(4.0)
    times.started(1.5)
    assert times.worst(1) == 4
    now = 120.0
    assert times.worst(1) == 7
    assert times.worst(0) == 4
    now = 113.0 + WINDOW + 1
    assert times.worst(0) == 0


@pytest.mark.parametrize(
    ("now", "waits", "running", "wanted"),
    [
        (1, [0], [0], 1),
        (1, [2.5], [16], 2),
        (2, [2.5, 0.1], [16, 3], 2),  # the other one has room
        (2, [2.5, 2.1], [16, 16], 3),
        (2, [0.1, 0.1], [10, 2], 1),
        (2, [0.1, 0.1], [10, 3], 2),  # too much for one
        (2, [0.1, 1.5], [1, 1], 2),  # somebody waits
        (3, [0, 0, 0], [8, 8, 8], 2),
        (2, [], [], 2),
    ],
)
def test_how_many_engines(now, waits, running, wanted):
    assert wanted_engines(now, waits, running, target=2, most=16) == wanted
