"""The three ways to ask an engine, as bench/serve.py times them: in process, over HTTP, over gRPC.

The clients do as little as they can, since they share the machine with what is measured: the HTTP one reads
server-sent events from a bare connection and parses nothing but the last.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from attrs import Factory, define

from mer import Engine, EngineConfig, SamplingParams


@define
class Record:
    """One request. Times are of time.perf_counter; arrivals: when a piece came, one for each token.

    cached: tokens of the prompt whose keys and values were there, by HTTP.
    """

    asked: float
    arrivals: list[float] = Factory(list)
    tokens: int = 0
    error: str = ""
    cached: int = 0


class Face(Protocol):
    """name: for the tables. temperature: of all answers, which end at no end of text."""

    name: str
    temperature: float

    async def ask(self, prompt: list[int], tokens: int) -> Record:
        """Ask for so many tokens and wait for all of them."""

    async def ping(self) -> float:
        """How many seconds late the event loop, of the server if there is one, does something trivial."""

    def cpu_s(self) -> float:
        """Processor time that the process with the engine has used."""


def _cpu_s(pid: int | str) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class InProcess:
    name = "in process"
    temperature = 0.0

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.vocab = engine.spec.vocab

    async def ask(self, prompt: list[int], tokens: int) -> Record:
        record = Record(time.perf_counter())
        params = SamplingParams(max_tokens=tokens, temperature=self.temperature, ignore_eos=True)
        async for delta in self._engine.stream(prompt, params):
            record.arrivals.append(time.perf_counter())
            record.tokens += len(delta.token_ids)
        return record

    async def ping(self) -> float:
        begun = time.perf_counter()
        await asyncio.sleep(0.005)
        return time.perf_counter() - begun - 0.005

    def cpu_s(self) -> float:
        return _cpu_s("self")


class Http:
    name = "HTTP"
    temperature = 0.0

    def __init__(self, port: int, pid: int) -> None:
        self._port = port
        self._pid = pid
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, prompt: list[int], tokens: int) -> Record:
        record = Record(time.perf_counter())
        asked = {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
        asked["temperature"] = self.temperature
        body = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()
        reader, writer = await self._send("POST", "/v1/completions", body)
        try:
            status, length = await self._head(reader)
            if status != 200:
                record.error = (await reader.readexactly(length)).decode()
                return record
            await self._read(reader, record)
        except (OSError, asyncio.IncompleteReadError) as error:
            writer.close()
            record.error = repr(error)
            return record
        self._idle.append((reader, writer))
        return record

    async def _read(self, reader: asyncio.StreamReader, record: Record) -> None:
        """A chunked body of events."""
        text = b""
        while size := int(await reader.readline(), 16):
            text += (await reader.readexactly(size + 2))[:-2]
            *events, text = text.split(b"\n\n")
            now = time.perf_counter()
            for event in events:
                if b'"choices":[]' in event:
                    usage = json.loads(event.removeprefix(b"data: "))["usage"]
                    record.tokens = usage["completion_tokens"]
                    record.cached = usage["prompt_tokens_details"]["cached_tokens"]
                elif b'"choices"' in event:
                    record.arrivals.append(now)
        await reader.readline()

    async def ping(self) -> float:
        begun = time.perf_counter()
        reader, writer = await self._send("GET", "/health", b"")
        status, length = await self._head(reader)
        await reader.readexactly(length)
        assert status == 200
        self._idle.append((reader, writer))
        return time.perf_counter() - begun

    async def _send(
        self, method: str, path: str, body: bytes
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():  # the server closes connections that are idle for long
                break
            writer.close()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        return reader, writer

    @staticmethod
    async def _head(reader: asyncio.StreamReader) -> tuple[int, int]:
        """Status, and the length of the body if it is known."""
        status, length = int((await reader.readline()).split()[1]), 0
        while line := (await reader.readline()).strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, length

    def cpu_s(self) -> float:
        return _cpu_s(self._pid)


class Grpc:
    name = "gRPC"
    temperature = 0.0

    def __init__(self, stub: Any, messages: Any, http: Http) -> None:
        self._stub = stub
        self._messages = messages
        self._http = http

    async def ask(self, prompt: list[int], tokens: int) -> Record:
        import grpc

        record = Record(time.perf_counter())
        pb = self._messages
        params = pb.SamplingParams(max_tokens=tokens, temperature=self.temperature, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), params=params)
        try:
            async for piece in self._stub.Generate(request):
                record.arrivals.append(time.perf_counter())
                record.tokens += len(piece.token_ids)
        except grpc.aio.AioRpcError as error:
            record.error = f"{error.code().name}: {error.details()}"
        return record

    async def ping(self) -> float:
        return await self._http.ping()

    def cpu_s(self) -> float:
        return self._http.cpu_s()


@asynccontextmanager
async def in_process(model: Path, settings: dict[str, Any]) -> AsyncIterator[InProcess]:
    """An engine in this process. settings: of EngineConfig."""
    async with Engine.open(model, EngineConfig(**settings)) as engine:
        yield InProcess(engine)


@asynccontextmanager
async def served(model: Path, settings: dict[str, Any]) -> AsyncIterator[tuple[Http, Grpc]]:
    """`mer serve` as a child process, by both of its faces."""
    import grpc

    from mer.v1 import inference_pb2, inference_pb2_grpc

    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    program = [sys.executable, "-c", "from mer.cli.main import main; main()", "serve", str(model)]
    server = await asyncio.create_subprocess_exec(
        *program, "--port", "0", "--grpc-port", "0", *flags, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert server.stderr is not None
        said: list[str] = []
        while not (found := re.search(r"http://\S+:(\d+), gRPC on port (\d+)", said[-1] if said else "")):
            line = (await server.stderr.readline()).decode()
            if not line:
                raise RuntimeError(f"mer serve ended: {''.join(said)}")
            said.append(line)
        drain = asyncio.create_task(server.stderr.read())
        http = Http(int(found[1]), server.pid)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{found[2]}") as channel:
            yield http, Grpc(inference_pb2_grpc.InferenceStub(channel), inference_pb2, http)
        drain.cancel()
    finally:
        if server.returncode is None:
            server.terminate()
        await server.wait()
