"""The gRPC server: its socket, health checking, reflection, and how it ends."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mer.api.access import Access
from mer.api.grpc.gate import Gate
from mer.api.grpc.service import SERVICE, Inference
from mer.api.model import Model
from mer.api.models import Models
from mer.api.settings import ServerSettings
from mer.api.tracing import Tracing
from mer.config import EngineConfig
from mer.engine.engine import Engine
from mer.errors import ConfigError

# What the health of is told: the server as a whole, and the service.
_NAMES: Final = ("", SERVICE)
_SERVING: Final = (health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING)
# Seconds between two looks at the engines.
_LOOK: Final = 1.0
_PING_TIMEOUT: Final = 20.0
# Clients may ping this often, also between calls; who does it more often is taken for a nuisance and cut off.
_CLIENT_PING: Final = 5.0
# Then a connection takes no new calls, and those that it has go on: a client that balances over addresses of
# a name looks it up again only when a connection ends, and would not find who came later.
_CONNECTION_AGE: Final = 300.0


async def serve_grpc(
    engine: Engine | None,
    settings: ServerSettings,
    access: Access | None = None,
    models: Models | None = None,
    tracing: Tracing | None = None,
) -> GrpcServer:
    """A server on settings.host and settings.grpc_port (0: any free one) that listens already.

    engine: None while the model is being loaded, see `GrpcServer.ready`. access: keys and limits, where
    another face shares them; so are models. Raises ConfigError for an address or certificates that
    can't be used.
    """
    access = access or Access(
        settings.api_keys, rate_limit=settings.rate_limit, max_concurrent=settings.max_concurrent
    )
    gate = Gate(access, tracing)
    models = models or Models([Model(settings.model_name, Path(), EngineConfig())])
    inference = Inference(models, settings, gate)
    server = grpc.aio.server(options=_options(settings))
    generic = grpc.method_handlers_generic_handler(SERVICE, inference.handlers())
    server.add_generic_rpc_handlers((generic,))
    healths = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    for name in _NAMES:
        await healths.set(name, _SERVING[False])
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = bind(server, settings)
    await server.start()
    made = GrpcServer(server, gate, models, healths, port)
    if engine is not None:
        await made.ready(engine)
    return made


class GrpcServer:
    """A server that listens on `port`."""

    def __init__(
        self,
        server: grpc.aio.Server,
        gate: Gate,
        models: Models,
        healths: health.aio.HealthServicer,
        port: int,
    ) -> None:
        self.port = port
        self._server = server
        self._gate = gate
        self._models = models
        self._healths = healths
        self._following: asyncio.Task[None] | None = None

    @property
    def running(self) -> int:
        """Calls that are being served."""
        return self._gate.running

    async def ready(self, engine: Engine) -> None:
        """The model is there: from now on requests are served."""
        if self._models.first.engine is None:
            self._models.adopt(engine)
        for name in _NAMES:
            await self._healths.set(name, _SERVING[True])
        self._following = asyncio.create_task(self._follow())

    async def stop(self, grace: float) -> None:
        """Take nothing new, let calls end for `grace` seconds, then cut off those that are left.

        May be called again meanwhile, with less grace.
        """
        # Not by grpc's own grace: that waits for those who watch the health as well, who never end, and
        # gives calls that come meanwhile the status CANCELLED, after which no client tries elsewhere.
        self._gate.draining.set()
        if self._following is not None:
            self._following.cancel()
        await self._healths.enter_graceful_shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._gate.wait_idle()
        await self._server.stop(None)

    async def _follow(self) -> None:
        """Tell who asks for the health whether an engine has stopped by an error."""
        told = False
        while True:
            failed = bool(self._models.failure)
            if failed != told:
                told = failed
                for name in _NAMES:
                    await self._healths.set(name, _SERVING[not failed])
            await asyncio.sleep(_LOOK)


def _options(settings: ServerSettings) -> list[tuple[str, int]]:
    def milliseconds(seconds: float) -> int:
        return max(1, round(seconds * 1000))

    return [
        ("grpc.max_receive_message_length", settings.max_body),
        ("grpc.max_send_message_length", -1),
        # A client that is gone without a word is found out, and its requests end.
        ("grpc.keepalive_time_ms", milliseconds(settings.keep_alive)),
        ("grpc.keepalive_timeout_ms", milliseconds(_PING_TIMEOUT)),
        ("grpc.http2.ping_timeout_ms", milliseconds(_PING_TIMEOUT)),
        ("grpc.http2.min_ping_interval_without_data_ms", milliseconds(_CLIENT_PING)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_age_ms", milliseconds(_CONNECTION_AGE)),
        # Two servers on one port would share its connections without anybody noticing.
        ("grpc.so_reuseport", 0),
    ]


def bind(
    server: grpc.aio.Server,
    settings: ServerSettings,
    host_option: str = "--host",
    port_option: str = "--grpc-port",
) -> int:
    """The port of settings.host that it listens on once it is started. Raises ConfigError."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port or 0}"
    credentials = _credentials(settings)
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        raise ConfigError(
            f"{host_option} {settings.host}, {port_option} {settings.grpc_port}: can't listen there; "
            "choose another, stop who has it, or leave it out"
            + (" with --no-grpc" if port_option == "--grpc-port" else "")
        ) from None


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    cert, key, ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if cert is None or key is None:
        return None
    try:
        # gRPC says nothing of what it does not like; this names it.
        checked = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        checked.load_cert_chain(cert, key, lambda: "")
        if ca is not None:
            checked.load_verify_locations(ca)
        return grpc.ssl_server_credentials(
            [(key.read_bytes(), cert.read_bytes())],
            root_certificates=ca.read_bytes() if ca else None,
            require_client_auth=ca is not None,
        )
    except (OSError, ValueError) as error:
        files = f"--tls-cert {cert}, --tls-key {key}" + (f", --tls-client-ca {ca}" if ca else "")
        raise ConfigError(f"{files}: can't be used: {error}") from None
