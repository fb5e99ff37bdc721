"""What every call passes: its id, keys and limits on the way in, status and log line on the way out."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from typing import Any, Final
from urllib.parse import unquote

import grpc
from attrs import Factory, define
from google.protobuf.message import Message
from grpc.aio import ServicerContext

from mer.api.access import Access
from mer.api.grpc.errors import Failure
from mer.api.tracing import Tracing
from mer.engine.outputs import Usage
from mer.errors import EngineClosedError, MerError

Context = ServicerContext[Any, Any]

_access_log = logging.getLogger("mer.access")
_log = logging.getLogger("mer.grpc")
_SERVICE: Final = "mer.v1.Inference"
_TRACED: Final = frozenset(("Generate", "Chat", "Session", "Tokenize", "Detokenize", "Embed"))
# What the server is to blame for.
_FAILED: Final = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


@define
class Call:
    """One call, or one request of a session.

    path: what the failing parameter is called in its request. size: bytes of that, at the least.
    """

    request_id: str
    caller: str
    client: str
    method: str
    size: int = 0
    path: Callable[[str], str] = str
    log: dict[str, Any] = Factory(dict)
    begun: float = Factory(time.perf_counter)

    def used(self, usage: Usage | None) -> None:
        """For the line in the log."""
        if usage is not None:
            self.log |= {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
            }

    def failed(self, error: BaseException) -> Failure:
        """What to tell the client; an error of `mer` itself is logged."""
        failure = Failure.of(error, self.path)
        self.log["error"] = failure.message
        if not isinstance(error, MerError):
            _log.error("request %s: %r", self.request_id, error, exc_info=error)
        return failure

    def write(self, status: grpc.StatusCode) -> None:
        """The line in the log."""
        if _access_log.isEnabledFor(logging.INFO):
            fields = {
                "request_id": self.request_id,
                "client": self.client,
                "caller": self.caller,
                "method": "gRPC",
                "path": self.method,
                "status": status.name,
                "seconds": round(time.perf_counter() - self.begun, 4),
                **self.log,
            }
            _access_log.info("request", extra={"fields": fields})


class Gate:
    """Lets calls in, and knows how many are running. draining: nothing new is let in."""

    def __init__(self, access: Access, tracing: Tracing | None = None) -> None:
        self._access = access
        self._tracing = tracing
        self.running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = asyncio.Event()

    async def wait_idle(self) -> None:
        """Until no call is left."""
        await self._idle.wait()

    @asynccontextmanager
    async def call(self, context: Context, method: str) -> AsyncIterator[Call]:
        """While a call is served; an error in it becomes the call's status."""
        metadata = dict(context.invocation_metadata() or ())
        given = metadata.get("x-request-id", "")
        known = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
        client = _address(context.peer())
        call = Call(str(given) if known else f"req-{uuid.uuid4().hex}", client, client, method)
        status = grpc.StatusCode.CANCELLED  # unless it ends otherwise
        self.running += 1
        self._idle.clear()
        stack = ExitStack()
        span = None
        if self._tracing is not None and method in _TRACED:
            carrier = {name: value for name, value in metadata.items() if isinstance(value, str)}
            span = stack.enter_context(
                self._tracing.request(f"{_SERVICE}/{method}", carrier, call.request_id)
            )
        try:
            call.caller = self._access.caller(_key(metadata), client)
            yield call
            context.set_trailing_metadata((("x-request-id", call.request_id),))
            status = grpc.StatusCode.OK
        except Exception as error:
            failure = call.failed(error)
            status = failure.code
            self.count(failure)
            await context.abort(failure.code, failure.message, failure.metadata(call.request_id))
        finally:
            remaining = context.time_remaining()
            if status is grpc.StatusCode.CANCELLED and remaining is not None and remaining <= 0:
                status = grpc.StatusCode.DEADLINE_EXCEEDED
            self.running -= 1
            if not self.running:
                self._idle.set()
            call.write(status)
            with stack:
                if span is not None:
                    span.grpc(status.name, call.log, failed=status in _FAILED)

    def count(self, failure: Failure) -> None:
        """A call, or a request of a session, failed: it may have been refused."""
        if failure.refusal:
            self._access.refused[failure.refusal] += 1

    def admitted(self, call: Call) -> AbstractContextManager[None]:
        """While a request is served, be it a call or one of a session's. Raises RateLimitError."""
        if self.draining.is_set():
            raise EngineClosedError("the server is shutting down")
        return self._access.admitted(call.caller)


async def send(context: Context, message: Message) -> None:
    """Waits for the client, if that reads slowly. Raises CancelledError where it is gone.

    grpc itself cancels the call then, but it may come to write before it has heard of it: no error of ours.
    """
    try:
        await context.write(message.SerializeToString())
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


def _key(metadata: dict[str, str | bytes]) -> str | None:
    authorization, key = metadata.get("authorization", ""), metadata.get("x-api-key")
    scheme, _, bearer = str(authorization).partition(" ")
    if scheme.lower() == "bearer":
        return bearer.strip()
    return key if isinstance(key, str) else None


def _address(peer: str) -> str:
    """The address of 'ipv4:127.0.0.1:4711', 'ipv6:%5B::1%5D:4711', 'unix:...'."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else "local"
