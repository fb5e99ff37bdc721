"""What the gRPC tests share: a stub on a channel, a server in the same loop, answers and errors read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import pytest
from engine_models import opened
from google.rpc import error_details_pb2
from grpc_status.rpc_status import aio as rpc_status
from http_server import PATIENCE

from mer import Engine
from mer.api.grpc.server import GrpcServer, serve_grpc
from mer.api.settings import ServerSettings
from mer.engine.runner import Runner
from mer.v1 import inference_pb2 as pb
from mer.v1 import inference_pb2_grpc as rpc

GREEDY = pb.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
FOREVER = pb.SamplingParams(temperature=0, ignore_eos=True)


@asynccontextmanager
async def connected(port: int, **options) -> AsyncIterator[rpc.InferenceAsyncStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=list(options.items())) as channel:
        yield rpc.InferenceStub(channel)


@asynccontextmanager
async def served(
    model: Path, settings: dict | None = None, **engine
) -> AsyncIterator[tuple[rpc.InferenceAsyncStub, Engine, GrpcServer]]:
    """A stub, the engine behind it and the server; in the end nothing may be held for nobody."""
    async with opened(model, **engine) as opened_engine:
        told = ServerSettings(**{"model_name": "tiny", "grpc_port": 0} | (settings or {}))
        server = await serve_grpc(opened_engine, told)
        try:
            async with connected(server.port) as stub:
                yield stub, opened_engine, server
        finally:
            await server.stop(0)


def generate(text: str | list[int], params: pb.SamplingParams = GREEDY) -> pb.GenerateRequest:
    if isinstance(text, str):
        return pb.GenerateRequest(text=text, params=params)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=text), params=params)


def chat(text: str, params: pb.SamplingParams = GREEDY) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[pb.Message(role="user", content=text)], params=params)


async def pieces(call) -> list:
    return [piece async for piece in call]


async def text_of(call) -> str:
    return "".join([piece.text async for piece in call])


class Refused:
    """The error that a call ends with. details: google.rpc's, by the name of their message."""

    def __init__(self, error: grpc.aio.AioRpcError, status) -> None:
        self.code = error.code()
        self.message = error.details()
        self.trailing = dict(error.trailing_metadata() or ())
        self.details = {}
        for packed in status.details if status else ():
            kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
            self.details[kind.DESCRIPTOR.name] = detail = kind()
            assert packed.Unpack(detail)

    @property
    def reason(self) -> str:
        return self.details["ErrorInfo"].reason

    @property
    def fields(self) -> list[str]:
        return [each.field for each in self.details["BadRequest"].field_violations]


async def refused(call) -> Refused:
    """Reads the call to its end, which must be an error."""
    try:
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
        else:
            await pieces(call)
    except grpc.aio.AioRpcError as error:
        return Refused(error, await rpc_status.from_call(call))
    raise AssertionError("the call was served")


def asked(engine: Engine) -> int:
    """Requests that the engine has and that have not ended."""
    snapshot = engine.snapshot()
    return snapshot.waiting + snapshot.running


def come(engine: Engine) -> int:
    """The same, with those that the engine's thread, in the midst of a step, does not know yet."""
    return engine._worker._here


async def until(condition, what: str) -> None:
    """Waits until `condition()` holds; fails when it does not for a long time."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        await asyncio.sleep(0.01)


@contextmanager
def slowed(seconds: float) -> Iterator[list[int]]:
    """Every step of an engine takes at least so long; gives a list with the number of tokens of each."""
    step, seen = Runner.step, []

    def slower(self: Runner, chunks):
        seen.append(sum(chunk.count for chunk in chunks))
        time.sleep(seconds)
        return step(self, chunks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "step", slower)
        yield seen
