"""Experts on other machines: tokens a second and bytes on the wire, by the number of nodes, on this machine.

    python -m bench.cluster demo
    python -m bench.cluster /tmp/model --share 25% --tokens 64 --rounds 5 --json cluster.json
    python -m bench.cluster /tmp/model --nodes 1 --nodes 2 --nodes 4 --delay 0.5 --gbit 10
    python -m bench.cluster /tmp/model --delay 1 --gbit 1 --expert-wire bf16 --drive 250

Each node holds a share of the experts, the engine's among them; shards are processes of their own. With delay
or rate each is in a network namespace behind a link like that (bench/links.py: root), in a memory control
group of its own, with certificates and a token; else on the loopback address. --drive has the engine read
more slowly than this machine's drive could (root as well). One number of nodes after the
other writes the same text in each round; figures are medians of the rounds, after one that is not counted. On
one machine the nodes share its cores and its drive, so the figures say what the way costs, not what a second
machine brings: give each --threads such that all of them fit. What a message costs is measured with one
expert and token, when nothing else is asked. bench/cluster_sim.py takes the JSON; it knows of no reading
ahead: give --prefetch 0 for it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import click
import numpy as np
from attrs import asdict, define, frozen
from rich.console import Console
from rich.table import Table

from bench.cgroups import MemoryGroup, SlowReads
from bench.help import help_of
from bench.links import LinkError, Network
from mer import Engine, SamplingParams
from mer._ext.cpus import usable_cpus
from mer._ext.remote import Ask
from mer.cli.common import model_argument
from mer.config import ExpertWire
from mer.engine.observer import Snapshot

_WAIT_S = 120.0
# What a shard takes beside its experts: bytes.
_BESIDE = 512 << 20


@define
class Nodes:
    """Of one number of nodes: medians, bytes and shares per token that was written or read."""

    nodes: int
    experts_each: int
    tokens_per_s: float
    drive_bytes: float
    sent_bytes: float
    received_bytes: float
    by_peers: float  # share of the experts that other nodes computed
    from_drive: float  # share of them that was read
    expert_s: float  # what one expert takes to compute here
    dense_s: float  # what the rest of the model takes
    io_wait_s: float  # with nothing to do but wait for reads
    late: float  # share of those asked of them that were read here, too
    wait_s: float  # with nothing to do but wait for peers
    asks: float  # times that a peer was asked
    engine_cpu_s: float  # processor time of the engine's process
    others_cpu_s: float  # of the shards and the relay


@frozen
class Message:
    """What asking a peer for one expert of one token takes: seconds, medians and means of some."""

    trip_s: float  # until the answer is there
    send_s: float  # of the thread that asks, before it goes on
    engine_cpu_s: float  # processor time of the engine's process
    shard_cpu_s: float
    relay_cpu_s: float


@frozen
class Running:
    """A shard."""

    address: str
    pid: int


def cpu_s(pid: int) -> float:
    """Processor time of a process until now, in the system's ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@frozen
class Place:
    """Where shards are: in namespaces behind links, or at the loopback address."""

    network: Network | None
    folder: Path

    @property
    def asking(self) -> dict[str, Any]:
        """Settings of an engine."""
        if self.network is None:
            return {}
        files = {f"peer_{part}": self.folder / f"engine.{part}" for part in ("cert", "key", "ca")}
        return files | {"peer_token": self.folder / "token"}

    def command(self, number: int) -> list[str]:
        if self.network is None:
            return ["--listen", "127.0.0.1:0"]
        address = self.network.nodes[number].address
        names = {"cert": "--tls-cert", "key": "--tls-key", "ca": "--tls-client-ca"}
        files = [[option, str(self.folder / f"{address}.{part}")] for part, option in names.items()]
        listen = ["--listen", f"{address}:0", "--token-file", str(self.folder / "token")]
        return [*listen, *(word for pair in files for word in pair)]


@contextmanager
def place(nodes: int, delay_s: float | None, bits_per_s: float | None) -> Iterator[Place]:
    """For so many shards; neither delay nor rate: at the loopback address."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        network = None
        if nodes and (delay_s is not None or bits_per_s is not None):
            made = Network(nodes, delay_s=delay_s or 0.0, bits_per_s=bits_per_s or 25e9)
            network = stack.enter_context(made)
            write_secrets(Path(folder), ["engine", *(node.address for node in network.nodes)])
        yield Place(network, Path(folder))


def write_secrets(folder: Path, names: list[str]) -> None:
    try:
        import trustme
    except ImportError:
        raise click.ClickException("--delay and --gbit need certificates: pip install trustme") from None
    ca = trustme.CA()
    (folder / "token").write_text("a token of this benchmark alone")
    for name in names:
        issued = ca.issue_cert(name)
        (folder / f"{name}.cert").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        (folder / f"{name}.key").write_bytes(issued.private_key_pem.bytes())
        (folder / f"{name}.ca").write_bytes(ca.cert_pem.bytes())


@contextmanager
def shard(
    model: Path, experts: int, threads: int, where: Place, number: int, limit: int
) -> Iterator[Running]:
    """A new one. limit: bytes of it, and of its control group, if it has one."""
    script = "from mer.cli.main import main; main()"
    command = [sys.executable, "-c", script, "shard", str(model), *where.command(number)]
    command += ["--experts", str(experts), "--threads", str(threads), "--ram", f"{limit >> 20}MiB"]
    with ExitStack() as stack:
        if where.network is None:
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        else:
            group = stack.enter_context(MemoryGroup(limit))
            node = where.network.nodes[number]
            process = node.popen(command, join=group.join, stderr=subprocess.PIPE, text=True)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        assert process.stderr is not None
        host = "127.0.0.1" if where.network is None else where.network.nodes[number].address
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(rf"{re.escape(host)}:\d+", line):
                break
        else:
            raise click.ClickException("".join(lines))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Running(found[0], process.pid)


async def settle(engine: Engine) -> None:
    """Until every peer holds what it has room for."""
    end = time.monotonic() + _WAIT_S
    while not all(peer.held and peer.held >= peer.capacity for peer in engine.snapshot().peers):
        if time.monotonic() > end:
            raise click.ClickException(f"peers do not hold their experts: {engine.snapshot().peers}")
        await asyncio.sleep(0.05)


@frozen
class Moment:
    """The engine, and processor time that it and others have used."""

    at: float
    snapshot: Snapshot
    engine_cpu_s: float
    others_cpu_s: float


def summary(nodes: int, experts: int, tokens: int, rounds: list[tuple[Moment, Moment]]) -> Nodes:
    """rounds: before and after each."""

    def median(value: Any) -> float:
        return statistics.median(value(b.at - a.at, a.snapshot, b.snapshot) for a, b in rounds)

    def used(name: str) -> float:
        return statistics.median(getattr(b, name) - getattr(a, name) for a, b in rounds) / tokens

    def wired(now: Snapshot, name: str) -> int:
        return sum(getattr(peer, name) for peer in now.peers)

    def by_peers(_: float, before: Snapshot, after: Snapshot) -> float:
        steps, hits = after.steps - before.steps, after.peer_hits - before.peer_hits
        return hits / max(hits + steps.hits + steps.misses, 1)

    def spent(before: Snapshot, after: Snapshot) -> tuple[float, float, int]:
        old, new = before.steps, after.steps
        count = new.hits + new.misses - old.hits - old.misses
        return new.expert_s - old.expert_s, new.io_wait_s - old.io_wait_s, max(count, 1)

    def dense(seconds: float, before: Snapshot, after: Snapshot) -> float:
        computing, reading, _ = spent(before, after)
        return (seconds - computing - reading - after.peer_wait_s + before.peer_wait_s) / tokens

    def late(_: float, before: Snapshot, after: Snapshot) -> float:
        count = after.peer_late - before.peer_late
        return count / max(count + after.peer_hits - before.peer_hits, 1)

    return Nodes(
        nodes=nodes,
        experts_each=experts,
        tokens_per_s=median(lambda seconds, *_: tokens / seconds),
        drive_bytes=median(lambda _, a, b: (b.steps.bytes_read - a.steps.bytes_read) / tokens),
        sent_bytes=median(lambda _, a, b: (wired(b, "sent") - wired(a, "sent")) / tokens),
        received_bytes=median(lambda _, a, b: (wired(b, "received") - wired(a, "received")) / tokens),
        by_peers=median(by_peers),
        from_drive=median(
            lambda _, a, b: (b.steps.misses - a.steps.misses) / (spent(a, b)[2] + b.peer_hits - a.peer_hits)
        ),
        expert_s=median(lambda _, a, b: spent(a, b)[0] / spent(a, b)[2]),
        dense_s=median(dense),
        io_wait_s=median(lambda _, a, b: spent(a, b)[1] / tokens),
        late=median(late),
        wait_s=median(lambda _, a, b: (b.peer_wait_s - a.peer_wait_s) / tokens),
        asks=median(lambda _, a, b: (wired(b, "asked") - wired(a, "asked")) / tokens),
        engine_cpu_s=used("engine_cpu_s"),
        others_cpu_s=used("others_cpu_s"),
    )


def message(engine: Engine, shard: int, relay: int | None, times: int = 1000) -> Message | None:
    """By the first peer, once it holds some; shard, relay: process ids."""
    experts = engine._runner.experts
    assert experts is not None
    tier, tables = experts.streamer, experts._tables
    peer = experts._peers._peers.get(0) if experts._peers is not None else None
    held = peer._session.held if peer is not None else ()
    if peer is None or not held:
        return None
    came = threading.Event()
    answered, peer._answered = peer._answered, lambda _: came.set()
    layer, expert = divmod(min(held), tier.n_experts)
    x = np.ones((1, int(tables.layers[layer, 3])), np.float32)
    trips: list[float] = []
    sends: list[float] = []
    others = [pid for pid in (shard, relay) if pid is not None]
    before = [time.process_time(), *map(cpu_s, others)]
    try:
        while len(trips) < times:
            came.clear()
            start = time.perf_counter()
            far = time.monotonic_ns() + 10**10
            first, weight = np.zeros(1, np.int32), np.ones(1, np.float32)
            if not peer.ask(Ask(0, far, layer, x, [expert], [1], first, weight)):
                time.sleep(0.001)
                continue
            sends.append(time.perf_counter() - start)
            came.wait(_WAIT_S)
            trips.append(time.perf_counter() - start)
    finally:
        peer._answered = answered
    after = [time.process_time(), *map(cpu_s, others)]
    used = [(b - a) / times for a, b in zip(before, after, strict=True)]
    return Message(statistics.median(trips), statistics.median(sends), *used[:2], used[2] if relay else 0.0)


async def measure(
    model: Path,
    nodes: tuple[int, ...],
    share: float,
    prompt: int,
    tokens: int,
    rounds: int,
    threads: int,
    prefetch: int | None = None,
    link: tuple[float | None, float | None] = (None, None),
    wire: ExpertWire = "f32",
    drive: int | None = None,
) -> dict[str, Any]:
    """link: seconds of one way, and bits a second. drive: bytes/s; None: as many as there are."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    ids = [1 + i % 200 for i in range(prompt)]
    common: dict[str, Any] = {"cache_experts": share, "threads": threads, "prefix_cache": False}
    common |= {"speculate": "off", "device": "cpu", "expert_wire": wire}
    common |= {} if prefetch is None else {"prefetch": prefetch}
    made, answers, costs, measured = [], set(), None, None
    async with AsyncExitStack() as stack:
        async with Engine.open(model, **common) as engine:
            slots = engine.budget.slots
            tables = engine._runner.experts._tables if engine._runner.experts is not None else None
            top_k = engine._runner.experts.streamer.top_k if engine._runner.experts is not None else 0
        assert tables is not None
        where = stack.enter_context(place(max(nodes) - 1, *link))
        limit = slots * tables.slot_bytes + _BESIDE
        shards = [
            stack.enter_context(shard(model, slots, threads, where, i, limit)) for i in range(max(nodes) - 1)
        ]
        relay = None
        if where.network is not None:
            measured = where.network.round_trip(where.network.nodes[0], 20)
            relay = where.network.relay
        others = [*(each.pid for each in shards), *([relay] if relay is not None else [])]
        slow = None if drive is None else stack.enter_context(SlowReads(model))

        def now(engine: Engine) -> Moment:
            used = sum(map(cpu_s, others))
            return Moment(time.perf_counter(), engine.snapshot(), time.process_time(), used)

        for n in nodes:
            addresses = tuple(each.address for each in shards[: n - 1])
            asking = {"peers": addresses, **where.asking} if n > 1 else {}
            found = []
            async with Engine.open(model, **common, **asking) as engine:
                await settle(engine)
                if slow is not None:
                    slow.limit(drive)
                for number in range(rounds + 1):
                    before = now(engine)
                    answers.add((await engine.generate(ids, params)).token_ids)
                    if number:
                        found.append((before, now(engine)))
                if slow is not None:
                    slow.limit(None)
                if n > 1 and costs is None:
                    costs = await asyncio.to_thread(message, engine, shards[0].pid, relay)
            made.append(summary(n, slots, prompt + tokens, found))
    if len(answers) != 1:
        raise click.ClickException("answers differ: this is a bug of mer")
    return {
        "model": model.name,
        "share": share,
        "prompt": prompt,
        "tokens": tokens,
        "threads": threads,
        "link": "loopback" if where.network is None else where.network.how,
        "delay_s": link[0] or 0.0,
        "bits_per_s": link[1] or 25e9,
        "wire": wire,
        "drive_bytes_per_s": drive,
        "packet_round_trip_s": measured,
        "message": None if costs is None else asdict(costs),
        "cores": usable_cpus(),
        "prefetch": prefetch,
        "layers": len(tables.layers),
        "top_k": top_k,
        "hidden": int(tables.layers[0, 3]),
        "expert_bytes": int(tables.slot_bytes),
        "nodes": [asdict(each) for each in made],
    }


def table(result: dict[str, Any]) -> Table:
    link = result["link"]
    if link != "loopback":
        link += f", {1e3 * result['delay_s']:g} ms each way, {result['bits_per_s'] / 1e9:g} Gbit/s"
    link += f"; {result['wire']}"
    if result["drive_bytes_per_s"] is not None:
        link += f"; drive {result['drive_bytes_per_s'] / 1e6:g} MB/s"
    shown = Table(title=f"{result['model']}: {result['prompt']} + {result['tokens']} tokens; {link}")
    names = ("nodes", "experts each", "tokens/s", "drive/token", "sent/token", "received/token", "by peers")
    for name in (*names, "asked twice", "wait/token"):
        shown.add_column(name, justify="right")
    for each in result["nodes"]:
        shown.add_row(
            f"{each['nodes']}", f"{each['experts_each']}", f"{each['tokens_per_s']:.1f}",
            f"{each['drive_bytes'] / 2**20:.1f} MiB",
            *(f"{each[name] / 1024:.1f} KiB" for name in ("sent_bytes", "received_bytes")),
            f"{each['by_peers']:.1%}", f"{each['late']:.1%}", f"{1e3 * each['wait_s']:.2f} ms",
        )  # fmt: skip
    if (costs := result["message"]) is not None:
        used = " + ".join(
            f"{1e6 * costs[name]:.0f}" for name in ("engine_cpu_s", "shard_cpu_s", "relay_cpu_s")
        )
        shown.caption = (
            f"one expert and token: {1e6 * costs['trip_s']:.0f} µs there and back; "
            f"processor time of engine, shard and relay {used} µs"
        )
    return shown


@click.command(help=help_of(__doc__))
@click.argument("model", callback=model_argument)
@click.option("--nodes", type=click.IntRange(1, 8), multiple=True, default=(1, 2), show_default=True)
@click.option("--share", default="25%", show_default=True, help="Of the experts, on each node.")
@click.option("--prompt", type=click.IntRange(1), default=16, show_default=True, help="Tokens.")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Of an answer.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each node.")
@click.option("--prefetch", type=click.IntRange(0), help="As of mer serve.")
@click.option("--delay", type=click.FloatRange(0), help="Of a link, one way, in ms.")
@click.option("--gbit", type=click.FloatRange(0, min_open=True), help="Of a link, each way, in Gbit/s.")
@click.option("--expert-wire", "wire", type=click.Choice(get_args(ExpertWire)), default="f32", help="Rows.")
@click.option("--drive", type=click.FloatRange(1), help="What the engine may read, in MB/s.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write all figures there.")
def main(
    model: Path,
    nodes: tuple[int, ...],
    share: str,
    prompt: int,
    tokens: int,
    rounds: int,
    threads: int,
    prefetch: int | None,
    delay: float | None,
    gbit: float | None,
    wire: ExpertWire,
    drive: float | None,
    out: Path | None,
) -> None:
    part = float(share.removesuffix("%")) / 100
    link = (None if delay is None else delay / 1e3, None if gbit is None else gbit * 1e9)
    rate = None if drive is None else round(1e6 * drive)
    try:
        result = asyncio.run(
            measure(model, nodes, part, prompt, tokens, rounds, threads, prefetch, link, wire, rate)
        )
    except LinkError as error:
        raise click.ClickException(f"no links can be made here: {error}") from None
    Console(width=120).print(table(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
