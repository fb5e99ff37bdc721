"""What Prometheus would read, as its own parsers understand it, against what the engine did."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from contextlib import aclosing
from pathlib import Path

import grpc
import httpx
import pytest
from click.testing import CliRunner
from engine_models import write_text_model
from grpc_client import connected
from http_server import PATIENCE, serving
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from mer import Engine, SamplingParams
from mer.api.http.errors import ApiError
from mer.api.http.service import Service
from mer.api.metrics import Metrics
from mer.api.model import Model
from mer.api.models import Models
from mer.api.settings import ServerSettings
from mer.cli.monitor import monitor
from mer.config import EngineConfig
from mer.demo import model_path
from mer.errors import DeviceReadError, RequestTimeoutError
from mer.v1 import inference_pb2 as pb

DOCS = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
SMALL = EngineConfig(context=64)
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("metrics"))


def families(text: bytes) -> dict:
    return {family.name: family for family in parse_text(text.decode())}


def values(text: bytes) -> dict[str, float]:
    """Name, with a label's value where there is one -> value; buckets left out."""
    found = {}
    for family in families(text).values():
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found


async def used(engine: Engine) -> tuple[Metrics, int]:
    """Metrics of an engine that had requests of every ending; how many tokens were drawn."""
    metrics = Metrics(engine, "small")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    results = await asyncio.gather(*(engine.generate([i, 5, 6], params) for i in range(1, 6)))
    stop = results[0].token_ids[3]
    results.append(await engine.generate([1, 5, 6], SamplingParams(temperature=0, stop_token_ids=[stop])))
    drawn = sum(len(each.token_ids) for each in results)
    async with aclosing(engine.stream([7, 8], SamplingParams(ignore_eos=True))) as deltas:
        await anext(deltas)
    with pytest.raises(RequestTimeoutError):
        await engine.generate([9], SamplingParams(ignore_eos=True, timeout=1e-6))
    await engine.embed([1, 2, 3, 4])
    return metrics, drawn


async def test_values(model):
    async with Engine.open(model, context=512, cache_experts=6) as engine:
        metrics, drawn = await used(engine)
        engine._runner.reader.set_fault(0, 0, 1 << 40, times=1000)
        with pytest.raises(DeviceReadError):
            await engine.generate([17, 18, 19, 20, 21, 22, 23, 24], SamplingParams(max_tokens=1))
        engine._runner.reader.clear_faults()
        text, content_type = metrics.render()
        assert content_type.startswith("text/plain; version=0.0.4")
        now, steps = engine.snapshot(), engine.stats
    found = values(text)
    ended = {
        reason: found[f"mer_requests_ended_total {reason}"]
        for reason in ("stop", "length", "embedded", "cancelled", "timeout", "error")
    }
    assert ended == {"stop": 1, "length": 5, "embedded": 1, "cancelled": 1, "timeout": 1, "error": 1}
    assert found["mer_requests waiting"] == found["mer_requests running"] == 0
    cancelled = found["mer_completion_tokens_total"] - drawn
    assert 1 <= cancelled < 500, "of the stream that was left"
    assert found["mer_prompt_tokens_total"] == 5 * 3 + 3 + 2 + 4
    assert found["mer_time_to_first_token_seconds_count"] == 7
    assert found["mer_inter_token_latency_seconds_count"] == found["mer_completion_tokens_total"] - 7
    assert found["mer_request_queue_seconds_count"] in (9, 10), "the one that came too late may have begun"
    assert 0 < found["mer_time_to_first_token_seconds_sum"] < 600
    # A step may give a request several tokens, drafted ones.
    assert found["mer_step_tokens_sum"] >= found["mer_completion_tokens_total"]
    assert found["mer_step_requests_count"] == found["mer_step_tokens_count"] < found["mer_step_requests_sum"]
    assert found["mer_step_tokens_sum"] >= 24 + drawn - 6
    assert found["mer_kv_blocks used"] == 0
    assert found["mer_kv_blocks cached"] + found["mer_kv_blocks free"] == now.kv_blocks
    assert found["mer_expert_cache_hits_total ram"] == steps.hits > 0
    assert found["mer_expert_cache_misses_total ram"] == steps.misses > 0
    assert found["mer_expert_cache_evictions_total ram"] == now.evictions > 0
    assert (found["mer_expert_cache_slots ram"], found["mer_experts"]) == (6, 12)
    assert 0 < found["mer_expert_cache_resident ram"] <= 6
    assert found["mer_expert_cache_pinned ram"] == 0
    assert found["mer_read_bytes_total"] == steps.bytes_read > 0
    assert found["mer_read_errors_total"] > 0
    assert found["mer_read_seconds_count"] >= steps.misses + steps.prefetched - found["mer_read_errors_total"]
    assert found["mer_read_seconds_sum"] > 0
    assert found["mer_prefetch_issued_total"] == steps.prefetched >= found["mer_prefetch_useful_total"]
    assert found["mer_step_seconds_total"] == steps.step_s >= found["mer_io_wait_seconds_total"] > 0
    assert found["mer_expert_compute_seconds_total"] == steps.expert_s > 0
    assert 0 < found["mer_resident_bytes"] <= found["mer_ram_budget_bytes"] == now.ram_budget_bytes


async def test_several_engines_and_prefix_hits(model):
    async with (
        Engine.open(model, context=512) as first,
        Engine.open(model, context=512) as second,
    ):
        one, other = Metrics(first, "one"), Metrics(second, "other")
        prompt = [*range(1, 41)]
        for _ in range(2):
            await first.generate(prompt, SamplingParams(max_tokens=2, ignore_eos=True))
        found = values(one.render()[0])
        assert found["mer_prefix_cache_query_tokens_total"] == 80
        assert found["mer_prefix_cache_hit_tokens_total"] == 32, "whole blocks of 16"
        assert found["mer_kv_blocks cached"] >= 2
        assert values(other.render()[0])["mer_completion_tokens_total"] == 0
        labels = families(one.render()[0])["mer_engine_info"].samples[0].labels
        assert (labels["model"], labels["io_backend"]) == ("one", first.facts()["io_backend"])


async def test_names_and_the_list_in_the_docs(model):
    """Prometheus' rules: a prefix, base units, _total on counters alone, a help text, sound histograms."""
    async with Engine.open(model, context=64, peers=["127.0.0.1:1"]) as engine:  # nobody is there
        metrics = Metrics(engine, "small")
        await engine.generate([1], SamplingParams(max_tokens=2))
        text = metrics.render()[0]
        open_text, content_type = metrics.render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    strict = {family.name: family.type for family in parse_openmetrics(open_text.decode())}
    listed = {}
    for name, kind, labels in re.findall(r"^\| `(mer_\w+)` \| (\w+) \| (.*?) \|", DOCS, re.MULTILINE):
        listed[name] = (kind, set(re.findall("`([a-z_]+)`", labels)))
    exported = {}
    for family in families(text).values():
        name = family.name + "_total" * (family.type == "counter")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        exported[name] = (family.type, labels)
        assert family.documentation.endswith(".")
        assert re.fullmatch("mer(_[a-z]+)+", name)
        assert not re.search("milli|micro|_ms|_kib|_mib|_percent|counter|histogram|gauge", name)
        assert (family.type == "counter") == name.endswith("_total")
        assert family.type in ("counter", "gauge", "histogram")
        assert strict[family.name.removesuffix("_info")] in (family.type, "info")
        if family.type == "histogram":
            buckets = [s.value for s in family.samples if s.name.endswith("_bucket")]
            bounds = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
            count = next(s.value for s in family.samples if s.name.endswith("_count"))
            assert buckets == sorted(buckets)
            assert bounds == sorted(set(bounds))
            assert (bounds[-1], buckets[-1]) == (float("inf"), count)
    assert exported == listed


def test_bounds_of_a_histogram():
    from mer.api.metrics import _Histogram

    counts = _Histogram((1, 2.5))
    for value in (0, 1, 1.01, 2.5, 3):
        counts.observe(value)
    samples = {s.labels.get("le", s.name): s.value for s in counts.metric("x", "Y.").samples}
    assert samples == {"1.0": 2, "2.5": 4, "+Inf": 5, "x_count": 5, "x_sum": pytest.approx(7.51)}


def test_over_http(model):
    with serving(model, "--context", "64") as server:
        body = b'{"prompt": "The", "max_tokens": 3, "ignore_eos": true}'
        asked = urllib.request.Request(
            f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            found = values(answer.read())
        assert found[f"mer_completion_tokens_total {model.name}"] == 3
        asked = urllib.request.Request(f"{server.url}/metrics", headers={"Accept": OPENMETRICS})
        with urllib.request.urlopen(asked) as answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
            assert {family.name for family in parse_openmetrics(answer.read().decode())} >= {"mer_requests"}


async def test_of_all_models_of_a_server():
    """Each has the label `model`; what is the process's is there once; of one that is not loaded, none."""
    models = Models([Model(name, model_path(), EngineConfig(context=64)) for name in ("one", "two", "three")])
    service = Service(ServerSettings(model_name="one"), models=models)
    with pytest.raises(ApiError, match="being loaded"):
        _ = service.metrics
    await models.open_first()
    for name, tokens in (("one", 3), ("two", 5)):
        async with models.use(models.find(name)) as engine:
            await engine.generate([5], SamplingParams(max_tokens=tokens, ignore_eos=True))
    text = service.metrics.render()[0]
    found = values(text)
    assert found["mer_completion_tokens_total one"] == 3
    assert found["mer_completion_tokens_total two"] == 5
    assert not any("three" in key for key in found)
    assert found["mer_ram_budget_bytes"] == models.ram
    assert found["mer_requests_refused_total queue_full"] == 0
    listed = set(re.findall(r"^\| `(mer_\w+)` \| \w+ \|", DOCS, re.MULTILINE))
    here = {family.name + "_total" * (family.type == "counter") for family in families(text).values()}
    assert here == listed
    strict = {
        family.name: family for family in parse_openmetrics(service.metrics.render(OPENMETRICS)[0].decode())
    }
    assert {sample.labels["model"] for sample in strict["mer_step_requests"].samples} == {"one", "two"}
    await models.reload(models.first)
    assert await models._unload_one(models.first)
    found = values(service.metrics.render()[0])
    assert found["mer_completion_tokens_total one"] == 3, "what was counted before a reload goes on"
    assert not any("two" in key for key in found)
    await models.close(drain=True)


async def test_what_is_live_and_watched_of_each_model():
    options = ("two=demo", "--context", 64, "--grpc-port", 0)
    with serving("demo", *options) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:

            async def live(model):
                answer = await client.get("/live", params={"model": model} if model else {})
                return answer.status_code, answer.json().get("name")

            assert await live(None) == await live("demo") == (200, "demo")
            assert await live("two") == (503, None), "watching loads nothing"
            assert await live("other") == (404, None)
            body = {"model": "two", "prompt": "Once", "max_tokens": 3}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            assert await live("two") == (200, "two")
            async with connected(server.grpc_port) as stub:
                seen = await stub.Watch(pb.WatchRequest(model="two")).read()
                assert (seen.name, seen.completion_tokens) == ("two", 3)
                assert (await stub.Watch(pb.WatchRequest()).read()).name == "demo"
                with pytest.raises(grpc.aio.AioRpcError, match="'other' is not served here"):
                    await stub.Watch(pb.WatchRequest(model="other")).read()
            address = f"127.0.0.1:{server.grpc_port}"
            done = await asyncio.to_thread(
                CliRunner().invoke, monitor, [address, "--model", "two", "-n", "1", "--interval", "0.1"]
            )
            assert done.exit_code == 0, done.output
