"""What the commands share: names of models, sizes in and out, consoles."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mer.config import parse_size
from mer.errors import ConfigError
from mer.weights.hub import locate

_F = TypeVar("_F", bound=Callable[..., Any])

DEVICE_OPTIONS: Final = (
    click.option(
        "--device",
        metavar="auto|cpu|cuda[:N]",
        default="auto",
        show_default=True,
        help="What computes beside the CPU; auto: an NVIDIA GPU where there is one that can.",
    ),
    click.option("--vram", help="Memory of the GPU to use (6GiB); default: what is free, less a margin."),
    click.option(
        "--gpu-layers",
        metavar="N|auto",
        default="auto",
        show_default=True,
        help="Layers, from the first on, whose attention and dense weights are on the GPU.",
    ),
)


def device_options(command: _F) -> _F:
    """The options that say what computes beside the CPU."""
    for option in reversed(DEVICE_OPTIONS):
        command = option(command)
    return command


def size_option(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that is a number of bytes: 8GiB, 512M, 4096."""
    try:
        return None if value is None else parse_size(value)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None


def model_argument(_ctx: click.Context, _param: click.Parameter, value: str) -> Path:
    """Callback of a model's argument: path, hub's name, or `demo` (a directory of that name is ./demo)."""
    return locate(value)


def size(n: float) -> str:
    """Bytes for people: 3.4 MiB, 12.0 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}" if n < 1000 else f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:,.1f} GiB"


def at_least(n: int) -> str:
    """Bytes for people, rounded up, so that giving --ram what is printed is enough."""
    mib = -(-n // (1 << 20))
    return f"{mib:,} MiB" if mib < 10_000 else f"{math.ceil(mib / 102.4) / 10:,.1f} GiB"


def rate(bytes_per_second: float) -> str:
    """Bandwidth for people, in units of 1000 as devices are sold: 3.51 GB/s."""
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def seconds(value: float | None) -> str:
    """A time for people: 4.7 ms, 1.24 s; - for None."""
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def percent(share: float | None) -> str:
    """A share of 1 for people: 83%; - for None."""
    return "-" if share is None else f"{share:.0%}"


def parameters(n: int) -> str:
    """A number of weights as model cards write it: 46.7 B, 350 M."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return str(n)


def output() -> Console:
    """Where results go. Text is what it is: no markup, no colours for numbers."""
    return Console(markup=False, highlight=False, emoji=False)


def messages() -> Console:
    """Where progress and warnings go, so that results can be piped."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def progress_bar() -> Progress:
    """A bar of bytes, rate and time left on stderr; nothing where stderr is no terminal."""
    console = messages()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
        expand=True,
        speed_estimate_period=10,
    )
