"""The caches of a server give memory back while others on the machine, or in its control group, need it."""

from __future__ import annotations

import asyncio
import logging
import time

from mer.api.models import Models
from mer.engine.breath import Breath
from mer.errors import BudgetError, EngineClosedError
from mer.streaming.pressure import Gauge

_log = logging.getLogger("mer.server")


async def breathe(models: Models, gauge: Gauge, every: float = 0.1) -> None:
    """For ever: look each `every` seconds, and have `models` keep to what can be had."""
    breath = Breath(models.asked, models.ram)
    while True:
        await asyncio.sleep(every)
        room, stalled = await asyncio.to_thread(gauge.read)
        if not any(budget.slots for budget in models.budgets):
            continue  # nothing that could shrink
        breath.asked, before = models.asked, models.ram
        breath.ram = before
        held, unfilled = models.filled()
        ram = breath.step(
            time.monotonic(), floor=models.floor, held=held, unfilled=unfilled, room=room, stalled=stalled
        )
        if ram == before:
            continue
        try:
            await models.keep_to(ram)
        except (BudgetError, EngineClosedError):
            continue  # models came or went meanwhile
        if before == models.asked:
            why = (
                f"tasks waited {stalled:.0%} of the time" if room >= breath.reserve else f"{room} bytes free"
            )
            _log.warning("memory is short (%s): caches shrink, ram is %d of %d bytes", why, ram, models.asked)
        elif ram == models.asked:
            _log.info("memory is there again: ram is %d bytes", ram)
