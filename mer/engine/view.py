"""What can be seen of an engine while it works; no text and no token of anybody.

Who is here and how far, how quick it was lately, which experts are in memory.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from typing import Final, Literal

import numpy as np
from attrs import frozen

from mer._ext.cache import ExpertCache
from mer.engine.observer import EndReason, Snapshot
from mer.engine.outputs import Usage
from mer.engine.request import Job
from mer.engine.scheduler import Scheduler
from mer.engine.stats import StepStats

# queued: no step of it was computed; prefill: its prompt is being computed; decode: its answer; preempted: it
# gave its KV blocks up and will be computed again; held: its reader is too far behind.
RequestState = Literal["queued", "prefill", "decode", "preempted", "held"]

# Latencies that percentiles are of: those of so many seconds, and at most so many.
WINDOW_S: Final = 60.0
_MOST: Final = 4096


@frozen(kw_only=True)
class RequestView:
    """One request. id: its number in this engine; computed_tokens: of prompt and answer together."""

    id: int
    state: RequestState
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int
    age_s: float


@frozen(kw_only=True)
class Percentiles:
    """Seconds; None where `count`, of how many, is 0."""

    count: int
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, values: Collection[float]) -> Percentiles:
        if not values:
            return cls(count=0)
        p50, p90, p99 = np.percentile(np.fromiter(values, float), (50, 90, 99)).tolist()
        return cls(count=len(values), p50=p50, p90=p90, p99=p99)


@frozen(kw_only=True)
class ExpertMap:
    """Which experts are in memory: a byte each, layer by layer of those that have experts.

    heat: 0: not in memory; else 1 + 254 * sqrt(chance that a token of the layer wants it), rounded, so that
    an eighth and a hundredth can be told apart; 1 where nobody keeps account (LRU, or all experts fit).
    pinned: numbers (layer * experts + expert) of those that are never evicted, whether in memory or not.
    """

    layers: int
    experts: int
    heat: bytes
    pinned: tuple[int, ...]

    @classmethod
    def of(cls, cache: ExpertCache, pinned: Iterable[int]) -> ExpertMap:
        chances = cache.chances()
        resident = chances >= 0
        counted = cache.policy == "next-use" and cache.n_slots < cache.n_experts
        root = np.sqrt(np.clip(chances, 0, 1)) if counted else np.zeros(len(chances))
        heat = np.where(resident, 1 + np.rint(254 * root), 0).astype(np.uint8)
        layers = cache.n_layers
        return cls(
            layers=layers,
            experts=cache.n_experts // layers,
            heat=heat.tobytes(),
            pinned=tuple(sorted(pinned)),
        )


@frozen(kw_only=True)
class View:
    """An engine at a moment; totals are since it was opened. time: seconds since 1970.

    first_token, next_token: latencies of the last WINDOW_S seconds; completion_tokens, steps, step_tokens:
    totals of tokens drawn, of steps, and of tokens that were computed in them. reads: total, of all that the
    device was asked; experts: None in a dense model.
    """

    time: float
    now: Snapshot
    paused: bool
    requests: tuple[RequestView, ...]
    first_token: Percentiles
    next_token: Percentiles
    completion_tokens: int
    steps: int
    step_tokens: int
    reads: int
    experts: ExpertMap | None


class Recent:
    """An observer that keeps the latest latencies, and counts."""

    def __init__(self) -> None:
        self.completion_tokens = self.steps = self.step_tokens = 0
        self._lock = threading.Lock()
        self._first: deque[tuple[float, float]] = deque(maxlen=_MOST)
        self._next: deque[tuple[float, float]] = deque(maxlen=_MOST)

    def queued(self, request_id: int) -> None:
        pass

    def started(self, queue_s: float) -> None:
        pass

    def token(self, first: bool, seconds: float) -> None:
        with self._lock:
            self.completion_tokens += 1
            (self._first if first else self._next).append((time.monotonic(), seconds))

    def step(self, tokens: int, requests: int, stats: StepStats) -> None:
        self.steps += 1
        self.step_tokens += tokens

    def ended(self, reason: EndReason, usage: Usage | None) -> None:
        pass

    def percentiles(self) -> tuple[Percentiles, Percentiles]:
        """Of first tokens, and of next ones."""
        since = time.monotonic() - WINDOW_S
        with self._lock:
            kept = [[took for at, took in each if at >= since] for each in (self._first, self._next)]
        return Percentiles.of(kept[0]), Percentiles.of(kept[1])


def requests(jobs: Iterable[Job], scheduler: Scheduler) -> tuple[RequestView, ...]:
    """The oldest first. From any thread: whose state is just changing may be told with the one before."""
    running, held = set(scheduler.running), set(scheduler.paused)
    now = time.perf_counter()

    def state(job: Job) -> RequestState:
        if job in held:
            return "held"
        if job not in running:
            return "queued" if job.started_at is None else "preempted"
        return "prefill" if len(job.tokens) == job.prompt_tokens else "decode"

    return tuple(
        RequestView(
            id=job.id,
            state=state(job),
            prompt_tokens=job.prompt_tokens,
            cached_tokens=job.cached or 0,
            computed_tokens=job.computed,
            completion_tokens=len(job.tokens) - job.prompt_tokens,
            age_s=now - job.asked_at,
        )
        for job in sorted(jobs, key=lambda job: job.id)
    )
