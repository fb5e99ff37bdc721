"""Clients that go away, that don't read, that ask too much."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket

import pytest
import uvloop
from engine_models import gated, opened, write_text_model
from http_server import PATIENCE, asking

from mer import Engine
from mer.api.http import server
from mer.api.http.app import create_app
from mer.api.http.service import Service
from mer.api.settings import ServerSettings
from mer.engine.runner import Runner
from mer.engine.scheduler import Scheduler
from mer.errors import DeviceReadError

TEXT = "/v1/completions"
ENDLESS = {"prompt": "The", "max_tokens": 100_000, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "The old man", "max_tokens": 8, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("life") / "small"
    return write_text_model(path, chat=True, max_position_embeddings=1 << 17)


class Client:
    """A connection that sends a request and then does what clients do who don't care."""

    def __init__(self, http, body, path=TEXT):
        data = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        head = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""])
        self.request = head.encode() + data
        self.port = http.base_url.port

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def send(self, part=1.0):
        self.writer.write(self.request[: int(part * len(self.request))])
        await self.writer.drain()

    async def __aexit__(self, *_):
        self.writer.transport.abort()  # no farewell: the other side gets a reset


def asked(engine):
    """Requests that are running or wait."""
    state = engine.snapshot()
    return state.running + state.waiting


async def until(condition, seconds=PATIENCE):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (what is waited for happens elsewhere)
            await asyncio.sleep(0.002)


async def idle(engine):
    await until(lambda: not asked(engine))


async def busy(engine, requests=1):
    await until(lambda: asked(engine) >= requests)


@pytest.mark.parametrize("stream", [False, True])
async def test_client_killed_at_any_time(model, stream):
    """Each ends a request that would go on for 100,000 tokens; the other client's answer does not change."""
    async with opened(model, context=1 << 17) as engine, asking(engine) as http:
        other_body = {**SHORT, "max_tokens": 100}
        alone = (await http.post(TEXT, json=other_body)).json()["choices"]
        long = {**ENDLESS, "prompt": [5] * 20_000, "stream": stream}  # many steps of prefill
        for body, part in (
            ({**ENDLESS, "stream": stream}, 0.3),  # in mid-header
            ({**ENDLESS, "stream": stream}, 0.9),  # in mid-body
            ({**ENDLESS, "stream": stream}, 1.0),
            ({**ENDLESS, "stream": stream, "n": 5}, 1.0),
            (long, 1.0),
        ):
            async with Client(http, body) as client:
                await client.send(part)
                if part == 1:
                    await busy(engine, body.get("n", 1))
                    if stream and body is not long:
                        await client.reader.readuntil(b"data: ")
                    other = asyncio.create_task(http.post(TEXT, json=other_body))
                    await busy(engine, body.get("n", 1) + 1)
                else:
                    other = asyncio.create_task(http.post(TEXT, json=other_body))
            await idle(engine)
            assert (await other).json()["choices"] == alone
        await idle(engine)


@pytest.mark.parametrize("turns", range(6))
async def test_a_client_that_goes_with_the_last_byte_of_its_request(model, turns):
    """The end of the body and the end of the connection so close together that one may hide the other."""
    async with opened(model, context=1 << 15) as engine:
        app = create_app(Service(ServerSettings(model_name="small", port=0), engine))
        headers = [(b"host", b"x"), (b"content-type", b"application/json")]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": TEXT}
        scope |= {"raw_path": TEXT.encode(), "query_string": b"", "root_path": "", "headers": headers}
        coming = iter(
            [{"type": "http.request", "body": json.dumps(ENDLESS).encode()}, {"type": "http.disconnect"}]
        )

        async def receive():
            event = next(coming)
            if event["type"] == "http.request":
                await asyncio.sleep(0.05)  # until the handler waits for it
            else:
                for _ in range(turns):
                    await asyncio.sleep(0)
            return event

        async def send(event):
            pass

        serving = asyncio.ensure_future(app(scope | {"extensions": {}}, receive, send))
        done, _ = await asyncio.wait([serving], timeout=PATIENCE)
        serving.cancel()
        assert done, "nobody told the handler"
        await idle(engine)


async def test_the_log_says_who_went_away(model, caplog):
    """Before there was an answer, in the midst of one, and not where it was complete."""
    caplog.set_level(logging.INFO, "mer.access")
    async with opened(model, context=1 << 17) as engine, asking(engine) as http:
        for stream in False, True:
            async with Client(http, {**ENDLESS, "stream": stream}) as client:
                await client.send()
                await busy(engine)
                if stream:
                    await client.reader.readuntil(b"data: ")
            await idle(engine)
            assert (await http.post(TEXT, json={**SHORT, "stream": stream})).status_code == 200
        assert (await http.post(TEXT, json={})).status_code == 400

        def lines():
            return [each.fields for each in caplog.records if each.name == "mer.access"]

        await until(lambda: len(lines()) == 5)
    found = sorted((str(each["status"]), each.get("cancelled", False)) for each in lines())
    assert found == [("200", False), ("200", False), ("200", True), ("400", False), ("None", True)]


async def test_a_farewell_in_order_ends_the_request_as_well(model):
    """Half a close (no more to send) is how some clients say that they are gone."""
    async with (
        opened(model, context=1 << 17) as engine,
        asking(engine) as http,
        Client(http, ENDLESS) as client,
    ):
        await client.send()
        await busy(engine)
        client.writer.write_eof()
        await idle(engine)


@pytest.fixture
def narrow(monkeypatch):
    """The system's own buffers take thousands of tokens, which a busy machine computes for a minute."""
    listen = server._listen

    def narrowly(place):
        made = listen(place)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return made

    monkeypatch.setattr(server, "_listen", narrowly)


async def slow_reader(http, engine):
    """A connection with an answer that waits to be read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", http.base_url.port))
    sock.sendall(Client(http, {**ENDLESS, "stream": True, "logprobs": 20}).request)
    await busy(engine)
    async with asyncio.timeout(PATIENCE):
        computed = -1.0
        while computed != engine.stats.step_s or not engine._scheduler.paused:
            computed = engine.stats.step_s
            await asyncio.sleep(0.3)
    return sock


async def test_slow_reader_waits_and_harms_nobody(model, narrow):
    """Who does not read stops being computed; others go on. When it is gone, everything is free."""
    async with opened(model, context=1 << 17) as engine, asking(engine) as http:
        sock = await slow_reader(http, engine)
        assert asked(engine) == 1, "it is paused, not over"
        assert (await http.post(TEXT, json=SHORT)).status_code == 200
        sock.close()
        await idle(engine)


async def test_the_end_of_a_server_waits_for_nobody(model, narrow, caplog):
    """Neither for who does not read nor for who sends half a request, or nothing over HTTP/2."""
    async with opened(model, context=1 << 17) as engine:
        async with asyncio.timeout(PATIENCE), asking(engine) as http:
            slow = await slow_reader(http, engine)
            half, silent = Client(http, SHORT), Client(http, SHORT)
            silent.request = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
            for client in half, silent:
                await client.__aenter__()
            await half.send(0.9)
            await silent.send()
            await silent.reader.readexactly(9)  # it has been understood
        assert await half.reader.read() == b""
        for client in half, silent:
            client.writer.close()
        slow.close()
        await idle(engine)
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"prompt": [5] * 2000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}]}),
    ],
)
async def test_silence_is_filled_with_comments(model, path, body):
    """While a long prompt is computed, the stream says that it is alive."""
    async with opened(model, context=4096) as engine, asking(engine, keep_alive=0.001) as http:
        answer = await http.post(path, json={**body, "max_tokens": 2, "stream": True})
        assert answer.text.startswith(": keep-alive\n\n"), answer.text[:300]
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_error_while_computing(model, monkeypatch):
    """A read that fails is an error of that request: with its status, or in its stream."""
    async with opened(model) as engine, asking(engine) as http:
        step = Runner.step

        def failing(runner, chunks):
            if any(222 in chunk.sequence.tokens for chunk in chunks):
                raise DeviceReadError("model.safetensors: can't be read at 4096: Input/output error")
            return step(runner, chunks)

        monkeypatch.setattr(Runner, "step", failing)
        good = asyncio.create_task(http.post(TEXT, json={**SHORT, "max_tokens": 50}))
        bad = await http.post(TEXT, json={"prompt": [222], "max_tokens": 5})
        assert (bad.status_code, bad.json()["error"]["code"]) == (500, "read_error")
        assert "Input/output error" in bad.json()["error"]["message"]
        assert (await good).status_code == 200


async def test_an_error_inside_mer_tells_the_client_little(model, monkeypatch, caplog):
    async with opened(model) as engine, asking(engine) as http:
        monkeypatch.setattr(type(engine.tokenizer), "encode", lambda *_, **__: 1 / 0)
        answer = await http.post(TEXT, json=SHORT)
        monkeypatch.undo()
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "division" not in answer.text
        assert "ZeroDivisionError" in caplog.text
        assert answer.headers["x-request-id"] in caplog.text
        assert (await http.post(TEXT, json=SHORT)).status_code == 200


async def test_an_engine_that_stopped_is_not_healthy(model, monkeypatch):
    """Whoever watches the server then starts it anew."""
    async with Engine.open(model, context=512) as engine, asking(engine) as http:
        assert (await http.get("/health")).status_code == 200
        monkeypatch.setattr(Scheduler, "schedule", lambda *_: 1 / 0)
        assert (await http.post(TEXT, json=SHORT)).status_code in (500, 503)
        for probe in ("/health", "/ready"):
            answer = await http.get(probe)
            assert (answer.status_code, answer.json()) == (503, {"status": "failed"})
        refused = await http.post(TEXT, json=SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_failed")
        assert "ZeroDivisionError" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]
        counts = (await http.get("/metrics")).text
        assert 'refused_total{reason="engine_failed"}' in counts
        assert 'refused_total{reason="engine_failed"} 0' not in counts


async def test_full_queue(model):
    """Who finds no room is told when to come again; who has room gets an answer."""
    async with opened(model, max_running=1, max_waiting=2, context=4096) as engine, asking(engine) as http:
        body = {**SHORT, "max_tokens": 200}
        with gated() as go:  # one runs, two wait, the others have come before any of them ends
            tasks = [asyncio.create_task(http.post(TEXT, json=body)) for _ in range(12)]
            await until(lambda: sum(each.done() for each in tasks) == 9)
            go.set()
            answers = await asyncio.gather(*tasks)
        statuses = [answer.status_code for answer in answers]
        assert sorted(statuses) == [200] * 3 + [503] * 9
        for answer in answers:
            if answer.status_code == 503:
                assert answer.json()["error"]["code"] == "overloaded"
                assert int(answer.headers["retry-after"]) >= 1
            else:
                assert answer.json()["choices"] == answers[statuses.index(200)].json()["choices"]
        many = await http.post(TEXT, json={**body, "n": 8})
        assert many.status_code == 503
        await idle(engine)


async def test_keys(model, tmp_path):
    keys = {"secret-1": "ann", "secret-2": "bob"}
    async with opened(model) as engine, asking(engine, api_keys=keys) as http:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer"}, 401),
            ({"Authorization": "Bearer secret-3"}, 401),
            ({"Authorization": "Basic secret-1"}, 401),
            ({"Authorization": "Bearer secret-1x"}, 401),
            ({"Authorization": b"Bearer \xff\xfe"}, 401),
            ({"Authorization": "Bearer secret-1"}, 200),
            ({"authorization": "bearer  secret-2"}, 200),
            ({"X-Api-Key": "secret-2"}, 200),
        ):
            for answer in (
                await http.post(TEXT, json=SHORT, headers=headers),
                await http.get("/v1/models", headers=headers),
                await http.get("/openapi.json", headers=headers),
            ):
                assert answer.status_code == status, headers
                if status == 401:
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                    assert answer.headers["www-authenticate"].startswith("Bearer")
        for probe in ("/health", "/ready"):
            assert (await http.get(probe)).status_code == 200


async def test_rate_and_concurrency_of_a_key(model):
    keys = {"a": "ann", "b": "bob"}

    def of(key):
        return {"Authorization": f"Bearer {key}"}

    async with opened(model, context=1 << 16) as engine:
        async with asking(engine, api_keys=keys, rate_limit=3) as http:
            statuses = [(await http.post(TEXT, json=SHORT, headers=of("a"))).status_code for _ in range(4)]
            assert statuses == [200, 200, 200, 429]
            last = await http.post(TEXT, json=SHORT, headers=of("a"))
            assert 0 < int(last.headers["retry-after"]) <= 20
            assert last.json()["error"]["code"] == "rate_limit_exceeded"
            assert (await http.post(TEXT, json=SHORT, headers=of("b"))).status_code == 200
            assert (await http.get("/v1/models", headers=of("a"))).status_code == 200
        async with asking(engine, api_keys=keys, max_concurrent=1) as http:
            async with http.stream("POST", TEXT, json={**ENDLESS, "stream": True}, headers=of("a")):
                refused = await http.post(TEXT, json=SHORT, headers=of("a"))
                assert refused.status_code == 429
                assert (await http.post(TEXT, json=SHORT, headers=of("b"))).status_code == 200
            await idle(engine)
            async with asyncio.timeout(PATIENCE):  # the end of the connection itself is known a moment later
                while (answer := await http.post(TEXT, json=SHORT, headers=of("a"))).status_code == 429:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert answer.status_code == 200


async def test_cross_origin(model):
    """Nobody's web page may ask, unless it was allowed to."""
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST",
           "Access-Control-Request-Headers": "authorization, content-type"}  # fmt: skip
    async with opened(model) as engine:
        async with asking(engine) as http:
            answer = await http.options(TEXT, headers=ask)
            assert not [name for name in answer.headers if name.startswith("access-control")]
        for origins, allowed in ((("https://page.example",), "https://page.example"), (("*",), "*")):
            async with asking(engine, cors_origins=origins, api_keys={"k": "key"}) as http:
                answer = await http.options(TEXT, headers=ask)
                assert answer.status_code == 204
                assert answer.headers["access-control-allow-origin"] == allowed
                assert "authorization" in answer.headers["access-control-allow-headers"]
                answer = await http.post(TEXT, json=SHORT, headers={"Origin": ask["Origin"]})
                assert answer.status_code == 401
                assert answer.headers["access-control-allow-origin"] == allowed
                if allowed != "*":
                    answer = await http.options(TEXT, headers=ask | {"Origin": "https://other.example"})
                    assert "access-control-allow-origin" not in answer.headers


async def test_request_ids(model):
    async with opened(model) as engine, asking(engine) as http:
        given = await http.get("/v1/models", headers={"X-Request-Id": "abc-123"})
        assert given.headers["x-request-id"] == "abc-123"
        made = [(await http.get("/v1/models")).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        odd = await http.get("/nothing", headers={"X-Request-Id": "a b" * 100})
        assert odd.headers["x-request-id"].startswith("req-")


async def test_connections_that_open_and_die(model):
    """Nothing is left of them at once: neither descriptors nor tasks, whatever they had sent."""
    async with opened(model) as engine, asking(engine) as http:
        await http.get("/health")
        before, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
        for i in range(100):
            async with Client(http, {**SHORT, "stream": bool(i % 2)}) as client:
                await client.send((0, 0.3, 0.9, 1)[i % 4])
        await idle(engine)
        await until(
            lambda: len(os.listdir("/proc/self/fd")) <= before, server._IDLE / 2
        )  # none is kept as idle
        await until(lambda: len(asyncio.all_tasks()) <= tasks)


def test_under_uvloop(model):
    """Answers, streams, a client that goes away, a body that is too large, the end: all under its loop."""

    async def use():
        assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
        async with opened(model, context=1 << 16) as engine, asking(engine, max_body=1 << 20) as http:
            expected = (await http.post(TEXT, json=SHORT)).json()["choices"]
            answers = await asyncio.gather(*(http.post(TEXT, json=SHORT) for _ in range(12)))
            assert [each.json()["choices"] for each in answers] == [expected] * 12
            text = ""
            async with http.stream("POST", TEXT, json={**SHORT, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
            assert text == expected[0]["text"]
            async with Client(http, {**ENDLESS, "stream": True}) as client:
                await client.send()
                await client.reader.readuntil(b"data: ")
            await idle(engine)
            assert (await http.post(TEXT, json={"prompt": "x" * (1 << 20)})).status_code == 413

    uvloop.run(use())
