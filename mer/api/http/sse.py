"""Server-sent events: a response that is written while it is made."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from time import monotonic
from typing import Any, Final

import msgspec
from quart import Response

from mer.api.http.call import current_call
from mer.api.http.errors import ApiError, api_error

KEEP_ALIVE: Final = b": keep-alive\n\n"
DONE: Final = b"data: [DONE]\n\n"

_log = logging.getLogger("mer.http")
_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def data(value: Any, event: str | None = None) -> bytes:
    """One event; `value` is anything that msgspec writes as JSON."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + msgspec.json.encode(value) + b"\n\n"


async def respond(
    chunks: AsyncGenerator[bytes, None],
    on_error: Callable[[ApiError], bytes] = lambda error: data(error.object),
    *,
    silence: float = math.inf,
    comment: bytes = KEEP_ALIVE,
) -> Response:
    """A response of these chunks, each of them written at once.

    What goes wrong before the first chunk is raised, so that it becomes an ordinary error response; what goes
    wrong later ends the stream with on_error(error).

    Chunks may be empty: the model goes on, and nothing of it is shown. After `silence` seconds of these comes
    `comment`, for who takes a connection that says nothing for dead.
    """
    call = current_call()
    await call.cleanup.enter_async_context(aclosing(chunks))
    while not (first := await anext(chunks)):
        pass

    async def body() -> AsyncGenerator[bytes, None]:
        try:
            yield first
            said = monotonic()
            async for chunk in chunks:
                now = monotonic()
                if chunk or now - said >= silence:
                    said = now
                    yield chunk or comment
        except Exception as error:
            told = api_error(error)
            call.failed(error, told)
            yield on_error(told)

    response = Response(body(), content_type="text/event-stream; charset=utf-8", headers=_HEADERS)
    response.timeout = None
    return response
