"""A chunk reads an expert at most once, and who waits for a read lets the processor go."""

from __future__ import annotations

import errno
import json
import time
from collections import Counter

import pytest
from engine_models import opened, prompt
from moe_model import KERNELS, Model, Streamed, open_reader
from oracle.make_checkpoints import make

from mer import SamplingParams
from mer.weights import formats

TOP_K, CHUNK, CHUNKS = 3, 24, 4
LATE = 0.8  # seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three layers of eight experts."""
    path = tmp_path_factory.mktemp("reads") / "model"
    make(path, "qwen3_moe", num_hidden_layers=3, num_experts_per_tok=TOP_K)
    return path


def reads_by_chunk(events) -> list[Counter]:
    """Of each step, how often it began to read an expert: (layer, expert)."""
    steps = [(e["ts"], e["ts"] + e["dur"], Counter()) for e in events if e["name"] == "step"]
    for event in events:
        if event.get("cat") == "reads" and event["ph"] == "b":
            (found,) = (count for start, end, count in steps if start <= event["ts"] <= end)
            found[event["args"]["layer"], event["args"]["expert"]] += 1
    return [count for _, _, count in steps]


@pytest.mark.parametrize("policy", ["next-use", "lru"])
@pytest.mark.parametrize("prefetch", [0, 8])
@pytest.mark.parametrize("slots", [TOP_K, 5, 12])
async def test_a_chunk_reads_an_expert_once(model, tmp_path, slots, prefetch, policy):
    settings = {"cache_experts": slots, "prefetch": prefetch, "cache_policy": policy, "step_tokens": CHUNK}
    file = tmp_path / "profile.json"
    async with opened(model, **settings, speculate="off", profile=file) as engine:
        await engine.generate(prompt(CHUNK * CHUNKS), SamplingParams(temperature=0, max_tokens=1))
    events = json.loads(file.read_text())["traceEvents"]
    chunks = reads_by_chunk(events)[:CHUNKS]
    assert [e["args"]["tokens"] for e in events if e["name"] == "step"][:CHUNKS] == [CHUNK] * CHUNKS
    for found in chunks:
        assert max(found.values()) == 1, found
        # 24 tokens of three choices want more experts of each layer than there is room for
        assert sum(found.values()) > slots


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """One layer of experts."""
    return Model(tmp_path_factory.mktemp("waiting"), [(formats.Q8_0, formats.Q8_0, 96, 160)])


@pytest.mark.parametrize("backend", ["uring", "preadv", "buffered"])
def test_waiting_for_a_read_takes_no_processor(layer, backend):
    inputs = layer.inputs(0, 3)
    expected = layer.exact(KERNELS, 0, *inputs).tobytes()
    spent = []
    while len(spent) < 3 and min(spent, default=LATE) > LATE / 10:  # what an earlier test left may take some
        with open_reader(layer, backend) as reader:
            streamed = Streamed(layer, reader=reader)
            for file in range(2):  # the first read of each comes late
                reader.set_fault(file, 0, 1 << 40, error=errno.EINTR, late=LATE)
            began, used = time.monotonic(), time.process_time()
            out = streamed.forward(0, *inputs)
            spent.append(time.process_time() - used)
            assert time.monotonic() - began >= LATE
            assert reader.stats()["retries"] >= 1
        assert out.tobytes() == expected
    # Of the whole process, its threads included: a millisecond or two. A loop would take all that it can get.
    assert min(spent) < LATE / 10
