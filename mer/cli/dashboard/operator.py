"""What the dashboard's keys do, through the server's admin API."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mer.cli.remote import Remote, RemoteError
from mer.v1 import admin_pb2 as pb
from mer.v1 import admin_pb2_grpc as rpc


class Operator:
    """Each call says what came of it. Raises RemoteError."""

    def __init__(self, remote: Remote, model: str = "") -> None:
        """model: whose; empty: the first."""
        self._model = model
        self._remote = remote

    async def pause(self) -> str:
        async with self._stub() as stub:
            await stub.Pause(pb.PauseRequest(model=self._model), metadata=self._remote.metadata)
        return "paused: nobody new begins"

    async def resume(self) -> str:
        async with self._stub() as stub:
            await stub.Resume(pb.ResumeRequest(model=self._model), metadata=self._remote.metadata)
        return "going on"

    async def reload(self) -> str:
        async with self._stub() as stub:
            done = await stub.Reload(pb.ReloadRequest(model=self._model), metadata=self._remote.metadata)
        return f"loaded anew in {done.seconds:.1f} s"

    async def pin(self, text: str) -> str:
        """text: 3 or 3/17, of layer and expert; -3/17 to unpin."""
        found = re.fullmatch(r"\s*(-?)\s*(\d{1,9})(?:\s*[/:]\s*(\d{1,9}))?\s*", text)
        if found is None:
            raise RemoteError(f"{text!r}: write LAYER or LAYER/EXPERT, such as 3 or 3/17")
        layer, expert = int(found[2]), int(found[3]) if found[3] else None
        async with self._stub() as stub:
            if found[1]:
                gone = pb.UnpinRequest(model=self._model, layer=layer, expert=expert)
                pinned = (await stub.Unpin(gone, metadata=self._remote.metadata)).pinned
            else:
                kept = pb.PinRequest(model=self._model, layer=layer, expert=expert)
                pinned = (await stub.Pin(kept, metadata=self._remote.metadata)).pinned
        return f"{pinned} experts are pinned"

    async def log(self) -> AsyncIterator[list[str]]:
        """The last lines, then further ones."""
        async with self._stub() as stub:
            async for answer in stub.Log(pb.LogRequest(), metadata=self._remote.metadata):
                yield list(answer.lines)

    @asynccontextmanager
    async def _stub(self) -> AsyncIterator[rpc.AdminAsyncStub]:
        with self._remote.explained():
            async with self._remote.channel() as channel:
                yield rpc.AdminStub(channel)
