"""Connections as Hypercorn serves them, with what is wrong in 0.18 mended.

What is gone stays gone, what is wrong with one request is not the others' matter, the server's end is an end.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import h2.events
import h11
import hypercorn.asyncio.run
import hypercorn.protocol
import hypercorn.protocol.h2
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h2 import BUFFER_LOW_WATER, H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol

# When the server ends, what is sent already may still be on its way to a client who reads slowly.
GRACE: Final = 2.0


class Connection(TCPServer):
    """A client that is gone is forgotten at once, not when its connection has been idle."""

    _gone = False

    async def run(self) -> None:
        ending = asyncio.create_task(self._end())
        try:
            await super().run()
        finally:
            ending.cancel()

    async def _end(self) -> None:
        """With the server. Hypercorn has no end while a client does not read, and logs tracebacks."""
        await self.context.terminated.wait()
        await asyncio.sleep(GRACE)
        self.writer.transport.abort()

    async def _read_data(self) -> None:
        await super()._read_data()
        self._gone = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if not (self._gone and isinstance(event, Updated)):  # nobody is there to be idle
            await super().protocol_send(event)


class Parser(h11.Connection):
    """What stands behind a request that is being answered is not there yet."""

    def next_event(self) -> Any:
        event = super().next_event()
        return h11.NEED_DATA if event is h11.PAUSED else event


class Http1(H11Protocol):
    """Reads on while it answers, or nobody sees the client go.

    Hypercorn does not once there is something behind the request: another one, an empty line.
    """

    # Bytes behind a request; a client that sends more of them has to wait.
    _AHEAD: Final = 1 << 16
    _closed = False

    async def initiate(self) -> None:
        self.connection = Parser(h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size)
        self._turn = asyncio.Lock()

    async def handle(self, event: Event) -> None:
        if isinstance(event, Closed):
            self._closed = True
            await self.can_read.set()
        elif isinstance(event, RawData):
            while self._answering and len(self.connection.trailing_data[0]) > self._AHEAD:
                await self.can_read.clear()
                await self.can_read.wait()
        await super().handle(event)

    @property
    def _answering(self) -> bool:
        """A request that is complete."""
        complete = (h11.DONE, h11.MIGHT_SWITCH_PROTOCOL)  # type: ignore[attr-defined]
        return not self._closed and self.connection.their_state in complete

    async def _handle_events(self) -> None:
        async with self._turn:
            if not self._closed:
                await super()._handle_events()

    async def _maybe_recycle(self) -> None:
        await super()._maybe_recycle()
        if self.connection.our_state is not h11.IDLE:  # it was the last request
            self._closed = True
            await self.can_read.set()
        elif self.connection.trailing_data[0]:
            self.task_group.spawn(self._handle_events)

    async def _check_protocol(self, event: h11.Request) -> None:
        if not self.keep_alive_requests:  # HTTP/2 begins with the connection
            await super()._check_protocol(_as_it_is(event))

    async def _create_stream(self, request: h11.Request) -> None:
        await super()._create_stream(_as_it_is(request))


def _as_it_is(request: h11.Request) -> h11.Request:
    """Without the wish for another protocol: there are no web sockets here, and HTTP/2 needs no upgrade."""
    headers = [each for each in request.headers if each[0] != b"upgrade"]
    if len(headers) == len(request.headers):
        return request
    return h11.Request(
        method=request.method, target=request.target, headers=headers, http_version=request.http_version
    )


class Http2(H2Protocol):
    """What is wrong with one request ends no other one of its connection."""

    async def initiate(
        self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None
    ) -> None:
        await super().initiate(headers, settings)
        await self.send(Updated(idle=True))  # HTTP/1.1 has taken the preface for a request

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()  # else who writes into it waits for ever

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                # The rest of the body of a request that was refused, which Hypercorn answers with KeyError.
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.RequestReceived) and not _possible(event.headers):
                self.connection.send_headers(event.stream_id, [(b":status", b"400")], end_stream=True)
            else:
                await super()._handle_events([event])
            if isinstance(event, h2.events.StreamReset) and self.idle:
                await self.send(Updated(idle=True))
        await self._flush()

    async def _priority_updated(self, event: h2.events.PriorityUpdated) -> None:
        """RFC 9113 has done away with them; Hypercorn ends the connection at the thousandth."""


def _possible(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether HTTP/1.1 could have said it. There are no tunnels here, and no web sockets."""
    told = dict(headers)
    method, path = told.get(b":method", b""), told.get(b":path", b"")
    return method != b"CONNECT" and path != b"" and (method + path).isascii()


class Buffer(StreamBuffer):
    """What a stream has to send. Hypercorn lets it grow as long as nothing can be sent."""

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data


def install() -> None:
    """From now on Hypercorn makes these, in the whole process: it has no setting for them."""
    for module, name, ours in (
        (hypercorn.asyncio.run, "TCPServer", Connection),
        (hypercorn.protocol, "H11Protocol", Http1),
        (hypercorn.protocol, "H2Protocol", Http2),
        (hypercorn.protocol.h2, "StreamBuffer", Buffer),
    ):
        setattr(module, name, ours)
