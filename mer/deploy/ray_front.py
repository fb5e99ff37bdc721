"""The one address of a cluster on Ray: takes requests, and asks engines by what the requests begin with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from contextvars import Context
from typing import Any, Final

import grpc
import msgspec
from google.protobuf import message_factory
from google.protobuf.message import Message
from ray import serve
from ray.exceptions import RayActorError

from mer.api.grpc.errors import Failure
from mer.deploy.affinity import beginnings, prompt_of, text_of
from mer.deploy.session import RefusedError, RoutedSession
from mer.v1 import inference_pb2 as pb

# Of a body, in bytes: an engine refuses what is too long for it; this is where reading ends.
_LONGEST: Final = 64 << 20
# What of a request's scope matters to the HTTP API.
_SCOPE: Final[tuple[str, ...]] = (
    "type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip
_METHODS: Final = pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name
_RESPONSES: Final = {
    name: message_factory.GetMessageClass(method.output_type) for name, method in _METHODS.items()
}
# Of a call's metadata, what is of its connection.
_OWN: Final = ("content-type", "te", "user-agent")
_OWN_PREFIXES: Final = ("grpc-", ":")

# Engines that a request is sent to while they are lost, one after the other.
_TRIES: Final = 3
_JSON: Final = [(b"content-type", b"application/json")]
_UNAVAILABLE: Final = grpc.StatusCode.UNAVAILABLE
_LOST_REASON: Final = "ENGINE_LOST"
_LOST_WORDS: Final = "the engines that had this request were lost; try again"
_LOST: Final = msgspec.json.encode(
    {
        "error": {
            "message": _LOST_WORDS,
            "type": "server_error",
            "param": None,
            "code": "engine_lost",
        }
    }
)

_Receive = Callable[[], Awaitable[dict[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


class FrontBase:
    """`FRONT` is made of it: Ray adds what makes an ASGI application of it."""

    def __init__(self, engines: Any) -> None:
        """engines: the handle of the deployment of EngineReplica."""
        self._engines = engines.options(stream=True)

    def __serve_build_asgi_app__(self) -> Callable[..., Awaitable[None]]:
        async def app(scope: dict[str, Any], receive: _Receive, send: _Send) -> None:
            await self._http(scope, receive, send)

        return app  # a bound method would be taken for an application of ASGI 2

    # ---- HTTP ----

    async def _http(self, scope: dict[str, Any], receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"{scope['type']} is not served here")
        body = await _read(receive)
        if body is None:
            return
        chosen = {name: scope[name] for name in _SCOPE if name in scope}
        left = asyncio.ensure_future(_left(receive))
        passing = asyncio.ensure_future(self._pass_on(chosen, body, send))
        try:
            await asyncio.wait([left, passing], return_when=asyncio.FIRST_COMPLETED)
            if passing.done():
                passing.result()
        finally:
            left.cancel()
            passing.cancel()

    async def _pass_on(self, scope: dict[str, Any], body: bytes, send: _Send) -> None:
        """Of an engine that is lost before it said anything, another one takes the request."""
        keys = beginnings(text_of(body))
        for _ in range(_TRIES):
            answer, begun = self._engines.http.remote(scope, body, keys=keys), False
            try:
                async for messages in answer:
                    for message in messages:
                        begun = True
                        await send(message)
                return
            except RayActorError:
                if begun:
                    raise
            finally:
                answer.cancel()
        await send(
            {"type": "http.response.start", "status": 503, "headers": [*_JSON, (b"retry-after", b"2")]}
        )
        await send({"type": "http.response.body", "body": _LOST})

    # ---- gRPC: a method for each of the service ----

    async def Session(self, requests: Any, grpc_context: Any) -> AsyncGenerator[Message, None]:  # noqa: N802
        """See the proto; each of its requests goes to the engine that fits it."""
        metadata = _passed_on(grpc_context)
        session = RoutedSession(lambda message: self._ask("Session", message, metadata))
        async with aclosing(session.responses((each, 0) async for each in requests)) as responses:
            async for response in responses:
                yield response

    async def Generate(self, request: Any, grpc_context: Any) -> AsyncGenerator[Message, None]:  # noqa: N802
        """See the proto."""
        async for response in self._rpc("Generate", request, grpc_context):
            yield response

    async def Chat(self, request: Any, grpc_context: Any) -> AsyncGenerator[Message, None]:  # noqa: N802
        """See the proto."""
        async for response in self._rpc("Chat", request, grpc_context):
            yield response

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncGenerator[Message, None]:  # noqa: N802
        """See the proto; of one of the engines."""
        async for response in self._rpc("Watch", request, grpc_context):
            yield response

    async def Tokenize(self, request: Any, grpc_context: Any) -> Message | None:  # noqa: N802
        """See the proto."""
        return await self._one("Tokenize", request, grpc_context)

    async def Detokenize(self, request: Any, grpc_context: Any) -> Message | None:  # noqa: N802
        """See the proto."""
        return await self._one("Detokenize", request, grpc_context)

    async def Embed(self, request: Any, grpc_context: Any) -> Message | None:  # noqa: N802
        """See the proto."""
        return await self._one("Embed", request, grpc_context)

    async def GetModel(self, request: Any, grpc_context: Any) -> Message | None:  # noqa: N802
        """See the proto."""
        return await self._one("GetModel", request, grpc_context)

    async def GetStats(self, request: Any, grpc_context: Any) -> Message | None:  # noqa: N802
        """See the proto; of one of the engines."""
        return await self._one("GetStats", request, grpc_context)

    async def _one(self, method: str, request: Message, context: Any) -> Message | None:
        async for response in self._rpc(method, request, context):
            return response
        return None

    async def _rpc(self, method: str, request: Message, context: Any) -> AsyncGenerator[Message, None]:
        try:
            async with aclosing(self._ask(method, request, _passed_on(context))) as responses:
                async for response in responses:
                    yield response
        except RefusedError as error:
            context.set_code(error.failure.code)
            context.set_details(error.failure.message)
            raise RuntimeError(error.failure.message) from None

    async def _ask(
        self, method: str, request: Message, metadata: list[tuple[str, Any]]
    ) -> AsyncGenerator[Any, None]:
        """As in _pass_on. Raises RefusedError."""
        asked, keys = request.SerializeToString(), beginnings(prompt_of(request))
        for _ in range(_TRIES):
            # Ray's router knows a request by the call that it is made in. Those of a session have one in
            # common, and it would find one of them alone: so each is made outside.
            answer = Context().run(self._engines.rpc.remote, method, asked, metadata, keys=keys)
            begun = False
            try:
                async for data, status in answer:
                    begun = True
                    if status is not None:
                        code = grpc.StatusCode[status["code"]]
                        raise RefusedError(Failure(code, status["details"], status["reason"]))
                    yield _RESPONSES[method].FromString(data)
                return
            except RayActorError:
                if begun:
                    words = "the engine that was answering was lost"
                    raise RefusedError(Failure(_UNAVAILABLE, words, _LOST_REASON)) from None
            finally:
                answer.cancel()
        raise RefusedError(Failure(_UNAVAILABLE, _LOST_WORDS, _LOST_REASON))


FRONT: Any = serve.ingress()(FrontBase)


async def _live(receive: _Receive, send: _Send) -> None:
    """There is nothing to begin or to end."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _read(receive: _Receive) -> bytes | None:
    """The body; None: the client has gone."""
    parts, size, more = [], 0, True
    while more and size <= _LONGEST:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
    return b"".join(parts)


async def _left(receive: _Receive) -> None:
    """Until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _passed_on(context: Any) -> list[tuple[str, Any]]:
    """Of a call's metadata what is for an engine."""
    return [
        pair
        for pair in context.invocation_metadata()
        if pair[0] not in _OWN and not pair[0].startswith(_OWN_PREFIXES)
    ]
