"""Shards on machines of their own, as far as the network can tell: links are slow, and are cut."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack, contextmanager
from functools import partial

import httpx
import pytest
import trustme
from engine_models import answers, prompt, write_text_model
from http_server import serving
from prometheus_client.parser import text_string_to_metric_families
from shards import LONG, Process, certificates, peers, shard, streams, until, with_peers

from bench.cgroups import MemoryGroup
from bench.links import Network, why_not
from mer import SamplingParams
from mer.api.metrics import Metrics
from mer.cluster import peers as of_all
from mer.cluster import session as of_one

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPTS = [prompt(n) for n in (40, 5)]
TOKEN = "0123456789abcdef0123"
RAM = 400 << 20
DELAY_S = 0.0005


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("links") / "tiny")


@pytest.fixture(scope="module")
def expected(model):
    return answers(model, PROMPTS, PARAMS)


@pytest.fixture(scope="module")
def network():
    with Network(2, delay_s=DELAY_S, bits_per_s=1e9) as made:
        yield made


@pytest.fixture(scope="module")
def secrets(tmp_path_factory, network):
    """A folder with the token, and certificates for each node, by its address, and for the engine."""
    folder, ca = tmp_path_factory.mktemp("secrets"), trustme.CA()
    (folder / "token").write_text(TOKEN)
    for name in ("engine", *(node.address for node in network.nodes)):
        certificates(folder / name, ca, name)
    return folder


@contextmanager
def shard_at(node, model, secrets, port=0):
    """On a node, with as much memory as it says it needs."""
    cert, key, ca = (str(secrets / node.address / part) for part in ("cert", "key", "ca"))
    options = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", ca]
    options += ["--token-file", str(secrets / "token"), "--ram", f"{RAM >> 20}MiB"]
    with MemoryGroup(RAM) as group:

        def popen(command, **given):
            return node.popen(command, join=group.join, **given)

        with shard(model, *options, host=node.address, port=port, popen=popen) as made:
            yield made


@pytest.fixture(scope="module")
def nodes(network, model, secrets):
    with ExitStack() as stack:
        yield [stack.enter_context(shard_at(node, model, secrets)) for node in network.nodes]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Who is lost is tried again soon."""
    monkeypatch.setattr(of_one, "LAST_DELAY", 0.5)


def asking(model, secrets, *shards: Process, **settings):
    files = {f"peer_{part}": secrets / "engine" / part for part in ("cert", "key", "ca")}
    return with_peers(model, *shards, peer_token=secrets / "token", **files, **settings)


def metric(engine, name: str, peer: Process | None = None) -> float:
    """What Prometheus would be told."""
    labels = {} if peer is None else {"peer": peer.address}
    text = Metrics(engine, "tiny").render()[0].decode()
    samples = (each for family in text_string_to_metric_families(text) for each in family.samples)
    return next(each.value for each in samples if each.name == name and each.labels == labels)


async def again(engine):
    return await streams(engine, PROMPTS, PARAMS, 10, lambda: None)


@pytest.fixture(params=[(0.0001, 25e9), (0.0005, 1e9), (0.005, 1e9)], ids=["near", "usual", "far"])
def delay_s(request, network):
    """Of one way; all links are so."""
    delay, rate = request.param
    for node in network.nodes:
        network.shape(node, delay_s=delay, bits_per_s=rate)
    yield delay
    for node in network.nodes:
        network.shape(node, delay_s=DELAY_S, bits_per_s=1e9)


async def test_the_same_bytes_over_a_link(model, expected, network, secrets, nodes, delay_s, monkeypatch):
    monkeypatch.setattr(of_all, "PATIENCE_NS", int(LONG * 1e9))
    assert network.round_trip(network.nodes[0]) >= 2 * delay_s
    async with asking(model, secrets, *nodes) as engine:
        assert await again(engine) == expected
        assert engine.snapshot().peer_hits > 40
        for each in nodes:
            assert metric(engine, "mer_peer_up", each) == 1
            assert metric(engine, "mer_peer_answers_total", each) > 10
            assert metric(engine, "mer_peer_failures_total", each) == 0
            assert metric(engine, "mer_peer_late_answers_total", each) == 0


def test_a_server_that_is_a_node_as_well(model, network, secrets, nodes):
    """With a control group of its own, of as much memory as it says it needs."""
    body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0, "ignore_eos": True}

    def ask(server):
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=LONG)
        return answer.json()["choices"][0]["text"]

    with serving(model) as alone:
        text = ask(alone)
    options = ["--ram", f"{RAM >> 20}MiB", "--cache-experts", "25%", "--peer-token", secrets / "token"]
    options += [word for each in nodes for word in ("--peer", each.address)]
    for part in ("cert", "key", "ca"):
        options += [f"--peer-{part}", secrets / "engine" / part]
    with MemoryGroup(RAM) as group, serving(model, *options, join=group.join) as server:
        end, answered = time.monotonic() + LONG, set()
        while len(answered) < len(nodes):
            assert time.monotonic() < end
            assert ask(server) == text
            metrics = httpx.get(f"{server.url}/metrics", timeout=LONG).text
            answered = set(re.findall(r'^mer_peer_answers_total{.*peer="(.+)"} [1-9]', metrics, re.M))
        assert answered == {each.address for each in nodes}
        assert str(server.process.pid) in (group.path / "cgroup.procs").read_text().split()


async def test_cut_for_long(model, expected, network, secrets, nodes, monkeypatch):
    """The other one goes on; whose cable is cut is given up, and is there again with it."""
    monkeypatch.setattr(of_one, "LOST", 0.5)
    one, two = nodes
    async with asking(model, secrets, one, two) as engine:

        def cut():
            network.shape(network.nodes[0], up=False)

        try:
            assert await streams(engine, PROMPTS, PARAMS, 10, cut) == expected
            await until(lambda: "no answer for" in peers(engine)[0].error, "it is given up")
            assert metric(engine, "mer_peer_up", one) == metric(engine, "mer_peer_experts", one) == 0
            assert metric(engine, "mer_peer_failures_total", one) >= 1
            assert metric(engine, "mer_peer_up", two) == 1
            assert await again(engine) == expected
        finally:
            network.shape(network.nodes[0], up=True)
        await until(lambda: peers(engine)[0].held, "it is there again")
        assert metric(engine, "mer_peer_up", one) == 1
        assert metric(engine, "mer_peer_failures_total", two) == 0
        assert await again(engine) == expected


async def test_cut_for_a_moment(model, expected, network, secrets, nodes, monkeypatch):
    """Answers that come after all are those of a layer that is over, and the stream goes on."""
    monkeypatch.setattr(of_one, "LOST", LONG)
    link = network.nodes[0]
    async with asking(model, secrets, nodes[0]) as engine:
        try:
            shape = partial(network.shape, link, up=False)
            assert await streams(engine, PROMPTS, PARAMS, 10, shape) == expected
        finally:
            network.shape(link, up=True)
        await until(lambda: peers(engine)[0].condition == "up", "the stream goes on")
        assert await again(engine) == expected
        assert metric(engine, "mer_peer_failures_total", nodes[0]) == 0


async def test_slowed(model, expected, network, secrets, nodes, monkeypatch):
    """What it is asked comes late, and is read; then it is not asked, but to see whether it still is."""
    monkeypatch.setattr(of_one, "PROBE", 0.05)
    monkeypatch.setattr(of_all, "PATIENCE_NS", 80_000_000)  # of it a quarter is soon enough for any drive
    shape = partial(network.shape, network.nodes[0])
    async with asking(model, secrets, nodes[0]) as engine:
        try:
            assert await streams(engine, PROMPTS, PARAMS, 10, partial(shape, delay_s=0.05)) == expected
            await until(lambda: metric(engine, "mer_peer_late_answers_total", nodes[0]) > 0, "late")
            assert metric(engine, "mer_peer_late_experts_total") > 0
            end = time.monotonic() + LONG
            while not metric(engine, "mer_peer_skipped_experts_total"):
                assert time.monotonic() < end
                assert await again(engine) == expected
        finally:
            shape(delay_s=DELAY_S)
        before = metric(engine, "mer_peer_hits_total")
        while metric(engine, "mer_peer_hits_total") == before:
            assert time.monotonic() < end
            assert await again(engine) == expected
        assert metric(engine, "mer_peer_failures_total", nodes[0]) == 0


async def test_killed_and_another_model_in_its_place(
    model, expected, network, secrets, nodes, tmp_path, monkeypatch
):
    monkeypatch.setattr(of_all, "PATIENCE_NS", int(LONG * 1e9))
    other = write_text_model(tmp_path / "other", initializer_range=0.03)
    with shard_at(network.nodes[1], model, secrets) as leaving:
        async with asking(model, secrets, nodes[0], leaving) as engine:
            assert await streams(engine, PROMPTS, PARAMS, 10, leaving.kill) == expected
            await until(lambda: peers(engine)[1].condition == "lost", "it is known")
            with shard_at(network.nodes[1], other, secrets, port=leaving.port):
                assert await again(engine) == expected
                await until(lambda: "another model" in peers(engine)[1].error, "it is refused")
                assert await again(engine) == expected
            assert metric(engine, "mer_peer_up", leaving) == metric(engine, "mer_peer_experts", leaving) == 0
            assert metric(engine, "mer_peer_failures_total", leaving) >= 2
            assert metric(engine, "mer_peer_answers_total", nodes[0]) > 0
