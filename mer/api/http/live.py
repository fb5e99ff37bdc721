"""GET /live[?model=NAME]: what a model does, once or as events; the same facts as gRPC's Watch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any, Final

import attrs
from msgspec import Struct
from quart import Blueprint, Response, request

from mer.api.http import sse
from mer.api.http.errors import unavailable
from mer.api.http.service import Service, json_response
from mer.engine.stats import Vram
from mer.engine.view import ExpertMap, Percentiles, RequestView
from mer.errors import QueueFullError

# Seconds from one event to the next, and how many may listen.
_INTERVAL: Final = 1.0
_MOST: Final = 64


class Live(Struct):
    """Totals are since the model was loaded; latencies are of the last minute. See View of the library."""

    time: float
    name: str
    chat: bool
    """Whether the model has a chat template."""
    uptime_s: float
    paused: bool
    running: int
    waiting: int
    requests: tuple[RequestView, ...]
    first_token: Percentiles
    next_token: Percentiles
    completion_tokens: int
    steps: int
    step_tokens: int
    step_s: float
    io_wait_s: float
    expert_s: float
    bytes_read: int
    hits: int
    misses: int
    reads: int
    read_s: float
    read_errors: int
    kv_blocks: int
    kv_blocks_free: int
    kv_blocks_cached: int
    cache_slots: int
    resident: int
    evictions: int
    ram_budget_bytes: int
    resident_bytes: int
    vram: Vram | None
    vram_hits: int
    bus_bytes: int
    experts: ExpertMap | None


def blueprint(service: Service) -> Blueprint:
    """The endpoint."""
    made = Blueprint("live", __name__)
    listeners = 0

    async def stream(model: str | None) -> AsyncGenerator[bytes, None]:
        nonlocal listeners
        if listeners == _MOST:
            raise QueueFullError(f"{_MOST} are listening to /live; try again later", 5.0)
        listeners += 1
        try:
            while not service.draining:
                yield sse.data(await _live(service, model))
                await asyncio.sleep(_INTERVAL)
            raise unavailable("the server is shutting down", 5, "shutting_down")
        finally:
            listeners -= 1

    @made.get("/live")
    async def live() -> Response:
        model = request.args.get("model")
        # The answer to HEAD has no body that could end.
        if request.method != "HEAD" and "text/event-stream" in request.headers.get("Accept", ""):
            return await sse.respond(stream(model))
        return json_response(await _live(service, model))

    return made


async def _live(service: Service, model: str | None) -> Live:
    name, engine = service.engine_of(model)
    view = await asyncio.to_thread(engine.view)
    tokenizer = engine.tokenizer
    # Two names mean more in the view: steps, of which the snapshot has details, and experts, which are a map.
    facts: dict[str, Any] = attrs.asdict(view.now.steps)
    for given in (view.now, view):
        facts |= attrs.asdict(given, recurse=False)
    return Live(
        **{name: facts[name] for name in Live.__struct_fields__ if name in facts},
        name=name,
        chat=tokenizer is not None and tokenizer.chat_template is not None,
        uptime_s=time.time() - service.started,
        read_s=view.now.read_latency.seconds,
    )
