"""`mer cluster` on a Ray of this machine: two shards, two engines, and what happens when they are killed.

What of it needs no Ray is in test_cluster_cli.py, test_affinity.py and test_grpc_session.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from engine_models import opened, write_text_model
from own_ray import LONG, Cluster, own_ray, quiet_port, run

from mer import SamplingParams
from mer.v1 import inference_pb2 as pb
from mer.v1 import inference_pb2_grpc as rpc

ray = pytest.importorskip("ray", reason="Ray is not among what the tests install (docs/ray.md): it is large")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Ray's processes are looked at in /proc")

NOTHING = {"nodes": 1, "shards": [], "status": "", "engines": []}
MESSAGES = [{"role": "user", "content": "Tell me of the sea. " * 40}]
TEXT = "Once upon a time"
GREEDY = pb.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
FOREVER = pb.SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """A test that stalls says where, instead of holding up all others."""

    def over(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"not over after {2 * LONG:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(int(2 * LONG))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("ray") / "tiny", chat=True, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def empty() -> Iterator[Cluster]:
    """Nothing is up yet."""
    with own_ray() as made:
        yield made


@pytest.fixture
def lone() -> Iterator[Cluster]:
    """As `empty`, for a test that ends what it starts: the process behind `state` knows one Serve alone."""
    with own_ray() as made:
        yield made


@pytest.fixture(scope="module")
def cluster(empty, model) -> Iterator[Cluster]:
    http, rpcs = (address.rpartition(":")[2] for address in (empty.http, empty.grpc))
    done = empty.run(
        "up", model, "--shards", 2, "--shard-port", 0, "--ram", "1GiB", "--replicas", 2,
        "--cache-experts", 4, "--served-model-name", "tiny", "--port", http, "--grpc-port", rpcs,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"tiny is served at {empty.http}/v1, gRPC on port {rpcs}" in done.stderr
    empty.until(settled, "both engines use both shards")
    yield empty
    assert empty.run("down").returncode == 0
    assert json.loads(empty.run("status", "--json").stdout.splitlines()[-1]) == NOTHING


def settled(state: dict[str, Any]) -> bool:
    shards, engines = state["shards"], state["engines"]
    return (
        state["status"] == "RUNNING"
        and len(engines) == 2
        and all(each.get("held") for each in shards)
        and all(each["peers"] == 2 for each in engines)
    )


def idle(state: dict[str, Any]) -> bool:
    return not any(each["running"] or each["waiting"] for each in state["engines"])


async def until(cluster: Cluster, condition, what: str) -> dict[str, Any]:
    return await asyncio.to_thread(cluster.until, condition, what)


def client(cluster: Cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0, timeout=LONG)


async def ask(cluster: Cluster, tokens: int = 30) -> str:
    answer = await client(cluster).chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].message.content or ""


async def fetch(url: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=LONG) as session:
        return await session.get(url)


async def expected(model: Path, tokens: int) -> str:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    async with opened(model, context=4096) as engine:
        return (await engine.generate(engine.chat_prompt(MESSAGES), params)).text


async def expected_text(model: Path) -> str:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    async with opened(model, context=4096) as engine:
        return (await engine.generate(TEXT, params)).text


@pytest.fixture
async def stub(cluster) -> AsyncIterator[rpc.InferenceAsyncStub]:
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        yield rpc.InferenceStub(channel)


def test_no_ray_answers():
    port = quiet_port()
    done = run("status", "--ray", f"127.0.0.1:{port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no Ray answers at '127.0.0.1:{port}'" in done.stderr


async def test_an_engine_is_added_where_requests_wait(lone, model):
    """One that computes a request at a time, and always has four."""
    http, rpcs = (address.rpartition(":")[2] for address in (lone.http, lone.grpc))
    done = await asyncio.to_thread(
        lone.run, "up", model, "--ram", "1GiB", "--replicas", 1, "--max-replicas", 2,
        "--queue-seconds", 0.001, "--max-running", 1, "--served-model-name", "tiny",
        "--port", http, "--grpc-port", rpcs,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    async def asking() -> None:
        while True:
            await ask(lone, 200)

    assert len((await asyncio.to_thread(lone.state))["engines"]) == 1
    tasks = [asyncio.create_task(asking()) for _ in range(4)]
    try:
        await until(lone, lambda state: len(state["engines"]) == 2, "there is another one")
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert (await asyncio.to_thread(lone.run, "down")).returncode == 0
    assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended


def test_what_can_not_be_opened(empty, model):
    """Nothing of it is left."""
    done = empty.run(
        "up",
        model,
        "--shards",
        1,
        "--shard-ram",
        "1GiB",
        "--ram",
        "20MiB",
        "--port",
        quiet_port(),
        "--no-grpc",
    )
    assert done.returncode == 1  # stdout may have words of Ray's own
    assert "engines could not be started:" in done.stderr
    assert "ram 20 MiB is too little" in done.stderr
    assert empty.state() == NOTHING


def test_a_port_that_is_taken(empty, model):
    """Nothing is started."""
    port = quiet_port()
    with socket.create_server(("127.0.0.1", port)):
        done = empty.run(
            "up", model, "--shards", 1, "--ram", "1GiB", "--port", quiet_port(), "--grpc-port", port
        )
    assert done.returncode == 1
    assert f"port {port} of the node" in done.stderr
    assert "(Address already in use); --grpc-port names another one" in done.stderr
    assert empty.state() == NOTHING


async def test_one_address(cluster, model):
    want = await expected(model, 30)
    assert await ask(cluster) == want
    assert [await ask(cluster) for _ in range(4)] == [want] * 4
    stream = await client(cluster).chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=30,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert "".join([each.choices[0].delta.content or "" async for each in stream]) == want
    with pytest.raises(openai.NotFoundError, match="the model 'other' is not served here"):
        await client(cluster).completions.create(model="other", prompt="x")
    assert (await fetch(f"{cluster.http}/ready")).status_code == 200
    state = await asyncio.to_thread(cluster.state)
    assert [each["address"].partition(":")[0] for each in state["shards"]] == ["127.0.0.1"] * 2
    for each in state["engines"]:
        assert "mer_requests_ended_total" in (await fetch(f"{each['url']}/metrics")).text
        async with grpc.aio.insecure_channel(each["address"]) as channel:  # as `mer top` does
            calls = rpc.InferenceStub(channel).Watch(pb.WatchRequest())
            assert [peer.held > 0 for peer in (await anext(aiter(calls))).stats.peers] == [True] * 2
    # The same beginning went to the same engine, which knew it already.
    assert sorted(each["prefix_hit_tokens"] > 100 for each in state["engines"]) == [False, True]
    assert await asyncio.gather(*(ask(cluster) for _ in range(8))) == [want] * 8
    again = await asyncio.to_thread(cluster.run, "up", model, "--ram", "1GiB")
    assert "the cluster is up already" in again.stderr


async def test_what_rays_dashboard_is_told(cluster):
    """Of two shards and two engines, some seconds after it is so."""
    names = "shard_held", "shard_capacity", "running", "waiting", "queue_seconds", "peers"
    url = await asyncio.to_thread(cluster.metrics)
    state = await until(cluster, lambda state: settled(state) and idle(state), "nothing is asked any more")
    want = {
        f"shard_{name}": sorted(float(each[name]) for each in state["shards"])
        for name in ("held", "capacity")
    }
    want |= {"peers": [2.0] * 2, "running": [0.0] * 2, "waiting": [0.0] * 2}
    end = time.monotonic() + LONG
    while True:
        text = (await fetch(url)).text
        lines = {name: re.findall(rf"^ray_mer_{name}\{{.*\}} (\S+)$", text, re.MULTILINE) for name in names}
        found = {name: sorted(map(float, values)) for name, values in lines.items()}
        if len(found["queue_seconds"]) == 2 and {name: found[name] for name in want} == want:
            return
        assert time.monotonic() < end, (found, want)
        await asyncio.sleep(0.5)


async def test_grpc(cluster, model, stub):
    want = await expected_text(model)
    call = stub.Generate(pb.GenerateRequest(text=TEXT, params=GREEDY), timeout=LONG)
    assert "".join([each.text async for each in call]) == want
    assert (await stub.GetModel(pb.GetModelRequest(), timeout=LONG)).name == "tiny"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Embed(pb.EmbedRequest(text="x", model="other"), timeout=LONG)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_session(cluster, model, stub):
    """Its requests are answered side by side, one is refused, one is cancelled; its id is free again."""
    want = await expected_text(model)
    session = stub.Session(timeout=LONG)

    async def begin(id: str, params: pb.SamplingParams) -> None:
        request = pb.GenerateRequest(text=TEXT, params=params)
        await session.write(pb.SessionRequest(id=id, generate=request))

    for id, params in {"a": GREEDY, "b": GREEDY, "bad": pb.SamplingParams(top_p=2), "long": FOREVER}.items():
        await begin(id, params)
    texts: dict[str, str] = {}
    errors: dict[str, pb.Error] = {}
    left = ended = False
    async for response in session:
        id = response.id
        texts[id] = texts.get(id, "") + response.generate.text
        if response.HasField("error"):
            errors[id] = response.error
        if id != "long" or ended:
            continue
        if response.HasField("error"):
            ended, texts[id] = True, ""
            await begin(id, GREEDY)
            await session.done_writing()
        elif response.generate.HasField("final"):  # it was over before it could be cancelled
            left = False
            await begin(id, FOREVER)
        elif not left:
            left = True
            await session.write(pb.SessionRequest(id=id, cancel=pb.Cancel()))
    assert (texts["a"], texts["b"], texts["long"]) == (want, want, want)
    assert {id: (error.reason, error.field) for id, error in errors.items()} == {
        "bad": ("INVALID_REQUEST", "params.top_p"),
        "long": ("CANCELLED", ""),
    }
    await until(cluster, idle, "the cancelled request is gone from its engine")


async def cancelled(cluster: Cluster) -> float:
    """Requests that both engines were told to cancel, once nothing runs."""
    state = await until(cluster, idle, "nothing runs")
    told = [(await fetch(f"{each['url']}/metrics")).text for each in state["engines"]]
    pattern = re.compile(r'^mer_requests_ended_total\S*reason="cancelled"\S* (\S+)$', re.MULTILINE)
    return sum(float(count) for text in told for count in pattern.findall(text))


async def leave_completions(cluster: Cluster) -> None:
    stream = await client(cluster).completions.create(
        model="tiny", prompt="Once", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()


async def leave_session(cluster: Cluster) -> None:
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        session = rpc.InferenceStub(channel).Session(timeout=LONG)
        request = pb.GenerateRequest(text=TEXT, params=FOREVER)
        await session.write(pb.SessionRequest(id="a", generate=request))
        async for _ in session:
            break
        session.cancel()


@pytest.mark.parametrize("leave", [leave_completions, leave_session])
async def test_a_client_who_leaves_ends_its_request(cluster, leave):
    for _ in range(20):  # a request may be over before it is noticed that nobody wants it
        before = await cancelled(cluster)
        await leave(cluster)
        if await cancelled(cluster) > before:
            return
    raise AssertionError("never cancelled")


async def test_a_shard_is_killed(cluster, model):
    want = await expected(model, 150)
    before = await until(cluster, settled, "both are there")
    asking = asyncio.create_task(ask(cluster, 150))
    os.kill(before["shards"][0]["pid"], signal.SIGKILL)
    assert await asking == want

    def again(state: dict[str, Any]) -> bool:
        return settled(state) and state["shards"][0]["pid"] != before["shards"][0]["pid"]

    after = await until(cluster, again, "it is there again")
    assert after["shards"][1]["pid"] == before["shards"][1]["pid"]
    assert await ask(cluster, 150) == want


async def test_an_engine_is_killed(cluster, model):
    """What it was asked is answered by the other one, unless it had begun to answer."""
    want = await expected(model, 150)
    before = await until(cluster, settled, "both are there")
    pids = {each["pid"] for each in before["engines"]}
    asking = [asyncio.create_task(ask(cluster, 150)) for _ in range(8)]
    await asyncio.sleep(0.05)
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    assert await asyncio.gather(*asking) == [want] * 8

    def again(state: dict[str, Any]) -> bool:
        return settled(state) and victim not in {each["pid"] for each in state["engines"]}

    await until(cluster, again, "there are two again")
    assert await ask(cluster, 150) == want
