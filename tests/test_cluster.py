"""Engines whose experts are held by other processes: the bytes are those of one machine."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from engine_models import Logits, opened, prompt, write_text_model
from prometheus_client.parser import text_string_to_metric_families
from shards import LONG, MER, shard, with_peers

from mer import SamplingParams
from mer.api.grpc.convert import stats
from mer.api.metrics import Metrics
from mer.cluster import peers as module
from mer.demo import model_path

GREEDY = SamplingParams(temperature=0, max_tokens=10, logprobs=20, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=11, max_tokens=10, logprobs=20, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
PROMPTS = [prompt(n) for n in (70, 5, 33)]
CALLS = [(ids, params) for params in (GREEDY, DRAWN) for ids in PROMPTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("cluster") / "tiny")


@pytest.fixture(scope="module")
def expected(model):
    """What one machine answers, with all in memory."""

    async def ask():
        async with opened(model) as engine:
            return [await answer(engine, *call) for call in CALLS]

    return asyncio.run(ask())


async def answer(engine, ids, params):
    result = await engine.generate(ids, params)
    return result.token_ids, result.logprobs


async def all_at_once(engine):
    return await asyncio.gather(*(answer(engine, *call) for call in CALLS))


@pytest.fixture
def patient(monkeypatch):
    """However busy the machine, peers are waited for."""
    monkeypatch.setattr(module, "PATIENCE_NS", int(LONG * 1e9))


@pytest.mark.usefixtures("patient")
async def test_the_same_bytes_from_two_peers(model, expected, monkeypatch):
    logits = Logits(monkeypatch)
    async with opened(model) as engine:
        await engine.generate(PROMPTS[0], GREEDY)
        rows = logits.take(PROMPTS[0])
    with shard(model) as one, shard(model) as two:
        async with with_peers(model, one, two) as engine:
            assert await answer(engine, *CALLS[0]) == expected[0]
            assert logits.take(PROMPTS[0]) == rows
            assert [await answer(engine, *call) for call in CALLS] == expected
            assert await all_at_once(engine) == expected
            now = engine.snapshot()
            assert now.peer_hits > 100
            assert all(peer.asked >= peer.answers > 10 and peer.failures == 0 for peer in now.peers)
            check_reports(engine)
        async with with_peers(model, one, two, step_tokens=7) as engine:
            assert await all_at_once(engine) == expected
        assert one.end() == two.end() == 0


def check_reports(engine):
    """What metrics and GetStats say of peers is what the engine knows."""
    now = engine.snapshot()
    text = Metrics(engine, "tiny").render()[0].decode()
    found = {
        (sample.name, sample.labels.get("peer"), sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    told = stats(now, 1.0)
    assert (told.peer_hits, told.peer_late) == (now.peer_hits, now.peer_late)
    for peer, other in zip(now.peers, told.peers, strict=True):
        assert found["mer_peer_answer_seconds_count", peer.address, None] == peer.answers
        assert found["mer_peer_answer_seconds_bucket", peer.address, "+Inf"] == peer.answers
        assert found["mer_peer_answer_seconds_sum", peer.address, None] == pytest.approx(peer.answer_s)
        assert found["mer_peer_asked_total", peer.address, None] == peer.asked
        assert (other.address, other.held, other.answers) == (peer.address, peer.held, peer.answers)


async def test_the_example_of_the_docs():
    """Its commands, one after the other; the first goes on while the second is run."""
    page = (Path(__file__).parent.parent / "docs/cluster.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    serving, asking = (shlex.split(block)[1:] for block in blocks[:2])
    assert serving[:2] == ["shard", "MODEL"]
    assert serving[-2:] == ["--listen", asking[-1]]
    with shard(model_path(), *serving[2:-2]) as one:
        place = {"MODEL": "demo", asking[-1]: one.address}
        asking = [place.get(word, word) for word in asking]
        command = [*MER, *asking, "--temperature", "0", "-n", "20", "--ram", "1GiB"]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    assert re.search(r"peers +1 of 1 there", done.stderr), done.stderr
    async with opened(model_path()) as engine:
        result = await engine.generate(asking[2], SamplingParams(temperature=0, max_tokens=20))
    assert result.text.strip()
    assert result.text.strip() in done.stdout
