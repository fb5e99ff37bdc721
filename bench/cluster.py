"""Experts on other machines: tokens a second and bytes on the wire, one node against two, on this machine.

    python -m bench.cluster demo
    python -m bench.cluster /tmp/model --share 25% --tokens 64 --rounds 5 --json cluster.json

Each node holds a share of the experts, the engine's among them; shards are processes of their own that listen
on the loopback address. All engines are open at the same time, and in each round every one of them writes the
same text, one after the other; figures are medians of the rounds, after one that is not counted. On one
machine the nodes share its cores and its drive, so the figures say what the way costs, not what a second
machine brings: give each --threads such that all of them fit. The round trip is of one expert and token.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from attrs import asdict, define
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer import Engine, SamplingParams
from mer._ext.remote import Ask
from mer.cli.common import model_argument
from mer.engine.observer import Snapshot

_WAIT_S = 120.0


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
    late: float  # share of those asked of them that were read here, too
    wait_s: float  # with nothing to do but wait for peers


@contextmanager
def shard(model: Path, experts: int, threads: int) -> Iterator[str]:
    """The address of a new one."""
    script = "from mer.cli.main import main; main()"
    command = [sys.executable, "-c", script, "shard", str(model), "--listen", "127.0.0.1:0"]
    command += ["--experts", str(experts), "--threads", str(threads)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "127.0.0.1:" in line:
                break
        else:
            raise click.ClickException("".join(lines))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield "127.0.0.1:" + "".join(lines).split("127.0.0.1:")[-1].split(";")[0].strip()
    finally:
        process.terminate()
        process.wait()


async def settle(engine: Engine) -> None:
    """Until every peer holds what it has room for."""
    end = time.monotonic() + _WAIT_S
    while not all(peer.held and peer.held >= peer.capacity for peer in engine.snapshot().peers):
        if time.monotonic() > end:
            raise click.ClickException(f"peers do not hold their experts: {engine.snapshot().peers}")
        await asyncio.sleep(0.05)


def summary(nodes: int, experts: int, tokens: int, rounds: list[tuple[float, Snapshot, Snapshot]]) -> Nodes:
    """rounds: seconds that each took, and the engine before and after it."""

    def median(value: Any) -> float:
        return statistics.median(value(*each) for each in rounds)

    def wired(now: Snapshot, name: str) -> int:
        return sum(getattr(peer, name) for peer in now.peers)

    def by_peers(_: float, before: Snapshot, after: Snapshot) -> float:
        steps, hits = after.steps - before.steps, after.peer_hits - before.peer_hits
        return hits / max(hits + steps.hits + steps.misses, 1)

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
        late=median(late),
        wait_s=median(lambda _, a, b: (b.peer_wait_s - a.peer_wait_s) / tokens),
    )


def round_trip(engine: Engine, times: int = 200) -> float | None:
    """Seconds of one expert for one token, by the first peer, once it holds some; the median."""
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
    found = []
    try:
        while len(found) < times:
            came.clear()
            start = time.perf_counter()
            far = time.monotonic_ns() + 10**10
            if not peer.ask(Ask(0, far, layer, x, [expert], [1], np.zeros(1, np.int32))):
                time.sleep(0.001)
                continue
            came.wait(_WAIT_S)
            found.append(time.perf_counter() - start)
    finally:
        peer._answered = answered
    return statistics.median(found)


async def measure(
    model: Path, most: int, share: float, prompt: int, tokens: int, rounds: int, threads: int
) -> dict[str, Any]:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    ids = [1 + i % 200 for i in range(prompt)]
    found: dict[int, list[tuple[float, Snapshot, Snapshot]]] = {}
    async with AsyncExitStack() as stack:
        common: dict[str, Any] = {"cache_experts": share, "threads": threads, "prefix_cache": False}
        common |= {"speculate": "off", "device": "cpu"}
        engines = [await stack.enter_async_context(Engine.open(model, **common))]
        experts = engines[0].budget.slots
        shards = [stack.enter_context(shard(model, experts, threads)) for _ in range(most - 1)]
        for n in range(1, most):
            engines.append(await stack.enter_async_context(Engine.open(model, peers=shards[:n], **common)))
            if (
                n < most - 1
            ):  # the first engine of a shard decides: each has its turn, and leaves what it chose
                await settle(engines[-1])
        for engine in engines:
            await settle(engine)
        answers = set()
        for number in range(rounds + 1):
            for nodes, engine in enumerate(engines, 1):
                before, start = engine.snapshot(), time.perf_counter()
                answers.add((await engine.generate(ids, params)).token_ids)
                taken = time.perf_counter() - start
                if number:
                    found.setdefault(nodes, []).append((taken, before, engine.snapshot()))
        if len(answers) != 1:
            raise click.ClickException("answers differ: this is a bug of mer")
        trip = await asyncio.to_thread(round_trip, engines[-1])
    made = [summary(nodes, experts, prompt + tokens, each) for nodes, each in found.items()]
    return {
        "model": model.name,
        "share": share,
        "prompt": prompt,
        "tokens": tokens,
        "threads": threads,
        "round_trip_s": trip,
        "nodes": [asdict(each) for each in made],
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table(title=f"{result['model']}: {result['prompt']} + {result['tokens']} tokens")
    names = ("nodes", "experts each", "tokens/s", "drive/token", "sent/token", "received/token", "by peers")
    for name in (*names, "asked twice", "wait/token"):
        shown.add_column(name, justify="right")
    for each in result["nodes"]:
        shown.add_row(
            f"{each['nodes']}", f"{each['experts_each']}", f"{each['tokens_per_s']:.1f}",
            *(f"{each[name] / 1024:.1f} KiB" for name in ("drive_bytes", "sent_bytes", "received_bytes")),
            f"{each['by_peers']:.1%}", f"{each['late']:.1%}", f"{1e3 * each['wait_s']:.2f} ms",
        )  # fmt: skip
    if result["round_trip_s"] is not None:
        shown.caption = f"round trip of one expert and token: {1e6 * result['round_trip_s']:.0f} µs"
    return shown


@click.command(help=help_of(__doc__))
@click.argument("model", callback=model_argument)
@click.option("--nodes", type=click.IntRange(1, 8), default=2, show_default=True)
@click.option("--share", default="25%", show_default=True, help="Of the experts, on each node.")
@click.option("--prompt", type=click.IntRange(1), default=16, show_default=True, help="Tokens.")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Of an answer.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each node.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write all figures there.")
def main(
    model: Path,
    nodes: int,
    share: str,
    prompt: int,
    tokens: int,
    rounds: int,
    threads: int,
    out: Path | None,
) -> None:
    part = float(share.removesuffix("%")) / 100
    result = asyncio.run(measure(model, nodes, part, prompt, tokens, rounds, threads))
    Console(width=110).print(table(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
