"""What the handlers share: the engine, the settings, who is being served."""

from __future__ import annotations

import asyncio
import time
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
from quart import Response, request
from werkzeug.exceptions import RequestEntityTooLarge

from mer.api.access import Access
from mer.api.http.call import current_call
from mer.api.http.errors import ApiError, unavailable
from mer.api.http.large_bodies import decode_body, decode_conversation, too_long
from mer.api.http.long_lists import decode_large
from mer.api.large_json import PIECE, most_bytes
from mer.api.metrics import ServerMetrics
from mer.api.model import Model, UnknownModelError
from mer.api.models import Models
from mer.api.settings import ServerSettings
from mer.api.tracing import Tracing
from mer.config import EngineConfig
from mer.engine.engine import Engine

_T = TypeVar("_T")

# Seconds for a body to arrive.
_BODY_TIMEOUT: Final = 60.0


class Service:
    """One server. draining: it ends what is running and takes nothing new."""

    def __init__(
        self,
        settings: ServerSettings,
        engine: Engine | None = None,
        models: Models | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """engine: the only model's, where no `models` are given; also set later."""
        self.settings = settings
        self.tracing = tracing
        self.models = models or Models([Model(settings.model_name, Path(), EngineConfig())])
        self.access = Access(
            settings.api_keys, rate_limit=settings.rate_limit, max_concurrent=settings.max_concurrent
        )
        self.started = int(time.time())
        self.draining = False
        self.running = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._metrics = ServerMetrics(self.access.refused, lambda: self.models.ram)
        self.models.changed.append(lambda model, engine: self._metrics.follow(model.name, engine))
        if engine is not None:
            self.models.adopt(engine)

    @property
    def engine(self) -> Engine:
        """The first model's. Raises ApiError (503) while it is being loaded."""
        engine = self.models.first.engine
        if engine is None:
            raise unavailable("the model is being loaded", 2, "loading")
        return engine

    def engine_of(self, name: str | None) -> tuple[str, Engine]:
        """A model's name and engine, where it is loaded. Raises ApiError (404, 503)."""
        model = self.find(name)
        if model.engine is None:
            raise unavailable(f"the model {model.name!r} is not loaded; a request loads it", 2, "loading")
        return model.name, model.engine

    @property
    def metrics(self) -> ServerMetrics:
        """What all models did. Raises ApiError (503) while the first is being loaded."""
        if not self.models.ram:
            raise unavailable("the model is being loaded", 2, "loading")
        return self._metrics

    @property
    def status(self) -> Literal["ready", "loading", "draining", "failed"]:
        if self.models.first.state == "failed" or self.models.failure:
            return "failed"
        if self.draining:
            return "draining"
        return "ready" if self.models.ram else "loading"

    @property
    def loaded(self) -> Models:
        """The models. Raises ApiError (503) while the first is being loaded."""
        if not self.models.ram:
            raise unavailable("the model is being loaded", 2, "loading")
        return self.models

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together, of the model that takes most."""
        return self.loaded.context

    def begin(self) -> None:
        """A request is being served."""
        self.running += 1
        self.idle.clear()

    def end(self) -> None:
        """It no longer is."""
        self.running -= 1
        if not self.running:
            self.idle.set()

    def find(self, name: str | None) -> Model:
        """A request may leave the name out. Raises ApiError (404) for one that is not served here."""
        try:
            return self.models.find(name)
        except UnknownModelError as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from None

    async def use(self, name: str | None) -> tuple[str, Engine]:
        """A model's name and engine, which stays open until the request that is being handled is over.

        Waits for a model that is loaded when it is asked for. Raises ApiError, and why it can't be loaded.
        """
        model = self.find(name)
        return model.name, await current_call().cleanup.enter_async_context(self.models.use(model))


async def body_as(
    kind: type[_T],
    amend: Callable[[Any], Any] | None = None,
    *,
    ids: tuple[str, int] | None = None,
    models: Models | None = None,
) -> _T:
    """The body of the request that is being handled; a large one is read on a thread, a piece at a time.

    amend: what is done to the JSON before it is read as a `kind`. ids: the name of a list of token ids that
    may be long, and the most that make sense. models: for one of them it is a conversation. Raises ApiError.
    """
    given = request.mimetype
    if given != "application/json":
        raise ApiError(
            415,
            f"the body must be JSON, and a header must say so (Content-Type: application/json), not "
            f"{given or 'none'}",
            code="unsupported_media_type",
        )
    coding = request.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        message = f"the body must come as it is, not with Content-Encoding: {coding[:100]}"
        raise ApiError(415, message, code="unsupported_media_type", headers={"Accept-Encoding": "identity"})
    parts = await _read(None if models is None else models.context)
    if sum(map(len, parts)) <= PIECE:
        return decode_body(b"".join(parts), kind, amend)

    def large() -> _T:
        data = b"".join(parts)  # takes milliseconds, without Python's lock
        parts.clear()
        if ids is not None:
            return decode_large(data, kind, *ids)
        assert models is not None
        return decode_conversation(data, kind, amend, models.context, models.too_many)

    return await asyncio.to_thread(large)


async def _read(context: int | None) -> list[bytes]:
    """The body of the request that is being handled, in parts.

    context: the most tokens that make sense. Raises ApiError for a body that can't be so few: nothing of it
    is kept, but it is read to its end, so that the client sees the answer.
    """
    most = None if context is None else most_bytes(context)
    parts: list[bytes] = []
    size, taken = 0, request.max_content_length
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            async for part in request.body:
                size += len(part)
                if taken is not None and size > taken:
                    raise RequestEntityTooLarge
                if most is None or size <= most:
                    parts.append(part)
                else:
                    parts.clear()
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", type="timeout_error", code="timeout") from None
    if context is not None and most is not None and size > most:
        raise too_long(f"the conversation has {size:,} bytes", "messages", context)
    if parts:  # Windows' tools write a mark before UTF-8
        parts[0] = parts[0].removeprefix(BOM_UTF8)
    return parts


async def translated(work: Callable[[], _T]) -> _T:
    """What `work` makes of the body of the request that is being handled; on a thread if that is large."""
    large = request.content_length is None or request.content_length > PIECE
    return await asyncio.to_thread(work) if large else work()


def json_response(value: Any, status: int = 200) -> Response:
    """`value` is anything that msgspec writes as JSON."""
    return Response(msgspec.json.encode(value), status, content_type="application/json")
