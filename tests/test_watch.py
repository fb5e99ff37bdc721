"""What is seen of an engine from outside: gRPC's Watch, pausing, pinning, and `mer monitor`."""

from __future__ import annotations

import asyncio
import json
import statistics

import attrs
import grpc
import numpy as np
import pytest
from click.testing import CliRunner, Result
from engine_models import GREEDY, check_idle, opened, prompt, write_text_model
from grpc_client import FOREVER, generate, pieces, refused, served, slowed, until
from http_server import serving

from mer import Engine, SamplingParams
from mer.api.grpc import service
from mer.cli.dashboard.panels import speed
from mer.cli.moments import Moment
from mer.cli.monitor import monitor
from mer.cli.remote import Remote, RemoteError
from mer.engine.view import Percentiles
from mer.errors import MerError, RequestError
from mer.v1 import inference_pb2 as pb

SECRET = "a very private question"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("watch") / "tiny", chat=True)


async def watched(call, condition, what) -> pb.WatchResponse:
    """The first answer for which `condition` holds."""
    for _ in range(3000):
        answer = await call.read()
        if condition(answer):
            return answer
    raise AssertionError(f"never: {what}")


async def test_requests_are_seen_and_their_texts_are_not(model):
    async with served(model, {}, cache_experts=4, max_running=1) as (stub, engine, _):
        watch = stub.Watch(pb.WatchRequest(interval=0.1))
        with slowed(0.05):
            first = stub.Generate(generate(SECRET, FOREVER))
            await first.read()
            second = stub.Generate(generate(prompt(30), FOREVER))
            await until(lambda: engine.snapshot().waiting == 1, "the second one waits")
            seen = await watched(watch, lambda now: len(now.requests) == 2, "both are there")
            one, other = seen.requests
            assert (one.state, other.state) == (pb.REQUEST_STATE_DECODE, pb.REQUEST_STATE_QUEUED)
            assert one.id < other.id
            assert one.age_s > other.age_s > 0
            assert one.prompt_tokens == len(engine.tokenizer.encode(SECRET))
            assert other.prompt_tokens == 30
            assert one.completion_tokens >= 1
            assert one.computed_tokens >= one.prompt_tokens
            assert SECRET.encode() not in seen.SerializeToString()
            assert seen.first_token.p99 >= seen.first_token.p50 >= 0.05
            first.cancel()
            seen = await watched(
                watch, lambda now: [each.id for each in now.requests] == [other.id], "the first one is gone"
            )
            second.cancel()
        await watched(watch, lambda now: not now.requests, "nobody is left")
        watch.cancel()


async def test_totals_are_those_of_the_answers(model):
    async with served(model, {}, cache_experts=4) as (stub, _, _):
        finals = [(await pieces(stub.Generate(generate(prompt(9, seed=n)))))[-1].final for n in range(3)]
        seen = await stub.Watch(pb.WatchRequest()).read()
        assert seen.name == "tiny"
        assert seen.completion_tokens == sum(final.usage.completion_tokens for final in finals) == 36
        assert (seen.first_token.count, seen.next_token.count) == (3, 33)
        assert seen.stats.steps == (await stub.GetStats(pb.GetStatsRequest())).steps
        assert seen.device.reads >= seen.stats.steps.misses > 0
        assert seen.device.read_s > 0
        assert seen.step_tokens >= seen.step_count > 0


async def test_the_map_is_the_cache(model):
    async with served(model, {}, cache_experts=4) as (stub, engine, _):
        await pieces(stub.Generate(generate(prompt(40))))
        # What was read ahead may still be on its way.
        cache = engine._runner.experts.cache
        await until(lambda: cache.stats()["loading"] == 0, "nothing is being read")
        engine.pin(1, 2)
        seen = (await stub.Watch(pb.WatchRequest()).read()).experts
        assert (seen.layers, seen.experts, list(seen.pinned)) == (2, 6, [8])
        heat = np.frombuffer(seen.heat, np.uint8)
        assert [each > 0 for each in heat] == [cache.state_py(e) == "resident" for e in range(12)]
        chances = cache.chances()
        for expert in np.flatnonzero(heat):
            assert abs(((heat[expert] - 1.0) / 254) ** 2 - min(chances[expert], 1)) < 0.005
        assert heat.max() > 1
        without = await stub.Watch(pb.WatchRequest(without_experts=True)).read()
        assert not without.HasField("experts")
        assert without.stats.resident == 4


async def test_what_watch_refuses(model, monkeypatch):
    async with served(model, {"api_keys": {"secret": "me"}}) as (stub, _, _):
        assert (await refused(stub.Watch(pb.WatchRequest()))).code is grpc.StatusCode.UNAUTHENTICATED
        key = (("x-api-key", "secret"),)
        for interval in (0.05, 61.0, float("nan")):
            error = await refused(stub.Watch(pb.WatchRequest(interval=interval), metadata=key))
            assert (error.reason, error.fields) == ("INVALID_REQUEST", ["interval"])
        monkeypatch.setattr(service, "_MOST_WATCHERS", 1)
        first = stub.Watch(pb.WatchRequest(), metadata=key)
        await first.read()
        assert (await refused(stub.Watch(pb.WatchRequest(), metadata=key))).reason == "QUEUE_FULL"
        first.cancel()


async def test_a_server_that_ends_waits_for_no_watcher(model):
    async with served(model, {}) as (stub, _, server):
        watch = stub.Watch(pb.WatchRequest(interval=60))
        await watch.read()
        await asyncio.wait_for(server.stop(3600), 60)
        with pytest.raises(grpc.aio.AioRpcError):
            await watch.read()
        assert await watch.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_pause_lets_nobody_new_begin(model):
    async with opened(model, max_running=2) as engine:
        expected = await engine.generate(prompt(5), GREEDY)
        with slowed(0.005):
            running = engine.stream(prompt(8), SamplingParams(max_tokens=40, ignore_eos=True))
            await anext(running)
            engine.pause()
            await until(lambda: engine.view().paused, "it is paused")
            new = asyncio.create_task(engine.generate(prompt(5), GREEDY))
            assert sum([len(piece.token_ids) async for piece in running]) == 39, "who has begun goes on"
        await until(
            lambda: [each.state for each in engine.view().requests] == ["queued"], "the new one waits"
        )
        assert not new.done()
        engine.resume()
        assert (await new).token_ids == expected.token_ids


async def test_a_pause_ends_with_the_engine(model):
    engine = await Engine.open(model, context=512)
    engine.pause()
    new = asyncio.create_task(engine.generate(prompt(5), GREEDY))
    await until(lambda: engine.view().requests, "it waits")
    await asyncio.wait_for(engine.close(), 60)
    assert len((await new).token_ids) == 12
    check_idle(engine)


async def test_what_is_pinned_stays(model):
    async with opened(model, cache_experts=4, prefetch=0) as engine:
        cache, seeds = engine._runner.experts.cache, range(4)
        expected = [(await engine.generate(prompt(20, seed=n), GREEDY)).token_ids for n in seeds]
        await until(lambda: cache.stats()["in_use"] == 0, "nothing is used")
        resident = [e for e in range(12) if cache.state_py(e) == "resident"]
        kept = resident[0]
        assert engine.pin(kept // 6, kept % 6) == 1
        before = cache.stats()["evictions"]
        for n in seeds:
            assert (await engine.generate(prompt(20, seed=n), GREEDY)).token_ids == expected[n]
            assert cache.state_py(kept) == "resident"
        assert cache.stats()["evictions"] > before + 12
        assert engine.pin(kept // 6, kept % 6, on=False) == 0
        assert engine.view().experts.pinned == ()


async def test_what_can_not_be_pinned(model):
    async with opened(model, cache_experts=4) as engine:
        for layer, expert, param in (
            (2, None, "layer"),
            (-1, 0, "layer"),
            (0, 6, "expert"),
            (0, None, "layer"),
        ):
            with pytest.raises(RequestError) as error:
                engine.pin(layer, expert)
            assert error.value.param == param
        engine.pin(0, 0)
        engine.pin(0, 1)
        with pytest.raises(RequestError, match="of the cache's 4 slots 2 can be"):
            engine.pin(1, 0)
        assert engine.pin(0, on=False) == 0
        assert engine.pin(1, 0) == 1
    async with opened(model) as engine:
        assert engine.pin(0) == 6, "all fit anyhow"


def test_percentiles():
    values = [0.001 * n**2 for n in range(1, 41)]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    found = Percentiles.of(values)
    assert (found.p50, found.p90, found.p99) == pytest.approx((cuts[49], cuts[89], cuts[98]))
    assert Percentiles.of([]).count == 0


def test_what_happened_between_two_answers():
    def answer(time, steps, **more):
        return pb.WatchResponse(time=time, stats=pb.GetStatsResponse(steps=steps, experts=12), **more)

    before = answer(
        100, pb.StepStats(step_s=1, expert_s=0.5, hits=10), completion_tokens=5, device=pb.Device(reads=7)
    )
    steps = pb.StepStats(step_s=2, expert_s=0.75, io_wait_s=0.5, hits=16, misses=2, bytes_read=4000)
    now = Moment.between(
        before, answer(102, steps, completion_tokens=25, device=pb.Device(reads=107, read_s=6))
    )
    assert (now.tokens_per_s, now.reads_per_s, now.read_bytes_per_s, now.queue_depth) == (10, 50, 2000, 3)
    assert (now.expert_hit_rate, now.prefix_hit_rate) == (0.75, None)
    assert attrs.astuple(now.time_share) == (0.125, 0.25, 0.125, 0.5)
    assert now.first_token.p50 is None
    assert (now.peers, now.peer_share) == ((), None)


def test_peers_between_two_answers():
    def answer(time, hits, *peers):
        return pb.WatchResponse(time=time, stats=pb.GetStatsResponse(peer_hits=hits, peers=peers))

    one = pb.Peer(address="a:1", condition="up", capacity=9, held=4, asked=10, answers=10, answer_s=1)
    later = pb.Peer(
        address="a:1", condition="up", capacity=9, held=8, asked=20, answers=18, answer_s=2, late=3
    )
    new = pb.Peer(address="b:1", condition="lost", asked=7, error="UNAVAILABLE: nobody is there")
    now = Moment.between(answer(100, 10, one), answer(102, 50, later, new))
    assert [peer.address for peer in now.peers] == ["a:1", "b:1"]
    first, second = now.peers
    assert (first.asked_per_s, first.late_per_s, first.answer_s, first.held) == (5, 1.5, 0.125, 8)
    assert (second.asked_per_s, second.answer_s) == (0, None)
    assert now.peer_share == 1
    told = "\n".join(str(line) for line in speed(now, [1.0], 60))
    assert "1 of 2 up, 8 experts, 100% computed" in told
    assert "b:1 lost UNAVAILABLE: nobody is there" in told


def run_monitor(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(monitor, list(map(str, arguments)), env=environment)


@pytest.mark.parametrize(
    "told",
    [
        "Received http2 header with status: 404",
        "Stream removed (Data frame with END_STREAM flag received)",
    ],
)
def test_what_grpc_makes_of_plain_http(told):
    nothing = grpc.aio.Metadata()
    with pytest.raises(RemoteError, match="that is no gRPC API"), Remote("here").explained():
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, nothing, nothing, told)


def test_monitor(model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("me secret\n")
    with serving(model, "--grpc-port", 0, "--api-key-file", keys) as server:
        address = f"127.0.0.1:{server.grpc_port}"
        done = run_monitor(address, "--json", "-n", 2, "--interval", 0.1, MER_API_KEY="secret")
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["model"] for line in lines] == ["tiny", "tiny"]
        assert lines[1]["time"] > lines[0]["time"]
        assert lines[0]["time_share"]["idle"] == 1
        assert lines[0]["requests"] == []
        header, line = run_monitor(
            address, "-n", 1, "--interval", 0.1, MER_API_KEY="secret"
        ).stdout.splitlines()
        assert len(header) == len(line)
        assert line.endswith("100%")
        done = run_monitor(f"http://{address}/", "--json", "-n", 1, MER_API_KEY="secret")
        assert json.loads(done.stdout)["model"] == "tiny"
        done = run_monitor(f"127.0.0.1:{server.port}")
        assert "that is no gRPC API" in str(done.exception)
        done = run_monitor(address, MER_API_KEY="wrong")
        assert isinstance(done.exception, MerError)
        assert "MER_API_KEY" in str(done.exception)
        assert done.stdout == ""
    assert "no server answers there" in str(run_monitor(address).exception)
