"""What a face of the server costs: processor time per token, with an engine that computes nothing.

    python -m bench.overhead --streams 1,8 --tokens 1000

A thread delivers tokens as the engine's does, one to each stream every few milliseconds, to a reader in
process, to HTTP and to gRPC in turns; clients are other processes. The figure is the processor time of the
process, less what it takes in process: a difference of speeds depends on all that the machine does besides.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import click

from bench.faces import Grpc, Http
from bench.help import help_of
from bench.serve import numbers
from mer import Delta, Engine, SamplingParams, Timings, Usage
from mer.api.grpc.server import serve_grpc
from mer.api.http.app import create_app
from mer.api.http.server import HttpServer
from mer.api.http.service import Service
from mer.api.settings import ServerSettings
from mer.demo import model_path
from mer.engine.mailbox import Mailbox, wake
from mer.engine.stats import StepStats

_PROMPT = [1, 2, 3]


class Ticker:
    """Delivers the next token of every stream each `pace` seconds, from one thread."""

    def __init__(self, pace: float) -> None:
        self._pace = pace
        self._streams: dict[Mailbox[Delta], int] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(self._pace)
            with self._lock:
                boxes = list(self._streams)
                for box, left in list(self._streams.items()):
                    box.put(_piece(last=left == 1))
                    self._streams[box] = left - 1
                    if left == 1:
                        del self._streams[box]
                wake(boxes)

    async def stream(self, prompt: Any, params: SamplingParams | None = None) -> AsyncGenerator[Delta, None]:
        """As Engine.stream."""
        assert params is not None
        assert params.max_tokens is not None
        box: Mailbox[Delta] = Mailbox()
        with self._lock:
            self._streams[box] = params.max_tokens
        ended = False
        while not ended:
            delta = await box.get()
            ended = delta.finish_reason is not None
            yield delta


def _piece(*, last: bool) -> Delta:
    if not last:
        return Delta(" word", (5,))
    return Delta("", (5,), None, "length", Usage(len(_PROMPT), 1), Timings(0.0, 0.0, 0.0, StepStats()))


def _client(face: str, port: int, streams: int, tokens: int) -> None:
    async def ask() -> None:
        async with AsyncExitStack() as stack:
            client: Http | Grpc = Http(port, 0)
            if face == "gRPC":
                import grpc

                from mer.v1 import inference_pb2, inference_pb2_grpc

                channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
                await stack.enter_async_context(channel)
                client = Grpc(inference_pb2_grpc.InferenceStub(channel), inference_pb2, Http(port, 0))
            for record in await asyncio.gather(*(client.ask(_PROMPT, tokens) for _ in range(streams))):
                assert not record.error, record.error
                assert len(record.arrivals) == tokens, len(record.arrivals)

    asyncio.run(ask())


async def _in_process(ticker: Ticker, streams: int, tokens: int) -> None:
    async def read() -> None:
        async for _ in ticker.stream(_PROMPT, SamplingParams(max_tokens=tokens)):
            pass

    await asyncio.gather(*(read() for _ in range(streams)))


async def _from_outside(face: str, port: int, streams: int, tokens: int) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_client, args=(face, port, streams, tokens))
    child.start()
    await asyncio.to_thread(child.join)
    if child.exitcode:
        raise click.ClickException(f"the {face} client failed")


async def measure(streams: list[int], tokens: int, rounds: int, pace: float) -> dict[str, dict[str, float]]:
    """Streams -> face -> seconds of processor time a token, medians of the rounds."""
    runs: dict[str, dict[str, list[float]]] = {}
    settings = ServerSettings(model_name="demo", port=0, grpc_port=0)
    ticker = Ticker(pace)
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(Engine.open(model_path(), context=64))
        engine.stream = ticker.stream  # type: ignore[method-assign]
        service = Service(settings)
        http = await stack.enter_async_context(HttpServer(create_app(service), service.settings))
        service.models.adopt(engine)
        grpc = await serve_grpc(engine, settings)
        stack.push_async_callback(grpc.stop, 0)
        ports = {"in process": 0, "HTTP": http.port, "gRPC": grpc.port}
        for _ in range(rounds):
            for count in streams:
                for face, port in ports.items():
                    used = time.process_time()
                    if port:
                        await _from_outside(face, port, count, tokens)
                    else:
                        await _in_process(ticker, count, tokens)
                    cost = (time.process_time() - used) / (count * tokens)
                    runs.setdefault(str(count), {}).setdefault(face, []).append(cost)
    return {n: {face: statistics.median(each) for face, each in faces.items()} for n, faces in runs.items()}


@click.command(help=help_of(__doc__))
@click.option("--streams", callback=numbers, default="1,8", show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=1000, show_default=True, help="Of each stream.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--pace", default=0.002, show_default=True, help="Seconds from token to token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(streams: list[int], tokens: int, rounds: int, pace: float, as_json: bool) -> None:
    found = asyncio.run(measure(streams, tokens, rounds, pace))
    if as_json:
        click.echo(json.dumps(found))
        return
    for count, faces in found.items():
        plain = faces["in process"]
        text = ", ".join(f"{f} {1e3 * (s - plain):+.3f}" for f, s in faces.items() if f != "in process")
        click.echo(f"{count} streams: in process {1e3 * plain:.3f} ms of processor a token; {text}")


if __name__ == "__main__":
    main()
