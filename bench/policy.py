"""Replay a recorded routing trace through cache policies and Belady's optimum: decode hit rates.

    python -m bench.policy trace.csv [--slots 6.25,12.5,25] [--json FILE]

A trace is a CSV file, as `mer run --trace FILE` writes it: comment lines that start with `#`, of which one
names `n_layer=48` and `n_expert=128`; a line with the names of the columns; then a line for each expert that
a token chose in a layer, in the order in which they were computed (a prompt layer by layer, decoded tokens
one by one). Columns that count here, any others are passed over:

    phase    0 prefill, 1 decode
    step     number of the token
    layer    number of the MoE layer
    expert   number of the expert in its layer
    weight   the router's weight (may be missing)

One cache is shared by all layers; its slots are a share of all experts. Prefill warms it; hits are counted
in decode.

Policies, by what is evicted on a miss:

    lru         the expert that was used longest ago
    lfu         the expert that was used least, the one used longest ago among equals
    next-use    the latest expected next use: d + L (1/p - 1), where d is the number of layers until its
                layer's turn, L the number of layers, p the chance that a token wants it: a mix of averages,
                and of what followed in the same layer whenever the experts chosen now were chosen before
    belady      the latest next use (it knows the future): no policy does better
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from bench.options import shares

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Of the moving averages: weight in the mix, rate per token.
AVERAGES = ((0.4, 0.5), (0.3, 0.1), (0.3, 0.02))
LEAST = 1e-30  # an average is never 0
# Of the chance of an expert: the part that is what the averages say, the part that is what followed before.
ALONE, FOLLOWING = 0.4, 0.6
MOST_USES = 255  # of an expert, before half of what followed is forgotten


@frozen(eq=False)
class Visit:
    """One token's turn in one layer. experts: i64 [top_k], in the router's order. weights: f64 [top_k]."""

    decode: bool
    token: int
    layer: int
    experts: Ints
    weights: Floats


@frozen(eq=False)
class Trace:
    n_layers: int
    n_experts: int
    visits: list[Visit]

    @property
    def accesses(self) -> Ints:
        """Of all visits, as layer * n_experts + expert."""
        return np.concatenate([v.layer * self.n_experts + v.experts for v in self.visits])


def read_trace(path: Path) -> Trace:
    """Raises ValueError that names the file and the line."""
    sizes: dict[str, int] = {}
    groups: list[tuple[tuple[bool, int, int], list[int], list[float]]] = []
    names: list[str] | None = None
    with path.open(newline="") as file:
        for number, line in enumerate(csv.reader(file), 1):
            if not line:
                continue
            if line[0].startswith("#"):
                for word in ",".join(line).split():
                    key, _, value = word.partition("=")
                    if key in ("n_layer", "n_expert") and value.isdecimal():
                        sizes[key] = int(value)
                continue
            if names is None:
                names = line
                missing = {"phase", "step", "layer", "expert"} - set(names)
                if missing:
                    raise ValueError(f"{path}:{number}: the columns {', '.join(sorted(missing))} are missing")
                continue
            try:
                row = dict(zip(names, line, strict=True))
                key_of = row["phase"] == "1", int(row["step"]), int(row["layer"])
                expert, weight = int(row["expert"]), float(row.get("weight", 0))
                if min(*key_of, expert) < 0:
                    raise ValueError
            except ValueError:
                raise ValueError(f"{path}:{number}: {','.join(line)} is no line of a routing trace") from None
            if not groups or groups[-1][0] != key_of:
                groups.append((key_of, [], []))
            groups[-1][1].append(expert)
            groups[-1][2].append(weight)
    visits = [Visit(*key, np.array(experts), np.array(weights)) for key, experts, weights in groups]
    if not any(v.decode for v in visits):
        raise ValueError(f"{path}: the trace has no decoded token (phase 1)")
    n_layers = sizes.get("n_layer", 1 + max(v.layer for v in visits))
    n_experts = sizes.get("n_expert", 1 + max(int(v.experts.max()) for v in visits))
    if any(v.layer >= n_layers or v.experts.max() >= n_experts for v in visits):
        raise ValueError(f"{path}: a layer or an expert is beyond n_layer={n_layers}, n_expert={n_experts}")
    return Trace(n_layers, n_experts, visits)


class Policy(Protocol):
    """Told of every visit before its accesses, of every access after it was served; says whom to evict."""

    def visit(self, visit: Visit) -> None: ...

    def access(self, expert: int) -> None: ...

    def scores(self) -> NDArray[Any]:
        """Of every expert [n_layers * n_experts]: of those in the cache the highest is evicted."""
        ...


class Lru:
    def __init__(self, trace: Trace) -> None:
        self._scores = np.zeros(trace.n_layers * trace.n_experts, np.int64)
        self._clock = 0

    def visit(self, visit: Visit) -> None:
        pass

    def access(self, expert: int) -> None:
        self._clock -= 1
        self._scores[expert] = self._clock

    def scores(self) -> NDArray[Any]:
        return self._scores


class Lfu(Lru):
    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._uses = np.zeros_like(self._scores)
        self._most = len(trace.accesses)

    def access(self, expert: int) -> None:
        super().access(expert)
        self._uses[expert] += 1
        self._scores[expert] -= self._uses[expert] * self._most


class NextUse:
    def __init__(self, trace: Trace, averages: Sequence[tuple[float, float]] = AVERAGES) -> None:
        layers, experts = trace.n_layers, trace.n_experts
        self._mix = [share for share, _ in averages]
        self._rates = np.array([[rate] for _, rate in averages])
        self._averages = np.full((len(averages), layers * experts), LEAST)
        self._n_layers, self._n_experts = layers, experts
        self._followed = np.zeros(
            (layers, experts, experts), np.int64
        )  # [l, i, e]: e by the token after one by i
        self._uses = np.zeros((layers, experts), np.int64)
        self._last: dict[int, Ints] = {}  # of each layer, what the last token chose
        self._chance = np.full((layers, experts), LEAST)
        self._until = (np.arange(layers)[:, None] - np.arange(layers) - 1) % layers + 1
        self._layer = 0
        self._scores: Floats | None = None

    def visit(self, visit: Visit) -> None:
        used = np.zeros(self._n_experts)
        used[visit.experts] = 1
        start = visit.layer * self._n_experts
        part = self._averages[:, start : start + self._n_experts]
        part += self._rates * (used - part)
        np.maximum(part, LEAST, out=part)
        if visit.layer in self._last:
            self._learn(visit.layer, self._last[visit.layer], visit.experts)
        self._last[visit.layer] = visit.experts
        self._chance[visit.layer] = self.chance(visit.layer, visit.experts)
        self._layer, self._scores = visit.layer, None

    def _learn(self, layer: int, before: Ints, now: Ints) -> None:
        for i in before:
            if self._uses[layer, i] == MOST_USES:
                self._uses[layer, i] //= 2
                self._followed[layer, i] //= 2
            self._uses[layer, i] += 1
            self._followed[layer, i, now] += 1

    def chance(self, layer: int, experts: Ints) -> Floats:
        """f64 [n_experts]: of being wanted after a token that chose `experts` of that layer."""
        start = layer * self._n_experts
        # Added one by one, as csrc/cache/next_use.c does: experts of the same history stay equal.
        alone = np.zeros(self._n_experts)
        for share, average in zip(self._mix, self._averages, strict=True):
            alone += share * average[start : start + self._n_experts]
        following = np.zeros(self._n_experts)
        for i in np.sort(experts):
            following += (1 / len(experts)) / (self._uses[layer, i] + 1) * (self._followed[layer, i] + alone)
        return ALONE * alone + FOLLOWING * following

    def access(self, expert: int) -> None:
        pass

    def scores(self) -> NDArray[Any]:
        if self._scores is None:
            until = self._until[:, self._layer, None]
            self._scores = (until + self._n_layers * (1 / self._chance - 1)).reshape(-1)
        return self._scores


class Belady:
    def __init__(self, trace: Trace) -> None:
        accesses = trace.accesses
        self._after = np.empty(len(accesses), np.int64)  # the next access to the same expert
        after = np.full(trace.n_layers * trace.n_experts, len(accesses), np.int64)
        for at in range(len(accesses) - 1, -1, -1):
            self._after[at] = after[accesses[at]]
            after[accesses[at]] = at
        self._scores = after
        self._clock = 0

    def visit(self, visit: Visit) -> None:
        pass

    def access(self, expert: int) -> None:
        self._scores[expert] = self._after[self._clock]
        self._clock += 1

    def scores(self) -> NDArray[Any]:
        return self._scores


POLICIES: dict[str, Callable[[Trace], Policy]] = {
    "lru": Lru,
    "lfu": Lfu,
    "next-use": NextUse,
    "belady": Belady,
}


def replay(trace: Trace, policy: Policy, slots: int) -> tuple[int, int]:
    """(hits, accesses) of the decoded tokens in a cache of `slots` experts, at first empty."""
    cached = np.zeros(trace.n_layers * trace.n_experts, bool)
    used = hits = total = 0
    for visit in trace.visits:
        policy.visit(visit)
        for expert in (visit.layer * trace.n_experts + visit.experts).tolist():
            hit = bool(cached[expert])
            if not hit:
                if used == slots:
                    held = np.flatnonzero(cached)
                    cached[held[policy.scores()[held].argmax()]] = False
                else:
                    used += 1
                cached[expert] = True
            policy.access(expert)
            hits += hit and visit.decode
            total += visit.decode
    return hits, total


def hit_rates(trace: Trace, slots: Iterable[int], names: Iterable[str] = POLICIES) -> dict[str, list[float]]:
    """Decode hit rate of each policy with each number of slots."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for name, rates in found.items():
        for n in slots:
            hits, total = replay(trace, POLICIES[name](trace), n)
            rates.append(hits / total)
    return found


@click.command(help=help_of(__doc__))
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--slots", default="6.25,12.5,25", show_default=True, callback=shares, help="Percent of all experts."
)
@click.option(
    "--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the rates there, too."
)
def main(trace: Path, slots: list[float], out: Path | None) -> None:
    try:
        found = read_trace(trace)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    experts = found.n_layers * found.n_experts
    counts = [max(1, int(experts * share / 100)) for share in slots]
    rates = hit_rates(found, counts)
    table = Table("policy", *(f"{share:g} % ({n})" for share, n in zip(slots, counts, strict=True)))
    table.title = f"decode hit rate, {found.n_layers} x {found.n_experts} experts"
    for name, row in rates.items():
        table.add_row(name, *(f"{rate:.3f}" for rate in row))
    Console().print(table)
    if out:
        report = {"trace": trace.name, "experts": experts, "slots": counts, "hit_rates": rates}
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
