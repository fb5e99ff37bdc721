"""What Prometheus reads: counters, gauges and histograms of one engine. docs/metrics.md lists them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final, get_args

from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from mer.api.access import REASONS
from mer.cluster.state import ANSWER_BOUNDS, PeerState
from mer.engine.budget import resident_bytes
from mer.engine.engine import Engine
from mer.engine.observer import EndReason, Snapshot
from mer.engine.outputs import Usage
from mer.engine.stats import StepStats

_QUEUE_S: Final = (0.001, 0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_FIRST_TOKEN_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_NEXT_TOKEN_S: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
_REQUESTS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_OF_PROCESS: Final = ("mer_requests_refused", "mer_ram_budget_bytes", "mer_resident_bytes")
_REASONS: Final[tuple[EndReason, ...]] = get_args(EndReason)


class Metrics(Collector):
    """Watches one engine from now on; any number may live in a process, each has its own registry."""

    def __init__(self, engine: Engine, model_name: str, refused: Mapping[str, int] | None = None) -> None:
        """refused: what a server around the engine turned away, by reason; it may go on counting."""
        self._model_name = model_name
        self._refused = dict.fromkeys(REASONS, 0) if refused is None else refused
        self._ended: dict[EndReason, int] = dict.fromkeys(_REASONS, 0)
        self._prompt_tokens = self._completion_tokens = 0
        self._queue = _Histogram(_QUEUE_S)
        self._first_token = _Histogram(_FIRST_TOKEN_S)
        self._next_token = _Histogram(_NEXT_TOKEN_S)
        self._step_requests = _Histogram(_REQUESTS)
        self._step_tokens = _Histogram(_TOKENS)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.follow(engine)

    def follow(self, engine: Engine) -> None:
        """Another engine from now on; what was counted here goes on, the engine's own totals begin again."""
        self._engine = engine
        self._info = {"version": version("mer"), "model": self._model_name}
        self._info |= {
            name: str(engine.facts()[name]) for name in ("io_backend", "isa", "device", "threads", "kv_dtype")
        }
        engine.observe(self)

    def leave(self) -> None:
        """There is no engine for now: nothing can be told until `follow`."""
        del self._engine

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics as text, and its content type.

        In Prometheus' format, or in OpenMetrics' where `accept`, the header of that name, asks for it.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    # What the engine's thread tells.

    def queued(self, request_id: int) -> None:
        pass  # a snapshot has how many wait

    def started(self, queue_s: float) -> None:
        self._queue.observe(queue_s)

    def token(self, first: bool, seconds: float) -> None:
        self._completion_tokens += 1
        (self._first_token if first else self._next_token).observe(seconds)

    def step(self, tokens: int, requests: int, stats: StepStats) -> None:
        self._step_requests.observe(requests)
        self._step_tokens.observe(tokens)

    def ended(self, reason: EndReason, usage: Usage | None) -> None:
        self._ended[reason] += 1
        self._prompt_tokens += usage.prompt_tokens if usage else 0

    # What Prometheus is told.

    def describe(self) -> Iterable[Metric]:
        return ()  # registering asks for nothing

    def collect(self) -> Iterable[Metric]:
        now = self._engine.snapshot()
        yield InfoMetricFamily("mer_engine", "What this engine is and uses.", self._info)
        yield from self._requests(now)
        yield from _memory(now)
        yield from _experts(now)
        yield from _gpu(now)
        yield from _peers(now)
        yield from _time(now)

    def _requests(self, now: Snapshot) -> Iterable[Metric]:
        states = {"waiting": now.waiting, "running": now.running}
        yield _gauges("mer_requests", "Requests that are here now.", "state", states)
        yield _counters("mer_requests_ended", "Requests that are over, and why.", "reason", self._ended)
        yield _refusals(self._refused)
        yield self._queue.metric("mer_request_queue_seconds", "From a request to its first step.")
        yield self._first_token.metric(
            "mer_time_to_first_token_seconds", "From a request to its first token."
        )
        yield self._next_token.metric(
            "mer_inter_token_latency_seconds", "From one token of a request to the next."
        )
        yield _counter(
            "mer_prompt_tokens", "Tokens of the prompts of requests that are over.", self._prompt_tokens
        )
        yield _counter("mer_completion_tokens", "Tokens drawn.", self._completion_tokens)
        yield self._step_requests.metric("mer_step_requests", "Requests that were computed in one step.")
        yield self._step_tokens.metric("mer_step_tokens", "Tokens that were computed in one step.")
        yield _counter(
            "mer_preemptions", "Requests that gave up their KV blocks for others.", now.preemptions
        )
        yield _counter("mer_draft_tokens", "Tokens of drafts that were verified.", now.drafted)
        yield _counter("mer_draft_tokens_accepted", "Those that were right.", now.accepted)
        yield _counter(
            "mer_draft_experts", "Experts that steps wanted for drafted tokens alone.", now.draft_experts
        )


class ServerMetrics(Collector):
    """Of all models of a server, each with the label `model`; what is the process's is there once."""

    def __init__(self, refused: Mapping[str, int], ram: Callable[[], int]) -> None:
        """refused: see Metrics. ram: bytes that the server keeps to."""
        self._refused = refused
        self._ram = ram
        self._all: dict[str, Metrics] = {}
        self._loaded: set[str] = set()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def follow(self, name: str, engine: Engine | None) -> None:
        """The model of this name has another engine; None: none, so that there is nothing to tell of it."""
        self._loaded.discard(name)
        if engine is None:
            if name in self._all:
                self._all[name].leave()
            return
        if name in self._all:
            self._all[name].follow(engine)
        else:
            self._all[name] = Metrics(engine, name)
        self._loaded.add(name)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """As Metrics.render."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for name in sorted(self._loaded):
            for family in self._all[name].collect():
                if family.name in _OF_PROCESS:
                    continue
                labelled = [each._replace(labels={**each.labels, "model": name}) for each in family.samples]
                family.samples = labelled
                families.setdefault(family.name, family)
                if families[family.name] is not family:
                    families[family.name].samples += labelled
        yield from families.values()
        yield _refusals(self._refused)
        yield from _process(self._ram(), resident_bytes())


def _refusals(refused: Mapping[str, int]) -> Metric:
    return _counters("mer_requests_refused", "Requests that were not served.", "reason", refused)


def _process(ram: int, resident: int) -> Iterable[Metric]:
    yield GaugeMetricFamily("mer_ram_budget_bytes", "What the process may hold.", ram)
    yield GaugeMetricFamily("mer_resident_bytes", "What the process holds.", resident)


def _memory(now: Snapshot) -> Iterable[Metric]:
    blocks = {
        "used": now.kv_blocks - now.kv_blocks_free,
        "cached": now.kv_blocks_cached,
        "free": now.kv_blocks_free - now.kv_blocks_cached,
    }
    yield _gauges("mer_kv_blocks", "Blocks of the KV cache, 16 tokens each.", "state", blocks)
    yield _counter(
        "mer_prefix_cache_query_tokens",
        "Prompt tokens looked up in the prefix cache.",
        now.prefix_query_tokens,
    )
    yield _counter("mer_prefix_cache_hit_tokens", "Prompt tokens found there.", now.prefix_hit_tokens)
    yield from _process(now.ram_budget_bytes, now.resident_bytes)


def _experts(now: Snapshot) -> Iterable[Metric]:
    cache = "mer_expert_cache_"
    yield GaugeMetricFamily("mer_experts", "Experts of the model, of all layers.", now.experts)
    slots, resident, hits, evictions = (
        {"ram": now.cache_slots},
        {"ram": now.resident},
        {"ram": now.steps.hits},
        {"ram": now.evictions},
    )
    if (vram := now.vram) is not None:
        slots["vram"], resident["vram"] = vram.slots, vram.resident
        hits["vram"], evictions["vram"] = now.steps.vram_hits, vram.evictions
    yield _gauges(cache + "slots", "Experts that the cache has room for.", "tier", slots)
    yield _gauges(cache + "resident", "Experts in the cache now.", "tier", resident)
    yield _gauges(cache + "pinned", "Experts that a step is using now.", "tier", {"ram": now.pinned})
    yield _counters(cache + "hits", "Experts found in the cache.", "tier", hits)
    yield _counters(cache + "misses", "Experts that had to be read.", "tier", {"ram": now.steps.misses})
    yield _counters(cache + "evictions", "Experts that made room.", "tier", evictions)
    yield _counter("mer_prefetch_issued", "Experts read ahead of their layer.", now.steps.prefetched)
    yield _counter("mer_prefetch_useful", "Those that were wanted then.", now.steps.prefetch_used)
    yield _counter("mer_prefetch_bytes", "Bytes of experts read ahead.", now.steps.prefetch_bytes)
    yield _counter("mer_prefetch_useful_bytes", "Bytes of the useful ones.", now.steps.prefetch_used_bytes)
    yield _counter("mer_prefetch_guesses", "Experts expected to be wanted next.", now.steps.guesses)
    yield _counter("mer_prefetch_guesses_right", "Those that were.", now.steps.guesses_right)
    yield _counter("mer_read_bytes", "Bytes of experts read from disk.", now.steps.bytes_read)
    latency = now.read_latency
    yield _histogram(
        "mer_read_seconds", "Single reads from disk.", latency.bounds, latency.counts, latency.seconds
    )
    yield _counter("mer_read_errors", "Reads from disk that failed.", now.read_errors)


def _gpu(now: Snapshot) -> Iterable[Metric]:
    steps, vram = now.steps, now.vram
    parts = vram.parts if vram else dict.fromkeys(("experts", "dense", "kv"), 0)
    lost = vram is not None and vram.lost is not None
    yield _gauges("mer_vram_bytes", "What is taken of the GPU's memory, with buffers.", "part", parts)
    yield GaugeMetricFamily("mer_vram_layers", "Layers whose dense part it has.", vram.layers if vram else 0)
    yield GaugeMetricFamily("mer_vram_lost", "Whether the GPU was given up for an error.", int(lost))
    yield _counter("mer_vram_promotions", "Experts copied to the GPU to stay.", steps.vram_promotions)
    yield _counter("mer_vram_passed", "Experts copied to the GPU for one step.", steps.vram_passed)
    yield _counter("mer_bus_bytes", "Bytes of both kinds of copies.", steps.bus_bytes)


def _peers(now: Snapshot) -> Iterable[Metric]:
    def each(value: Callable[[PeerState], int]) -> dict[str, int]:
        return {peer.address: value(peer) for peer in now.peers}

    up = each(lambda peer: int(peer.condition == "up"))
    asked, answers = each(lambda peer: peer.asked), each(lambda peer: peer.answers)
    yield _gauges("mer_peer_up", "Whether the peer is asked for experts.", "peer", up)
    yield _gauges("mer_peer_experts", "Experts that it holds.", "peer", each(lambda peer: peer.held))
    yield _counters("mer_peer_asked", "Times that a layer wanted something of it.", "peer", asked)
    yield _counters("mer_peer_answers", "Times it computed what a layer wanted of it.", "peer", answers)
    late, failures = each(lambda peer: peer.late), each(lambda peer: peer.failures)
    yield _counters("mer_peer_late_answers", "Those that came too late.", "peer", late)
    yield _counters("mer_peer_failures", "Times it was lost or refused.", "peer", failures)
    sent, received = each(lambda peer: peer.sent), each(lambda peer: peer.received)
    yield _counters("mer_peer_sent_bytes", "Bytes of messages to it.", "peer", sent)
    yield _counters("mer_peer_received_bytes", "Bytes of messages from it.", "peer", received)
    answer = HistogramMetricFamily(
        "mer_peer_answer_seconds", "From asking a peer to all that it was asked for.", labels=["peer"]
    )
    for peer in now.peers:
        answer.add_metric([peer.address], _buckets(ANSWER_BOUNDS, peer.answer_counts), peer.answer_s)
    yield answer
    yield _counter("mer_peer_hits", "Experts that peers computed.", now.peer_hits)
    skipped = now.peer_skipped
    yield _counter("mer_peer_skipped_experts", "Experts that the own drive was to have sooner.", skipped)
    yield _counter("mer_peer_late_experts", "Experts for which the own drive was asked, too.", now.peer_late)


def _time(now: Snapshot) -> Iterable[Metric]:
    yield _counter("mer_step_seconds", "Time in steps.", now.steps.step_s)
    yield _counter(
        "mer_io_wait_seconds", "Of it with nothing to compute before reads came.", now.steps.io_wait_s
    )
    yield _counter("mer_expert_compute_seconds", "Of it computing experts.", now.steps.expert_s)
    yield _counter("mer_gpu_wait_seconds", "Of it with the GPU alone at work.", now.steps.gpu_wait_s)
    yield _counter("mer_peer_wait_seconds", "Of it with peers alone at work.", now.peer_wait_s)


class _Histogram:
    """Counts of one writer; a reader may miss what is being counted. Cheaper than prometheus_client's."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def metric(self, name: str, help_text: str) -> Metric:
        return _histogram(name, help_text, self._bounds, self._counts, self._sum)


def _histogram(
    name: str, help_text: str, bounds: Sequence[float], counts: Sequence[int], total: float
) -> Metric:
    return HistogramMetricFamily(name, help_text, _buckets(bounds, counts), total)


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    buckets, below = [], 0
    for bound, count in zip([*map(str, map(float, bounds)), "+Inf"], counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return buckets


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(name, help_text, value)


def _counters(name: str, help_text: str, label: str, values: Mapping[Any, int]) -> Metric:
    return _labelled(CounterMetricFamily(name, help_text, labels=[label]), values)


def _gauges(name: str, help_text: str, label: str, values: Mapping[Any, int]) -> Metric:
    return _labelled(GaugeMetricFamily(name, help_text, labels=[label]), values)


def _labelled(
    family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[Any, int]
) -> CounterMetricFamily | GaugeMetricFamily:
    for value, number in values.items():
        family.add_metric([value], number)
    return family
