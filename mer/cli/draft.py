"""`mer draft train`: a head that drafts tokens for a model."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mer.cli.common import messages, model_argument, output, size_option
from mer.config import EngineConfig
from mer.errors import ConfigError
from mer.model.tokenizer import Tokenizer


@click.group()
def draft() -> None:
    """Heads that draft tokens for a model, which then verifies several at a time."""


@draft.command()
@click.argument("model", callback=model_argument)
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Directory.")
@click.option(
    "--held-out",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text to try the head on; default: the end of DATA, which is left out of training then.",
)
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True, help="Of the optimiser.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Windows of a step.")
@click.option("--length", type=click.IntRange(16), default=256, show_default=True, help="Tokens of a window.")
@click.option(
    "--own",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of windows that the model goes on with itself: better, but it has to write them.",
)
@click.option(
    "--passes",
    type=click.IntRange(1, 8),
    default=4,
    show_default=True,
    help="Tokens drafted one after the other.",
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True, help="Of learning."
)
@click.option(
    "--window", type=click.IntRange(1), default=128, show_default=True, help="Positions that the head sees."
)
@click.option(
    "--vocabulary", type=click.IntRange(1), default=32768, show_default=True, help="Most tokens it can draft."
)
@click.option(
    "--inter",
    type=click.IntRange(1),
    help="Width of its feed-forward block; default: the model's hidden size.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--ram", callback=size_option, help="Memory of the model, without training; default: what is free."
)
@click.option(
    "--threads", type=click.IntRange(1), help="Compute threads; default: the CPUs this process may use."
)
def train(
    model: Path,
    data: Path,
    out: Path,
    held_out: Path | None,
    ram: int | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Train a draft head for MODEL on the text file DATA, and write it to a directory.

    The head learns what the model itself says behind this text, so DATA should be like what it will be
    asked for. For a model without a tokenizer DATA holds token ids.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("training needs torch, which is not installed: pip install 'mer[train]'")
    from mer.train.train import Training, train

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    err = messages()
    texts = _ids(model, data), None if held_out is None else _ids(model, held_out)
    config = EngineConfig(ram=ram, threads=threads)
    found = train(model, *texts, out, Training(**options), config, err.print, _bar)
    output().print(f"{out}: right at each position, where those before it were: {_shown(found)}")


def _ids(model: Path, data: Path) -> list[int]:
    """The text as tokens."""
    try:
        text = data.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{data}: is not UTF-8 text: {error}") from error
    tokenizer = Tokenizer.open(model)
    if tokenizer is not None:
        return tokenizer.encode(text)
    words = text.split()
    for word in words:
        if not re.fullmatch(r"[0-9]{1,9}", word):
            raise ConfigError(f"{data}: {word[:40]!r} is no token id, and the model came without a tokenizer")
    return [int(word) for word in words]


def _bar(name: str) -> Callable[[int, int], None]:
    """Says how far it is, now and then."""
    err, said = messages(), 0

    def progress(done: int, total: int) -> None:
        nonlocal said
        if done * 10 // total > said or done == total:
            said = done * 10 // total
            err.print(f"{name}: {done} of {total}")

    return progress


def _shown(found: list[float]) -> str:
    return ", ".join(f"{each:.0%}" for each in found)
