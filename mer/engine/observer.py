"""What can be seen of an engine from outside: its state at a moment, and events as they happen."""

from __future__ import annotations

from typing import Literal, Protocol

from attrs import frozen

from mer.cluster.state import PeerState
from mer.engine.outputs import Usage
from mer.engine.stats import StepStats, Vram

# embedded: what was asked for was no answer.
EndReason = Literal["stop", "length", "embedded", "cancelled", "timeout", "error"]


@frozen
class ReadLatency:
    """How long reads took, from the device being asked until it was noticed that they were over.

    counts[i] reads took at most bounds[i] seconds and more than the bound before; the last count, which has
    no bound, is of those that took longer. seconds: of all together.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    seconds: float


@frozen(kw_only=True)
class Snapshot:
    """An engine at a moment; totals are since it was opened. Sizes in bytes."""

    waiting: int  # requests that are not being computed: new ones, preempted ones, those of slow readers
    running: int
    kv_blocks: int
    kv_blocks_free: int  # that no request holds; those with reusable content included
    kv_blocks_cached: int  # of the free ones, those that hold a prefix
    prefix_hit_tokens: int  # total: prompt tokens found in the prefix cache
    prefix_query_tokens: int  # total: prompt tokens looked up there
    preemptions: int  # total
    drafted: int  # total: tokens of drafts that were verified
    accepted: int  # total: those that were right
    draft_experts: int  # total: experts that steps wanted for drafted tokens alone
    cache_slots: int  # of the expert cache
    experts: int  # of all layers
    resident: int  # experts in memory now
    evictions: int  # total, of experts
    pinned: int  # experts in use by the step under way
    read_latency: ReadLatency  # of all reads, those at the start included
    read_errors: int  # total
    ram_budget_bytes: int
    resident_bytes: int  # of the process
    steps: StepStats  # totals
    vram: Vram | None  # None: there is no GPU, or nothing is in its memory
    peers: tuple[PeerState, ...]  # other machines that hold experts
    peer_hits: int  # total: experts that they computed, counted once a step
    peer_late: int  # total: experts that were asked of them, and of the own drive, too
    peer_skipped: int  # total: experts that they have, and that the own drive was to have sooner
    peer_wait_s: float  # total: of steps, with nothing to compute here, and no read under way


class Observer(Protocol):
    """Is told what happens, on the thread that computes: a method must be quick and may not raise."""

    def queued(self, request_id: int) -> None:
        """A request waits for its first step."""

    def started(self, queue_s: float) -> None:
        """Its first step begins, `queue_s` seconds after it was asked for."""

    def token(self, first: bool, seconds: float) -> None:
        """A token was drawn: seconds since the request was asked for (first), or since the token before."""

    def step(self, tokens: int, requests: int, stats: StepStats) -> None:
        """A step of this many tokens of this many requests was computed; stats: of this step alone."""

    def ended(self, reason: EndReason, usage: Usage | None) -> None:
        """A request is over; usage is None where it failed or was left before its first token."""
