"""What the step thread tells the readers on event loops."""

from __future__ import annotations

import asyncio

from mer.engine.mailbox import Mailbox, wake


class Leaving(Mailbox[int]):
    """Its reader waits when it is looked at first, and has found the item by itself at the second look."""

    @property
    def _waiter(self) -> asyncio.Future[None] | None:
        self.looks += 1
        return self._loop.create_future() if self.looks == 1 else None

    @_waiter.setter
    def _waiter(self, _: None) -> None:
        self.looks = 0


async def test_a_reader_that_finds_its_item_while_it_is_told():
    """It does not keep the others from being told: theirs may be the last item that ever comes."""
    other = Mailbox[int]()
    reading = asyncio.create_task(other.get())
    await asyncio.sleep(0)
    other.put(1)
    wake([Leaving(), other])
    for _ in range(5):
        await asyncio.sleep(0)
    assert reading.done(), "nobody told it"
    assert reading.result() == 1
