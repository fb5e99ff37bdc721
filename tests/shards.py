"""Shards of a model as processes of their own, and engines that use them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trustme
from engine_models import opened

from mer import Engine, SamplingParams
from mer.cluster.server import ShardServer, ShardSettings
from mer.cluster.shard import Shard
from mer.cluster.state import PeerState

MER = [sys.executable, "-c", "from mer.cli.main import main; main()"]
# A generous limit of what is waited for, and how long a peer has before the own drive is asked, too.
LONG = 180.0


class Process:
    """`mer shard`, listening; what it writes is in `lines`. popen: begins it somewhere else."""

    def __init__(
        self,
        model: Path,
        *options: str,
        port: int = 0,
        host: str = "127.0.0.1",
        popen: Callable[..., subprocess.Popen[str]] = subprocess.Popen,
    ) -> None:
        command = [*MER, "shard", str(model), "--listen", f"{host}:{port}", "--threads", "1", *options]
        self.process = popen(command, stderr=subprocess.PIPE, text=True, env=_environment())
        self.host = host
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(rf"{re.escape(host)}:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise AssertionError("".join(self.lines))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self, on: bool = True) -> None:
        self.process.send_signal(signal.SIGSTOP if on else signal.SIGCONT)

    def end(self) -> int:
        """Its exit status after SIGTERM."""
        if self.process.poll() is None:
            self.freeze(False)
            self.process.terminate()
        status = self.process.wait(LONG)
        self._reader.join(LONG)
        return status


def _environment() -> dict[str, str]:
    return os.environ | {"COLUMNS": "200"}


@contextmanager
def shard(model: Path, *options: str, **where) -> Iterator[Process]:
    made = Process(model, *(options or ("--ram", "1GiB")), **where)
    try:
        yield made
    finally:
        made.end()


@contextmanager
def here(model: Path, token: Path | None = None, port: int = 0, most: int | None = None, **settings):
    """A shard in this process: the server, and its service's shard."""
    made = Shard(model, 1 << 40, 0, most=most, threads=1)
    server = ShardServer(made, ShardSettings(listen=f"127.0.0.1:{port}", token_file=token, **settings))
    server.address = f"127.0.0.1:{server.port}"
    try:
        yield server, made
    finally:
        server.stop()
        made.close()


def certificates(path: Path, ca: trustme.CA, name: str = "127.0.0.1") -> dict[str, Path]:
    """Files in `path`: a certificate for `name`, its key, and that of the CA."""
    issued = ca.issue_cert(name)
    parts = {
        "cert": b"".join(blob.bytes() for blob in issued.cert_chain_pems),
        "key": issued.private_key_pem.bytes(),
        "ca": ca.cert_pem.bytes(),
    }
    path.mkdir()
    for part, content in parts.items():
        (path / part).write_bytes(content)
    return {part: path / part for part in parts}


@asynccontextmanager
async def with_peers(model: Path, *shards: Process, held: bool = True, **settings) -> AsyncIterator[Engine]:
    """An engine that has few experts itself; begun once the shards hold what they can."""
    addresses = tuple(each.address for each in shards)
    async with opened(model, peers=addresses, cache_experts=4, prefetch=0, **settings) as engine:
        if held:
            await until(lambda: settled(engine), "experts are held")
        yield engine


def settled(engine: Engine) -> bool:
    """Whether every peer holds as many as it has room for."""
    return all(peer.held and peer.held == peer.capacity for peer in peers(engine))


def peers(engine: Engine) -> tuple[PeerState, ...]:
    return engine.snapshot().peers


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.02)


async def streams(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, when: int, act: Callable[[], object]
) -> list[tuple[int, ...]]:
    """What is answered to all prompts at once; `act` is done when the first has so many tokens."""

    async def read(number: int) -> tuple[int, ...]:
        found: list[int] = []
        async for piece in engine.stream(prompts[number], params):
            if number == 0 and len(found) <= when < len(found) + len(piece.token_ids):
                act()
            found += piece.token_ids
        return tuple(found)

    return await asyncio.gather(*map(read, range(len(prompts))))
