"""`mer top`: a server on the terminal."""

from __future__ import annotations

import sys
from typing import Any

import click

from mer.cli.remote import Remote, remote_options


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
def top(interval: float, **where: Any) -> None:
    """Show what the server at ADDRESS (HOST:PORT of its gRPC API) does.

    An API key is taken from MER_API_KEY.
    """
    if not sys.stdout.isatty():
        raise click.UsageError("this needs a terminal; `mer monitor` writes lines")
    from mer.cli.dashboard.app import Dashboard

    error = Dashboard(Remote(**where), interval).run()
    if error is not None:
        raise error
