"""How commands reach a server over gRPC: its address, key and certificates, and what its errors mean."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import click
import grpc
from attrs import frozen

from mer.errors import ConfigError, MerError

KEY: Final = "MER_API_KEY"
ADMIN_KEY: Final = "MER_ADMIN_KEY"

Metadata = tuple[tuple[str, str], ...]

_FILE: Final = click.Path(path_type=Path)
_MEANING: Final = {
    grpc.StatusCode.UNAUTHENTICATED: "put the server's key into {}",
    grpc.StatusCode.UNIMPLEMENTED: "the server is older than this command",
}


class RemoteError(MerError):
    """What a server said, or that none did."""


@frozen
class Remote:
    """A server. address: HOST:PORT, with https:// before it for TLS. key: the variable that has its key."""

    address: str
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    key: str = KEY

    @property
    def metadata(self) -> Metadata:
        """With every call."""
        key = os.environ.get(self.key)
        return (("authorization", f"Bearer {key}"),) if key else ()

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        """Raises ConfigError for files that can't be read."""
        target = self.address.removeprefix("https://").removeprefix("http://").rstrip("/")
        if not self.address.startswith("https://") and self.tls_ca is None:
            opened = grpc.aio.insecure_channel(target)
        else:
            given = (self.tls_ca, self.tls_key, self.tls_cert)
            opened = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(*map(_contents, given)))
        async with opened as channel:
            yield channel

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error of gRPC becomes a RemoteError."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise RemoteError(f"{self.address}: {self._why(error)}") from None

    def _why(self, error: grpc.aio.AioRpcError) -> str:
        told = error.details() or error.code().name
        if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in told:
            return (
                "no server answers there; start one with `mer serve`, or give the address of its gRPC API "
                "(https:// before it where it has a certificate)"
            )
        # 404 or 401 of plain HTTP, where gRPC always has 200; an answer that ends with its body, where gRPC's
        # ends with trailers. Which of them gRPC tells is chance.
        if "http2 header" in told or "END_STREAM flag" in told:
            return "that is no gRPC API; `mer serve` says at its start on which port it has it"
        advice = _MEANING.get(error.code())
        return f"{told}; {advice.format(self.key)}" if advice else told


def remote_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The argument ADDRESS and the options that make a Remote, of these names."""
    for option in (
        click.option("--tls-key", type=_FILE, help="Its private key (PEM)."),
        click.option("--tls-cert", type=_FILE, help="Certificate (PEM) for a server that asks for one."),
        click.option("--tls-ca", type=_FILE, help="Certificates (PEM), one of which signed the server's."),
        click.argument("address", default="127.0.0.1:50051"),
    ):
        command = option(command)
    return command


model_option: Final = click.option(
    "--model", default="", metavar="NAME", help="Of a server with several; default: its first."
)


def _contents(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror or error}") from None
