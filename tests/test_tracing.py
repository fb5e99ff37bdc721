"""Spans of requests, as OpenTelemetry's own SDK keeps them: whose they are, below what, how long."""

from __future__ import annotations

import asyncio
import gzip
import queue
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from engine_models import opened, write_text_model
from grpc_client import connected, generate
from http_server import PATIENCE, serving
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mer.api.grpc.server import serve_grpc
from mer.api.http.app import create_app
from mer.api.http.server import HttpServer
from mer.api.http.service import Service
from mer.api.settings import ServerSettings
from mer.api.tracing import Tracing
from mer.engine.runner import Runner
from mer.errors import ConfigError, DeviceReadError
from mer.v1 import inference_pb2 as pb

# The example of W3C's Trace Context.
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
SETTINGS = ServerSettings(model_name="small", port=0, grpc_port=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("tracing"))


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Tracing(provider)


def asking(engine, tracing):
    service = Service(SETTINGS, engine, tracing=tracing)
    return HttpServer(create_app(service), SETTINGS)


async def finished(exporter):
    """All spans, once that of the request has ended: after the client has its answer."""
    for _ in range(100 * PATIENCE):
        spans = exporter.get_finished_spans()
        if any(each.kind is SpanKind.SERVER for each in spans):
            return spans
        await asyncio.sleep(0.01)
    raise AssertionError("it never ended")


def below(spans, parent):
    return [each for each in spans if each.parent and each.parent.span_id == parent.context.span_id]


def check(spans, name, **attributes):
    """A server's span of our caller's trace, an answer below it, its phases below that, in their order."""
    (root,) = [each for each in spans if each.kind is SpanKind.SERVER]
    assert (root.name, f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (
        name, TRACE, PARENT,
    )  # fmt: skip
    assert attributes.items() <= dict(root.attributes).items()
    (answer,) = below(spans, root)
    assert (answer.name, answer.attributes["gen_ai.usage.input_tokens"]) == ("answer", 3)
    phases = {each.name: each for each in below(spans, answer)}
    queue, prefill, decode, io = (phases.pop(each) for each in ("queue", "prefill", "decode", "io wait"))
    assert not phases
    assert root.start_time <= answer.start_time <= queue.start_time + 1000
    assert queue.end_time == pytest.approx(prefill.start_time, abs=50_000)
    assert prefill.start_time < prefill.end_time < decode.end_time <= root.end_time
    assert prefill.end_time == pytest.approx(decode.start_time, abs=50_000)
    waited = (io.end_time - io.start_time) / 1e9
    assert 0 < waited < (decode.end_time - prefill.start_time) / 1e9
    assert waited == pytest.approx(answer.attributes["mer.io_wait_s"], abs=1e-5)
    return root, answer


@pytest.mark.parametrize("stream", [False, True])
async def test_over_http(model, spans, tracing, stream):
    async with opened(model, cache_experts=3) as engine, asking(engine, tracing) as server:
        body = {"prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True, "stream": stream}
        headers = HEADERS | {"X-Request-Id": "mine"}
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
            assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 200
            await client.get("/health")
            await client.get("/v1/models", headers=headers)
    told = {"http.response.status_code": 200, "mer.request_id": "mine", "mer.completion_tokens": 9}
    _, answer = check(await finished(spans), "POST /v1/completions", **told)
    assert answer.attributes["gen_ai.usage.output_tokens"] == 9
    assert answer.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert not any("prompt" in name and "tokens" not in name for name in answer.attributes)


async def test_over_grpc_alone_and_in_a_session(model, spans, tracing):
    async with opened(model, cache_experts=3) as engine:
        server = await serve_grpc(engine, SETTINGS, tracing=tracing)
        async with connected(server.port) as stub:
            params = pb.SamplingParams(max_tokens=9, ignore_eos=True)
            metadata = tuple(HEADERS.items())
            async for _ in stub.Generate(generate([5, 6, 7], params), metadata=metadata):
                pass
            await stub.GetStats(pb.GetStatsRequest(), metadata=metadata)
            told = {"rpc.grpc.status": "OK", "mer.completion_tokens": 9}
            check(await finished(spans), "mer.v1.Inference/Generate", **told)
            spans.clear()
            session = stub.Session(metadata=metadata)
            await session.write(pb.SessionRequest(id="a", generate=generate([5, 6, 7], params)))
            await session.done_writing()
            async for _ in session:
                pass
            check(await finished(spans), "mer.v1.Inference/Session")
        await server.stop(0)


async def test_what_fails_what_is_refused_and_who_leaves(model, spans, tracing, monkeypatch):
    async with opened(model, context=8192) as engine, asking(engine, tracing) as server:
        client = httpx.AsyncClient(base_url=server.url, timeout=PATIENCE)

        async def ask(path="/v1/completions", **body):
            spans.clear()
            status = (await client.post(path, json={"prompt": [5], **body})).status_code
            return status, await finished(spans)

        status, (refused,) = await ask(top_p=7)
        assert (status, refused.status.status_code) == (400, StatusCode.UNSET)
        status, (nowhere,) = await ask("/v1/any-number-of-these")
        assert (status, nowhere.name) == (404, "POST")
        status, found = await ask(n=2, max_tokens=2)
        assert (status, [each.name for each in found].count("answer")) == (200, 2)

        spans.clear()
        endless = {"prompt": [5], "stream": True, "max_tokens": 8000, "ignore_eos": True}
        async with client.stream("POST", "/v1/completions", json=endless) as answer:
            await anext(answer.aiter_lines())
        left = {each.name: each for each in await finished(spans)}
        assert left["answer"].attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
        assert left["POST /v1/completions"].status.status_code is StatusCode.UNSET

        def fail(*_):
            raise DeviceReadError("file.bin: Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(Runner, "step", fail)
            status, found = await ask()
        assert status == 500
        (root,) = [each for each in found if each.kind is SpanKind.SERVER]
        assert root.status.status_code is StatusCode.ERROR
        assert "file.bin" in root.status.description
        await client.aclose()


def test_a_server_sends_them_where_its_variables_say(model):
    """OTLP over HTTP, read by OpenTelemetry's own messages."""
    received = queue.SimpleQueue()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            data = self.rfile.read(int(self.headers["Content-Length"]))
            received.put((self.path, gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    with serving(model, "--context", 64, "--otel", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as server:
        body = {"prompt": [5], "max_tokens": 2, "ignore_eos": True}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).raise_for_status()
        server.signal()
        assert server.ended() == 0
    path, data = received.get(timeout=PATIENCE)
    collector.shutdown()
    collector.server_close()
    assert path == "/v1/traces"
    (sent,) = ExportTraceServiceRequest.FromString(data).resource_spans
    assert ("service.name", "mer") in [
        (each.key, each.value.string_value) for each in sent.resource.attributes
    ]
    names = [span.name for scope in sent.scope_spans for span in scope.spans]
    assert sorted(names) == ["POST /v1/completions", "answer", "decode", "io wait", "prefill", "queue"]


def test_an_exporter_that_is_not_known(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "jaeger")
    with pytest.raises(ConfigError, match="mer knows otlp and console"):
        Tracing()
