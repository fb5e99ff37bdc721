"""Connections as Hypercorn serves them, with two things of 0.18 mended: what is gone stays gone."""

from __future__ import annotations

import h2.events
import hypercorn.asyncio.run
import hypercorn.protocol
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Event, Updated
from hypercorn.protocol.h2 import H2Protocol


class Connection(TCPServer):
    """A client that is gone is forgotten at once, not when its connection has been idle."""

    _gone = False

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
