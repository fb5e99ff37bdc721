"""What the step thread has made for one reader on an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

_T = TypeVar("_T")

# A reader that is so many items behind gets no more computed until it has read down to the second number.
FULL: Final = 128
_READ_DOWN: Final = FULL // 2


class Mailbox(Generic[_T]):
    """Items on their way from one thread, which puts, to one coroutine, which gets.

    Made on the reader's event loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[_T | BaseException] = deque()
        self._waiter: asyncio.Future[None] | None = None  # of a reader that has found nothing
        self._held_up = False

    def put(self, item: _T | BaseException) -> bool:
        """From the other thread, which is to `wake` the reader. An exception is raised by `get`.

        False: nobody will read it, the loop is closed.
        """
        self._items.append(item)
        return not self._loop.is_closed()

    def hold_up(self) -> bool:
        """From the other thread: whether the reader is too far behind; `caught_up` will tell when no more."""
        if len(self._items) < FULL:
            return False
        self._held_up = True
        # It may have read everything before it could see that somebody waits.
        return len(self._items) > _READ_DOWN

    async def get(self) -> _T:
        """The next item. Raises what was put."""
        while not self._items:
            self._waiter = self._loop.create_future()
            if not self._items:  # nothing was put before it could be seen that somebody waits
                await self._waiter
            self._waiter = None
        item = self._items.popleft()
        if isinstance(item, BaseException):
            raise item
        return item

    def caught_up(self) -> bool:
        """Whether the other thread holds something up that may go on now; says so once."""
        if not self._held_up or len(self._items) > _READ_DOWN:
            return False
        self._held_up = False
        return True


def wake(mailboxes: Iterable[Mailbox[Any]]) -> None:
    """From the other thread: the readers are to look; each of their event loops is told once.

    Told for every item, the loop would want Python's lock before the items of others are made.
    """
    waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for mailbox in mailboxes:
        waiter = mailbox._waiter  # looked at once: its reader may find the item by itself meanwhile
        if waiter is not None:
            waiting.setdefault(mailbox._loop, []).append(waiter)
    for loop, waiters in waiting.items():
        with suppress(RuntimeError):  # it was closed: the next `put` says so
            loop.call_soon_threadsafe(_end, waiters)


def _end(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
