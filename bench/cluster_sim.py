"""What more nodes would bring: a simulation of one engine and its shards, by discrete events.

    python -m bench.cluster_sim                         table: where a remote expert beats the own drive
    python -m bench.cluster_sim --plot turn.png         the same as a picture (needs matplotlib)
    python -m bench.cluster_sim --check a.json          beside what bench.cluster measured (with --plot, too)
    python -m bench.cluster_sim --nodes 64              DeepSeek-V3's shape, from 1 node to so many

Assumptions:
 1. One request, one token a step, no drafts, nothing read ahead, no prefix; layers one after the other.
 2. Experts are wanted by a popularity of (rank + 1) ** -skew, each layer and token anew. The engine keeps the
    hottest, peers the next ones in turn, its drive has the rest; so each wanted one is here, at a peer or on
    the drive by these shares, whatever the others are. With --check the shares are those measured.
 3. Drive, engine, each shard and each way of the engine's one port do one thing at a time, in the order of
    asking, and so do the threads of the engine that take answers (Python's lock). Shards serve nobody else;
    the switch between is never full.
 4. A message takes its bytes at the link's rate, then the delay. The engine makes and sends one after the
    other (`send_s`) before it computes anything, and takes each answer (`take_s`); a shard has work beside
    computing (`serve_s`); `ask_s` is what remains of a round trip: waking threads. None of them depends on
    how large rows are.
 5. An expert takes the same time at a peer as here. No peer is late or lost, and nobody is skipped.
 6. The rest of the model (`dense_s`) is not spread: it takes the same time with any number of nodes.
 7. Nodes are machines of their own, of as many cores as they use. With --check they share the cores of one,
    and what carries packets there (`carry_s`) does as well: each thing that is done takes a core, of those
    that wait the first one gets it. Nothing else runs, and work does not slow other work down otherwise.
With --check the costs of a message are those measured with nothing else to do; expert_s, dense_s and the
drive's speed are those with which one node takes as long as was measured. Where the drive was throttled it is
as quick as in the result before, and a token takes at least what its bytes take at the throttle's rate.
"""

from __future__ import annotations

import heapq
import json
import statistics
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer.config import ExpertWire

# Of a request and an answer beside the rows: ids, counts, checksums, HTTP/2 and TLS. Bytes.
_BESIDE = 150
# Bytes of a number of a row.
_NUMBER = {"f32": 4, "bf16": 2, "f16": 2}


@frozen
class World:
    """Sizes in bytes, times in seconds. dense_s: of a token, all layers."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    expert_bytes: int
    dense_s: float
    expert_s: float
    send_s: float
    take_s: float
    serve_s: float
    ask_s: float
    drive_bytes_per_s: float
    delay_s: float
    bits_per_s: float
    skew: float = 0.8
    carry_s: float = 0.0  # of a message one way, by a process that stands for the links
    number_bytes: int = 4  # of a row on the wire: F32
    cores: int | None = None  # that all nodes share; None: each has its own


# The real shape; experts in Q4_K (4.5 bits a weight). Times are assumed: a server with 200 GB/s of memory
# bandwidth, which reads some 12 GB a token beside routed experts (17e9 weights), and a drive of 6 GB/s. What
# a message takes is what bench.cluster measured on a Xeon of 2.5 GHz: Python and gRPC, on either side.
DEEPSEEK_V3 = World(
    layers=58, experts=256, top_k=8, hidden=7168, expert_bytes=round(3 * 7168 * 2048 * 4.5 / 8),
    dense_s=0.060, expert_s=24.8e6 / 200e9, send_s=140e-6, take_s=310e-6, serve_s=450e-6, ask_s=0.0,
    drive_bytes_per_s=6e9, delay_s=50e-6, bits_per_s=25e9,
)  # fmt: skip


class Stations:
    """Who does one thing after the other; of those that need a core no more work at a time than there are."""

    def __init__(self, cores: int | None) -> None:
        self._free: dict[str, float] = {}
        self._cores = None if cores is None else [0.0] * cores
        self._events: list[tuple[float, int, str, float, bool, Callable[[float], None]]] = []
        self._order = count()
        self._end = 0.0

    def do(
        self, ready: float, who: str, seconds: float, then: Callable[[float], None], core: bool = True
    ) -> None:
        """From `ready` on; `then` is told when it is done."""
        heapq.heappush(self._events, (ready, next(self._order), who, seconds, core, then))

    def run(self) -> float:
        """When all is done."""
        while self._events:
            ready, order, who, seconds, core, then = heapq.heappop(self._events)
            start = max(ready, self._free.get(who, 0.0))
            cores = self._cores if core else None
            if cores:
                start = max(start, cores[0])
            if start > ready:  # by then somebody else may have come before
                heapq.heappush(self._events, (start, order, who, seconds, core, then))
                continue
            end = start + seconds
            self._free[who] = end
            if cores:
                heapq.heapreplace(cores, end)
            self._end = max(self._end, end)
            then(end)
        return self._end


def layer_s(world: World, local: int, remote: list[int], read: int) -> float:
    """Seconds of a layer's experts: `local` here, remote[i] at peer i, `read` from the drive."""
    stations, row = Stations(world.cores), world.number_bytes * world.hidden
    do = stations.do

    def nothing(_: float) -> None:
        pass

    def over_wire(now: float, way: str, size: int, then: Callable[[float], None]) -> None:
        def arrived(at: float) -> None:
            at += world.delay_s
            if world.carry_s:
                do(at, "relay", world.carry_s, then)
            else:
                then(at)

        do(now, way, 8 * (size + _BESIDE) / world.bits_per_s, arrived, core=False)

    def ask(now: float, peer: int, experts: int) -> None:
        def compute(at: float) -> None:
            do(at + world.ask_s, f"peer {peer}", world.serve_s + experts * world.expert_s, answer)

        def answer(at: float) -> None:
            over_wire(at, "in", experts * row, lambda at: do(at, "answers", world.take_s, nothing))

        over_wire(now, "out", row, compute)

    def sent(now: float) -> None:
        for _ in range(read):
            once = world.expert_bytes / world.drive_bytes_per_s
            do(now, "drive", once, lambda at: do(at, "engine", world.expert_s, nothing), core=False)
        here(now, local)

    def here(now: float, left: int) -> None:
        if left:
            do(now, "engine", world.expert_s, lambda at: here(at, left - 1))

    asked = [(peer, experts) for peer, experts in enumerate(remote) if experts]

    def send(now: float, number: int) -> None:
        if number:
            ask(now, *asked[number - 1])
        if number == len(asked):
            sent(now)
        else:
            do(now, "engine", world.send_s, lambda at: send(at, number + 1))

    send(0.0, 0)
    return stations.run()


def token_s(world: World, shares: tuple[float, float], peers: int, tokens: int = 40) -> float:
    """Seconds of a token, the mean of some. shares: of the wanted experts at peers, and on the drive."""
    draw = np.random.default_rng(1)
    total = 0.0
    for _ in range(tokens * world.layers):
        where = draw.random(world.top_k)
        read = int((where < shares[1]).sum())
        far = int((where < sum(shares)).sum()) - read
        at = np.bincount(draw.integers(0, max(peers, 1), far), minlength=max(peers, 1))
        total += layer_s(world, world.top_k - far - read, at.tolist(), read)
    return world.dense_s + total / tokens


def shares(world: World, nodes: int, each: int) -> tuple[float, float]:
    """Of the wanted experts at peers, and on the drive, where each node has room for `each`, all layers."""
    popular: NDArray[np.float64] = np.arange(1.0, world.experts + 1) ** -world.skew
    # Of top_k distinct ones the share of the hottest is less than that of one draw: each counts once at most.
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(popular * middle, 1).sum() < world.top_k else (low, middle)
    wanted = np.minimum(popular * low, 1) / world.top_k
    own = min(each // world.layers, world.experts)
    there = min(each * nodes // world.layers, world.experts)
    return float(wanted[own:there].sum()), float(wanted[there:].sum())


def turn_over(world: World, experts: int = 1) -> float:
    """Bits a second from which on one peer has `experts` of a layer sooner than the drive; inf: never."""
    drive = layer_s(world, 0, [], experts)
    low, high = 1e6, 1e13
    if layer_s(evolve(world, bits_per_s=high), 0, [experts], 0) > drive:
        return float("inf")
    for _ in range(60):
        middle = (low * high) ** 0.5
        if layer_s(evolve(world, bits_per_s=middle), 0, [experts], 0) > drive:
            low = middle
        else:
            high = middle
    return high


def measured(
    result: dict[str, Any], drive: float | None = None
) -> tuple[World, list[tuple[int, float, float]]]:
    """The world of a result of bench.cluster, and (nodes, tokens/s measured, tokens/s simulated).

    drive: bytes/s of the drive where the result is of a throttled one.
    """
    alone = [each for each in result["nodes"] if each["nodes"] == 1]  # before and after the others, say
    one = {name: statistics.mean(each[name] for each in alone) for name in alone[0]}
    costs = result["message"]
    number = _NUMBER[result["wire"]]
    row = 8 * 2 * number * result["hidden"] / result["bits_per_s"]
    send, carry = costs["send_s"], costs["relay_cpu_s"] / 2
    serve = max(costs["shard_cpu_s"] - one["expert_s"], 0.0)
    known = send + serve + one["expert_s"] + 2 * (carry + result["delay_s"]) + row
    rest = max(costs["trip_s"] - known, 0.0)
    take = min(max(costs["engine_cpu_s"] - send, 0.0), rest)  # more of it was done beside
    world = World(
        layers=result["layers"], experts=0, top_k=result["top_k"], hidden=result["hidden"],
        expert_bytes=result["expert_bytes"], dense_s=one["dense_s"], expert_s=one["expert_s"],
        send_s=send, take_s=take, serve_s=serve, ask_s=rest - take,
        drive_bytes_per_s=1e9, delay_s=result["delay_s"], bits_per_s=result["bits_per_s"],
        carry_s=carry, cores=result["cores"], number_bytes=number,
    )  # fmt: skip
    most = result["drive_bytes_per_s"]
    if most is None or drive is None:
        drive = _drive(world, one["from_drive"], 1 / one["tokens_per_s"])
    world = evolve(world, drive_bytes_per_s=drive)
    found = []
    for each in result["nodes"]:
        seconds = token_s(world, (each["by_peers"], each["from_drive"]), each["nodes"] - 1)
        if most is not None:  # a throttle counts over a while: time in which nothing is read is not lost
            seconds = max(seconds, each["drive_bytes"] / most)
        found.append((each["nodes"], each["tokens_per_s"], 1 / seconds))
    return world, found


def _drive(world: World, read: float, seconds: float) -> float:
    """The drive's bytes a second with which one node takes so long for a token."""
    low, high = 1e6, 1e12
    for _ in range(40):
        middle = (low * high) ** 0.5
        slow = token_s(evolve(world, drive_bytes_per_s=middle), (0.0, read), 0) > seconds
        low, high = (middle, high) if slow else (low, middle)
    return high


def _check(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table("link", "nodes", "measured", "simulated", "error", "here", "drive", "peers")
    table.title = "tokens/s, and ms of a token that were spent beside experts and waiting for drive and peers"
    errors = []
    drive = None  # of the last result whose drive was not throttled
    for result in results:
        world, found = measured(result, drive)
        drive = world.drive_bytes_per_s if result["drive_bytes_per_s"] is None else drive
        for (nodes, real, simulated), each in zip(found, result["nodes"], strict=True):
            if nodes > 1:  # one node is what the figures of the world are taken from
                errors.append(abs(simulated / real - 1))
            spent = (f"{1e3 * each[name]:.1f}" for name in ("dense_s", "io_wait_s", "wait_s"))
            error = f"{simulated / real - 1:+.0%}"
            table.add_row(_link(result), f"{nodes}", f"{real:.1f}", f"{simulated:.1f}", error, *spent)
    console.print(table)
    console.print(f"median error {statistics.median(errors):.0%}")
    console.print(_trips(results))


def _link(result: dict[str, Any]) -> str:
    rate = result["drive_bytes_per_s"]
    words = f"{1e3 * result['delay_s']:g} ms, {result['bits_per_s'] / 1e9:g} Gbit/s, {result['wire']}"
    return words if rate is None else f"{words}, {rate / 1e6:g} MB/s"


def _trips(results: list[dict[str, Any]]) -> Table:
    """What messages cost is that of the first result; links are those of each."""
    table = Table("link", "measured", "simulated", "error", "a drive as quick")
    table.title = "one expert of one token at a peer, there and back, by what the first link's messages cost"
    first = evolve(measured(results[0])[0], cores=None)
    for result in results:
        world = measured(result)[0]
        seconds, names = result["message"]["trip_s"], ("delay_s", "bits_per_s", "number_bytes")
        told = layer_s(evolve(first, **{name: getattr(world, name) for name in names}), 0, [1], 0)
        ways = (f"{1e3 * seconds:.2f} ms", f"{1e3 * told:.2f} ms", f"{told / seconds - 1:+.0%}")
        table.add_row(_link(result), *ways, f"{_as_quick(result) / 1e9:.2f} GB/s")
    return table


def _as_quick(result: dict[str, Any]) -> float:
    """Bytes a second of a drive that has one expert as soon as the peer had it."""
    world = measured(result)[0]
    return world.expert_bytes / float(result["message"]["trip_s"] - world.expert_s)


def _scale(console: Console, world: World, most: int, each: int) -> None:
    title = f"DeepSeek-V3's shape, {each} experts ({each * world.expert_bytes / 1e9:.0f} GB) a node"
    table = Table("nodes", "here", "at peers", "on the drive", "tokens/s", "against one", title=title)
    alone = 0.0
    for nodes in (1 << i for i in range(most.bit_length())):
        far, read = shares(world, nodes, each)
        rate = 1 / token_s(world, (far, read), nodes - 1)
        alone = alone or rate
        table.add_row(
            f"{nodes}",
            f"{1 - far - read:.0%}",
            f"{far:.0%}",
            f"{read:.0%}",
            f"{rate:.2f}",
            f"{rate / alone:.1f}",
        )
    console.print(table)


DELAYS = (0.05e-3, 0.1e-3, 0.2e-3, 0.5e-3, 1e-3, 2e-3, 5e-3)
DRIVES = (0.5e9, 1e9, 2e9, 3e9, 6e9)


def _turns(world: World) -> list[tuple[float, list[float]]]:
    return [
        (delay, [turn_over(evolve(world, delay_s=delay, drive_bytes_per_s=drive)) for drive in DRIVES])
        for delay in DELAYS
    ]


def _turn_table(console: Console, world: World) -> None:
    table = Table("delay, one way", *(f"drive {drive / 1e9:g} GB/s" for drive in DRIVES))
    table.title = (
        f"Link from which on one expert of {world.expert_bytes / 1e6:.1f} MB is there sooner from a peer"
    )
    for delay, rates in _turns(world):
        told = ("never" if rate == float("inf") else f"{rate / 1e6:.0f} Mbit/s" for rate in rates)
        table.add_row(f"{1e3 * delay:g} ms", *told)
    console.print(table)


def _plot(world: World, results: list[dict[str, Any]], path: Path) -> None:
    """results: measured ones, each a cross with the drive that is as quick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=90)
    turns = _turns(world)
    for i, drive in enumerate(DRIVES):
        points = [(1e3 * delay, rates[i] / 1e9) for delay, rates in turns if rates[i] != float("inf")]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"drive {drive / 1e9:g} GB/s")
    for result in results:
        at = 1e3 * result["delay_s"], result["bits_per_s"] / 1e9
        axes.plot(*at, "kx")
        axes.annotate(f" {_as_quick(result) / 1e9:.1f} GB/s", at, fontsize=8, verticalalignment="bottom")
    axes.set(xscale="log", yscale="log", xlabel="delay of one way, ms", ylabel="Gbit/s")
    title = "A peer is sooner than the drive above the line"
    axes.set_title(f"{title}; crosses: measured, a drive as quick" if results else title, fontsize=9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


@click.command(help=help_of(__doc__))
@click.option(
    "--check", multiple=True, type=click.Path(path_type=Path, exists=True), help="JSON of bench.cluster."
)
@click.option("--nodes", type=click.IntRange(1, 1024), help="Of DeepSeek-V3's shape, up to so many.")
@click.option("--each", type=click.IntRange(1), default=1024, show_default=True, help="Experts of a node.")
@click.option("--expert-mb", type=click.FloatRange(0, min_open=True), default=2.65, show_default=True)
@click.option("--hidden", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--expert-wire", "wire", type=click.Choice(get_args(ExpertWire)), default="f32", help="Rows.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG (needs matplotlib).")
def main(
    check: tuple[Path, ...],
    nodes: int | None,
    each: int,
    expert_mb: float,
    hidden: int,
    wire: ExpertWire,
    plot: Path | None,
) -> None:
    console = Console(width=110)
    results = [json.loads(file.read_text()) for file in check]
    if results:
        _check(console, results)
    if nodes is not None:
        _scale(console, evolve(DEEPSEEK_V3, number_bytes=_NUMBER[wire]), nodes, each)
    if (results or nodes is not None) and plot is None:
        return
    size = round(1e6 * expert_mb)
    # An expert takes what its bytes take at 20 GB/s of one machine's memory.
    world = evolve(
        DEEPSEEK_V3,
        expert_bytes=size,
        hidden=hidden,
        expert_s=size / 20e9,
        number_bytes=_NUMBER[wire],
    )
    _turn_table(console, world)
    if plot is not None:
        _plot(world, results, plot)


if __name__ == "__main__":
    main()
