"""Both faces around one engine, from the first signal of life to the last."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path

from mer.api.http.server import HttpServer
from mer.api.http.service import Service
from mer.api.settings import ServerSettings
from mer.config import EngineConfig
from mer.engine.engine import Engine

_log = logging.getLogger("mer.server")

# Told when requests can come: the engine, the URL of the HTTP API.
Announce = Callable[[Engine, str], None]


async def serve(model: Path, config: EngineConfig, settings: ServerSettings, announce: Announce) -> None:
    """Serve until SIGTERM or SIGINT; then end what is running within `drain_timeout`.

    A second signal ends it at once. The HTTP API answers /health while the model is being loaded. Raises
    what Engine.open raises, and ConfigError for an address or a certificate that can't be used.
    """
    stop, now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        (now if stop.is_set() else stop).set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, signalled)
    service = Service(settings)
    try:
        async with HttpServer(service) as server:
            engine = await _unless(stop, _open(model, config))
            if engine is None:
                return
            try:
                service.engine = engine
                announce(engine, server.url)
                await stop.wait()
                service.draining = True
                await _drain(service, now)
            finally:
                await engine.close(drain=False)
    finally:
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(name)


async def _open(model: Path, config: EngineConfig) -> Engine:
    return await Engine.open(model, config)


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


async def _drain(service: Service, now: asyncio.Event) -> None:
    """Until nothing is running, time is up, or somebody is in a hurry."""
    limit = service.settings.drain_timeout
    if service.running:
        _log.info("%d running; ending within %g s, at once with a second signal", service.running, limit)
    waits = [asyncio.ensure_future(event.wait()) for event in (service.idle, now)]
    await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if service.running:
        _log.warning("%d requests are ended unfinished", service.running)
