"""What goes into a routed expert and comes out, rounded: the same bytes wherever it is computed."""

from __future__ import annotations

import asyncio
import time
from math import inf

import numpy as np
import pytest
import torch
from engine_models import opened, prompt, write_text_model
from moe_model import MAX_TOKENS, Model, Streamed
from shards import LONG, here, peers, with_peers
from simulated_cluster import RIGHT, Context, Memory
from transformers import AutoModelForCausalLM

from bench.rounding import scores
from mer import SamplingParams
from mer._ext.mixture import narrow, rounding_bytes, widen
from mer._ext.remote import Ask
from mer.cluster import peers as module
from mer.cluster.server import Service
from mer.cluster.session import Session
from mer.cluster.shard import LateError
from mer.cluster.wire import make_rows, outputs_checksum
from mer.v1 import expert_pb2 as pb
from mer.weights import formats

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}
GREEDY = SamplingParams(temperature=0, max_tokens=10, logprobs=20, ignore_eos=True)
PROMPTS = [prompt(n) for n in (70, 5, 33)]


@pytest.mark.parametrize("wire", TORCH)
def test_rounding_is_torchs(wire):
    """Of numbers of every size, ties, what is too large or too small, and what is none."""
    fmt, rng = formats.by_name(wire).id, np.random.default_rng(5)
    bits = rng.integers(0, 1 << 32, 40_000, np.uint32)
    ties = (rng.integers(0, 1 << 16, 4000, np.uint32) << 16) | 0x8000
    halves = np.arange(0, 1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    middles = (halves[:-1].astype(np.float64) + halves[1:]) / 2  # of F16's: ties again, subnormals included
    edges = [65504, 65519.99, 65520, 65536, 3.3895314e38, 3.4e38, inf, -inf, np.nan, 0, -0.0, 1e-45, 2**-25]
    numbers = np.concatenate(
        [bits.view(np.float32), ties.view(np.float32), middles.astype(np.float32), np.float32(edges)]
    )
    for count in (len(numbers), 1, 7, 8, 13):
        rows = np.ascontiguousarray(numbers[-count:][None])
        made = np.frombuffer(narrow(fmt, rows), np.int16)
        right = torch.from_numpy(rows).to(TORCH[wire])
        numeric = ~np.isnan(rows[0])
        assert (made[numeric] == right.view(torch.int16).numpy()[0][numeric]).all()
        back = widen(fmt, made.tobytes(), count)
        assert np.array_equal(back, right.float().numpy(), equal_nan=True)
        assert narrow(fmt, back) == made.tobytes(), "rounding twice is rounding once"


def test_rows_that_can_not_be_rounded():
    x = np.ones((2, 32), np.float32)
    assert widen(0, narrow(0, x), 32).tobytes() == x.tobytes()
    with pytest.raises(ValueError, match="format 8"):
        narrow(formats.Q8_0.id, x)
    with pytest.raises(ValueError, match="no rows of 32"):
        widen(formats.F16.id, bytes(63), 32)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    form = formats.by_name("q4_0")
    return Model(tmp_path_factory.mktemp("rounded"), [(form, form, 64, 96), (form, form, 96, 32)])


@pytest.mark.parametrize("wire", TORCH)
@pytest.mark.parametrize("slots", [1, None])
def test_a_streamer_rounds_what_goes_in_and_comes_out(mixture, wire, slots, monkeypatch):
    monkeypatch.setattr(mixture, "wire", wire)
    made = Streamed(mixture, slots)
    for tokens in (1, 7, MAX_TOKENS):
        for layer in (0, 1):
            made.check(layer, tokens)
    monkeypatch.setattr(mixture, "wire", "f32")
    with pytest.raises(AssertionError):
        made.check(0, 7)
    made.streamer.mixture.round_to(formats.F32.id)
    made.check(0, 7)
    rounding = rounding_bytes(mixture.tables.layers, MAX_TOKENS)
    assert rounding == MAX_TOKENS * 96 * 4
    assert made.streamer.mixture.scratch_bytes == Streamed(mixture).streamer.mixture.scratch_bytes + rounding
    with pytest.raises(ValueError, match="format 8"):
        made.streamer.mixture.round_to(formats.Q8_0.id)


def test_what_is_too_large_for_f16_is_seen(mixture):
    """It is infinite, and no answer comes of that; bf16 has the range."""
    made = Streamed(mixture)
    x, ids, weights = mixture.inputs(0, 2)
    x[1, 5] = 70_000
    made.streamer.mixture.round_to(formats.BF16.id)
    assert np.isfinite(made.forward(0, x, ids, weights)).all()
    made.streamer.mixture.round_to(formats.F16.id)
    out = made.forward(0, x, ids, weights)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).any()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("rounding") / "tiny")


async def answers(engine):
    found = await asyncio.gather(*(engine.generate(ids, GREEDY) for ids in PROMPTS))
    return [(each.token_ids, each.logprobs) for each in found]


@pytest.fixture(scope="module")
def alone(model):
    """What one machine answers, by what it rounds to."""

    async def ask(wire):
        async with opened(model, expert_wire=wire) as engine:
            return await answers(engine)

    return {wire: asyncio.run(ask(wire)) for wire in ("f32", *TORCH)}


@pytest.fixture
def patient(monkeypatch):
    """However busy the machine, peers are waited for."""
    monkeypatch.setattr(module, "PATIENCE_NS", int(LONG * 1e9))


@pytest.mark.usefixtures("patient")
async def test_the_same_bytes_from_two_peers(model, alone):
    """Engines that round otherwise may share them."""
    assert len({repr(each) for each in alone.values()}) == 3
    with here(model, most=6) as (one, _), here(model, most=6) as (two, _):
        async with with_peers(model, one, two) as plain:
            assert await answers(plain) == alone["f32"]
            for wire in TORCH:
                async with with_peers(model, one, two, expert_wire=wire) as engine:
                    assert await answers(engine) == alone[wire]
                    assert engine.snapshot().peer_hits > 0
                    assert all(peer.failures == 0 for peer in peers(engine))
            assert await answers(plain) == alone["f32"]


@pytest.mark.parametrize("wire", TORCH)
async def test_the_same_bytes_when_peers_are_late(model, alone, wire, monkeypatch):
    """Some come first from here and some from there."""
    monkeypatch.setattr(module, "PATIENCE_NS", 1)
    with here(model) as (one, _):
        async with with_peers(model, one, expert_wire=wire) as engine:
            for _ in range(3):
                assert await answers(engine) == alone[wire]


async def test_prefixes_of_another_rounding_are_not_used(model, tmp_path):
    marks = set()
    for wire in ("f32", *TORCH):
        async with opened(model, expert_wire=wire, prefix_store=tmp_path / wire) as engine:
            marks.add(engine._store.fingerprint)
    assert len(marks) == 3


# What is asked and answered.

WIDTH = 64
WELCOME = pb.Welcome(capacity=8, held=pb.Held(experts=range(8), decides=True))


def asked(wire: str, deadline: int = 1 << 62, tokens: int = 2) -> tuple[Session, list[pb.ComputeRequest]]:
    session = Session("a:1", bytes(16), RIGHT, 8, wire)
    assert session.begin(0.0).hello.wire == wire
    session.take(0.0, pb.ComputeResponse(welcome=WELCOME))
    x = np.ones((tokens, WIDTH), np.float32)
    weights = np.ones(tokens, np.float32)
    ask = Ask(1, deadline, 0, x, [1], [tokens], np.arange(tokens, dtype=np.int32), weights)
    return session, session.ask(1.0, ask)


def test_half_goes_over_the_wire():
    sizes = {}
    for wire, width in (("f32", 4), ("bf16", 2), ("f16", 2)):
        session, (message,) = asked(wire)
        assert len(message.rows.x) == 2 * WIDTH * width
        rows = bytes(2 * WIDTH * width)
        answer = pb.Outputs(id=message.rows.id, rows=rows, checksum=outputs_checksum(message.rows.id, rows))
        assert session.take(2.0, pb.ComputeResponse(outputs=answer)).answer.rows == rows
        sizes[wire] = message.ByteSize() + answer.ByteSize()
    assert sizes["f16"] == sizes["bf16"] < 0.6 * sizes["f32"]


def test_how_long_an_answer_is_wanted():
    """Twice as long as until the own drive is asked, from the first message of a question on."""
    _, messages = asked("f32", deadline=1_000_000_000 + 30_500_000, tokens=600)
    assert [(each.rows.part, each.rows.patience_ms) for each in messages] == [(0, 61), (1, 61), (2, 61)]
    _, (late,) = asked("f32", deadline=500_000_000)
    assert late.rows.patience_ms == 1
    _, (never,) = asked("f32")
    assert never.rows.patience_ms == 0


def test_an_answer_that_was_not_computed_is_a_late_one():
    """Its experts are read at once, and the peer is slower than it was thought to be."""
    session, (message,) = asked("f32", deadline=1_010_000_000)
    empty = pb.Outputs(id=message.rows.id, checksum=outputs_checksum(message.rows.id, b""), late=True)
    answer = session.take(1.5, pb.ComputeResponse(outputs=empty)).answer
    assert (answer.turn, answer.rows) == (1, None)
    assert session.state(1.5).late == 1
    assert session.expected(2) == pytest.approx(0.5)
    missing, (message,) = asked("f32", deadline=1_010_000_000)
    empty = pb.Outputs(id=message.rows.id, checksum=outputs_checksum(message.rows.id, b""))
    assert missing.take(1.5, pb.ComputeResponse(outputs=empty)).answer.rows is None
    assert (missing.state(1.5).late, missing.expected(2)) == (0, 0.0)


def test_a_shard_does_not_compute_what_nobody_wants(model):
    with here(model) as (_, shard):
        shard.assign(range(12))
        end = time.monotonic() + LONG
        while len(shard.held()) < 12:
            assert time.monotonic() < end
            time.sleep(0.01)
        x, ids = np.ones((1, shard.hidden[0]), np.float32), np.zeros((1, 1), np.int32)
        weights = np.ones((1, 1), np.float32)
        right = shard.compute(0, x, ids, weights)
        assert shard.compute(0, x, ids, weights, time.monotonic() + LONG).tobytes() == right.tobytes()
        with pytest.raises(LateError):
            shard.compute(0, x, ids, weights, time.monotonic() - 1e-9)


def test_messages_of_a_question_have_one_clock(mixture):
    """It begins with the first one."""
    said = {name: getattr(RIGHT, name) for name in ("protocol", "version", "model", "arithmetic", "probe")}
    memory, times = Memory(mixture, 8, RIGHT), []
    right = memory.compute

    def compute(layer, x, experts, weights, until):
        times.append(until)
        if len(times) == 2:
            raise LateError
        return right(layer, x, experts, weights, until)

    memory.compute = compute
    memory.assign(range(8))
    memory.load(8)
    requests = [pb.ComputeRequest(hello=pb.Hello(**said, engine=bytes(16), wire="bf16"))]
    for part, patience_ms in ((0, 5000), (1, 5000), (2, 5000), (0, 5000), (0, 0)):
        x = np.ones((1, WIDTH), np.float32)
        rows = make_rows(
            len(requests), 0, x, [1], [1], np.zeros(1, np.int32), np.ones(1, np.float32), "bf16",
            part=part, patience_ms=patience_ms,
        )  # fmt: skip
        requests.append(pb.ComputeRequest(rows=rows))
    before = time.monotonic() + 5
    answers = [each.outputs for each in Service(memory, "").Compute(iter(requests), Context())][1:]
    assert before <= times[0] == times[1] == times[2] < times[3] <= time.monotonic() + 5
    assert times[4] == inf
    assert [(len(each.rows), each.late) for each in answers] == [
        (0, True) if number == 1 else (2 * WIDTH, False) for number in range(5)
    ]


async def test_what_the_benchmark_measures(model):
    """Of every token but a window's last the chances of what follows, as transformers has them."""
    windows = [prompt(90), prompt(7)]
    found = await scores(model, windows, {})
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        right = [theirs(torch.tensor([each])).logits[0, :-1].log_softmax(-1) for each in windows]
    assert np.allclose(found, torch.cat(right).numpy(), atol=1e-3)
    assert not np.array_equal(await scores(model, windows, {"expert_wire": "bf16"}), found)
