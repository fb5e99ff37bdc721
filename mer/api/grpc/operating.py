"""What mer.v1.Admin has for whoever watches: pausing, pinning, the log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import Message

from mer.api.grpc import convert
from mer.api.grpc.gate import Context, Gate, send
from mer.api.http.logs import TAIL
from mer.engine.engine import Engine
from mer.errors import EngineClosedError
from mer.v1 import admin_pb2 as pb

_Q = TypeVar("_Q", bound=Message)

_LINES: Final = 100
# Seconds from one look at the log to the next.
_LOOK: Final = 0.2


class Operating:
    """The calls. find: the engine of the model of this name, of the first for an empty one; may raise."""

    def __init__(self, find: Callable[[str], Engine], gate: Gate) -> None:
        self._find = find
        self._gate = gate

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """By the name of the call."""
        return {
            "Pause": self._unary("Pause", pb.PauseRequest, self.pause),
            "Resume": self._unary("Resume", pb.ResumeRequest, self.resume),
            "Pin": self._unary("Pin", pb.PinRequest, self.pin),
            "Unpin": self._unary("Unpin", pb.UnpinRequest, self.unpin),
            "Log": grpc.unary_stream_rpc_method_handler(self._log),
        }

    def _unary(
        self, name: str, kind: type[_Q], method: Callable[[_Q], Awaitable[Message]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(data: bytes, context: Context) -> bytes:
            async with self._gate.call(context, name) as call:
                request = convert.parsed(kind, data)
                call.path = convert.path_of(request)
                return (await method(request)).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(handle)

    async def pause(self, request: pb.PauseRequest) -> pb.PauseResponse:
        """See Engine.pause."""
        self._find(request.model).pause()
        return pb.PauseResponse()

    async def resume(self, request: pb.ResumeRequest) -> pb.ResumeResponse:
        """See Engine.resume."""
        self._find(request.model).resume()
        return pb.ResumeResponse()

    async def pin(self, request: pb.PinRequest) -> pb.PinResponse:
        """Raises RequestError."""
        return pb.PinResponse(pinned=self._pin(request, on=True))

    async def unpin(self, request: pb.UnpinRequest) -> pb.UnpinResponse:
        """Raises RequestError."""
        return pb.UnpinResponse(pinned=self._pin(request, on=False))

    def _pin(self, request: pb.PinRequest | pb.UnpinRequest, *, on: bool) -> int:
        expert = request.expert if request.HasField("expert") else None
        return self._find(request.model).pin(request.layer, expert, on=on)

    async def _log(self, data: bytes, context: Context) -> None:
        async with self._gate.call(context, "Log"):
            request = convert.parsed(pb.LogRequest, data)
            last = request.last if request.HasField("last") else _LINES
            found = TAIL.since(0)
            number = found[-1][0] if found else 0
            found = found[len(found) - min(last, len(found)) :]
            while not self._gate.draining.is_set():
                if found:
                    number = found[-1][0]
                    lines = [line for _, line in found]
                    await send(context, pb.LogResponse(lines=lines))
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK):
                        await self._gate.draining.wait()
                found = TAIL.since(number)
            raise EngineClosedError("the server is shutting down")
