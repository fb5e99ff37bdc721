"""A session whose requests are answered by several engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from mer.api.grpc.errors import Failure
from mer.api.grpc.session import Session
from mer.errors import MerError
from mer.v1 import inference_pb2 as pb

_log = logging.getLogger("mer.grpc")


class RefusedError(MerError):
    """What an engine refuses, or that none is there; failure: what to tell the client."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class RoutedSession(Session):
    """Each request is asked for itself; ids and cancels are dealt with here."""

    def __init__(self, ask: Callable[[pb.SessionRequest], AsyncGenerator[pb.SessionResponse, None]]) -> None:
        """ask: of any engine, by a session of this one request. Raises RefusedError; closed early, the engine
        computes it no further.
        """
        super().__init__(asyncio.Event(), lambda _: None)
        self._ask = ask

    async def answer(self, message: pb.SessionRequest, size: int) -> None:
        """Errors that an engine tells are passed on as they are."""
        try:
            async with aclosing(self._ask(message)) as responses:
                async for response in responses:
                    await self.write(response)
        except Exception as error:
            if isinstance(error, RefusedError):
                failure = error.failure
            else:
                _log.exception("a request of a session")
                failure = Failure.of(error)
            await self.write(pb.SessionResponse(id=message.id, error=failure.proto()))
