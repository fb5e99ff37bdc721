"""Replay a recorded routing through two tiers of experts, a GPU's memory above RAM, and say what each way of
dividing them costs.

    python -m bench.vram_policy trace.csv [--vram 5,10,15,20] [--ram 25] [--expert-mb 2.65]

The trace is one of `bench.policy`. RAM goes by its `next-use`. An expert that was computed from RAM moves up
where the tokens lately wanted it clearly more often than whom the GPU has that is wanted least (as
mer/_ext/vram.pyx does; copies arrive at once here). The ways:

    drop        what moves up leaves RAM, and what leaves the GPU is dropped, to be read again
    copy-back   what moves up leaves RAM, and what leaves the GPU is copied back, for whom RAM evicts next
    inclusive   what moves up stays in RAM for as long as RAM's policy wants it there

Of decoded tokens: the share of experts found in the GPU's memory, in RAM, and read; megabytes a token over
the bus (both directions) and from the drive.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import click
import numpy as np
from attrs import asdict, frozen
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from bench.policy import NextUse, Trace, Visit, read_trace, shares

WAYS: Final = ("drop", "copy-back", "inclusive")
# As in mer/_ext/vram.pyx.
RATE, CLEARLY = 0.02, 1.5
MARGIN, MARGIN_READ = 0.02, 0.1  # where RAM has room for all, and where it has not


@frozen
class Counts:
    """Of decoded tokens: experts found in either tier and read, experts copied to the GPU and back."""

    tokens: int
    vram: int
    ram: int
    read: int
    up: int
    back: int


class Tiers:
    """Both tiers, at first empty. vram, ram: experts that they have room for."""

    def __init__(self, trace: Trace, vram: int, ram: int, way: str) -> None:
        keys = trace.n_layers * trace.n_experts
        self._n_experts, self._sizes, self._way = trace.n_experts, (vram, ram), way
        self._all = ram >= keys  # nothing leaves RAM then
        self.policy = NextUse(trace)
        self._heat = np.zeros(keys)
        self.above, self.below = np.zeros(keys, bool), np.zeros(keys, bool)
        self.counts = dict.fromkeys(("vram", "ram", "read", "up", "back"), 0)

    def visit(self, visit: Visit) -> None:
        start = visit.layer * self._n_experts
        heat = self._heat[start : start + self._n_experts]
        heat *= 1 - RATE
        heat[visit.experts] += RATE
        self.policy.visit(visit)
        keys = start + visit.experts
        for key in keys.tolist():
            if self.above[key]:
                self.counts["vram"] += 1
                continue
            self.counts["ram" if self.below[key] else "read"] += 1
            self._to_ram(key)
            self._offer(key, keys)

    def _to_ram(self, key: int) -> None:
        if self.below[key]:
            return
        if self.below.sum() == self._sizes[1]:
            held = np.flatnonzero(self.below)
            self.below[held[self.policy.scores()[held].argmax()]] = False
        self.below[key] = True

    def _offer(self, key: int, busy: np.ndarray) -> None:
        if self.above.sum() == self._sizes[0]:
            held = np.setdiff1d(np.flatnonzero(self.above), busy)
            if not len(held):
                return
            coldest = held[self._heat[held].argmin()]
            margin = MARGIN if self._all else MARGIN_READ
            if self._heat[key] <= CLEARLY * self._heat[coldest] + margin:
                return
            self.above[coldest] = False
            if self._way == "copy-back" and not self.below[coldest]:
                self.below[key] = self._all  # its slot is free first
                self._to_ram(int(coldest))
                self.counts["back"] += 1
        self.above[key] = True
        self.counts["up"] += 1
        if self._way != "inclusive" and not self._all:
            self.below[key] = False


def replay(trace: Trace, vram: int, ram: int, way: str) -> Counts:
    """What the decoded tokens met; a prompt before them warms both tiers."""
    tiers = Tiers(trace, vram, ram, way)
    warm = dict(tiers.counts)
    tokens = set()
    for visit in trace.visits:
        if not visit.decode:
            tiers.visit(visit)
            warm = dict(tiers.counts)
            continue
        tokens.add(visit.token)
        tiers.visit(visit)
    return Counts(len(tokens), **{name: count - warm[name] for name, count in tiers.counts.items()})


@click.command(help=help_of(__doc__))
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--vram", default="5,10,15,20", show_default=True, callback=shares, help="Percent of all experts."
)
@click.option("--ram", default="25", show_default=True, callback=shares, help="Percent of all experts.")
@click.option("--expert-mb", default=2.65, show_default=True, help="Of an expert (Qwen3-30B-A3B in Q4_0).")
@click.option(
    "--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the counts there, too."
)
def main(trace: Path, vram: list[float], ram: list[float], expert_mb: float, out: Path | None) -> None:
    try:
        found = read_trace(trace)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    experts = found.n_layers * found.n_experts
    table = Table("VRAM", "RAM", "way", "in VRAM", "in RAM", "read", "bus, MB", "drive, MB")
    report = []
    for above in vram:
        for below in ram:
            for way in WAYS:
                c = replay(found, max(1, int(experts * above / 100)), int(experts * below / 100), way)
                whole = c.vram + c.ram + c.read
                rates = [f"{count / whole:.3f}" for count in (c.vram, c.ram, c.read)]
                bus, drive = ((c.up + c.back) * expert_mb / c.tokens, c.read * expert_mb / c.tokens)
                table.add_row(f"{above:g} %", f"{below:g} %", way, *rates, f"{bus:.1f}", f"{drive:.1f}")
                report.append({"vram": above, "ram": below, "way": way, **asdict(c)})
    Console().print(table)
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
