"""The Session call: requests side by side on one stream, under ids that the client chooses."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import grpc

from mer.api.grpc.errors import Failure, RequestCancelledError
from mer.api.grpc.gate import Call, Context, Gate, send
from mer.errors import EngineClosedError, QueueFullError, RequestError
from mer.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from mer.api.grpc.service import Inference

_MOST_ID_BYTES: Final = 128
# Pieces of all requests that wait for the client to read; then the requests wait.
_UNREAD: Final = 16
# Bytes that the requests of one session may hold together until they are over, and what one holds beside its
# message: whoever sends requests and reads no answers would fill the memory.
_MOST_HELD: Final = 1 << 26
_BESIDE: Final = 4096
# A message, and of how many bytes it was at the least.
_Sized = tuple[pb.SessionRequest, int]


async def serve_session(
    inference: Inference, gate: Gate, call: Call, requests: AsyncIterator[bytes], context: Context
) -> None:
    """Until the client has closed its side and all its requests are over, or the server drains.

    Raises RequestError for what is no SessionRequest, EngineClosedError when the server drains.
    """

    async def received() -> AsyncIterator[_Sized]:
        async for data in requests:
            yield await inference.received(pb.SessionRequest, data), len(data)

    session = _EngineSession(inference, gate, call, context)
    # One writer: a write can't be cancelled midway without harm to the next one.
    async with aclosing(session.responses(received())) as responses:
        async for response in responses:
            await send(context, response)


class Session(ABC):
    """Begins and cancels what is read; who derives from it answers one request. Used once."""

    def __init__(self, draining: asyncio.Event, refused: Callable[[Failure], None]) -> None:
        """draining: once it is set, what runs may end, and nothing else is begun.

        refused: told of what is not begun for another reason.
        """
        self._draining = draining
        self._refused = refused
        # Responses, and behind the last one None or the error that ends the session.
        self._out: asyncio.Queue[pb.SessionResponse | Exception | None] = asyncio.Queue(_UNREAD)
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_use: dict[str, asyncio.Task[None]] = {}  # by id; no longer when its last response is out
        self._held = 0  # bytes of the requests that are not over
        self._ending = False  # nobody wants responses any more

    async def responses(self, requests: AsyncIterator[_Sized]) -> AsyncGenerator[pb.SessionResponse, None]:
        """Closing it cancels all requests. Raises what `requests` raises, EngineClosedError when draining."""
        running = asyncio.create_task(self._run(requests))
        try:
            while isinstance(item := await self._out.get(), pb.SessionResponse):
                yield item
            if item is not None:
                raise item
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    @abstractmethod
    async def answer(self, message: pb.SessionRequest, size: int) -> None:
        """`write` the responses to what is to be generated or chatted, or the error.

        Cancelled where the client has cancelled the request: it is told here.
        """

    async def write(self, response: pb.SessionResponse) -> None:
        """Waits for the client, if that reads slowly. With the last one of a request its id is free."""
        piece = getattr(response, response.WhichOneof("response") or "error")
        if isinstance(piece, pb.Error) or piece.HasField("final"):
            self._in_use.pop(response.id, None)
        await self._out.put(response)

    async def _run(self, requests: AsyncIterator[_Sized]) -> None:
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
        await self._out.put(error)

    async def _drained(self) -> None:
        await self._draining.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _read(self, requests: AsyncIterator[_Sized], drained: asyncio.Task[None]) -> None:
        incoming = aiter(requests)
        while True:
            reading = asyncio.ensure_future(anext(incoming, None))
            try:
                await asyncio.wait({reading, drained}, return_when=asyncio.FIRST_COMPLETED)
                if drained.done():
                    raise EngineClosedError("the server is shutting down")
                message = reading.result()
            finally:
                reading.cancel()
            if message is None:
                return
            await self._begin(*message)

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
        elif self._held and self._held + size > _MOST_HELD:
            text = f"{len(self._tasks)} requests of this session are not over; read their answers first"
            await self._refuse(id, Failure.of(QueueFullError(text, 1.0)))
        else:
            self._held += size + _BESIDE
            task = self._in_use[id] = asyncio.create_task(self._serve(message, size))
            self._tasks.add(task)
            task.add_done_callback(lambda task: self._over(task, size))

    def _over(self, task: asyncio.Task[None], size: int) -> None:
        self._tasks.discard(task)
        self._held -= size + _BESIDE

    async def _serve(self, message: pb.SessionRequest, size: int) -> None:
        try:
            await self.answer(message, size)
        except asyncio.CancelledError:
            if self._ending:
                raise
            failure = Failure.of(RequestCancelledError("the request was cancelled"))
            await self.write(pb.SessionResponse(id=message.id, error=failure.proto()))

    async def _refuse(self, id: str, failure: Failure) -> None:
        self._refused(failure)
        await self._out.put(pb.SessionResponse(id=id, error=failure.proto()))


class _EngineSession(Session):
    """Its requests go to the engines of this process."""

    def __init__(self, inference: Inference, gate: Gate, call: Call, context: Context) -> None:
        super().__init__(gate.draining, gate.count)
        self._inference = inference
        self._gate = gate
        self._call = call
        self._context = context

    async def answer(self, message: pb.SessionRequest, size: int) -> None:
        """With the deadline of the session."""
        session, id = self._call, message.id
        call = Call(f"{session.request_id}/{id}", session.caller, session.client, session.method, size)
        status = grpc.StatusCode.CANCELLED
        try:
            with self._gate.admitted(call):
                await self._generate(call, message)
            status = grpc.StatusCode.OK
        except Exception as error:
            failure = call.failed(error)
            status = failure.code
            self._gate.count(failure)
            await self.write(pb.SessionResponse(id=id, error=failure.proto()))
        finally:
            call.write(status)

    async def _generate(self, call: Call, message: pb.SessionRequest) -> None:
        id, remaining = message.id, self._context.time_remaining()

        async def generated(piece: pb.GenerateResponse) -> None:
            await self.write(pb.SessionResponse(id=id, generate=piece))

        async def chatted(piece: pb.ChatResponse) -> None:
            await self.write(pb.SessionResponse(id=id, chat=piece))

        if message.HasField("generate"):
            async with self._inference.using(message.generate):
                await self._inference.generate(call, message.generate, remaining, generated)
        else:
            async with self._inference.using(message.chat):
                await self._inference.chat(call, message.chat, remaining, chatted)
