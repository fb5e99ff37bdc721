"""The gRPC server in bad times: clients that are killed or vanish, crowds, signals, too small a cache."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from engine_models import write_text_model
from grpc_client import FOREVER, asked, connected, generate, pieces, refused, served, slowed, text_of, until
from http_server import serving

from mer.api.grpc import server as grpc_server
from mer.v1 import inference_pb2 as pb
from mer.v1 import inference_pb2_grpc as rpc

CLIENT = """
import sys, grpc
from mer.v1 import inference_pb2 as pb, inference_pb2_grpc as rpc
stub = rpc.InferenceStub(grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}"))
params = pb.SamplingParams(temperature=0, ignore_eos=True)
request = pb.GenerateRequest(text="Hello", params=params)
if sys.argv[2] == "generate":
    call = stub.Generate(request)
else:
    call = stub.Session(iter([pb.SessionRequest(id=id, generate=request) for id in "abc"]))
for i, piece in enumerate(call):
    if i == 2:
        print("reading", flush=True)
        if sys.argv[2] == "asleep":
            sys.stdin.read()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(
        tmp_path_factory.mktemp("life") / "tiny", chat=True, max_position_embeddings=16384
    )


@pytest.mark.parametrize("kind", ["generate", "session", "asleep"])
async def test_clients_that_are_killed(model, kind):
    """In the middle of a stream, or while they don't read: nothing of theirs is left."""
    async with served(model, context=16384) as (stub, engine, server):
        expected = await text_of(stub.Generate(generate("the sea")))
        with slowed(0.002):
            killed = await asyncio.create_subprocess_exec(
                sys.executable, "-c", CLIENT, str(server.port), kind, stdout=subprocess.PIPE
            )
            assert killed.stdout is not None
            assert await killed.stdout.readline() == b"reading\n"
            other = asyncio.create_task(text_of(stub.Generate(generate("the sea"))))
            assert asked(engine) >= 1
            killed.kill()
            await killed.wait()
            assert await other == expected
            await until(lambda: not asked(engine), "theirs is gone")


@asynccontextmanager
async def cable(port: int):
    """A way to the server that can be cut so that neither side is told: gives its port, and an event."""
    cut = asyncio.Event()
    tasks = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if cut.is_set():
                await asyncio.Event().wait()
            writer.write(data)
            await writer.drain()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        tasks.extend(asyncio.create_task(pump(*pair)) for pair in ((reader, back), (there, writer)))

    listening = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1], cut
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_client_that_vanishes(model, monkeypatch):
    """Without a word, as by a cable: the server finds out by its pings, and nothing is held any more."""
    monkeypatch.setattr(grpc_server, "_PING_TIMEOUT", 0.5)
    async with served(model, {"keep_alive": 0.5}, context=16384) as (stub, engine, server):
        async with cable(server.port) as (port, cut), connected(port) as vanishing:
            with slowed(0.002):
                call = vanishing.Generate(generate("Hello", FOREVER))
                await call.read()
                cut.set()
                await until(lambda: not asked(engine), "it is gone")
            call.cancel()
        assert await text_of(stub.Generate(generate("the sea")))


async def test_more_than_the_kv_cache_holds(model):
    """Requests give way to each other and are computed again; no answer is another one for it."""
    params = pb.SamplingParams(temperature=0, ignore_eos=True, max_tokens=60)
    prompts = [f"Request {i}: the old man and the sea" for i in range(6)]
    async with served(model, context=16384) as (stub, _, _):
        expected = [await text_of(stub.Generate(generate(prompt, params))) for prompt in prompts]
    async with served(model, context=160) as (stub, _, _):
        answers = await asyncio.gather(*(text_of(stub.Generate(generate(p, params))) for p in prompts))
        stats = await stub.GetStats(pb.GetStatsRequest())
    assert answers == expected
    assert stats.preemptions > 0


async def test_connections_that_come_and_go(model):
    """Opened, asked on, and dropped at some moment or other: descriptors and memory stay as they are."""

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def one(port: int, i: int) -> None:
        if i % 4 == 0:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        async with connected(port, **{"grpc.use_local_subchannel_pool": 1}) as stub:
            call = stub.Generate(generate("Hello", FOREVER))
            if i % 4 > 1:
                await call.read()
            if i % 4 == 3:
                call.cancel()

    async with served(model, context=16384) as (stub, engine, server):
        await text_of(stub.Generate(generate("the sea")))
        before = open_files()
        for _ in range(3):
            await asyncio.gather(*(one(server.port, i) for i in range(40)))
            await until(lambda: not asked(engine), "all are gone")
        # Both sides of 120 connections; gRPC closes them some time after they were left.
        await until(lambda: open_files() <= before + 6, "descriptors are given back")
        assert await text_of(stub.Generate(generate("the sea")))


async def test_a_signal_in_mid_stream(model):
    """What runs ends as if nothing were; what comes then is sent away; the process ends well."""
    # More than fits between the two: it can't end before it is read.
    params = pb.SamplingParams(temperature=0, ignore_eos=True, max_tokens=400, logprobs=20)
    with serving(model, "--grpc-port", 0, "--context", 16384) as server:
        async with connected(server.grpc_port) as stub:
            expected = await text_of(stub.Generate(generate("the sea", params)))
            call = stub.Generate(generate("the sea", params))
            read = [await call.read(), await call.read()]
            server.signal()
            await asyncio.to_thread(server.wait_for, "1 running; ending within")
            error = await refused(stub.Generate(generate("x")))
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
            while (piece := await call.read()) is not grpc.aio.EOF:
                read.append(piece)
            assert "".join(piece.text for piece in read) == expected
            assert read[-1].final.usage.completion_tokens == 400
        assert await asyncio.to_thread(server.ended) == 0


async def cut_off(call) -> grpc.StatusCode:
    """The status of a call that is read to its end."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return await call.code()


async def test_a_second_signal(model):
    with serving(model, "--grpc-port", 0, "--context", 16384) as server:
        async with connected(server.grpc_port) as stub:
            call = stub.Session()
            await call.write(pb.SessionRequest(id="a", generate=generate("Hello", FOREVER)))
            await call.read()
            server.signal()
            await asyncio.to_thread(server.wait_for, "1 running; ending within")
            server.signal(signal.SIGINT)
            assert await asyncio.to_thread(server.ended) == 0
            assert await cut_off(call) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert any("1 requests are ended unfinished" in line for line in server.lines)
        assert "Traceback" not in "".join(server.lines)


async def test_the_options_of_mer_serve(model, tmp_path: Path):
    """Keys and TLS are those of HTTP."""
    ca = trustme.CA()
    issued = ca.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    issued.private_key_pem.write_to_path(tmp_path / "key")
    (tmp_path / "keys").write_text("someone right\n")
    options = ["--tls-cert", tmp_path / "cert", "--tls-key", tmp_path / "key"]
    with serving(model, "--grpc-port", 0, *options, "--api-key-file", tmp_path / "keys") as server:
        given = grpc.ssl_channel_credentials(ca.cert_pem.bytes())
        async with grpc.aio.secure_channel(f"localhost:{server.grpc_port}", given) as channel:
            stub = rpc.InferenceStub(channel)
            assert await pieces(stub.Generate(generate("x"), metadata=[("x-api-key", "right")]))
            error = await refused(stub.Generate(generate("x"), metadata=[("x-api-key", "wrong")]))
            assert error.code == grpc.StatusCode.UNAUTHENTICATED
