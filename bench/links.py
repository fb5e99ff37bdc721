"""Machines that are none: network namespaces, joined by links with a rate and a delay, which can be cut.

Every node has a link of its own to here, the namespace that this process is in. Where the kernel has netem,
the links are veth pairs on a bridge, shaped by it at both ends; elsewhere TUN devices, and a process that
holds packets back for as long as the cable would (links_relay.c, compiled when it is wanted). `Network.how`
says which it is. Needs root, iproute2, and a C compiler for the relay.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, Literal

from attrs import define

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET: Final = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_NAMESPACES: Final = Path("/run/netns")
# As large as can be: packets are work for this machine, which would bound the rate otherwise.
_MTU: Final = 65000
# Of the networks that are set aside for benchmarks (RFC 2544): 198.18.NET.0/24.
_HERE: Final = "198.18.{}.1"
_SOURCE: Final = Path(__file__).with_name("links_relay.c")

How = Literal["netem", "relay"]


class LinkError(Exception):
    """No such network can be made here."""


@define
class Node:
    """A namespace. delay_s: of one way; bits_per_s: of each way."""

    name: str
    address: str
    delay_s: float
    bits_per_s: float
    up: bool = True

    def popen(
        self, command: list[str], *, join: Callable[[], None] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """A process there; join: called in it first, to enter a control group for instance."""

        def enter() -> None:
            _enter(self.name)
            if join is not None:
                join()

        return subprocess.Popen(command, preexec_fn=enter, **options)


def why_not() -> str | None:
    """What is missing for a Network; None: nothing."""
    if os.geteuid():
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return "network namespaces need iproute2 (ip and tc)"
    try:
        with Network(1):
            return None
    except LinkError as error:
        return f"no network namespaces here: {error}"


def has_netem() -> bool:
    """Whether this kernel can delay packets itself; tried at a device that exists for the moment."""
    name = f"mer-{os.getpid()}-t"
    try:
        _do("ip", "link", "add", name, "type", "dummy")
    except LinkError:
        return False
    try:
        _do("tc", "qdisc", "add", "dev", name, "root", "netem", "delay", "1ms")
    except LinkError:
        return False
    else:
        return True
    finally:
        _do("ip", "link", "del", name)


class Network:
    """`n` nodes, their links alike at first; removed at the end. Raises LinkError."""

    def __init__(self, n: int, *, delay_s: float = 0.0, bits_per_s: float = 25e9) -> None:
        self._stack = ExitStack()
        self._relay: subprocess.Popen[str] | None = None
        self.nodes: list[Node] = []
        try:
            self.how: How = "netem" if has_netem() else "relay"
            self._tag, self._net = _free_network()
            for number in range(n):
                self._add_namespace(number, delay_s, bits_per_s)
            if self.how == "netem":
                self._lay_pairs()
            else:
                self._lay_tuns()
            for node in self.nodes:
                self.shape(node)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def relay(self) -> int | None:
        """The process that carries the packets; None: the kernel does."""
        return self._relay.pid if self._relay is not None else None

    def shape(
        self,
        node: Node,
        *,
        delay_s: float | None = None,
        bits_per_s: float | None = None,
        up: bool | None = None,
    ) -> None:
        """Change its link; up: False cuts the cable, without a word to either end."""
        node.delay_s = node.delay_s if delay_s is None else delay_s
        node.bits_per_s = node.bits_per_s if bits_per_s is None else bits_per_s
        node.up = node.up if up is None else up
        number = self.nodes.index(node)
        if self._relay is None:
            self._shape_pair(number, node)
            return
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        per_kib = round(1024 * 8e9 / node.bits_per_s)
        self._relay.stdin.write(f"{number} {round(1e9 * node.delay_s)} {per_kib} {int(node.up)}\n")
        self._relay.stdin.flush()
        if self._relay.stdout.readline() != "ok\n":
            raise LinkError("the relay of packets has ended")

    def round_trip(self, node: Node, times: int = 5) -> float:
        """Seconds of a small packet there and back, the least of some. Raises TimeoutError: it is cut."""
        found = []
        for _ in range(times):
            start = time.perf_counter()
            with socket.socket() as caller:
                caller.settimeout(0.5 + 4 * node.delay_s)
                with suppress(ConnectionRefusedError):  # nobody is at this port: that is the answer
                    caller.connect((node.address, 1))
            found.append(time.perf_counter() - start)
        return min(found)

    def _add_namespace(self, number: int, delay_s: float, bits_per_s: float) -> None:
        name = f"{self._tag}{number}"
        _do("ip", "netns", "add", name)
        self._stack.callback(_do, "ip", "netns", "del", name)
        _do("ip", "-n", name, "link", "set", "lo", "up")
        address = _HERE.format(self._net)[:-1] + f"{number + 2}"
        self.nodes.append(Node(name, address, delay_s, bits_per_s))

    def _lay_pairs(self) -> None:
        bridge = self._tag
        _do("ip", "link", "add", bridge, "type", "bridge")
        self._stack.callback(_do, "ip", "link", "del", bridge)
        for number, node in enumerate(self.nodes):
            here, there = f"{self._tag}h{number}", f"{self._tag}n{number}"
            _do("ip", "link", "add", here, "mtu", f"{_MTU}", "type", "veth",
                "peer", "name", there, "mtu", f"{_MTU}", "netns", node.name)  # fmt: skip
            _do("ip", "link", "set", here, "master", bridge, "up")
            _do("ip", "-n", node.name, "addr", "add", f"{node.address}/24", "dev", there)
            _do("ip", "-n", node.name, "link", "set", there, "up")
        _do("ip", "addr", "add", f"{_HERE.format(self._net)}/24", "dev", bridge)
        _do("ip", "link", "set", bridge, "mtu", f"{_MTU}", "up")

    def _shape_pair(self, number: int, node: Node) -> None:
        for ip, name in ((("-n", node.name), f"{self._tag}n{number}"), ((), f"{self._tag}h{number}")):
            _do("tc", *ip, "qdisc", "replace", "dev", name, "root", "netem", "limit", "100000",
                "delay", f"{1e6 * node.delay_s:.0f}us", "rate", f"{node.bits_per_s:.0f}bit",
                "loss", "0%" if node.up else "100%")  # fmt: skip

    def _lay_tuns(self) -> None:
        tuns = [_open_tun(self._tag)]
        self._stack.callback(os.close, tuns[0])
        for node in self.nodes:
            tun = _in_namespace(node.name, lambda: _open_tun("wire"))
            self._stack.callback(os.close, tun)
            tuns.append(tun)
            _do("ip", "-n", node.name, "addr", "add", f"{node.address}/24", "dev", "wire")
            _do("ip", "-n", node.name, "link", "set", "wire", "mtu", f"{_MTU}", "txqueuelen", "10000", "up")
        _do("ip", "addr", "add", f"{_HERE.format(self._net)}/24", "dev", self._tag)
        _do("ip", "link", "set", self._tag, "mtu", f"{_MTU}", "txqueuelen", "10000", "up")
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "relay"
            _do("cc", "-O2", "-Wall", "-Wextra", "-o", str(program), str(_SOURCE))
            command, pipe = [str(program), *map(str, tuns)], subprocess.PIPE
            self._relay = subprocess.Popen(command, pass_fds=tuns, stdin=pipe, stdout=pipe, text=True)
        self._stack.callback(_end, self._relay)


def _free_network() -> tuple[str, int]:
    """A name for devices and a number of a network that nobody has here."""
    used = _do("ip", "-4", "addr")
    first = os.getpid() % 256
    for step in range(256):
        number = (first + step) % 256
        name = f"mer{number}x"
        # A process that was killed may have left its namespaces.
        if _HERE.format(number) not in used and not (_NAMESPACES / f"{name}0").exists():
            return name, number
    raise LinkError("198.18.0.0/16 is in use altogether")


def _open_tun(name: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError as error:
        os.close(tun)
        raise LinkError(f"/dev/net/tun: {error}") from None
    return tun


def _enter(name: str) -> None:
    """The calling thread is in the namespace then."""
    there = os.open(_NAMESPACES / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(there, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"namespace {name} can't be entered")
    finally:
        os.close(there)


def _in_namespace(name: str, make: Callable[[], int]) -> int:
    """What `make` returns on a thread that is in the namespace: a thread's end leaves it."""
    found: list[int | BaseException] = []

    def run() -> None:
        try:
            _enter(name)
            found.append(make())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _do(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LinkError(f"{command[0]} is not there") from None
    if done.returncode:
        raise LinkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
