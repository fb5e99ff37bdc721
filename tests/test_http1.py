"""HTTP/1.1 as it is on the wire, beyond what clients of our own send."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest
from engine_models import opened, write_text_model
from http_server import PATIENCE, asking

TEXT = "/v1/completions"
SHORT = {"prompt": "The", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("http1") / "small", max_position_embeddings=1 << 17)


def request(target=TEXT, method="POST", body=b"", **headers):
    told = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(body)} | headers
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items()), "", ""]
    return "\r\n".join(lines).encode() + body


async def answer(http, data):
    """The whole connection's: it is for one request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
    writer.write(data)
    async with asyncio.timeout(PATIENCE):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body


async def test_targets(model, caplog):
    """With the server's name in front they are the same paths; what is none is refused."""
    async with opened(model) as engine, asking(engine, api_keys={"k": "key"}) as http:
        for target, status in (
            ("http://localhost/health", 200),
            ("http://localhost", 200),
            ("http://localhost/v1/models", 401),
            ("?x", 400),
            ("http://[/x", 400),
            ("localhost:80", 401),
            ("*", 401),
        ):
            got, body = await answer(http, request(target, "GET", Connection="close"))
            assert got == status, target
            assert status == 200 or json.loads(body)["error"]["message"]
    assert "Traceback" not in caplog.text


async def test_head_of_a_stream_ends(model):
    async with opened(model) as engine, asking(engine) as http:
        data = request("/live", "HEAD", Accept="text/event-stream", Connection="close")
        assert await answer(http, data) == (200, b"")


async def test_bodies_that_are_compressed_are_refused_by_name(model):
    body = gzip.compress(json.dumps(SHORT).encode())
    async with opened(model) as engine, asking(engine) as http:
        told = {"Content-Encoding": "gzip", "Connection": "close"}
        got, said = await answer(http, request(body=body, **told))
        assert (got, "Content-Encoding: gzip" in json.loads(said)["error"]["message"]) == (415, True)
        body = json.dumps(SHORT).encode()
        got, _ = await answer(http, request(body=body, **told | {"Content-Encoding": "identity"}))
        assert got == 200


@pytest.mark.parametrize("behind", [b"", b"\r\n", request("/health", "GET")])
async def test_who_goes_is_missed_whatever_stands_behind_the_request(model, behind):
    """Nothing reads what comes next until there is an answer, but its end is seen."""
    endless = json.dumps(SHORT | {"max_tokens": 100_000, "ignore_eos": True}).encode()
    async with opened(model, context=1 << 17) as engine, asking(engine) as http, asyncio.timeout(PATIENCE):
        _, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
        writer.write(request(body=endless) + behind)
        while not engine.snapshot().running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        writer.close()
        while engine.snapshot().running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_many_requests_at_once_are_answered_in_their_order(model):
    """More of them than are read ahead."""
    async with opened(model) as engine, asking(engine) as http:
        short = request(body=json.dumps(SHORT).encode())
        unknown = request("/v1/nothing", body=b"x" * 20_000)
        data = (short + unknown) * 10 + request("/health", "GET", Connection="close")
        reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
        writer.write(data)
        async with asyncio.timeout(PATIENCE):
            said = await reader.read()
        writer.close()
        found = [int(each.split()[0]) for each in said.split(b"HTTP/1.1 ")[1:]]
        assert found == [200, 404] * 10 + [200]


async def test_wishes_for_another_protocol_are_not_heard(model, caplog):
    """The answer is that of HTTP/1.1, and the connection ends when it says so."""
    async with opened(model) as engine, asking(engine) as http:
        for wish in "websocket", "h2c":
            told = {"Upgrade": wish, "Connection": "Upgrade, close", "HTTP2-Settings": "A"}
            got, body = await answer(http, request("/v1/models", "GET", **told))
            assert (got, json.loads(body)["object"]) == (200, "list")
    assert "Traceback" not in caplog.text
