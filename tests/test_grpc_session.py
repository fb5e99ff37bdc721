"""Session: many requests on one stream, begun, cancelled and their ids used again in any order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from engine_models import gated, write_text_model
from grpc_client import (
    FOREVER,
    asked,
    chat,
    come,
    connected,
    generate,
    refused,
    served,
    slowed,
    text_of,
    until,
)

from mer.api.grpc.errors import Failure
from mer.deploy.session import RefusedError, RoutedSession
from mer.v1 import inference_pb2 as pb
from mer.v1 import inference_pb2_grpc as rpc

PROMPTS = ["The old man", "the sea", "Hello", "é漢字"]
CANCEL = pb.Cancel()
# For which the front finds no engine, or fails itself.
LOST, WRONG = "lost", "wrong"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("session") / "tiny", chat=True)


def begin(id: str, request: pb.GenerateRequest | pb.ChatRequest) -> pb.SessionRequest:
    if isinstance(request, pb.ChatRequest):
        return pb.SessionRequest(id=id, chat=request)
    return pb.SessionRequest(id=id, generate=request)


class Front(rpc.InferenceServicer):
    """As that of a cluster: each request of a session is asked for itself."""

    def __init__(self, stub: rpc.InferenceAsyncStub) -> None:
        self._stub = stub

    async def Session(self, requests, context):  # noqa: N802
        session = RoutedSession(self._ask)
        async with aclosing(session.responses((each, 0) async for each in requests)) as responses:
            async for response in responses:
                yield response

    async def Generate(self, request, context):  # noqa: N802
        async for response in self._stub.Generate(request):
            yield response

    async def Chat(self, request, context):  # noqa: N802
        async for response in self._stub.Chat(request):
            yield response

    async def _ask(self, request):
        if request.generate.text == LOST:
            raise RefusedError(Failure(grpc.StatusCode.UNAVAILABLE, "the engine was lost", "ENGINE_LOST"))
        if request.generate.text == WRONG:
            raise ValueError("a secret")
        call = self._stub.Session(iter([request]))
        try:
            async for response in call:
                yield response
        finally:
            call.cancel()


@asynccontextmanager
async def routed(model: Path, **engine) -> AsyncIterator[tuple]:
    """As `served`; the stub is of a Front before the server."""
    async with served(model, **engine) as (stub, opened, server):
        front = grpc.aio.server()
        rpc.add_InferenceServicer_to_server(Front(stub), front)
        port = front.add_insecure_port("127.0.0.1:0")
        await front.start()
        try:
            async with connected(port) as before:
                yield before, opened, server
        finally:
            await front.stop(0)


EITHER = pytest.mark.parametrize("serving", [served, routed])


class Reader:
    """Everything that a session answered, by id: text so far, and how each request with this id ended."""

    def __init__(self, call) -> None:
        self.texts: dict[str, str] = {}
        self.ends: dict[str, list[tuple[str, pb.Final | pb.Error]]] = {}
        self.order: list[str] = []
        self._task = asyncio.create_task(self._read(call))

    async def _read(self, call) -> None:
        async for response in call:
            id, kind = response.id, response.WhichOneof("response")
            self.order.append(id)
            if kind == "error":
                self.ends.setdefault(id, []).append((self.texts.pop(id, ""), response.error))
                continue
            piece = getattr(response, kind)
            self.texts[id] = self.texts.get(id, "") + (piece.text if kind == "generate" else piece.content)
            if piece.HasField("final"):
                self.ends.setdefault(id, []).append((self.texts.pop(id), piece.final))

    async def ended(self, id: str, times: int = 1) -> tuple[str, pb.Final | pb.Error]:
        await until(lambda: len(self.ends.get(id, ())) >= times or self._task.done(), f"{id} ends")
        return self.ends[id][times - 1]

    async def end(self) -> None:
        """Until the stream has ended."""
        await self._task


@EITHER
async def test_requests_run_side_by_side(model, serving):
    """Text by text what each would get by itself; their pieces are mixed."""
    async with serving(model) as (stub, engine, _):
        requests = {f"g{i}": generate(text) for i, text in enumerate(PROMPTS)}
        requests |= {f"c{i}": chat(text) for i, text in enumerate(PROMPTS)}
        alone = {}
        for id, request in requests.items():
            call = stub.Generate(request) if id[0] == "g" else stub.Chat(request)
            alone[id] = "".join([piece.text if id[0] == "g" else piece.content async for piece in call])
        with gated() as go:
            call = stub.Session()
            reader = Reader(call)
            for id, request in requests.items():
                await call.write(begin(id, request))
            await call.done_writing()
            await until(lambda: come(engine) == len(requests), "all are there")
            go.set()
            await reader.end()
        assert {id: ends[0][0] for id, ends in reader.ends.items()} == alone
        assert all(ends[0][1].usage.completion_tokens == 12 for ends in reader.ends.values())
        assert len(set(reader.order[: len(requests)])) > 1, "one after the other"
        assert await call.code() == grpc.StatusCode.OK


@EITHER
@pytest.mark.parametrize("seed", range(4))
async def test_any_order_of_messages(model, serving, seed):
    """Begun, cancelled and used again at random: nothing is lost, mixed up or held."""
    rng = random.Random(seed)
    params = pb.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    async with serving(model) as (stub, _, _):
        whole = {text: await text_of(stub.Generate(generate(text, params))) for text in PROMPTS}
        with slowed(0.001):
            call = stub.Session()
            reader = Reader(call)
            begun: dict[str, list[str]] = {}
            for _ in range(60):
                id = rng.choice("abcdefgh")
                running = len(begun.get(id, ())) > len(reader.ends.get(id, ()))
                if running and rng.random() < 0.6:
                    await call.write(pb.SessionRequest(id=id, cancel=CANCEL))
                    if rng.random() < 0.5:
                        await reader.ended(id, len(begun[id]))
                elif not running:
                    text = rng.choice(PROMPTS)
                    begun.setdefault(id, []).append(text)
                    await call.write(begin(id, generate(text, params)))
                await asyncio.sleep(rng.choice([0, 0, 0.005]))
            await call.done_writing()
            await reader.end()
        assert {id: len(ends) for id, ends in reader.ends.items()} == {
            id: len(texts) for id, texts in begun.items()
        }
        cancelled = 0
        for id, texts in begun.items():
            for text, (got, end) in zip(texts, reader.ends[id], strict=True):
                if isinstance(end, pb.Error):
                    assert (end.code, end.reason) == (grpc.StatusCode.CANCELLED.value[0], "CANCELLED")
                    assert whole[text].startswith(got)
                    cancelled += 1
                else:
                    assert got == whole[text]
        assert cancelled


@EITHER
async def test_cancel_ends_a_request_and_no_other(model, serving):
    async with serving(model) as (stub, engine, _):
        with slowed(0.005):
            call = stub.Session()
            reader = Reader(call)
            await call.write(begin("long", generate("Hello", FOREVER)))
            await call.write(begin("short", generate("the sea")))
            await until(lambda: "long" in reader.texts, "the first piece")
            await call.write(pb.SessionRequest(id="long", cancel=CANCEL))
            await call.write(pb.SessionRequest(id="long", cancel=CANCEL))
            await call.write(pb.SessionRequest(id="nobody", cancel=CANCEL))
            _, error = await reader.ended("long")
            assert error.reason == "CANCELLED"
            await until(lambda: asked(engine) <= 1, "the request is gone from the engine")
            _, final = await reader.ended("short")
            assert final.usage.completion_tokens == 12
            await call.write(begin("long", generate("the sea")))  # the id is free again
            assert (await reader.ended("long", 2))[1].usage.completion_tokens == 12
            await call.done_writing()
            await reader.end()
        assert set(reader.ends) == {"long", "short"}


@EITHER
@pytest.mark.parametrize(
    ("message", "field", "code"),
    [
        (begin("bad", generate("x", pb.SamplingParams(top_p=2))), "params.top_p", "INVALID_ARGUMENT"),
        (begin("bad", pb.GenerateRequest()), "prompt", "INVALID_ARGUMENT"),
        (begin("bad", pb.ChatRequest()), "messages", "INVALID_ARGUMENT"),
        (begin("", generate("x")), "id", "INVALID_ARGUMENT"),
        (begin("x" * 129, generate("x")), "id", "INVALID_ARGUMENT"),
        (pb.SessionRequest(id="bad"), "request", "INVALID_ARGUMENT"),
        (begin("good", generate("x")), "id", "ALREADY_EXISTS"),
    ],
)
async def test_what_is_refused_harms_no_other(model, serving, message, field, code):
    async with serving(model) as (stub, _, _):
        expected = await text_of(stub.Generate(generate("the sea")))
        with gated() as go:  # the good one is there until the other was refused
            call = stub.Session()
            reader = Reader(call)
            await call.write(begin("good", generate("the sea")))
            await call.write(message)
            await call.done_writing()
            await until(lambda: reader.ends, "it is refused")
            go.set()
            await reader.end()
        errors = [end for ends in reader.ends.values() for _, end in ends if isinstance(end, pb.Error)]
        assert [(error.field, error.code) for error in errors] == [
            (field, getattr(grpc.StatusCode, code).value[0])
        ]
        finals = [end for _, end in reader.ends["good"] if isinstance(end, pb.Final)]
        assert [final.usage.completion_tokens for final in finals] == [12]
        if code != "ALREADY_EXISTS":
            assert reader.ends["good"][0][0] == expected


async def test_what_is_no_message_ends_the_session(model):
    async with served(model) as (_, engine, server):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = channel.stream_stream("/mer.v1.Inference/Session")()
            await call.write(begin("a", generate("Hello", FOREVER)).SerializeToString())
            await until(lambda: asked(engine), "it has begun")
            await call.write(b"\xff\xff\xff")
            error = await refused(call)
        assert error.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "mer.v1.SessionRequest" in error.message
        await until(lambda: not asked(engine), "its requests are gone")


@EITHER
async def test_who_leaves_ends_all_of_them(model, serving):
    async with serving(model) as (stub, engine, _):
        with slowed(0.005):
            call = stub.Session()
            for i in range(5):
                await call.write(begin(str(i), generate("Hello", FOREVER)))
            await until(lambda: asked(engine) == 5, "all have begun")
            call.cancel()
            await until(lambda: not asked(engine), "all are gone")


async def test_who_does_not_read_holds_up_nobody_else(model):
    """The requests of the sleeper wait; another client's go on, and the sleeper gets all in the end."""
    params = pb.SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, logprobs=20)
    async with served(model) as (stub, engine, server):
        # A channel of its own with the smallest window: what nobody reads must wait at the server.
        options = {"grpc.http2.lookahead_bytes": 1024, "grpc.http2.bdp_probe": 0}
        async with connected(server.port, **options) as sleeper:
            call = sleeper.Session()
            await call.write(begin("big", generate("Hello", params)))
            await call.done_writing()
            for _ in range(3):
                assert len(await text_of(stub.Generate(generate("the sea"))))
            await until(lambda: engine.snapshot().waiting == 1, "the engine waits for the sleeper")
            assert engine.snapshot().running == 0
            reader = Reader(call)
            await reader.end()
        assert (await reader.ended("big"))[1].usage.completion_tokens == 400


async def test_a_server_that_stops_ends_sessions_when_they_are_idle(model):
    async with served(model) as (stub, engine, server):
        with gated() as go:
            call = stub.Session()
            await call.write(begin("a", generate("the sea")))
            await until(lambda: asked(engine) == 1, "it has begun")
            stopping = asyncio.create_task(server.stop(600))
            await asyncio.sleep(0)
            go.set()
            error, texts = None, []
            try:
                async for response in call:
                    texts.append(response.generate.text)
                    final = response.generate.final
            except grpc.aio.AioRpcError as raised:
                error = raised
        assert final.usage.completion_tokens == 12
        assert error is not None
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        await stopping


async def test_a_request_without_an_engine_harms_no_other(model):
    async with routed(model) as (stub, _, _):
        call = stub.Session()
        reader = Reader(call)
        for id, text in {"a": LOST, "b": "the sea", "c": WRONG}.items():
            await call.write(begin(id, generate(text)))
        await call.done_writing()
        await reader.end()
    errors = {id: ends[0][1] for id, ends in reader.ends.items()}
    assert errors.pop("b").usage.completion_tokens == 12
    assert {id: (error.code, error.reason) for id, error in errors.items()} == {
        "a": (grpc.StatusCode.UNAVAILABLE.value[0], "ENGINE_LOST"),
        "c": (grpc.StatusCode.INTERNAL.value[0], "INTERNAL_ERROR"),
    }
    assert "secret" not in errors["c"].message
