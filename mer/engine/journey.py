"""What became of one request, told to whoever asked for it: for traces."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

from attrs import frozen

from mer.engine.request import Job, Request


@frozen(kw_only=True)
class Journey:
    """Moments are seconds of time.perf_counter, None where it did not come so far.

    started_at: its first step; first_at, last_at: its first and latest token. io_wait_s: of its steps, time
    with nothing to compute because reads were not there yet. finish_reason: None where it was left or failed.
    """

    id: int
    asked_at: float
    started_at: float | None
    first_at: float | None
    last_at: float | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    io_wait_s: float
    bytes_read: int
    finish_reason: str | None

    @classmethod
    def of(cls, job: Job, finish_reason: str | None) -> Journey:
        usage, request = job.usage(), job if isinstance(job, Request) else None
        drawn = request is not None and request.first_at is not None
        return cls(
            id=job.id,
            asked_at=job.asked_at,
            started_at=job.started_at,
            first_at=request.first_at if request is not None else None,
            last_at=request.last_at if request is not None and drawn else None,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            io_wait_s=job.steps.io_wait_s,
            bytes_read=job.steps.bytes_read,
            finish_reason=finish_reason,
        )


# Called when a request that was asked for in this context is over.
TELL: Final[ContextVar[Callable[[Journey], None] | None]] = ContextVar("journey", default=None)


def told(job: Job, finish_reason: str | None) -> None:
    """It is over."""
    tell = TELL.get()
    if tell is not None:
        tell(Journey.of(job, finish_reason))
