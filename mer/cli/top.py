"""`mer top`: a server on the terminal."""

from __future__ import annotations

import sys
from typing import Any

import attrs
import click

from mer.cli.remote import ADMIN_KEY, Remote, model_option, remote_options


@click.command()
@remote_options
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 60),
    default=1,
    show_default=True,
    metavar="SECONDS",
    help="From one picture to the next.",
)
@model_option
@click.option("--admin", metavar="ADDRESS", help="Its admin API (gRPC): to pause, pin, reload, see the log.")
def top(interval: float, model: str, admin: str | None, **where: Any) -> None:
    """Show what the server at ADDRESS (HOST:PORT of its gRPC API) does.

    Keys are taken from MER_API_KEY, and of the admin API from MER_ADMIN_KEY.
    """
    if not sys.stdout.isatty():
        raise click.UsageError("this needs a terminal; `mer monitor` writes lines")
    from mer.cli.dashboard.app import Dashboard

    remote = Remote(**where)
    operator = attrs.evolve(remote, address=admin, key=ADMIN_KEY) if admin else None
    error = Dashboard(remote, interval, operator, model).run()
    if error is not None:
        raise error
