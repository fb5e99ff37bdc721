"""What every request passes before it's handled: its id, keys, limits, CORS; and its line in the log."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any, Final, cast
from urllib.parse import urlsplit

from hypercorn.typing import ASGIFramework, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope

from mer.api.http.call import Call
from mer.api.http.errors import ApiError, api_error, unavailable
from mer.api.http.hosts import Hosts
from mer.api.http.pages import PATHS
from mer.api.http.service import Service

# Asked for by what watches the server, often and without a key.
PROBES: Final = frozenset({"/health", "/ready"})

_log = logging.getLogger("mer.access")
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
# How long a body that was refused is still read, so that the client gets to see why.
_LINGER: Final = 5.0

# How an error is told to clients of paths with this beginning; others get OpenAI's error object.
ERROR_BODIES: dict[str, Callable[[ApiError], bytes]] = {}


def error_body(path: str, error: ApiError) -> bytes:
    """`error` as clients of this path know errors."""
    for beginning, render in ERROR_BODIES.items():
        if path.startswith(beginning):
            return render(error)
    return error.body


class Gate:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIFramework, service: Service) -> None:
        self._app = app
        self._service = service
        self._settings = service.settings
        self._hosts = Hosts(service.settings)

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        call = Call(given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}")
        cast(dict[str, Any], scope).setdefault("state", {})["call"] = call
        added = {"X-Request-Id": call.request_id, **self._cors(headers)}
        extra = [(name.lower().encode(), value.encode("latin1")) for name, value in added.items()]
        status, complete = 0, False

        async def sending(event: ASGISendEvent) -> None:
            nonlocal status, complete
            if event["type"] == "http.response.start":
                status = event["status"]
                event["headers"] = [*event["headers"], *extra]
            await send(event)
            if event["type"] == "http.response.body":
                complete = not event.get("more_body", False)

        begun, tracing = time.perf_counter(), self._service.tracing
        with (
            tracing.request("POST", headers, call.request_id)
            if tracing and scope["method"] == "POST"
            else nullcontext() as span
        ):
            try:
                await self._serve(scope, headers, call, receive, sending)
            finally:
                await call.cleanup.aclose()
                if call.refused:
                    self._service.access.refused[call.refused] += 1
                if not complete:  # the client went away; gRPC has a status for that
                    call.log["cancelled"] = True
                self._write(scope, call, status, time.perf_counter() - begun)
                if span is not None:
                    span.http(scope["path"], status, call.log)

    async def _serve(
        self,
        scope: Any,
        headers: Mapping[str, str],
        call: Call,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
    ) -> None:
        path, service = scope["path"], self._service
        address = scope["client"][0] if scope.get("client") else "local"
        try:
            call.caller = address
            path = scope["path"] = _path(path)
            if path not in PROBES:
                self._hosts.check(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _respond(send, 204, b"", {})
                return
            if path in PROBES or (path in PATHS and scope["method"] in ("GET", "HEAD")):
                await self._app(scope, receive, send)
                return
            call.caller = service.access.caller(_key(headers), address)
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            if service.draining:
                raise unavailable("the server is shutting down", 5, "shutting_down")
            self._check_size(headers)
            call.cleanup.enter_context(service.access.admitted(call.caller))
        except Exception as error:
            told = api_error(error)
            call.failed(error, told)
            answered = {"Content-Type": "application/json"} | told.headers
            await _respond(send, told.status, error_body(path, told), answered, receive)
            return
        service.begin()
        call.cleanup.callback(service.end)
        await self._app(scope, receive, send)

    def _check_size(self, headers: Mapping[str, str]) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._settings.max_body:
            raise ApiError(
                413,
                f"the body has {int(length):,} bytes; at most {self._settings.max_body:,} are taken",
                code="body_too_large",
            )

    def _cors(self, headers: Mapping[str, str]) -> dict[str, str]:
        allowed, origin = self._settings.cors_origins, headers.get("origin")
        if origin is None or not ("*" in allowed or origin in allowed):
            return {}
        made = {
            "Access-Control-Allow-Origin": "*" if "*" in allowed else origin,
            "Access-Control-Expose-Headers": "X-Request-Id, Retry-After",
            "Vary": "Origin",
        }
        if "access-control-request-method" in headers:
            made |= {
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
                "Access-Control-Max-Age": "600",
            }
        return made

    def _write(self, scope: Any, call: Call, status: int, seconds: float) -> None:
        level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
        if not _log.isEnabledFor(level):
            return
        fields = {
            "request_id": call.request_id,
            "client": scope["client"][0] if scope.get("client") else "local",
            "caller": call.caller,
            "method": scope["method"],
            "path": scope["path"],
            "status": status or None,  # None: the client went away before there was one
            "seconds": round(seconds, 4),
            **call.log,
        }
        _log.log(level, "request", extra={"fields": fields})


def _path(target: str) -> str:
    """Of a target that may name the server as well, which is for Quart no path."""
    if target.startswith("/") or target == "*":
        return target
    try:
        found = urlsplit(target)
    except ValueError:
        found = urlsplit("")
    if not found.scheme:
        raise ApiError(400, f"{target[:100]!r} is no path", code="unknown_url")
    return found.path if found.path.startswith("/") else f"/{found.path}"


def _key(headers: Mapping[str, str]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


async def _respond(
    send: ASGISendCallable,
    status: int,
    body: bytes,
    headers: Mapping[str, str],
    receive: ASGIReceiveCallable | None = None,
) -> None:
    """A whole response; of `receive`, what the client is still sending is read and forgotten."""
    pairs = [(name.lower().encode(), value.encode("latin1")) for name, value in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": receive is not None})
    if receive is not None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while True:
                    event = await receive()
                    if event["type"] != "http.request" or not event.get("more_body"):
                        break
        await send({"type": "http.response.body", "body": b"", "more_body": False})
