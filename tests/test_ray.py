"""`mer cluster` on a Ray of this machine: two shards, two engines, and what happens when they are killed.

Ray takes minutes to start on a small machine, so it is not among what the tests install: this is run where it
is there (pip install 'mer[ray]'). What of it needs no Ray is in test_cluster_cli.py and test_affinity.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from attrs import frozen
from engine_models import opened, write_text_model

from mer import SamplingParams
from mer.v1 import inference_pb2 as pb
from mer.v1 import inference_pb2_grpc as rpc

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Ray's processes are looked at in /proc")

MER = [sys.executable, "-c", "from mer.cli.main import main; main()", "cluster"]
# A generous limit of whatever is waited for, in seconds.
LONG = 300.0
NOTHING = {"nodes": 1, "shards": [], "status": "", "engines": []}
MESSAGES = [{"role": "user", "content": "Tell me of the sea. " * 40}]


@frozen
class Cluster:
    """Where it is: of Ray, of the HTTP API, of the gRPC API."""

    ray: str
    http: str
    grpc: str

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*MER, *map(str, arguments), "--ray", self.ray]
        return subprocess.run(command, capture_output=True, text=True, timeout=LONG)

    def state(self) -> dict[str, Any]:
        """{} while Ray has no answer."""
        done = self.run("status", "--json")
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        end = time.monotonic() + LONG
        while True:
            state = self.state()
            if state and condition(state):
                return state
            assert time.monotonic() < end, f"{what}: {state}"
            time.sleep(1)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("ray") / "tiny", chat=True, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def cluster_of_ray() -> Iterator[Cluster]:
    """Nothing is up yet."""
    own, http, rpcs, *others = free_ports(7)
    names = "node-manager", "object-manager", "ray-client-server", "dashboard-agent-listen"
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={own}",
        "--num-cpus=8", f"--memory={8 << 30}", f"--object-store-memory={128 << 20}",
        "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats",
        *(f"--{name}-port={port}" for name, port in zip(names, others, strict=True)),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    made = Cluster(f"127.0.0.1:{own}", f"http://127.0.0.1:{http}", f"127.0.0.1:{rpcs}")
    try:
        made.until(lambda _: True, "Ray answers")
        yield made
    finally:
        process.terminate()
        process.wait(LONG)


@pytest.fixture(scope="module")
def cluster(cluster_of_ray, model) -> Iterator[Cluster]:
    made = cluster_of_ray
    http, rpcs = (address.rpartition(":")[2] for address in (made.http, made.grpc))
    done = made.run(
        "up", model, "--shards", 2, "--shard-port", 0, "--ram", "1GiB", "--replicas", 2,
        "--cache-experts", 4, "--served-model-name", "tiny", "--port", http, "--grpc-port", rpcs,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"tiny is served at {made.http}/v1, gRPC on port {rpcs}" in done.stderr
    made.until(settled, "both engines use both shards")
    yield made
    assert made.run("down").returncode == 0
    assert made.run("down").stderr.strip() == "nothing was up"
    assert made.state() == NOTHING


def settled(state: dict[str, Any]) -> bool:
    shards, engines = state["shards"], state["engines"]
    return (
        state["status"] == "RUNNING"
        and len(engines) == 2
        and all(each.get("held") for each in shards)
        and all(each["peers"] == 2 for each in engines)
    )


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


def test_no_ray_answers():
    (port,) = free_ports(1)
    done = Cluster(f"127.0.0.1:{port}", "", "").run("status")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no Ray answers at '127.0.0.1:{port}'" in done.stderr


def test_what_can_not_be_opened(cluster_of_ray, model):
    """Nothing of it is left."""
    for options, words in (
        (("nowhere", "--shards", 1, "--ram", "1GiB"), "nowhere does not exist"),
        ((model, "--ram", "20MiB"), "ram 20 MiB is too little"),
    ):
        done = cluster_of_ray.run("up", *options, "--port", free_ports(1)[0], "--no-grpc")
        assert done.returncode == 1
        assert words in done.stderr
        assert cluster_of_ray.state() == NOTHING


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
    # The same beginning went to the same engine, which knew it already.
    assert sorted(each["prefix_hit_tokens"] > 100 for each in state["engines"]) == [False, True]
    assert await asyncio.gather(*(ask(cluster) for _ in range(8))) == [want] * 8
    assert (
        "the cluster is up already"
        in (await asyncio.to_thread(cluster.run, "up", model, "--ram", "1GiB")).stderr
    )


async def test_grpc(cluster, model):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    async with opened(model, context=4096) as engine:
        want = (await engine.generate("Once upon a time", params)).text
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        stub = rpc.InferenceStub(channel)
        asked = pb.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        call = stub.Generate(pb.GenerateRequest(text="Once upon a time", params=asked))
        assert "".join([each.text async for each in call]) == want
        assert (await stub.GetModel(pb.GetModelRequest())).name == "tiny"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Embed(pb.EmbedRequest(text="x", model="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [each async for each in stub.Session(iter([pb.SessionRequest()]))]
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_client_who_leaves_ends_its_request(cluster):
    stream = await client(cluster).completions.create(
        model="tiny", prompt="Once", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()

    def idle(state: dict[str, Any]) -> bool:
        return not any(each["running"] or each["waiting"] for each in state["engines"])

    state = await asyncio.to_thread(cluster.until, idle, "nothing runs")
    told = [(await fetch(f"{each['url']}/metrics")).text for each in state["engines"]]
    assert any(
        re.search(r'^mer_requests_ended_total.*reason="cancelled".* 1\.0$', text, re.MULTILINE)
        for text in told
    )


async def test_a_shard_is_killed(cluster, model):
    want = await expected(model, 150)
    before = await asyncio.to_thread(cluster.until, settled, "both are there")
    asking = asyncio.create_task(ask(cluster, 150))
    os.kill(before["shards"][0]["pid"], signal.SIGKILL)
    assert await asking == want

    def again(state: dict[str, Any]) -> bool:
        return settled(state) and state["shards"][0]["pid"] != before["shards"][0]["pid"]

    after = await asyncio.to_thread(cluster.until, again, "it is there again")
    assert after["shards"][1]["pid"] == before["shards"][1]["pid"]
    assert await ask(cluster, 150) == want


async def test_an_engine_is_killed(cluster, model):
    """What it was asked is answered by the other one, unless it had begun to answer."""
    want = await expected(model, 150)
    before = await asyncio.to_thread(cluster.until, settled, "both are there")
    pids = {each["pid"] for each in before["engines"]}
    asking = [asyncio.create_task(ask(cluster, 150)) for _ in range(8)]
    await asyncio.sleep(0.05)
    victim = min(pids)
    os.kill(victim, signal.SIGKILL)
    assert await asyncio.gather(*asking) == [want] * 8

    def again(state: dict[str, Any]) -> bool:
        return settled(state) and victim not in {each["pid"] for each in state["engines"]}

    await asyncio.to_thread(cluster.until, again, "there are two again")
    assert await ask(cluster, 150) == want
