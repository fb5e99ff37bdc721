"""The Session call: requests side by side on one stream, under ids that the client chooses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

import grpc

from mer.api.grpc.errors import Failure, RequestCancelledError
from mer.api.grpc.gate import Call, Context, Gate
from mer.errors import EngineClosedError, RequestError
from mer.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from mer.api.grpc.service import Inference

_MOST_ID_BYTES: Final = 128
# Pieces of all requests that wait for the client to read; then the requests wait.
_UNREAD: Final = 16


async def serve_session(
    inference: Inference, gate: Gate, call: Call, requests: AsyncIterator[bytes], context: Context
) -> None:
    """Until the client has closed its side and all its requests are over, or the server drains.

    Raises RequestError for what is no SessionRequest, EngineClosedError when the server drains.
    """
    session = _Session(inference, gate, call, context)
    running = asyncio.create_task(session.run(requests))
    try:
        # One writer: a write can't be cancelled midway without harm to the next one.
        while isinstance(item := await session.out.get(), pb.SessionResponse):
            await context.write(item.SerializeToString())
        if item is not None:
            raise item
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class _Session:
    """out: responses, and behind the last one None or the error that ends the session."""

    def __init__(self, inference: Inference, gate: Gate, call: Call, context: Context) -> None:
        self.out: asyncio.Queue[pb.SessionResponse | Exception | None] = asyncio.Queue(_UNREAD)
        self._inference = inference
        self._gate = gate
        self._call = call
        self._context = context
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = False  # nobody wants responses any more
        self._in_use: dict[str, asyncio.Task[None]] = {}  # by id; no longer when its last response is out

    async def run(self, requests: AsyncIterator[bytes]) -> None:
        """Serve what is read; cancelling this cancels all requests."""
        error: Exception | None = None
        drained = asyncio.create_task(self._drained())
        try:
            await self._read(requests, drained)
            while self._tasks:
                await asyncio.wait(self._tasks)
        except Exception as raised:
            error = raised
        finally:
            self._ending = True
            for task in [drained, *self._tasks]:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.out.put(error)

    async def _drained(self) -> None:
        await self._gate.draining.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _read(self, requests: AsyncIterator[bytes], drained: asyncio.Task[None]) -> None:
        incoming = aiter(requests)
        while True:
            reading = asyncio.ensure_future(anext(incoming, None))
            try:
                await asyncio.wait({reading, drained}, return_when=asyncio.FIRST_COMPLETED)
                if drained.done():
                    raise EngineClosedError("the server is shutting down")
                data = reading.result()
            finally:
                reading.cancel()
            if data is None:
                return
            await self._begin(await self._inference.received(pb.SessionRequest, data), len(data))

    async def _begin(self, message: pb.SessionRequest, size: int) -> None:
        id, kind = message.id, message.WhichOneof("request")
        running = self._in_use.get(id)
        if kind == "cancel":
            if running is not None and not running.cancelling():
                running.cancel()
        elif kind is None:
            error = RequestError("the message has neither generate nor chat nor cancel", "request")
            await self._refuse(id, Failure.of(error))
        elif not 1 <= len(id.encode()) <= _MOST_ID_BYTES:
            error = RequestError(f"an id must have 1 to {_MOST_ID_BYTES} bytes", "id")
            await self._refuse(id, Failure.of(error))
        elif running is not None:
            text = f"the request {id!r} is running; this one was not begun"
            await self._refuse(id, Failure(grpc.StatusCode.ALREADY_EXISTS, text, "ID_IN_USE", "id"))
        else:
            task = self._in_use[id] = asyncio.create_task(self._serve(message, size))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, message: pb.SessionRequest, size: int) -> None:
        session, id = self._call, message.id
        call = Call(f"{session.request_id}/{id}", session.caller, session.client, session.method, size)
        status = grpc.StatusCode.CANCELLED
        try:
            with self._gate.admitted(call):
                await self._answer(call, message)
            status = grpc.StatusCode.OK
        except asyncio.CancelledError:
            if self._ending:
                raise
            await self._over(id, call.failed(RequestCancelledError("the request was cancelled")))
        except Exception as error:
            failure = call.failed(error)
            status = failure.code
            self._gate.count(failure)
            await self._over(id, failure)
        finally:
            call.write(status)

    async def _answer(self, call: Call, message: pb.SessionRequest) -> None:
        id, remaining = message.id, self._context.time_remaining()

        async def generated(piece: pb.GenerateResponse) -> None:
            if piece.HasField("final"):
                self._in_use.pop(id, None)
            await self.out.put(pb.SessionResponse(id=id, generate=piece))

        async def chatted(piece: pb.ChatResponse) -> None:
            if piece.HasField("final"):
                self._in_use.pop(id, None)
            await self.out.put(pb.SessionResponse(id=id, chat=piece))

        if message.HasField("generate"):
            async with self._inference.using(message.generate):
                await self._inference.generate(call, message.generate, remaining, generated)
        else:
            async with self._inference.using(message.chat):
                await self._inference.chat(call, message.chat, remaining, chatted)

    async def _over(self, id: str, failure: Failure) -> None:
        self._in_use.pop(id, None)
        await self._tell(id, failure)

    async def _refuse(self, id: str, failure: Failure) -> None:
        self._gate.count(failure)
        await self._tell(id, failure)

    async def _tell(self, id: str, failure: Failure) -> None:
        await self.out.put(pb.SessionResponse(id=id, error=failure.proto()))
