"""`mer serve` as a program, for the tests of its faces."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx

from mer import Engine
from mer.api.http.app import create_app
from mer.api.http.server import HttpServer
from mer.api.http.service import Service
from mer.api.settings import ServerSettings

SERVE = [sys.executable, "-c", "from mer.cli.main import main; main()", "serve"]
# Nothing in here takes that long; it ends a test that would hang.
PATIENCE = 180


class Server:
    """A running `mer serve`: its URL, its process, what it wrote to standard error.

    join: called in the process before all else, to enter a control group for instance.
    """

    def __init__(
        self,
        model: Path | str,
        *options: object,
        join: Callable[[], None] | None = None,
        **environment: str,
    ) -> None:
        grpc = [] if "--grpc-port" in options else ["--no-grpc"]
        self.process = subprocess.Popen(
            [*SERVE, str(model), "--port", "0", *grpc, *map(str, options)], preexec_fn=join,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1", **environment},
        )  # fmt: skip
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        found = self.wait_for(r"(https?://\S+:\d+)(?:, gRPC on port (\d+))?$")
        self.url = found[1]
        self.grpc_port = int(found[2] or 0)
        self.port = int(self.url.rpartition(":")[2])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            self._new.put(line)
        self._new.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line, of those that nobody waited for yet, in which `pattern` is found."""
        while (line := self._new.get(timeout=PATIENCE)) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"the server ended without {pattern!r}: {''.join(self.lines)}")

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Its exit status, awaited."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.ended()


@contextmanager
def serving(
    model: Path | str, *options: object, join: Callable[[], None] | None = None, **environment: str
) -> Iterator[Server]:
    server = Server(model, *options, join=join, **environment)
    try:
        yield server
    finally:
        server.close()


@asynccontextmanager
async def asking(engine: Engine, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the same server in this process and its event loop, so that a test sees what it holds."""
    service = Service(ServerSettings(**{"model_name": "small", "port": 0} | settings), engine)
    async with (
        HttpServer(create_app(service), service.settings) as server,
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client,
    ):
        yield client
