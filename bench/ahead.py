"""What reading ahead gains, by the speed of the device and the share of experts in memory.

    python -m bench.ahead MODEL --rates 120,250,500,0 --slots 12.5%,25%,50%

The same greedy answer to one token without reading ahead and with it, in turns, each with its own engine.
The device is throttled by a control group once a model is loaded (as root).
"""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.cgroups import SlowReads
from bench.compare import median, spread
from bench.help import help_of
from mer import Engine, EngineConfig, SamplingParams
from mer.cli.common import model_argument
from mer.errors import MerError

MIB = 1 << 20


def bytes_per_s(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    try:
        return [round(float(rate) * 1e6) for rate in value.split(",")]
    except ValueError:
        raise click.BadParameter("MB/s, separated by commas") from None


async def measure(
    model: Path, tokens: int, group: SlowReads | None, rate: int, **settings: Any
) -> dict[str, Any]:
    """One answer. rate: bytes/s, 0: as many as there are."""
    config = EngineConfig(**settings, prefix_cache=False, speculate="off", max_running=1)
    params = SamplingParams(max_tokens=tokens + 1, temperature=0, ignore_eos=True)
    async with Engine.open(model, config) as engine:
        if group is not None:
            group.limit(rate or None)
        try:
            async with aclosing(engine.stream([1], params)) as deltas:
                async for delta in deltas:
                    last = delta
        finally:
            if group is not None:
                group.limit(None)
        assert last.timings is not None
        steps = last.timings.steps
        return {
            "rate": rate,
            "slots": settings["cache_experts"],
            "ahead": settings["prefetch"],
            "tokens_per_s": tokens / last.timings.decode_s,
            "hit_rate": last.timings.hit_rate,
            "waited_s": steps.io_wait_s,
            "read_bytes": steps.bytes_read,
            "ahead_bytes": steps.prefetch_bytes,
            "used_bytes": steps.prefetch_used_bytes,
            "guesses": steps.guesses,
            "right": steps.guesses_right,
            "depth": engine.facts()["prefetch_depth"],
        }


def show(runs: list[dict[str, Any]], ahead: int) -> Table:
    """A row for each rate and share, without and with beside each other: medians; of tokens/s the range."""
    names = "MB/s,slots,tokens/s,with,gain,hits,read MiB,waited s,used,in vain MiB,guesses right,depth"
    table = Table(*names.split(","), box=None)
    for rate, slots in dict.fromkeys((run["rate"], run["slots"]) for run in runs):
        here = [run for run in runs if (run["rate"], run["slots"]) == (rate, slots)]
        without, other = ([run for run in here if run["ahead"] == n] for n in (0, ahead))

        def both(key: str, form: str, by: float = 1, pair: tuple[Any, ...] = (without, other)) -> str:
            return " → ".join(format(median(each, key) / by, form) for each in pair)

        read, used = (sum(run[key] for run in other) for key in ("ahead_bytes", "used_bytes"))
        guesses, right = (sum(run[key] for run in other) for key in ("guesses", "right"))
        table.add_row(
            f"{rate / 1e6:.0f}" if rate else "all",
            slots,
            spread(without, "tokens_per_s"),
            spread(other, "tokens_per_s"),
            f"{median(other, 'tokens_per_s') / median(without, 'tokens_per_s') - 1:+.1%}",
            both("hit_rate", ".3f"),
            both("read_bytes", ".0f", MIB),
            both("waited_s", ".2f"),
            f"{used / read:.0%}" if read else "-",
            f"{(read - used) / len(other) / MIB:.0f}",
            f"{right / guesses:.0%}" if guesses else "-",
            " ".join(str(run["depth"]) for run in other),
        )
    return table


@click.command(help=help_of(__doc__))
@click.argument("model", callback=model_argument)
@click.option(
    "--rates",
    default="120,250,500,0",
    show_default=True,
    callback=bytes_per_s,
    help="MB/s; 0: not throttled.",
)
@click.option("--slots", default="12.5%,25%,50%", show_default=True, help="As mer run --cache-experts.")
@click.option("--ahead", type=click.IntRange(1), default=8, show_default=True, help="As mer run --prefetch.")
@click.option("--tokens", type=click.IntRange(1), default=48, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=int)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write every run there, too.")
def main(
    model: Path,
    rates: list[int],
    slots: str,
    ahead: int,
    tokens: int,
    rounds: int,
    threads: int | None,
    out: Path | None,
) -> None:
    more = {} if threads is None else {"threads": threads}
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        try:
            group = stack.enter_context(SlowReads(model)) if any(rates) else None
            for rate in rates:
                for share in slots.split(","):
                    for _ in range(rounds):
                        for depth in (0, ahead):
                            settings = {"cache_experts": share, "prefetch": depth, **more}
                            runs.append(asyncio.run(measure(model, tokens, group, rate, **settings)))
        except (MerError, OSError) as error:
            raise click.ClickException(str(error)) from None
    Console(width=160).print(show(runs, ahead))
    if out:
        out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
