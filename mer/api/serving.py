"""Both faces around one engine, from the first signal of life to the last."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from mer.api.admin import Admin, watch_files
from mer.api.breathing import breathe
from mer.api.http.admin import create_admin
from mer.api.http.app import create_app
from mer.api.http.server import HttpServer, Place
from mer.api.http.service import Service
from mer.api.models import Models, start
from mer.api.settings import ServerSettings
from mer.api.tracing import Tracing
from mer.engine.engine import Engine
from mer.errors import EngineFailedError
from mer.streaming.pressure import Gauge

if TYPE_CHECKING:
    from mer.api.grpc.server import GrpcServer

_log = logging.getLogger("mer.server")

# Seconds between two looks at the engines.
_LOOK: Final = 0.25

# Told when requests can come: the engine, the URL of the HTTP API, the port of the gRPC API if there is one.
Announce = Callable[[Engine, str, int | None], None]


async def serve(
    models: Models,
    settings: ServerSettings,
    announce: Announce,
    keys: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then end what is running within `drain_timeout`.

    SIGHUP reloads the models that are loaded, and the API keys, which `keys` reads.

    A second signal ends it at once, a third one whatever is under way. Both APIs tell their health
    while the model is being loaded. Raises what Engine.open raises, ConfigError for an address or a
    certificate that can't be used, and EngineFailedError when the only model's engine stopped by itself: a
    process that is started anew is the way out.
    """
    stop, now, closing = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    engine: Engine | None = None
    failure = ""

    def signalled() -> None:
        if now.is_set() or (stop.is_set() and (engine is None or closing.is_set())):
            # Nobody is served, and a thread that loads or writes can't be told to stop.
            loop.remove_signal_handler(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        (now if stop.is_set() else stop).set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, signalled)
    tracing = Tracing() if settings.otel else None
    service = Service(settings, models=models, tracing=tracing)
    admin = Admin(models, service.access, keys)
    hung_up = asyncio.Event()

    async def obey() -> None:
        """One reload does for all signals that came before it began; a later one is not lost."""
        while True:
            await hung_up.wait()
            hung_up.clear()
            await admin.reload_all()

    loop.add_signal_handler(signal.SIGHUP, hung_up.set)
    try:
        async with (
            HttpServer(create_app(service), settings) as server,
            _grpc(service) as grpc,
            _admin(admin, settings),
        ):
            engine = await _unless(stop, models.open_first())
            if engine is None:
                return
            # So long does a thread that computes in Python (a template, a body) keep the loop waiting.
            sys.setswitchinterval(0.001)
            watching = [
                start(watch_files(models), "watching files"),
                start(_watch_engines(models, stop), "watching engines"),
                start(obey(), "SIGHUP"),
            ]
            if not settings.fixed_ram:
                watching.append(start(breathe(models, Gauge()), "watching memory"))
            try:
                if grpc is not None:
                    await grpc.ready(engine)
                announce(engine, server.url, grpc.port if grpc else None)
                await stop.wait()
                failure = models.drop_failed()
                service.draining = True
                await _drain(service, grpc, now)
            finally:
                closing.set()
                for task in watching:
                    task.cancel()
                await models.close(drain=False)
    finally:
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(name)
    if failure:
        raise EngineFailedError(f"{failure}; its log says more, and a new start helps")


async def _watch_engines(models: Models, stop: asyncio.Event) -> None:
    """Set `stop` when nothing can be served any more."""
    while True:
        await asyncio.sleep(_LOOK)
        if models.drop_failed():
            _log.error("the engine has failed: the server ends, so that who watches over it starts it anew")
            stop.set()
            return


async def _unless(stop: asyncio.Event, opening: Coroutine[None, None, Engine]) -> Engine | None:
    """What is opened, or None when `stop` comes first."""
    task, stopped = asyncio.ensure_future(opening), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
            return None
        return task.result()
    finally:
        stopped.cancel()


@asynccontextmanager
async def _admin(admin: Admin, settings: ServerSettings) -> AsyncIterator[None]:
    """The operator's ports, where they are wanted."""
    async with AsyncExitStack() as stack:
        if settings.admin_port is not None:
            place = Place(settings.admin_host, settings.admin_port, "admin-")
            server = await stack.enter_async_context(
                HttpServer(create_admin(admin, settings), settings, place)
            )
            _log.info("admin endpoints at %s for %d keys", server.url, len(settings.admin_keys))
        if settings.admin_grpc_port is not None:
            from mer.api.grpc.admin import serve_admin

            grpc, port = await serve_admin(admin, settings)
            stack.push_async_callback(grpc.stop, None)
            _log.info("admin service on port %d", port)
        yield


@asynccontextmanager
async def _grpc(service: Service) -> AsyncIterator[GrpcServer | None]:
    """The gRPC server, where one is wanted; stopped behind."""
    if service.settings.grpc_port is None:
        yield None
        return
    from mer.api.grpc.server import serve_grpc

    server = await serve_grpc(None, service.settings, service.access, service.models, service.tracing)
    try:
        yield server
    finally:
        await server.stop(0)


async def _drain(service: Service, grpc: GrpcServer | None, now: asyncio.Event) -> None:
    """Until nothing is running, time is up, or somebody is in a hurry."""
    limit = service.settings.drain_timeout
    running = service.running + (grpc.running if grpc else 0)
    if running:
        _log.info("%d running; ending within %g s, at once with a second signal", running, limit)
    waits: list[Coroutine[Any, Any, object]] = [service.idle.wait()]
    if grpc is not None:
        waits.append(grpc.stop(limit))
    idle: asyncio.Future[Any] = asyncio.gather(*waits)
    hurry = asyncio.ensure_future(now.wait())
    await asyncio.wait([idle, hurry], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    left = service.running + (grpc.running if grpc else 0)
    if left:
        _log.warning("%d requests are ended unfinished", left)
    if grpc is not None:
        await grpc.stop(0)
    for each in (hurry, idle):
        each.cancel()
    # Else asyncio logs that nobody asked how they ended.
    await asyncio.gather(hurry, idle, return_exceptions=True)
