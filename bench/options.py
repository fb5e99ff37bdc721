"""Options that take several values, separated by commas: types of argparse, callbacks of click."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

import click


def names(known: Collection[str]) -> Callable[[str], list[str]]:
    """Some of these names, in upper or lower case."""

    def read(text: str) -> list[str]:
        asked = text.lower().split(",")
        if unknown := [name for name in asked if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return asked

    return read


def counts(text: str) -> list[int]:
    """Numbers from 1 on."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"numbers from 1 on, separated by commas, not {text!r}")
    return found


def shares(_ctx: click.Context, _param: click.Parameter, value: str) -> list[float]:
    """Percentages above 0."""
    try:
        found = [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter("give percentages, separated by commas") from None
    if not all(0 < each <= 100 for each in found):
        raise click.BadParameter("every share must be above 0 and at most 100 percent")
    return found
