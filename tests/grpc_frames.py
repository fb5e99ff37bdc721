"""A client of gRPC that writes HTTP/2 frames itself: it does what no client library lets one do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from google.protobuf.message import Message
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.settings import SettingCodes, Settings


class Frames:
    """A connection. window: bytes of a call's answer that the server may send before the client reads."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int) -> None:
        self._reader = reader
        self._writer = writer
        self._h2 = H2Connection(H2Configuration(header_encoding="utf-8"))
        first = {SettingCodes.INITIAL_WINDOW_SIZE: window, SettingCodes.ENABLE_PUSH: 0}
        self._h2.local_settings = Settings(initial_values=first)
        self._h2.initiate_connection()
        self._changed = asyncio.Condition()
        self.headers: dict[int, dict[str, str]] = {}
        """Of the answers by call, trailers as well."""
        self.data: dict[int, bytes] = {}
        self.stuck = False
        """Whether the server takes no more of what is being sent."""
        self._over: set[int] = set()

    async def call(self, name: str, *messages: Message | bytes, end: bool = True) -> int:
        """Begins a call of mer.v1.Inference; its number. bytes: sent as they are, not as a message."""
        call = self._h2.get_next_available_stream_id()
        told = {
            ":method": "POST", ":scheme": "http", ":path": f"/mer.v1.Inference/{name}", ":authority": "x",
            "te": "trailers", "content-type": "application/grpc",
        }  # fmt: skip
        self._h2.send_headers(call, list(told.items()))
        for message in messages:
            await self.send(call, message)
        if end:
            self._h2.end_stream(call)
        await self._flush()
        return call

    async def send(self, call: int, message: Message | bytes) -> None:
        """Waits while the server takes no more."""
        if isinstance(message, Message):
            body = message.SerializeToString()
            message = b"\0" + len(body).to_bytes(4) + body
        while message:
            room = min(self._h2.local_flow_control_window(call), self._h2.max_outbound_frame_size)
            if room <= 0:
                self.stuck = True
                async with self._changed:
                    await self._changed.wait()
                continue
            self.stuck = False
            self._h2.send_data(call, message[:room])
            message = message[room:]
            await self._flush()

    async def all_of(self, call: int, messages: list[Message]) -> None:
        """Sends them, and that there are no more."""
        for message in messages:
            await self.send(call, message)
        self._h2.end_stream(call)
        await self._flush()

    async def read_on(self, call: int) -> None:
        """Lets the server send a mebibyte of the answer."""
        self._h2.increment_flow_control_window(1 << 20, call)
        self._h2.increment_flow_control_window(1 << 20)
        await self._flush()

    def messages(self, call: int) -> list[bytes]:
        """Of the answer, those that are whole."""
        found, data = [], self.data.get(call, b"")
        while len(data) >= 5:
            size = int.from_bytes(data[1:5])
            found.append(data[5 : 5 + size])
            data = data[5 + size :]
        return found

    async def reset(self, *calls: int) -> None:
        """RST_STREAM: the client wants no more of them."""
        for call in calls:
            self._h2.reset_stream(call, ErrorCodes.CANCEL)
        await self._flush()

    async def over(self, call: int) -> dict[str, str]:
        """The headers and trailers of a call, when the server has ended it."""
        async with self._changed:
            await self._changed.wait_for(lambda: call in self._over)
        return self.headers.get(call, {})

    async def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())
        await self._writer.drain()

    async def read(self) -> None:
        """Until the server closes the connection; a task of its own."""
        while data := await self._reader.read(65536):
            for event in self._h2.receive_data(data):
                if isinstance(event, ResponseReceived | TrailersReceived):
                    headers = self.headers.setdefault(event.stream_id, {})
                    headers |= {str(name): str(value) for name, value in event.headers}
                elif isinstance(event, DataReceived):
                    self.data[event.stream_id] = self.data.get(event.stream_id, b"") + event.data
                elif isinstance(event, StreamEnded | StreamReset):
                    self._over.add(event.stream_id)
            async with self._changed:
                self._changed.notify_all()
            await self._flush()


@asynccontextmanager
async def frames(port: int, window: int = 65535) -> AsyncIterator[Frames]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    made = Frames(reader, writer, window)
    reading = asyncio.create_task(made.read())
    try:
        yield made
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        writer.close()
