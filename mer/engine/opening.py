"""What `Engine.open` returns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mer.errors import MerError

if TYPE_CHECKING:
    from mer.engine.engine import Engine


class Opening:
    """`async with` opens and closes the engine, `await` just opens it. load: does so, on another thread."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._load = load
        self._engine: Engine | None = None

    def __await__(self) -> Generator[Any, None, Engine]:
        return self._open().__await__()

    async def _open(self) -> Engine:
        # Shielded: an open that is cancelled midway would leave files and memory behind.
        task = asyncio.ensure_future(asyncio.to_thread(self._load))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            with suppress(MerError):
                await (await task).close(drain=False)
            raise
        finally:
            del task  # else an error would keep itself, and by its frames what had been opened

    async def __aenter__(self) -> Engine:
        self._engine = await self._open()
        return self._engine

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._engine is not None
        await self._engine.close(drain=error is None)
