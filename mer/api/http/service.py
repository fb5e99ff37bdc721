"""What the handlers share: the engine, the settings, who is being served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

import msgspec
from quart import Response, request

from mer.api.access import Access
from mer.api.http.errors import ApiError, unavailable
from mer.api.http.large_bodies import decode_body
from mer.api.http.long_lists import decode_large
from mer.api.large_json import PIECE
from mer.api.metrics import Metrics
from mer.api.settings import ServerSettings
from mer.engine.engine import Engine

_T = TypeVar("_T")

# Seconds for a body to arrive.
_BODY_TIMEOUT: Final = 60.0


class Service:
    """One server. draining: it ends what is running and takes nothing new."""

    def __init__(self, settings: ServerSettings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.access = Access(
            settings.api_keys, rate_limit=settings.rate_limit, max_concurrent=settings.max_concurrent
        )
        self.started = int(time.time())
        self.draining = False
        self.running = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._engine: Engine | None = None
        self._metrics: Metrics | None = None
        if engine is not None:
            self.engine = engine

    @property
    def engine(self) -> Engine:
        """Raises ApiError (503) while the model is being loaded."""
        if self._engine is None:
            raise unavailable("the model is being loaded", 2, "loading")
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine
        self._metrics = Metrics(engine, self.settings.model_name, self.access.refused)

    @property
    def metrics(self) -> Metrics:
        """What the engine did since it is served here. Raises ApiError (503) while it is being loaded."""
        if self._metrics is None:
            raise unavailable("the model is being loaded", 2, "loading")
        return self._metrics

    @property
    def status(self) -> Literal["ready", "loading", "draining", "failed"]:
        if self._engine is not None and self._engine.failure:
            return "failed"
        if self.draining:
            return "draining"
        return "loading" if self._engine is None else "ready"

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        engine = self.engine
        return min(engine.spec.max_positions, engine.budget.context)

    def begin(self) -> None:
        """A request is being served."""
        self.running += 1
        self.idle.clear()

    def end(self) -> None:
        """It no longer is."""
        self.running -= 1
        if not self.running:
            self.idle.set()

    def check_model(self, name: str | None) -> str:
        """The name of the model here; a request may leave it out. Raises ApiError (404) for another."""
        served = self.settings.model_name
        if name is not None and name != served:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; this server has {served!r}",
                param="model",
                code="model_not_found",
            )
        return served


async def body_as(
    kind: type[_T],
    amend: Callable[[Any], Any] | None = None,
    *,
    ids: tuple[str, int] | None = None,
    most: int | None = None,
) -> _T:
    """The body of the request that is being handled; a large one is read on a thread, a piece at a time.

    amend: what is done to the JSON before it is read as a `kind`. ids: the name of a list of token ids that
    may be long, and the most that make sense. most: messages that make sense, each of which is some tokens.
    Raises ApiError.
    """
    given = request.mimetype
    if given != "application/json":
        raise ApiError(
            415,
            f"the body must be JSON, and a header must say so (Content-Type: application/json), not "
            f"{given or 'none'}",
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            data = await request.get_data(cache=False, as_text=False)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", type="timeout_error", code="timeout") from None
    assert isinstance(data, bytes)
    if len(data) <= PIECE:
        return decode_body(data, kind, amend)
    if most is not None and (count := data.count(b'"role"')) > most:
        raise ApiError(
            400,
            f"the conversation has some {count} messages; {most} tokens are the most here",
            param="messages",
            code="context_length_exceeded",
        )
    if ids is None:
        return await asyncio.to_thread(lambda: decode_body(data, kind, amend))
    return await asyncio.to_thread(lambda: decode_large(data, kind, *ids))


async def translated(work: Callable[[], _T]) -> _T:
    """What `work` makes of the body of the request that is being handled; on a thread if that is large."""
    large = request.content_length is None or request.content_length > PIECE
    return await asyncio.to_thread(work) if large else work()


def json_response(value: Any, status: int = 200) -> Response:
    """`value` is anything that msgspec writes as JSON."""
    return Response(msgspec.json.encode(value), status, content_type="application/json")
