"""Many clients that read slowly, and many that die: nobody loses anything, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
from attrs import frozen
from engine_models import write_text_model
from http_server import PATIENCE, serving
from test_metrics import values

from mer.v1 import inference_pb2 as pb
from mer.v1 import inference_pb2_grpc as rpc

PROMPTS = ["The old man", "said: it will rain", "before the night", "русский язык"]
READERS, DEATHS = 200, 500
TOKENS, LOGPROBS = 12, 5
# Some answers are larger than all buffers on the way, so that the engine itself has to wait for the reader.
LARGE = {"max_tokens": 220, "logprobs": 20}
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("load"))


@frozen
class Held:
    """What a process holds. memory: bytes."""

    files: int
    threads: int
    memory: int

    @classmethod
    def by(cls, pid: int) -> Held:
        process = Path(f"/proc/{pid}")
        memory = int((process / "statm").read_text().split()[1]) * PAGE
        return cls(len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())), memory)

    def hardly_more_than(self, before: Held) -> bool:
        """A leak is at least one with each of the deaths."""
        return (
            self.files <= before.files + 3
            and self.threads < before.threads + 8
            and self.memory < before.memory + (6 << 20)
        )


def idle(server) -> Held:
    """Waits until no request is here, no block or expert in use and no connection open; what is held then."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            now = values(answer.read())
        busy = [
            count
            for (name, *labels), count in ((key.split(), count) for key, count in now.items())
            if (name == "mer_requests" and {"waiting", "running"}.intersection(labels))
            or (name == "mer_kv_blocks" and "used" in labels)
            or (name == "mer_expert_cache_pinned" and "ram" in labels)
        ]
        connections = sum(
            os.readlink(each).startswith("socket:")
            for each in Path(f"/proc/{server.process.pid}/fd").iterdir()
        )
        if len(busy) >= 4 and not any(busy) and connections < 12:
            return Held.by(server.process.pid)
        time.sleep(0.05)
    raise AssertionError(f"still busy: {now}, {connections} sockets")


def request(prompt: str, **changes) -> bytes:
    asked = {
        "prompt": prompt, "max_tokens": TOKENS, "logprobs": LOGPROBS, "temperature": 0, "ignore_eos": True,
        "stream": True,
    } | changes  # fmt: skip
    body = json.dumps(asked).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n"
    )
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """With the smallest buffers that a client can have."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=made, limit=2048)


async def read(port: int, prompt: str, pause: float, **changes) -> str:
    """The text of a whole answer, of which at most 16 KiB are read at a time."""
    reader, writer = await connect(port)
    writer.write(request(prompt, **changes))
    received = bytearray()
    while piece := await reader.read(1 << 14):
        received += piece
        await asyncio.sleep(pause)
    writer.close()
    head, _, chunks = bytes(received).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], head
    body = b""
    while (size := int(chunks.partition(b"\r\n")[0], 16)) > 0:
        _, _, chunks = chunks.partition(b"\r\n")
        body, chunks = body + chunks[:size], chunks[size + 2 :]
    *events, done, rest = body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    choices = [
        json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events if event[:1] != b":"
    ]
    assert sum(len(each["logprobs"]["tokens"]) for each in choices) == changes.get("max_tokens", TOKENS)
    assert choices[-1]["finish_reason"] == "length"
    return "".join(each["text"] for each in choices)


async def answers(port: int) -> list[str]:
    """What the server says to each prompt, at the usual length and at the large one."""
    usual = await asyncio.gather(*(read(port, prompt, 0) for prompt in PROMPTS))
    large = await asyncio.gather(*(read(port, prompt, 0, **LARGE) for prompt in PROMPTS))
    return [*usual, *large]


async def slow_readers(port: int, expected: list[str]) -> None:
    """Every 20th of a large answer."""
    readers = []
    for i in range(READERS):
        pause = 0.1 if i % 20 == 0 else 0.02 + 0.01 * (i % 7)
        readers.append(read(port, PROMPTS[i % 4], pause, **(LARGE if i % 20 == 0 else {})))
    for i, answer in enumerate(await asyncio.gather(*readers)):
        assert answer == expected[i % 4 + 4 * (i % 20 == 0)]


async def die(port: int, stage: int) -> None:
    """Open a connection, and close it at one of the stages of a request; every other time by a reset."""
    reader, writer = await connect(port)
    whole = request(PROMPTS[stage % len(PROMPTS)], max_tokens=400)
    head = whole.index(b"\r\n\r\n")
    writer.write([b"", whole[:20], whole[: head + 4], whole[:-9], whole, whole][stage % 6])
    if stage % 6 == 5:
        await reader.readexactly(2000)  # in the middle of the answer
    elif stage % 6 == 4:
        await asyncio.sleep(0.01 * (stage % 5))
    if stage % 2:
        abort = struct.pack("ii", 1, 0)  # SO_LINGER of 0 seconds: the connection is reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)
    writer.close()


async def deaths(port: int) -> None:
    at_once = asyncio.Semaphore(40)

    async def one(stage: int) -> None:
        async with at_once:
            await die(port, stage)

    await asyncio.gather(*map(one, range(DEATHS)))


async def grpc_deaths(port: int) -> None:
    """Channels that are closed while their streams are read, slowly."""

    async def one() -> None:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            params = pb.SamplingParams(max_tokens=400, ignore_eos=True, logprobs=LOGPROBS)
            calls = [
                rpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="x", params=params)) for _ in "ab"
            ]
            for call in calls:
                await call.read()

    await asyncio.gather(*(one() for _ in range(20)))


def test_slow_readers_and_dying_connections(model):
    with serving(model, "--grpc-port", "0", "--context", "2048", "--max-waiting", "1000") as server:

        async def storm() -> None:
            await asyncio.gather(slow_readers(server.port, expected), deaths(server.port))
            await grpc_deaths(server.grpc_port)

        expected = asyncio.run(answers(server.port))
        held = [idle(server)]
        # Pools of threads and the heap grow to what a storm takes; whoever leaks does it in each storm.
        while len(held) < 3 or not held[-1].hardly_more_than(held[-2]):
            assert len(held) < 7, held
            asyncio.run(storm())
            held.append(idle(server))
        assert asyncio.run(answers(server.port)) == expected
        server.signal()
        assert server.ended() == 0
