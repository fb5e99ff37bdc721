"""One HTTP request on its way: its id, its caller, what its log line shall say."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, cast

from attrs import Factory, define
from quart import request

from mer.api.conversation import Event
from mer.api.http.errors import ApiError
from mer.engine.outputs import Usage
from mer.errors import MerError

_log = logging.getLogger("mer.http")


@define
class Call:
    """cleanup: closed when the response has been sent or nobody wants it any more.

    refused: the reason, see mer.api.access.REASONS; empty while it is not.
    """

    request_id: str
    caller: str = ""
    cleanup: AsyncExitStack = Factory(AsyncExitStack)
    log: dict[str, Any] = Factory(dict)
    begun: float = Factory(time.perf_counter)
    refused: str = ""

    def used(self, usage: Sequence[Usage]) -> None:
        """Count the tokens of these answers to one prompt in the log line."""
        self.log["prompt_tokens"] = self.log.get("prompt_tokens", 0) + usage[0].prompt_tokens
        answered = sum(each.completion_tokens for each in usage)
        self.log["completion_tokens"] = self.log.get("completion_tokens", 0) + answered

    def failed(self, error: BaseException, told: ApiError) -> None:
        """Say in the log what went wrong; with a traceback where it is an error of `mer`."""
        self.log["error"] = str(told)
        self.refused = told.refusal
        if told.status >= 500 and not isinstance(error, MerError):
            _log.error("request %s: %r", self.request_id, error, exc_info=error)


async def collect(
    events: AsyncGenerator[list[Event], None], add: Callable[[Event], object], call: Call
) -> None:
    """Add every event to an answer that is sent as a whole, and count its tokens."""
    async with aclosing(events):
        async for batch in events:
            for event in batch:
                add(event)
                if event.delta.usage:
                    call.used([event.delta.usage])


def current_call() -> Call:
    """That of the request which is being handled."""
    return cast(Call, request.scope["state"]["call"])
