"""What `--expert-wire` and `--kv` change of a model's answers, over the tokens of a text.

    python -m bench.rounding demo held-out.txt
    python -m bench.rounding MODEL text.txt --window 512 --tokens 20000

The text is cut into windows, each computed by itself. Of every token in them: perplexity; how often the
likeliest next token is the same as without rounding, which is what a greedy answer takes; the divergence
(Kullback and Leibler, in nats) of the chances from those without rounding, its mean and its 99th percentile.
Keys and values are F32 unless they are what is looked at.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer import Engine, SamplingParams
from mer.cli.common import model_argument
from mer.engine.runner import Runner
from mer.engine.scheduler import Chunk

_SCORED: Final = SamplingParams(max_tokens=0, prompt_logprobs=0)
_SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "as it is": {},
    "--expert-wire bf16": {"expert_wire": "bf16"},
    "--expert-wire f16": {"expert_wire": "f16"},
    "--kv f16": {"kv_dtype": "f16"},
    "--kv q8_0": {"kv_dtype": "q8_0"},
}


async def scores(model: Path, windows: list[list[int]], settings: dict[str, Any]) -> NDArray[np.float32]:
    """f32 [tokens, vocab]: the logarithms of the chances of what follows each token but a window's last."""
    common: dict[str, Any] = {"kv_dtype": "f32", "prefix_cache": False, "speculate": "off", "device": "cpu"}
    longest = max(map(len, windows))
    async with Engine.open(model, step_tokens=longest, context=longest, **common | settings) as engine:
        rows, step = list[NDArray[np.float32]](), Runner.step

        def kept(runner: Runner, chunks: list[Chunk]) -> NDArray[np.float32]:
            logits = step(runner, chunks)
            rows[-1] = np.concatenate([rows[-1], logits])
            return logits

        with patch.object(Runner, "step", kept):
            for window in windows:
                rows.append(np.empty((0, engine._runner.spec.vocab), np.float32))
                await engine.generate(window, _SCORED)
    found = np.concatenate([each[: len(window) - 1] for each, window in zip(rows, windows, strict=True)])
    found -= found.max(1, keepdims=True)
    return found - np.log(np.exp(found).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)


async def measure(model: Path, text: str, window: int, tokens: int) -> Table:
    async with Engine.open(model, device="cpu", context=window) as engine:
        ids = engine.tokenizer.encode(text)[:tokens]
    windows = [each for i in range(0, len(ids), window) if len(each := ids[i : i + window]) > 1]
    follows = np.concatenate([each[1:] for each in windows])
    table = Table(title=f"{model.name}: {len(follows)} tokens in windows of {window}")
    for name in ("", "perplexity", "likeliest is the same", "divergence", "99 % below"):
        table.add_column(name, justify="right")
    right: NDArray[np.float32] | None = None
    for name, settings in _SETTINGS.items():
        found = await scores(model, windows, settings)
        right = found if right is None else right
        perplexity = np.exp(-found[np.arange(len(follows)), follows].mean(dtype=np.float64))
        same = (found.argmax(1) == right.argmax(1)).mean()
        apart = (np.exp(right) * (right - found)).sum(1, dtype=np.float64)
        table.add_row(
            name, f"{perplexity:.4f}", f"{same:.3%}", f"{apart.mean():.2e}", f"{np.quantile(apart, 0.99):.2e}"
        )
    return table


@click.command(help=help_of(__doc__))
@click.argument("model", callback=model_argument)
@click.argument("text", type=click.File(encoding="utf-8"))
@click.option("--window", type=click.IntRange(2), default=256, show_default=True, help="Tokens.")
@click.option(
    "--tokens", type=click.IntRange(2), default=8192, show_default=True, help="The most of the text."
)
def main(model: Path, text: Any, window: int, tokens: int) -> None:
    Console(width=110).print(asyncio.run(measure(model, text.read(), window, tokens)))


if __name__ == "__main__":
    main()
