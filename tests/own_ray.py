"""A Ray that only one test file uses: started without a fixed port, and all its processes ended behind it."""

from __future__ import annotations

import json
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

MER = [sys.executable, "-c", "from mer.cli.main import main; main()", "cluster"]
HOST = Path(__file__).parent / "ray_host.py"
MINUTES = "600"
# No limit of time or memory of Ray's counts: on a busy machine a slow process is no dead one, and memory or a
# disk that others fill are no reason to end these.
OWN = {
    "RAY_AUTH_MODE": "token",  # or Ray would leave one in the home directory
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",  # they are started when they are needed
    "RAY_prestart_worker_first_driver": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_local_fs_capacity_threshold": "1",
    "RAY_agent_register_timeout_ms": MINUTES + "000",
    "RAY_worker_register_timeout_seconds": MINUTES,
    "RAY_health_check_timeout_ms": MINUTES + "000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": MINUTES,
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": MINUTES,
}
# A generous limit of whatever is waited for, in seconds.
LONG = 240.0


@frozen
class Cluster:
    """Where it is: of Ray, of the HTTP API, of the gRPC API."""

    host: subprocess.Popen[str]
    ray: str
    http: str
    grpc: str

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run(*arguments, "--ray", self.ray)

    def state(self) -> dict[str, Any]:
        """As `mer cluster status --json` tells it; {} while Ray has no answer."""
        return json.loads(self._told("") or "{}")

    def metrics(self) -> str:
        """Where Ray tells them."""
        return self._told("metrics").strip()

    def _told(self, question: str) -> str:
        assert self.host.stdin is not None
        self.host.stdin.write(f"{question}\n")
        self.host.stdin.flush()
        return _line(self.host, LONG)

    def until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        end = time.monotonic() + LONG
        while True:
            state = self.state()
            if state and condition(state):
                return state
            assert time.monotonic() < end, f"{what}: {state}"
            time.sleep(0.2)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`mer cluster`."""
    command = [*MER, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG, env=os.environ | OWN)


def quiet_port() -> int:
    """A free one, and of those that a system does not hand out by itself: so it stays free."""
    for _ in range(1000):
        port = random.randrange(20000, 30000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


@contextmanager
def own_ray() -> Iterator[Cluster]:
    """With nothing on it. Skips where Ray does not start, with its reason."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets are short
    said = Path(folder) / "stderr"
    with said.open("w") as errors:
        host = subprocess.Popen(
            [sys.executable, HOST, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | OWN,
            start_new_session=True,
        )
    try:
        address = _line(host, LONG)
        if not address:
            lines = said.read_text().strip().splitlines() or ["nothing is said"]
            pytest.skip(f"Ray does not start here: {lines[-1]}")
        yield Cluster(host, address.strip(), f"http://127.0.0.1:{quiet_port()}", f"127.0.0.1:{quiet_port()}")
    finally:
        with suppress(BrokenPipeError):
            host.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            host.wait(LONG)
        for pid in _session(host.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        host.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _line(process: subprocess.Popen[str], limit: float) -> str:
    """The next one that it writes; '' if it ends, or writes none for so long. One is asked for at a time."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], limit)
    return process.stdout.readline() if ready else ""


def _session(leader: int) -> list[int]:
    """Processes of the session of `leader`, itself included."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # it has ended
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found
