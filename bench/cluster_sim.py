"""What more nodes would bring: a simulation of one engine and its shards, by discrete events.

    python -m bench.cluster_sim                         table: where a remote expert beats the own drive
    python -m bench.cluster_sim --plot turn.png         the same as a picture (needs matplotlib)
    python -m bench.cluster_sim --check a.json          beside what bench.cluster measured
    python -m bench.cluster_sim --nodes 64              DeepSeek-V3's shape, from 1 node to so many

Assumptions:
 1. One request, one token a step, no drafts, nothing read ahead, no prefix; layers one after the other.
 2. Experts are wanted by a popularity of (rank + 1) ** -skew, each layer and token anew. The engine keeps the
    hottest, peers the next ones in turn, its drive has the rest; so each wanted one is here, at a peer or on
    the drive by these shares, whatever the others are. With --check the shares are those measured.
 3. Drive, engine, each shard and each way of the engine's one port do one thing at a time, in the order of
    asking. Shards serve nobody else; the switch between is never full.
 4. A message takes its bytes at the link's rate, then the delay. `ask_s` is what a round trip takes beside
    the links (gRPC, TLS, waking threads); all peers' are side by side.
 5. An expert takes the same time at a peer as here. No peer is late or lost, and nobody is skipped.
 6. The rest of the model (`dense_s`) is not spread: it takes the same time with any number of nodes.
"""

from __future__ import annotations

import heapq
import json
import statistics
from pathlib import Path
from typing import Any

import click
import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.help import help_of

# Of a request and an answer beside the rows: ids, counts, checksums, HTTP/2 and TLS. Bytes.
_BESIDE = 150


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
    ask_s: float
    drive_bytes_per_s: float
    delay_s: float
    bits_per_s: float
    skew: float = 0.8


# The real shape; experts in Q4_K (4.5 bits a weight). Times are assumed: a server with 200 GB/s of memory
# bandwidth, which reads some 12 GB a token beside routed experts (17e9 weights), and a drive of 6 GB/s.
DEEPSEEK_V3 = World(
    layers=58, experts=256, top_k=8, hidden=7168, expert_bytes=round(3 * 7168 * 2048 * 4.5 / 8),
    dense_s=0.060, expert_s=24.8e6 / 200e9, ask_s=300e-6, drive_bytes_per_s=6e9,
    delay_s=50e-6, bits_per_s=25e9,
)  # fmt: skip


def layer_s(world: World, local: int, remote: list[int], read: int) -> float:
    """Seconds of a layer's experts: `local` here, remote[i] at peer i, `read` from the drive."""
    row = 4 * world.hidden
    port_out = port_in = 0.0
    answers: list[tuple[float, float]] = []  # when it leaves the peer, and how long the wire has it
    for count in filter(None, remote):
        port_out += 8 * (row + _BESIDE) / world.bits_per_s
        done = port_out + world.delay_s + world.ask_s + count * world.expert_s
        heapq.heappush(answers, (done, 8 * (count * row + _BESIDE) / world.bits_per_s))
    here = local * world.expert_s
    drive = 0.0
    for _ in range(read):
        drive += world.expert_bytes / world.drive_bytes_per_s
        here = max(here, drive) + world.expert_s
    while answers:
        left, wire = heapq.heappop(answers)
        port_in = max(port_in, left) + wire
    return max(here, port_in + world.delay_s if port_in else 0.0)


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


def measured(result: dict[str, Any]) -> tuple[World, list[tuple[int, float, float]]]:
    """The world of a result of bench.cluster, and (nodes, tokens/s measured, tokens/s simulated)."""
    one = next(each for each in result["nodes"] if each["nodes"] == 1)
    reading = one["drive_bytes"] / max(one["io_wait_s"], 1e-9)
    trip = result["round_trip_s"] or 0.0
    row = 8 * 2 * 4 * result["hidden"] / result["bits_per_s"]
    world = World(
        layers=result["layers"], experts=0, top_k=result["top_k"], hidden=result["hidden"],
        expert_bytes=result["expert_bytes"], dense_s=one["dense_s"], expert_s=one["expert_s"],
        ask_s=max(trip - 2 * result["delay_s"] - row - one["expert_s"], 0.0), drive_bytes_per_s=reading,
        delay_s=result["delay_s"], bits_per_s=result["bits_per_s"],
    )  # fmt: skip
    found = []
    for each in result["nodes"]:
        seconds = token_s(world, (each["by_peers"], each["from_drive"]), each["nodes"] - 1)
        found.append((each["nodes"], each["tokens_per_s"], 1 / seconds))
    return world, found


def _check(console: Console, files: tuple[Path, ...]) -> None:
    table = Table("link", "nodes", "measured", "simulated", "error", title="tokens/s")
    errors = []
    for file in files:
        result = json.loads(file.read_text())
        for nodes, real, simulated in measured(result)[1]:
            if nodes > 1:  # one node is what the figures of the world are taken from
                errors.append(abs(simulated / real - 1))
            link = f"{1e3 * result['delay_s']:g} ms, {result['bits_per_s'] / 1e9:g} Gbit/s"
            table.add_row(link, f"{nodes}", f"{real:.1f}", f"{simulated:.1f}", f"{simulated / real - 1:+.0%}")
    console.print(table)
    console.print(f"median error {statistics.median(errors):.0%}")


def _scale(console: Console, most: int, each: int) -> None:
    world = DEEPSEEK_V3
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
DRIVES = (0.5e9, 1e9, 3e9, 6e9, 12e9)


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


def _plot(world: World, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=90)
    turns = _turns(world)
    for i, drive in enumerate(DRIVES):
        points = [(1e3 * delay, rates[i] / 1e9) for delay, rates in turns if rates[i] != float("inf")]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"drive {drive / 1e9:g} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="delay of one way, ms", ylabel="Gbit/s")
    axes.set_title("A peer is sooner than the drive above the line", fontsize=10)
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
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG (needs matplotlib).")
def main(
    check: tuple[Path, ...], nodes: int | None, each: int, expert_mb: float, hidden: int, plot: Path | None
) -> None:
    console = Console(width=110)
    if check:
        _check(console, check)
    if nodes is not None:
        _scale(console, nodes, each)
    if check or nodes is not None:
        return
    size = round(1e6 * expert_mb)
    # An expert takes what its bytes take at 20 GB/s of one machine's memory.
    world = evolve(DEEPSEEK_V3, expert_bytes=size, hidden=hidden, expert_s=size / 20e9)
    _turn_table(console, world)
    if plot is not None:
        _plot(world, plot)


if __name__ == "__main__":
    main()
