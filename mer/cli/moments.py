"""What a server did between two answers of its Watch, in numbers for people and scripts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import attrs
import grpc
from attrs import frozen

from mer.cli.remote import Remote
from mer.v1 import inference_pb2 as pb
from mer.v1 import inference_pb2_grpc as rpc


@frozen(kw_only=True)
class Latency:
    """Percentiles of the last minute in seconds; None where nothing happened. count: of how many."""

    count: int
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None

    @classmethod
    def of(cls, given: pb.Percentiles) -> Latency:
        if not given.count:
            return cls(count=0)
        return cls(count=given.count, p50=given.p50, p90=given.p90, p99=given.p99)


@frozen(kw_only=True)
class RequestLine:
    """One request. state: queued, prefill, decode, preempted or held."""

    id: int
    state: str
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int
    age_s: float


@frozen(kw_only=True)
class Shares:
    """Where the time went, as shares of 1.

    experts: computing them, here or on a GPU; io_wait: waiting for them; other: the rest of the steps;
    idle: between steps.
    """

    experts: float
    io_wait: float
    other: float
    idle: float


@frozen(kw_only=True)
class VramLine:
    """What is in a GPU's memory, see Vram. computed_share: of all experts, those that it computed."""

    device: str
    layers: int
    dense_bytes: int
    kv_bytes: int
    slots: int
    nbytes: int
    resident: int
    computed_share: float | None
    bus_bytes_per_s: float
    lost: str | None


@frozen(kw_only=True)
class PeerLine:
    """Another machine that holds experts, see Peer. answer_s: of the answers of the interval, on average."""

    address: str
    condition: str
    capacity: int
    held: int
    asked_per_s: float
    late_per_s: float
    answer_s: float | None
    sent_bytes_per_s: float
    received_bytes_per_s: float
    failures: int
    error: str


@frozen(kw_only=True)
class Moment:
    """Rates are of the last interval, rates of hits None where nothing was looked up. Sizes in bytes."""

    time: float
    model: str
    uptime_s: float
    paused: bool
    tokens_per_s: float
    computed_tokens_per_s: float
    steps_per_s: float
    running: int
    waiting: int
    requests: tuple[RequestLine, ...]
    first_token: Latency
    next_token: Latency
    ram_budget_bytes: int
    resident_bytes: int
    kv_blocks: int
    kv_blocks_used: int
    kv_blocks_cached: int
    prefix_hit_rate: float | None
    experts: int
    cache_slots: int
    experts_resident: int
    experts_pinned: int
    expert_hit_rate: float | None
    evictions_per_s: float
    read_bytes_per_s: float
    reads_per_s: float
    queue_depth: float
    read_errors: int
    time_share: Shares
    vram: VramLine | None
    peers: tuple[PeerLine, ...]
    peer_share: float | None  # of all experts, those that peers computed

    @classmethod
    def between(cls, before: pb.WatchResponse, after: pb.WatchResponse) -> Moment:
        """before: an earlier answer of the same engine."""
        seconds = max(after.time - before.time, 1e-3)
        old, now = before.stats, after.stats
        steps = {
            name: getattr(now.steps, name) - getattr(old.steps, name)
            for name in (
                "step_s",
                "io_wait_s",
                "expert_s",
                "bytes_read",
                "hits",
                "misses",
                "vram_hits",
                "vram_passed",
                "gpu_wait_s",
                "bus_bytes",
            )
        }
        peer_hits = now.peer_hits - old.peer_hits
        found = steps["hits"] + steps["vram_hits"]
        experts = steps["expert_s"] + steps["gpu_wait_s"]
        earlier = {each.address: each for each in old.peers}
        # A step counts when it is over: some of its time may lie before the interval.
        whole = max(seconds, steps["step_s"])
        return cls(
            time=after.time,
            model=after.name,
            uptime_s=now.uptime_s,
            paused=after.paused,
            tokens_per_s=(after.completion_tokens - before.completion_tokens) / seconds,
            computed_tokens_per_s=(after.step_tokens - before.step_tokens) / seconds,
            steps_per_s=(after.step_count - before.step_count) / seconds,
            running=now.running,
            waiting=now.waiting,
            requests=tuple(_line(each) for each in after.requests),
            first_token=Latency.of(after.first_token),
            next_token=Latency.of(after.next_token),
            ram_budget_bytes=now.ram_budget_bytes,
            resident_bytes=now.resident_bytes,
            kv_blocks=now.kv_blocks,
            kv_blocks_used=now.kv_blocks - now.kv_blocks_free,
            kv_blocks_cached=now.kv_blocks_cached,
            prefix_hit_rate=_share(
                now.prefix_hit_tokens - old.prefix_hit_tokens,
                now.prefix_query_tokens - old.prefix_query_tokens,
            ),
            experts=now.experts,
            cache_slots=now.cache_slots,
            experts_resident=now.resident,
            experts_pinned=len(after.experts.pinned),
            expert_hit_rate=_share(found, found + steps["misses"]),
            evictions_per_s=(now.evictions - old.evictions) / seconds,
            read_bytes_per_s=steps["bytes_read"] / seconds,
            reads_per_s=(after.device.reads - before.device.reads) / seconds,
            queue_depth=(after.device.read_s - before.device.read_s) / seconds,
            read_errors=after.device.errors,
            time_share=Shares(
                experts=experts / whole,
                io_wait=steps["io_wait_s"] / whole,
                other=max(steps["step_s"] - experts - steps["io_wait_s"], 0.0) / whole,
                idle=max(whole - steps["step_s"], 0.0) / whole,
            ),
            vram=_vram(now.vram, steps, seconds) if now.HasField("vram") else None,
            peers=tuple(_peer(earlier.get(each.address, each), each, seconds) for each in now.peers),
            peer_share=_share(peer_hits, peer_hits + found + steps["misses"]) if now.peers else None,
        )

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return attrs.asdict(self)


async def watch(
    remote: Remote, channel: grpc.aio.Channel, interval: float, model: str = ""
) -> AsyncIterator[tuple[pb.WatchResponse, Moment]]:
    """From the second answer on, since the first has nothing before it. Raises RemoteError."""
    request = pb.WatchRequest(interval=interval, model=model)
    before: pb.WatchResponse | None = None
    with remote.explained():
        async for answer in rpc.InferenceStub(channel).Watch(request, metadata=remote.metadata):
            # Totals that went back are those of another engine.
            if before is not None and answer.step_count >= before.step_count:
                yield answer, Moment.between(before, answer)
            before = answer


def _line(given: pb.RequestStatus) -> RequestLine:
    state = pb.RequestState.Name(given.state).removeprefix("REQUEST_STATE_").lower()
    fields = {
        each.name: getattr(given, each.name) for each in attrs.fields(RequestLine) if each.name != "state"
    }
    return RequestLine(state=state, **fields)


def _peer(before: pb.Peer, after: pb.Peer, seconds: float) -> PeerLine:
    def rate(name: str) -> float:
        return max(float(getattr(after, name) - getattr(before, name)), 0.0) / seconds

    return PeerLine(
        address=after.address,
        condition=after.condition,
        capacity=after.capacity,
        held=after.held,
        asked_per_s=rate("asked"),
        late_per_s=rate("late"),
        answer_s=_share(after.answer_s - before.answer_s, after.answers - before.answers),
        sent_bytes_per_s=rate("sent"),
        received_bytes_per_s=rate("received"),
        failures=after.failures,
        error=after.error,
    )


def _vram(given: pb.Vram, steps: Mapping[str, float], seconds: float) -> VramLine:
    return VramLine(
        device=given.device,
        layers=given.layers,
        dense_bytes=given.dense_bytes,
        kv_bytes=given.kv_bytes,
        slots=given.slots,
        nbytes=given.nbytes,
        resident=given.resident,
        computed_share=_share(
            steps["vram_hits"] + steps["vram_passed"], steps["vram_hits"] + steps["hits"] + steps["misses"]
        ),
        bus_bytes_per_s=steps["bus_bytes"] / seconds,
        lost=given.lost if given.HasField("lost") else None,
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
