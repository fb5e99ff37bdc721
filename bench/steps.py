"""Where the time of decode steps goes, by a profile of `mer run` or `bench.engine`.

    python -m bench.engine MODEL --profile FILE
    python -m bench.steps FILE [--steps 64] [--json]

Means of the last steps: milliseconds of each part, reads a step, how long a read takes from when it is asked
for to when that is seen to be over, and the share of the time in which one was under way. `experts` has
`compute` and `wait for reads` in it. Steps with a prompt are not told apart: ask for fewer steps than the
last answer has tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.help import help_of


def summary(events: list[dict[str, Any]], last: int) -> dict[str, Any]:
    """Of the last steps. Raises click.ClickException where there are not so many."""
    spans = [event for event in events if event.get("ph") == "X"]
    steps = [event for event in spans if event["name"] == "step"][-last:]
    if len(steps) < last:
        raise click.ClickException(f"the profile has {len(steps)} steps, not {last}: give fewer --steps")
    start, end = steps[0]["ts"], steps[-1]["ts"] + steps[-1]["dur"]
    parts: Counter[str] = Counter()
    for span in spans:
        if start <= span["ts"] < end and not span["name"].startswith("layer "):
            parts[span["name"]] += span["dur"]
    begun: dict[Any, float] = {}
    reads: list[tuple[float, float]] = []
    for event in events:
        if event.get("cat") == "reads" and event["ph"] == "b":
            begun[event["id"]] = event["ts"]
        elif event.get("cat") == "reads" and event["ph"] == "e" and event["id"] in begun:
            reads.append((begun.pop(event["id"]), event["ts"]))
    reads = sorted(read for read in reads if start <= read[0] < end)
    busy, until = 0.0, start
    for first, over in reads:
        busy += max(0.0, min(over, end) - max(first, until))
        until = max(until, over)
    return {
        "steps": last,
        "ms": {name: spent / last / 1e3 for name, spent in parts.most_common()},
        "reads": len(reads) / last,
        "read_ms": sum(over - first for first, over in reads) / len(reads) / 1e3 if reads else 0.0,
        "reading": busy / (end - start),
    }


@click.command(help=help_of(__doc__))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--steps", type=click.IntRange(1), default=64, show_default=True, help="The last ones.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(file: Path, steps: int, as_json: bool) -> None:
    try:
        events = json.loads(file.read_text())["traceEvents"]
    except (ValueError, KeyError, TypeError):
        raise click.ClickException(f"{file} is no profile of mer run --profile") from None
    found = summary(events, steps)
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("of a step", "ms")
    for name, spent in found["ms"].items():
        table.add_row(name, f"{spent:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{found['reads']:.1f} reads a step, {found['read_ms']:.1f} ms each; "
        f"one was under way for {found['reading']:.0%} of the time"
    )


if __name__ == "__main__":
    main()
