"""`mer monitor`: what a server does, a line at a time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any, Final

import click

from mer.cli.common import percent, rate, seconds
from mer.cli.moments import Moment, watch
from mer.cli.remote import Remote, model_option, remote_options

_COLUMNS: Final = {
    "time": 8, "tok/s": 8, "run": 4, "wait": 4, "first p50": 9, "next p50": 9, "hits": 5, "read": 10,
    "depth": 5, "KV": 4, "experts": 7, "waits": 5, "other": 5, "idle": 5,
}  # fmt: skip


@click.command()
@remote_options
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 60),
    default=1,
    show_default=True,
    metavar="SECONDS",
    help="From one line to the next.",
)
@model_option
@click.option("--count", "-n", type=click.IntRange(1), metavar="N", help="Lines; default: until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def monitor(interval: float, model: str, count: int | None, as_json: bool, **where: Any) -> None:
    """Write what the server at ADDRESS (HOST:PORT of its gRPC API) does, line by line.

    Rates are of the interval before. An API key is taken from MER_API_KEY.
    """
    asyncio.run(_monitor(Remote(**where), interval, model, count, as_json))


async def _monitor(remote: Remote, interval: float, model: str, count: int | None, as_json: bool) -> None:
    async with remote.channel() as channel:
        written = 0
        async for _, moment in watch(remote, channel, interval, model):
            if not (as_json or written):
                click.echo(_row(_COLUMNS))
            click.echo(json.dumps(moment.as_json()) if as_json else _line(moment))
            written += 1
            if written == count:
                return


def _line(now: Moment) -> str:
    shares = now.time_share
    return _row(
        (
            time.strftime("%H:%M:%S", time.localtime(now.time)),
            f"{now.tokens_per_s:.1f}",
            str(now.running),
            str(now.waiting),
            seconds(now.first_token.p50),
            seconds(now.next_token.p50),
            percent(now.expert_hit_rate),
            rate(now.read_bytes_per_s),
            f"{now.queue_depth:.1f}",
            percent(now.kv_blocks_used / max(now.kv_blocks, 1)),
            *(percent(each) for each in (shares.experts, shares.io_wait, shares.other, shares.idle)),
        )
    )


def _row(cells: Iterable[str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=True))
