"""Connections as Hypercorn serves them, with what is wrong in 0.18 mended.

What is gone stays gone, what is wrong with one request is not the others' matter, the server's end is an end.
"""

from __future__ import annotations

import asyncio
from typing import Final

import h2.events
import hypercorn.asyncio.run
import hypercorn.protocol
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Event, Updated
from hypercorn.protocol.h2 import H2Protocol

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


class Http2(H2Protocol):
    """What still comes of a request that has its answer is dropped.

    A refusal is sent before the body is there. Hypercorn raises KeyError for the rest of the body, and all
    requests of the connection end with it.
    """

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            else:
                await super()._handle_events([event])
        await self._flush()


def install() -> None:
    """From now on Hypercorn makes these, in the whole process: it has no setting for them."""
    for module, name, ours in (
        (hypercorn.asyncio.run, "TCPServer", Connection),
        (hypercorn.protocol, "H2Protocol", Http2),
    ):
        setattr(module, name, ours)
