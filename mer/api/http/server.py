"""A server on a socket: starts before the model is there, ends what is running before it ends itself."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from typing import Final, Self

from attrs import frozen
from hypercorn.asyncio import serve
from hypercorn.config import Config
from hypercorn.typing import ASGIFramework

from mer.api.http.connections import GRACE, install
from mer.api.settings import ServerSettings
from mer.errors import ConfigError

# Longer than clients keep a connection that they don't use, so that none is closed while they send.
_IDLE: Final = 60.0

install()


@frozen
class Place:
    """prefix: of the options that say so."""

    host: str
    port: int
    prefix: str = ""


class HttpServer:
    """`async with HttpServer(app, settings) as server`: listens; leaving it closes all connections.

    Raises ConfigError for an address or a certificate that can't be used.
    """

    def __init__(self, app: ASGIFramework, settings: ServerSettings, place: Place | None = None) -> None:
        """place: where it listens; None: where the settings say."""
        self._app = app
        self._place = place = place or Place(settings.host, settings.port)
        self._scheme = "https" if settings.tls_cert else "http"
        self._stop = asyncio.Event()
        self._config = config = Config()
        config.errorlog = logging.getLogger("mer.http.connections")
        config.graceful_timeout = 5 * GRACE  # all connections have ended before
        config.keep_alive_timeout = _IDLE
        config.keep_alive_max_requests = sys.maxsize  # at its end HTTP/2 drops what it is answering
        config.backlog = 1024
        config.include_server_header = False
        if settings.tls_cert is not None and settings.tls_key is not None:
            config.certfile, config.keyfile = str(settings.tls_cert), str(settings.tls_key)
        if settings.tls_client_ca is not None:
            import ssl

            config.ca_certs, config.verify_mode = str(settings.tls_client_ca), ssl.VerifyMode.CERT_REQUIRED
        try:
            config.create_ssl_context()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--tls-cert {settings.tls_cert}, --tls-key {settings.tls_key}: can't be used: {error}"
            ) from None
        listening = _listen(place)
        self.port: int = listening.getsockname()[1]
        config.bind = [f"fd://{listening.detach()}"]

    @property
    def url(self) -> str:
        host = f"[{self._place.host}]" if ":" in self._place.host else self._place.host
        return f"{self._scheme}://{host}:{self.port}"

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(serve(self._app, self._config, shutdown_trigger=self._stop.wait))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await self._task


def _listen(place: Place) -> socket.socket:
    host, port = place.host, place.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((host, port))
            made.listen(1024)
        except BaseException:
            made.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"--{place.prefix}host {host}, --{place.prefix}port {port}: can't listen there: "
            f"{error.strerror or error}; choose another, or stop who has it"
        ) from None
    return made
