"""`mer shard`: experts of a model in this machine's memory, for engines on other machines."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import click

from mer._ext.uring import BACKENDS
from mer.api.http import logs
from mer.cli.common import messages, model_argument, size, size_option
from mer.cluster.health import HealthServer
from mer.cluster.server import ShardServer, ShardSettings
from mer.cluster.shard import Shard
from mer.config import parse_address
from mer.engine.budget import default_ram, resident_bytes

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class _Shard(click.Command):
    """Knows what who comes from `mer serve` means by --host."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in ("--host", "--port"):
                text = f"No such option {error.option_name!r}: a shard has --listen HOST:PORT."
                raise click.NoSuchOption(error.option_name, text, ctx=ctx) from None
            raise


@click.command(cls=_Shard)
@click.argument("model", callback=model_argument)
@click.option("--ram", callback=size_option, help="Memory of the process (8GiB); default: what is free.")
@click.option(
    "--listen", default="127.0.0.1:9100", show_default=True, metavar="HOST:PORT", help="Port 0: a free one."
)
@click.option(
    "--token-file", type=_FILE, help="The join token that engines must show; `openssl rand -hex 32`."
)
@click.option("--tls-cert", type=_FILE, help="Certificate chain of this shard (PEM).")
@click.option("--tls-key", type=_FILE, help="Its private key (PEM).")
@click.option("--tls-client-ca", type=_FILE, help="Engines need a certificate signed by this one (PEM).")
@click.option(
    "--health",
    metavar="HOST:PORT",
    help="Where to say by gRPC's health protocol, to anybody, whether it is well; default: nowhere.",
)
@click.option(
    "--experts", type=click.IntRange(1), metavar="N", help="Most that it holds; default: what --ram holds."
)
@click.option("--threads", type=click.IntRange(1), help="Compute threads; default: the CPUs it may use.")
@click.option(
    "--io",
    "io_backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="How experts are read.",
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Of the log."
)
def shard(
    model: Path,
    ram: int | None,
    health: str | None,
    experts: int | None,
    threads: int | None,
    io_backend: str,
    log_format: Literal["text", "json"],
    **options: Any,
) -> None:
    """Hold experts of MODEL in memory and compute them for engines on other machines.

    An engine names this one by --peer and says which experts are to be held. Both need the same files.
    """
    settings = ShardSettings(**options)
    logs.configure(log_format)
    with _health(health) as tell:
        made = Shard(
            model,
            ram or default_ram(),
            resident_bytes(),
            most=experts,
            threads=threads,
            io_backend=io_backend,
        )
        try:
            server = ShardServer(made, settings)
            ended = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: ended.set())
            host = parse_address(settings.listen)[0]
            address = f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"
            messages().print(
                f"mer {version('mer')} holds up to {made.capacity} of {made.total} experts of {model.name} "
                f"at {address}; memory {size(made.ram)}" + (f"; health at {health}" if health else ""),
                soft_wrap=True,
            )
            tell(True)
            while not ended.wait(0.5):  # the system may give a signal to another thread, which wakes nobody
                tell(not made.failed)
            server.stop()
        finally:
            made.close()


@contextmanager
def _health(listen: str | None) -> Iterator[Callable[[bool], None]]:
    """Answers probes from before the model is there."""
    if listen is None:
        yield lambda _: None
        return
    server = HealthServer(listen)
    try:
        yield server.tell
    finally:
        server.stop()
