"""The map of experts by layer: a character per expert, or per some of them where there are more than fit."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from mer.v1 import inference_pb2 as pb

# Coldest first; each has a colour that can be read on white and on black, and a form for those who see none.
_LEVELS: Final = (("░", "cyan"), ("▒", "green"), ("▓", "magenta"), ("█", "red"))
_ABSENT: Final = ("·", "dim")
_PINNED: Final = ("◆", "bold")
# Characters of one expert, where there is room.
_WIDEST: Final = 3
LEGEND: Final = "· absent  ░▒▓█ hotter  ◆ pinned"


def heat_map(given: pb.ExpertMap, width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` characters, layers from above, experts from the left."""
    label = len(str(given.layers - 1)) + 1
    heat = np.frombuffer(given.heat, np.uint8).reshape(given.layers, given.experts)
    pinned = np.zeros(heat.size, bool)
    pinned[list(given.pinned)] = True
    # Where nobody keeps account of who is hot, all are.
    warmth = (heat > 0).astype(float) if heat.max(initial=0) <= 1 else heat / 255.0
    zoom = min(max((width - label) // given.experts, 1), _WIDEST)
    rows = _groups(given.layers, max(height, 1))
    columns = _groups(given.experts, max(width - label, 1))
    cells = _sums(_sums(warmth, rows, 0), columns, 1)
    present = _sums(_sums((heat > 0).astype(float), rows, 0), columns, 1) > 0
    kept = _sums(_sums(pinned.reshape(heat.shape).astype(float), rows, 0), columns, 1) > 0
    sizes = np.outer(np.diff(rows, append=given.layers), np.diff(columns, append=given.experts))
    cells = cells / sizes
    hottest = cells.max(initial=0.0) or 1.0
    lines = []
    for first, values, here, fixed in zip(rows, cells, present, kept, strict=True):
        line = Text.assemble((f"{first:>{label - 1}} ", "dim"), no_wrap=True)
        for value, there, pin in zip(values, here, fixed, strict=True):
            sign, colour = _glyph(value / hottest, there, pin)
            line.append(sign * zoom, colour)
        lines.append(line)
    return lines


def _glyph(share: float, there: bool, pinned: bool) -> tuple[str, str]:
    if pinned:
        return _PINNED
    if not there:
        return _ABSENT
    return _LEVELS[min(int(share * len(_LEVELS)), len(_LEVELS) - 1)]


def _groups(n: int, most: int) -> NDArray[np.int64]:
    """Where each of at most `most` groups of equal size begins."""
    return np.arange(0, n, -(-n // most))


def _sums(values: NDArray[np.float64], starts: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.add.reduceat(values, starts, axis)
    return found
