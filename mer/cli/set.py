"""`mer set`: change a running server."""

from __future__ import annotations

import click

from mer.cli.common import output, size
from mer.cli.operator import ask, server_option


@click.command("set")
@click.argument("name", type=click.Choice(["ram"]))
@click.argument("value")
@server_option
def set(name: str, value: str, server: str) -> None:
    """Have a server keep to another amount of memory: mer set ram 4GiB."""
    told = ask(server, "/admin/ram", {"ram": value})
    caches = ", ".join(
        f"{each['name']}: {each['cache_slots']} of {each['experts']} experts in the cache"
        for each in told["models"]
        if each["generation"]
    )
    output().print(
        f"{size(told['ram_bytes'])} from now on, {size(told['resident_bytes'])} held; {caches}",
        soft_wrap=True,
    )
