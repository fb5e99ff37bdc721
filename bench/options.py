"""Types of argparse options that take several values, separated by commas."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection


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
