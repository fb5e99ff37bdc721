"""`mer reload`: a running server takes its model anew."""

from __future__ import annotations

import click

from mer.cli.common import output
from mer.cli.operator import ask, server_option


@click.command()
@click.argument("model", default="")
@click.option("--path", default="", metavar="MODEL", help="Where the new files are, on the server.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of `mer serve` (cache-policy=lru); without a value it takes its default.",
)
@click.option("--verify-all", is_flag=True, help="Compare every checksum before, not those of a sample.")
@server_option
def reload(model: str, path: str, settings: tuple[str, ...], verify_all: bool, server: str) -> None:
    """Have a server take MODEL (default: its first) anew, and its API keys.

    No request fails: those that run end on the old weights. New ones that can't be served are refused: the
    old ones serve on.
    """
    given = {}
    for each in settings:
        name, separator, value = each.partition("=")
        if not separator:
            raise click.BadParameter(f"{each!r}: write NAME=VALUE", param_hint="--set")
        given[name] = value
    body = {"model": model, "path": path, "settings": given, "verify_all": verify_all}
    told = ask(server, "/admin/reload", body)
    now = told["model"]
    output().print(
        f"{now['name']} serves {now['path']} after {told['seconds']:.2f} s; "
        f"{now['cache_slots']} of {now['experts']} experts in the cache",
        soft_wrap=True,
    )
