"""Hit rates of an LRU cache of any size, from one pass over a routing trace, by stack distance.

R. L. Mattson, J. Gecsei, D. R. Slutz, I. L. Traiger: Evaluation techniques for storage hierarchies, IBM
Systems Journal 9 (1970): an access hits a cache of C slots just if fewer than C others were used since its
last one.
"""

from __future__ import annotations

import csv
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer.errors import ConfigError

_COLUMNS: Final = ("turn", "phase", "step", "layer", "expert")


@frozen(eq=False)
class Distances:
    """tokens: that were decoded. hits f64 [experts + 1]: hits[c] is decode's share of hits with c slots.

    accesses: of experts, in decode; each counted once a layer and step. An expert's first use is a hit only
    where there is room for all of them.
    """

    tokens: int
    accesses: int
    hits: NDArray[np.float64]


def distances(path: Path) -> Distances:
    """Of a trace that `mer run --trace` or `mer serve --trace` wrote, which may be writing it still.

    Raises ConfigError for another file, or one without decode.
    """
    sizes: dict[str, int] = {}
    rows = _read(path, sizes)
    first = next(rows, None)
    if not {"n_layer", "n_expert"} <= sizes.keys():
        raise ConfigError(f"trace {path}: its head does not name n_layer and n_expert")
    total = sizes["n_layer"] * sizes["n_expert"]
    found = np.zeros(total + 1, np.int64)
    # Last uses, in order; where an expert's stands there, so many from the end, is its distance.
    order: list[int] = []
    last: dict[int, int] = {}
    tokens = 0
    for clock, (expert, decode, token) in enumerate(
        _accesses(chain([first] if first else [], rows), sizes["n_expert"])
    ):
        tokens += token
        if expert is None:
            continue
        distance = total
        before = last.get(expert)
        if before is not None:
            at = bisect_left(order, before)
            distance = len(order) - at
            del order[at]
        order.append(clock)
        last[expert] = clock
        if decode:
            if not 0 <= expert < total:
                raise ConfigError(f"trace {path}: expert {expert} is beyond the sizes in its head")
            found[distance] += 1
    if not found.any():
        raise ConfigError(f"trace {path}: no decoded token is in it; record some more")
    return Distances(tokens, int(found.sum()), np.cumsum(found) / found.sum())


_Row = tuple[int, ...]


def _read(path: Path, sizes: dict[str, int]) -> Iterator[_Row]:
    """(turn, phase, step, layer, expert) of each line; before the first, `sizes` gets those of the head."""
    places: list[int] | None = None
    at = 0
    try:
        with path.open(newline="") as file:
            for line in csv.reader(each for each in file if each.endswith("\n")):  # the last may be cut off
                at += 1
                if line and line[0].startswith("#"):
                    pairs = (word.partition("=") for word in ",".join(line).split())
                    sizes |= {key: int(value) for key, _, value in pairs if value.isdecimal()}
                elif places is None:
                    places = [line.index(name) for name in _COLUMNS]
                elif line:
                    yield tuple(int(line[place]) for place in places)
    except OSError as error:
        raise ConfigError(f"trace {path}: can't be read: {error.strerror}") from None
    except (ValueError, IndexError):
        raise ConfigError(f"trace {path}, line {at}: no line of a trace of `mer run --trace`") from None


def _accesses(rows: Iterable[_Row], n_experts: int) -> Iterator[tuple[int | None, bool, bool]]:
    """(layer * n_experts + expert, decode, whether a decoded token begins) of each line.

    No expert: where another token of the same step wanted it.
    """
    seen: set[int] = set()
    before: _Row | None = None
    begun = -1, -1
    for row in rows:
        turn, phase, step, layer, expert = row
        if before is not None:
            other = turn == before[0] and phase == 1 and step != before[2]
            if layer != before[3] or turn < before[0] or other:
                seen.clear()
        before = row
        number = layer * n_experts + expert
        token = phase == 1 and layer == 0 and (turn, step) != begun
        if token:
            begun = turn, step
        yield None if number in seen else number, phase == 1, token
        seen.add(number)
