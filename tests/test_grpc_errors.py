"""What a gRPC client is told when its request can't be served, and that nothing is held for it then."""

from __future__ import annotations

import asyncio
import errno
import random
import socket

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
    pieces,
    refused,
    served,
    slowed,
    text_of,
    until,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mer import Engine
from mer.api.grpc import server as grpc_server
from mer.api.grpc.errors import Failure
from mer.api.grpc.server import serve_grpc
from mer.api.settings import ServerSettings
from mer.engine.scheduler import Scheduler
from mer.errors import (
    ConfigError,
    DeviceReadError,
    EngineClosedError,
    EngineFailedError,
    FilesChangedError,
    QueueFullError,
    RequestError,
)
from mer.v1 import inference_pb2 as pb

Params, Structure, Message = pb.SamplingParams, pb.Structure, pb.Message
NO_SERVER = ServerSettings(model_name="tiny", grpc_port=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("errors") / "tiny", chat=True)


def tool(**fields: str) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[Message(role="user", content="x")], tools=[pb.Tool(**fields)])


def called(arguments: str) -> pb.ChatRequest:
    call = pb.ToolCall(id="1", name="f", arguments=arguments)
    return pb.ChatRequest(messages=[Message(role="user"), Message(role="assistant", tool_calls=[call])])


WRONG = [
    (generate("x", Params(top_p=1.5)), "params.top_p"),
    (generate("x", Params(top_p=float("nan"))), "params.top_p"),
    (generate("x", Params(temperature=-1)), "params.temperature"),
    (generate("x", Params(max_tokens=0)), "params.max_tokens"),
    (generate("x", Params(logprobs=21)), "params.logprobs"),
    (generate("x", Params(stop=[""])), "params.stop"),
    (generate("x", Params(frequency_penalty=3)), "params.frequency_penalty"),
    (generate("x", Params(logit_bias={1: 101})), "params.logit_bias"),
    (generate("x", Params(timeout=0)), "params.timeout"),
    (generate("x", Params(speculate=9)), "params.speculate"),
    (generate("x", Params(structure=Structure())), "params.structure"),
    (generate("x", Params(structure=Structure(json_object=False))), "params.structure"),
    (generate("x", Params(structure=Structure(json_schema="{"))), "params.structure"),
    (generate("x", Params(structure=Structure(choice=pb.Choices()))), "params.structure"),
    (pb.GenerateRequest(), "prompt"),
    (generate(""), "text"),
    (generate([]), "token_ids"),
    (generate([300]), "token_ids"),
    (generate("x" * 3000), "text"),
    (pb.ChatRequest(), "messages"),
    (chat("x", Params(top_k=1, min_p=2)), "params.min_p"),
    (chat("x" * 3000), "messages"),
    (pb.ChatRequest(messages=[Message(content="x")]), "messages[0].role"),
    (pb.ChatRequest(messages=[Message(role="user"), Message(role="USER")]), "messages[1].role"),
    (pb.ChatRequest(messages=[Message(role="user")], template_variables="[1]"), "template_variables"),
    (pb.ChatRequest(messages=[Message(role="user")], template_variables="{"), "template_variables"),
    (pb.ChatRequest(messages=[Message(role="user")], template_variables="[" * 9999), "template_variables"),
    (
        pb.ChatRequest(messages=[Message(role="user")], template_variables='{"self": 1}'),
        "template_variables.self",
    ),
    (tool(description="x"), "tools[0].name"),
    (tool(name="f", parameters="no"), "tools[0].parameters"),
    (called("[" + "0," * 40_000 + "0]"), "messages[1].tool_calls[0].arguments"),
]


@pytest.fixture
async def tiny(model):
    async with served(model) as given:
        yield given


async def test_a_field_that_is_wrong_is_named(tiny):
    stub, _, _ = tiny
    for request, field in WRONG:
        call = stub.Chat if isinstance(request, pb.ChatRequest) else stub.Generate
        error = await refused(call(request))
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"), request
        assert error.fields == [field], request
        assert error.details["BadRequest"].field_violations[0].description == error.message
        assert error.details["RequestInfo"].request_id == error.trailing["x-request-id"]
    assert await text_of(stub.Generate(generate("x")))


@pytest.mark.parametrize(
    ("name", "request_", "field"),
    [
        ("Tokenize", pb.TokenizeRequest(text="x", messages=[Message(role="user")]), "text"),
        ("Tokenize", pb.TokenizeRequest(messages=[Message()]), "messages[0].role"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1, 2**32 - 1]), "token_ids[1]"),
    ],
)
async def test_a_field_of_a_small_call_is_named(tiny, name, request_, field):
    error = await refused(getattr(tiny[0], name)(request_))
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.fields == [field]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\xff\xff\xff", "this is no mer.v1.GenerateRequest"),
        (b"\x0a\x05ab", "this is no mer.v1.GenerateRequest"),  # shorter than it says
        (b"\x0a\x02\xff\xfe", "this is no mer.v1.GenerateRequest"),  # a text that is not UTF-8
        (b"\x0a\x01x\xf8\x07\x01", "mer.v1.GenerateRequest has no field 127"),
        (b"\x0a\x01x\x1a\x03\xf8\x07\x01", "mer.v1.SamplingParams has no field 127"),
    ],
)
async def test_bytes_that_are_no_request(tiny, data, told):
    stub, _, server = tiny
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        error = await refused(channel.unary_stream("/mer.v1.Inference/Generate")(data))
        assert error.code == grpc.StatusCode.INVALID_ARGUMENT
        assert told in error.message
        error = await refused(channel.unary_unary("/mer.v1.Inference/Nothing")(b""))
        assert error.code == grpc.StatusCode.UNIMPLEMENTED
    assert await text_of(stub.Generate(generate("x")))


async def test_damaged_requests(tiny):
    """Bytes changed, cut out and put in at random: served or refused, never an error inside the server."""
    stub, _, server = tiny
    rng = random.Random(5)
    requests = {
        "Generate": generate("Hello", Params(top_p=0.5, stop=["x"], logit_bias={3: 1.5}, logprobs=2)),
        "Chat": tool(name="f", description="x", parameters='{"type": "object"}'),
        "Tokenize": pb.TokenizeRequest(text="x", add_special_tokens=True),
        "Detokenize": pb.DetokenizeRequest(token_ids=[1, 2, 300]),
        "Embed": pb.EmbedRequest(text="x"),
    }
    told: dict[grpc.StatusCode, list] = {}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for _ in range(200):
            name, request = rng.choice(list(requests.items()))
            data = bytearray(request.SerializeToString())
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(data) + 1)
                data[place : place + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
            call = channel.unary_stream(f"/mer.v1.Inference/{name}")(bytes(data))
            try:
                await call.read()  # of an answer one piece is enough
                call.cancel()
            except grpc.aio.AioRpcError as error:
                told.setdefault(error.code(), []).append((error.details(), name, bytes(data)))
    assert set(told) == {grpc.StatusCode.INVALID_ARGUMENT}, told
    assert len({details for details, *_ in told[grpc.StatusCode.INVALID_ARGUMENT]}) > 3
    assert await text_of(stub.Generate(generate("x")))


async def test_bytes_that_are_not_http2(tiny):
    """A browser or a scanner at the port; a client with half a frame."""
    stub, _, server = tiny
    for data in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01" * 50,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00",
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(data)
        await writer.drain()
        writer.close()
    assert await text_of(stub.Generate(generate("x")))


@pytest.mark.parametrize(
    ("metadata", "served_"),
    [
        ([("authorization", "Bearer right")], True),
        ([("authorization", "bearer right")], True),
        ([("x-api-key", "right")], True),
        ([("authorization", "Bearer wrong")], False),
        ([("authorization", "right")], False),
        ([("x-api-key", "")], False),
        ([], False),
    ],
)
async def test_keys(model, metadata, served_):
    async with served(model, {"api_keys": {"right": "someone"}}) as (stub, _, server):
        calls = [
            stub.Generate(generate("x"), metadata=metadata),
            stub.GetModel(pb.GetModelRequest(), metadata=metadata),
            stub.Session(iter([]), metadata=metadata),
        ]
        if served_:
            await asyncio.gather(pieces(calls[0]), calls[1], pieces(calls[2]))
            return
        for call in calls:
            error = await refused(call)
            assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_INVALID")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING, "watched without a key"


async def test_limits_of_a_caller(model):
    settings = {"api_keys": {"a": "one", "b": "two"}, "max_concurrent": 2}
    async with served(model, settings) as (stub, engine, _):
        one, two = ([("x-api-key", key)] for key in "ab")
        with slowed(0.02):
            running = [stub.Generate(generate("x", FOREVER), metadata=one) for _ in range(2)]
            await until(lambda: asked(engine) == 2, "both run")
            error = await refused(stub.Generate(generate("x"), metadata=one))
            assert (error.code, error.reason) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "RATE_LIMIT_EXCEEDED",
            )
            assert error.details["RetryInfo"].retry_delay.ToNanoseconds() > 0
            assert int(error.trailing["grpc-retry-pushback-ms"]) > 0
            assert (await stub.GetStats(pb.GetStatsRequest(), metadata=one)).running == 2  # not counted
            # A session is no request itself; those on it are.
            call = stub.Session(iter([pb.SessionRequest(id="a", generate=generate("x"))]), metadata=one)
            [response] = await pieces(call)
            assert response.error.reason == "RATE_LIMIT_EXCEEDED"
            assert response.error.retry_after > 0
            assert await text_of(stub.Generate(generate("x"), metadata=two))
            for call in running:
                call.cancel()
            await until(lambda: not asked(engine), "both are gone")
        assert await text_of(stub.Generate(generate("x"), metadata=one))


async def test_the_deadline_of_the_call(model):
    async with served(model) as (stub, engine, _):
        with slowed(0.02):
            error = await refused(stub.Generate(generate("x", FOREVER), timeout=0.3))
            assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: not asked(engine), "it is gone from the engine")
        assert await text_of(stub.Generate(generate("x"), timeout=60))


async def test_the_time_of_a_request(model):
    async with served(model) as (stub, engine, _):
        with slowed(0.02):
            params = Params(ignore_eos=True, timeout=0.2)
            error = await refused(stub.Generate(generate("x", params), timeout=60))
            assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "TIMEOUT")
            call = stub.Session(iter([pb.SessionRequest(id="a", generate=generate("x", params))]))
            *_, last = await pieces(call)
            assert last.error.reason == "TIMEOUT"
        assert not asked(engine)


async def test_a_queue_that_is_full(model):
    async with served(model, max_running=1, max_waiting=1) as (stub, engine, _):
        with slowed(0.01):
            running = [stub.Generate(generate("x", FOREVER)) for _ in range(2)]
            await until(lambda: asked(engine) == 2, "one runs, one waits")
            error = await refused(stub.Generate(generate("x")))
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            delay = error.details["RetryInfo"].retry_delay.ToMilliseconds()
            assert delay == int(error.trailing["grpc-retry-pushback-ms"]) > 0
            for call in running:
                call.cancel()
        await until(lambda: not asked(engine), "both are gone")
        assert await text_of(stub.Generate(generate("x")))


async def test_a_read_that_fails(model):
    """Every read fails: who needs one is told so; afterwards all is well again."""
    async with served(model, cache_experts=4) as (stub, engine, _):
        expected = await text_of(stub.Generate(generate("the sea")))
        reader, checkpoint = engine._runner.reader, engine._runner.checkpoint
        for i in range(len(checkpoint.files)):
            reader.set_fault(i, 0, 1 << 40, times=1 << 30, error=errno.EIO)
        error = await refused(stub.Generate(generate("a b c d e f g h i j k l m n o p")))
        assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "READ_ERROR")
        reader.clear_faults()
        assert await text_of(stub.Generate(generate("the sea"))) == expected


STAGES = ["at once", "while it is prefilled", "at the first piece", "in the middle"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_who_goes_away_costs_nothing_any_more(model, stage, how):
    """Cancelled, or the connection closed: it's gone with the next step, and the other is not harmed."""
    async with served(model, context=1024, step_tokens=16) as (stub, engine, server):
        expected = await text_of(stub.Generate(generate("the sea")))
        with slowed(0.01) as steps:
            other = asyncio.create_task(text_of(stub.Generate(generate("the sea"))))
            async with connected(server.port) as leaving:
                call = leaving.Generate(generate("Hello " * 30, FOREVER))
                if stage == "while it is prefilled":
                    await until(lambda: asked(engine) == 2 and len(steps) > 2, "it runs")
                elif stage != "at once":
                    for _ in range(1 if stage == "at the first piece" else 5):
                        await call.read()
                if how == "cancel":
                    call.cancel()
            assert await other == expected
            await until(lambda: not asked(engine), "it is gone")
            before = len(steps)
            await asyncio.sleep(0.1)
            assert len(steps) == before, "something is still computed"


async def test_cancelled_while_it_waits(model):
    async with served(model, max_running=1) as (stub, engine, _):
        with gated() as go:
            first = asyncio.create_task(text_of(stub.Generate(generate("the sea"))))
            await until(lambda: asked(engine) == 1, "one runs")
            call = stub.Generate(generate("Hello", FOREVER))
            await until(lambda: come(engine) == 2, "one waits")
            call.cancel()
            go.set()
            await first
        await until(lambda: not asked(engine), "both are gone")


async def test_before_the_model_is_there():
    server = await serve_grpc(None, NO_SERVER)
    async with connected(server.port) as stub:
        error = await refused(stub.Generate(generate("x")))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "LOADING")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await server.stop(0)


async def test_a_server_that_stops(model):
    """What runs ends well, who watches the health is told and does not hold it up, nothing new begins."""
    async with served(model) as (stub, engine, server):
        expected = await text_of(stub.Generate(generate("the sea")))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
            with gated() as go:
                running = asyncio.create_task(text_of(stub.Generate(generate("the sea"))))
                await until(lambda: asked(engine), "it runs")
                stopping = asyncio.create_task(server.stop(600))
                assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                for call in stub.Generate(generate("x")), stub.Session(iter([])):
                    error = await refused(call)
                    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
                go.set()
                assert await running == expected
                await asyncio.wait_for(stopping, 60)


async def test_an_engine_that_stopped_by_an_error(model, monkeypatch):
    """Who watches the health is told, and later requests know that waiting does not help."""
    monkeypatch.setattr(grpc_server, "_LOOK", 0.01)
    engine = await Engine.open(model, context=512)
    server = await serve_grpc(engine, NO_SERVER)
    async with connected(server.port) as stub, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as other:
        watching = health_pb2_grpc.HealthStub(other).Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        monkeypatch.setattr(Scheduler, "schedule", lambda *_: 1 / 0)
        await refused(stub.Generate(generate("Hello")))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        error = await refused(stub.Generate(generate("Hello")))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED")
        assert "ZeroDivisionError" in error.message
    await server.stop(0)
    await engine.close()


async def test_a_server_that_can_wait_no_longer(model):
    async with served(model) as (stub, engine, server):
        with slowed(0.01):
            call = stub.Generate(generate("Hello", FOREVER))
            await call.read()
            stopping = asyncio.create_task(server.stop(600))
            await asyncio.sleep(0.05)
            await server.stop(0)
            await asyncio.wait_for(stopping, 60)
            await until(lambda: not asked(engine), "it is gone")


async def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--grpc-port {port}: can't listen there"):
            await serve_grpc(None, ServerSettings(model_name="tiny", grpc_port=port))


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (QueueFullError("full", 1.5), "RESOURCE_EXHAUSTED", "QUEUE_FULL"),
        (EngineClosedError("closed"), "UNAVAILABLE", "SHUTTING_DOWN"),
        (EngineFailedError("oops"), "UNAVAILABLE", "ENGINE_FAILED"),
        (DeviceReadError("disk"), "INTERNAL", "READ_ERROR"),
        (FilesChangedError("x"), "UNAVAILABLE", "FILES_CHANGED"),
        (ZeroDivisionError("secret"), "INTERNAL", "INTERNAL_ERROR"),
    ],
)
def test_what_errors_become(error, code, reason):
    failure = Failure.of(error)
    assert (failure.code.name, failure.reason) == (code, reason)
    assert "secret" not in failure.message
    assert failure.retry_after == (1.5 if reason == "QUEUE_FULL" else None)


def test_an_error_fits_into_the_metadata():
    """Clients take 8 KiB of it."""
    failure = Failure.of(RequestError("é" * 50_000, "prompt"))
    assert sum(len(key) + len(value) for key, value in failure.metadata("id")) < 4000
    assert len(failure.message.encode()) < 1100
