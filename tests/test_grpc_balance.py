"""Clients that spread calls over the addresses of a name, as those of a headless service of Kubernetes."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from engine_models import opened, write_text_model
from grpc_client import generate, text_of, until
from http_server import PATIENCE

from mer import Engine
from mer.api.grpc import server as serving
from mer.api.settings import ServerSettings
from mer.v1 import inference_pb2_grpc as rpc

NAME = "mer-pods.test"


class NameServer:
    """Knows addresses in IPv4 of one name; listens on `port` of the loopback address."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            query, client = self._socket.recvfrom(512)
            if not query:
                return
            end = query.index(0, 12) + 5  # of the question: a name, its type and its class
            (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
            found = self.addresses if kind == 1 else []
            head = query[:2] + struct.pack(">5H", 0x8580, 1, len(found), 0, 0)
            entry = struct.pack(">3HIH", 0xC00C, 1, 1, 0, 4)
            answers = b"".join(entry + socket.inet_aton(address) for address in found)
            self._socket.sendto(head + query[12:end] + answers, client)

    def close(self) -> None:
        self._socket.sendto(b"", ("127.0.0.1", self.port))


@pytest.fixture
def names() -> Iterator[NameServer]:
    made = NameServer()
    yield made
    made.close()


def worked(engine: Engine) -> int:
    steps = engine.snapshot().steps
    return steps.hits + steps.misses


async def test_calls_go_to_all_that_a_name_has_also_to_who_comes_later(tmp_path, names, monkeypatch):
    """And to nobody who has gone: no call fails."""
    monkeypatch.setattr(serving, "_CONNECTION_AGE", 0.2)
    model = write_text_model(tmp_path / "tiny")
    async with opened(model) as one, opened(model) as two:
        first = await serving.serve_grpc(
            one, ServerSettings(host="127.0.0.2", grpc_port=0, model_name="tiny")
        )
        settings = ServerSettings(host="127.0.0.3", grpc_port=first.port, model_name="tiny")
        second = await serving.serve_grpc(two, settings)
        names.addresses = ["127.0.0.2"]
        options = [("grpc.lb_policy_name", "round_robin"), ("grpc.dns_min_time_between_resolutions_ms", 50)]
        target = f"dns://127.0.0.1:{names.port}/{NAME}:{first.port}"
        async with grpc.aio.insecure_channel(target, options) as channel:
            stub = rpc.InferenceStub(channel)
            said = await text_of(stub.Generate(generate("once"), timeout=60))
            assert worked(two) == 0 < worked(one)

            async def ask() -> None:
                assert await text_of(stub.Generate(generate("once"), timeout=60)) == said

            async def ask_until_it_works(engine: Engine) -> None:
                before, end = worked(engine), time.monotonic() + PATIENCE
                while worked(engine) == before:
                    assert time.monotonic() < end, "nothing is asked of it"
                    await ask()

            names.addresses.append("127.0.0.3")
            await ask_until_it_works(two)
            await ask_until_it_works(one)
            names.addresses.remove("127.0.0.2")
            await first.stop(60)
            before = worked(two)
            for _ in range(10):
                await ask()
            assert worked(two) > before
        await until(lambda: one.snapshot().running == two.snapshot().running == 0, "nothing runs")
        await second.stop(0)
