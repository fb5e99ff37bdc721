"""OpenTelemetry: a span per request of a client, and below it where the time of each answer went.

Needs `pip install 'mer[otel]'`; only `Tracing` imports it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen

from mer.engine.journey import TELL, Journey
from mer.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span


@frozen
class Traced:
    """The span of a request, once it is known how that ended."""

    _span: Span
    _failed: Any

    def http(self, path: str, status: int, facts: Mapping[str, Any]) -> None:
        """status: 0 where the client went away before there was one. facts: of its line in the log."""
        if status != 404:  # of paths that there are not, any may come
            self._span.update_name(f"POST {path}")
        self._span.set_attributes({"http.request.method": "POST", "url.path": path})
        if status:
            self._span.set_attribute("http.response.status_code", status)
        self._end(facts, failed=status >= 500)

    def grpc(self, status: str, facts: Mapping[str, Any], *, failed: bool) -> None:
        """status: such as 'OK'."""
        self._span.set_attributes({"rpc.system": "grpc", "rpc.grpc.status": status})
        self._end(facts, failed=failed)

    def _end(self, facts: Mapping[str, Any], *, failed: bool) -> None:
        for name in ("prompt_tokens", "completion_tokens"):
            if name in facts:
                self._span.set_attribute(f"mer.{name}", facts[name])
        if failed:
            self._span.set_status(self._failed, str(facts.get("error", "")))


class Tracing:
    """Makes spans. provider: who gets them; None: as OTEL_TRACES_EXPORTER and so on say.

    Raises ConfigError where OpenTelemetry is not installed, or for an exporter that is not known.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigError(_MISSING) from None
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = provider or _from_environment()
        self._tracer = self._provider.get_tracer("mer", version("mer"))

    @contextmanager
    def request(self, name: str, carrier: Mapping[str, str], request_id: str) -> Iterator[Traced]:
        """A client's request. carrier: its headers or metadata, which may have a traceparent."""
        trace = self._trace
        parent = self._propagator.extract(carrier)
        kind, attributes = trace.SpanKind.SERVER, {"mer.request_id": request_id}
        span = self._tracer.start_span(name, parent, kind=kind, attributes=attributes)
        inside = trace.set_span_in_context(span, parent)
        before = TELL.set(lambda journey: self._journey(journey, inside))
        try:
            yield Traced(span, trace.StatusCode.ERROR)
        finally:
            TELL.reset(before)
            span.end()

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()

    def _journey(self, journey: Journey, inside: Any) -> None:
        # perf_counter has no epoch. Whoever loses the processor between the two clocks finds too early a one.
        epoch = max(time.time_ns() - time.perf_counter_ns() for _ in range(3))

        def at(seconds: float) -> int:
            return epoch + int(seconds * 1e9)

        now = time.perf_counter()
        answer = self._tracer.start_span(
            "answer",
            inside,
            start_time=at(journey.asked_at),
            attributes={
                "gen_ai.usage.input_tokens": journey.prompt_tokens,
                "gen_ai.usage.output_tokens": journey.completion_tokens,
                "gen_ai.response.finish_reasons": [journey.finish_reason or "cancelled"],
                "mer.request": journey.id,
                "mer.cached_tokens": journey.cached_tokens,
                "mer.io_wait_s": journey.io_wait_s,
                "mer.bytes_read": journey.bytes_read,
            },
        )
        below = self._trace.set_span_in_context(answer, inside)

        def phase(name: str, since: float, until: float) -> None:
            self._tracer.start_span(name, below, start_time=at(since)).end(at(until))

        started, first, last = journey.started_at, journey.first_at, journey.last_at
        phase("queue", journey.asked_at, started or now)
        if started is not None:
            phase("prefill", started, first or now)
            # It is spread over all steps; the span is as long as all of it together.
            phase("io wait", started, started + journey.io_wait_s)
        if first is not None:
            phase("decode", first, last or now)
        answer.end(at(max(last or now, journey.asked_at)))


_MISSING: Final = "--otel: OpenTelemetry is not installed; pip install 'mer[otel]'"


def _from_environment() -> TracerProvider:
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import (
            BatchSpanProcessor,
            ConsoleSpanExporter,
            SimpleSpanProcessor,
        )
    except ImportError:
        raise ConfigError(_MISSING) from None
    # The rest of OTEL_... is read by the SDK.
    service = os.environ.get("OTEL_SERVICE_NAME", "mer")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}), shutdown_on_exit=False)
    match os.environ.get("OTEL_TRACES_EXPORTER", "otlp"):
        case "otlp":
            try:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            except ImportError:
                raise ConfigError(_MISSING) from None
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        case "console":
            provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
        case other:
            raise ConfigError(f"OTEL_TRACES_EXPORTER {other!r}: mer knows otlp and console")
    return provider
