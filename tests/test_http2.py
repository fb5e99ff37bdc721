"""Many requests on one HTTP/2 connection: what is wrong with one is not the others' matter."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from engine_models import opened, write_text_model
from http2_client import PATH, Client
from http_server import PATIENCE, asking, serving

from mer.api.http import server as http_server

KEY = {"authorization": "Bearer secret"}
STREAM = {"prompt": "The", "max_tokens": 200, "ignore_eos": True, "temperature": 0, "stream": True}
SHORT = STREAM | {"stream": False, "max_tokens": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("http2") / "small"
    return write_text_model(path, max_position_embeddings=1 << 17)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("me secret\n")
    with serving(model, "--api-key-file", keys) as server:
        yield server
    assert "Traceback" not in "".join(server.lines)


@pytest.fixture
def client(server):
    client = Client(server.port)
    with client.socket:
        yield client


def begin(client, **asked):
    """A stream of which something has come."""
    stream = client.ask(**KEY)
    client.data(stream, json.dumps(STREAM | asked).encode())
    client.read_until(lambda: client.body[stream])
    return stream


def check(client, stream):
    """It comes to its end, and another request gets its answer."""
    assert client.answer(stream)[1].endswith(b"data: [DONE]\n\n")
    again = client.ask(**KEY)
    client.data(again, json.dumps(SHORT).encode())
    assert client.answer(again)[0] == "200"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (PATH, {"authorization": "Bearer wrong"}, "401"),
        ("/v1/nothing", KEY, "404"),
        (PATH, KEY | {"content-length": str(1 << 40)}, "413"),
        ("/\xe9", KEY, "400"),
        (PATH, KEY | {":method": "P\xd6ST"}, "400"),
        (None, {":method": "CONNECT", ":scheme": None}, "400"),
        ("/live", {":method": "CONNECT", ":protocol": "websocket"}, "400"),
    ],
)
def test_the_body_of_a_refused_request_ends_no_other(client, path, headers, status):
    stream = begin(client)
    refused = client.ask(path=path, **headers)
    assert client.answer(refused)[0] == status
    for _ in range(3):
        client.data(refused, b"x" * 1000, end=False)
    check(client, stream)


def test_more_requests_than_hypercorn_counts(client):
    """At the thousandth it used to drop what it was answering."""
    live = client.ask("GET", "/live", end=True, accept="text/event-stream", **KEY)
    for _ in range(1100):
        assert client.answer(client.ask("GET", "/health", end=True))[0] == "200"
    size = len(client.body[live])
    client.read_until(lambda: len(client.body[live]) > size)


def test_priorities_end_nothing(client):
    """There are none any more (RFC 9113), but clients that tell them."""
    stream = begin(client)
    for i in range(1100):
        client.http.prioritize(2 * i + 1001, weight=10, depends_on=2 * i + 999)
    client.send()
    check(client, stream)


async def test_who_takes_no_more_of_an_answer_pauses_it(model):
    """And none but it; when there is room again it goes on."""
    async with opened(model, context=1 << 13) as engine, asking(engine) as http:
        client = Client(http.base_url.port, 1000)
        with client.socket:
            slow = await asyncio.to_thread(begin, client, max_tokens=4000, logprobs=5)
            async with asyncio.timeout(PATIENCE):
                computed = -1.0
                while computed != engine.stats.step_s or not engine._scheduler.paused:
                    computed = engine.stats.step_s
                    assert engine.snapshot().running + engine.snapshot().waiting, "it was computed to its end"
                    await asyncio.sleep(0.3)
            other = client.ask()
            client.data(other, json.dumps(SHORT).encode())
            assert (await asyncio.to_thread(client.answer, other))[0] == "200"
            for window in slow, None:
                client.http.increment_flow_control_window(1 << 24, window)
            client.send()
            answer = await asyncio.to_thread(client.answer, slow)
            assert answer[1].count(b'"text"') > 1000
            assert answer[1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("used", [False, True])
async def test_connections_without_requests_are_closed(model, monkeypatch, used):
    """Those that never had one, and those whose only one was taken back."""
    monkeypatch.setattr(http_server, "_IDLE", 1.0)
    async with opened(model, context=1 << 17) as engine, asking(engine) as http:
        client = Client(http.base_url.port)
        with client.socket:
            if used:
                stream = await asyncio.to_thread(begin, client, max_tokens=100_000)
                client.http.reset_stream(stream)
                client.send()
            with pytest.raises((AssertionError, ConnectionError), match=r"closed|reset"):
                await asyncio.to_thread(client.read_until, lambda: False)


async def test_nothing_is_left_of_who_goes_without_taking_a_refusal(model):
    async with opened(model) as engine, asking(engine) as http:
        await http.get("/health")
        before = len(os.listdir("/proc/self/fd"))
        client = Client(http.base_url.port, 0)
        with client.socket:
            refused = client.ask(**{"content-length": str(1 << 40)})
            await asyncio.to_thread(client.read_until, lambda: refused in client.status)
        async with asyncio.timeout(PATIENCE):
            while len(os.listdir("/proc/self/fd")) > before:  # noqa: ASYNC110 (there is nothing to wait for)
                await asyncio.sleep(0.01)
