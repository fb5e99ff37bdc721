"""Messages between engines and shards that are damaged, cut, too large or nonsense: both sides survive."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import contextmanager
from math import inf

import grpc
import numpy as np
import pytest
from engine_models import opened, prompt, write_text_model
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_model import EXPERTS, Model
from shards import LONG, here, peers, until, with_peers
from simulated_cluster import RIGHT, AbortedError, Context, Memory

from mer import SamplingParams
from mer._ext.remote import Ask
from mer.cluster import peer as of_one
from mer.cluster import server as serving
from mer.cluster import session as talking
from mer.cluster.server import Service
from mer.cluster.session import Session
from mer.cluster.wire import WireError, outputs_checksum
from mer.v1 import expert_pb2 as pb
from mer.weights import formats

HELLO = pb.ComputeRequest(
    hello=pb.Hello(
        protocol=RIGHT.protocol, version=RIGHT.version, model=RIGHT.model, arithmetic=RIGHT.arithmetic,
        probe=RIGHT.probe, engine=bytes(16), wire="f32",
    )
)  # fmt: skip
WELCOME = pb.ComputeResponse(
    welcome=pb.Welcome(capacity=8, held=pb.Held(experts=range(EXPERTS), decides=True))
)
WIDTH = 32
WEIGHTS = np.array([0.5, 0.3, -2], np.float32)
ASK = Ask(1, 0, 0, np.ones((3, WIDTH), np.float32), [1, 4], [2, 1], np.array([0, 2, 1], np.int32), WEIGHTS)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    form = formats.by_name("q8_0")
    made = Memory(Model(tmp_path_factory.mktemp("wire"), [(form, form, WIDTH, WIDTH)]), EXPERTS, RIGHT)
    made.assign(range(EXPERTS))
    made.load(EXPERTS)
    return made


# (where, what, which bit, which bytes)
_HARM = st.tuples(
    st.integers(0, 999),
    st.sampled_from(["flip", "flip", "cut", "put", "repeat"]),
    st.integers(0, 7),
    st.binary(min_size=1, max_size=8),
)


def damage(given: bytes) -> st.SearchStrategy[bytes]:
    """These bytes with some flipped, cut off, put in or repeated."""
    return st.lists(_HARM, min_size=1, max_size=3).map(lambda harms: damaged(given, harms))


def damaged(given: bytes, harms) -> bytes:
    data = bytearray(given)
    for where, what, bit, more in harms:
        at = where * len(data) // 1000
        if what == "flip" and data:
            data[at] ^= 1 << bit
        elif what == "cut":
            del data[at:]
        elif what == "put":
            data[at:at] = more
        else:
            data[at:at] = data[at : at + 20]
    return bytes(data)


def session() -> Session:
    made = Session("a:1", bytes(16), RIGHT, EXPERTS)
    made.begin(0.0)
    return made


def asked() -> tuple[Session, pb.ComputeRequest]:
    made = session()
    made.take(0.0, WELCOME)
    (message,) = made.ask(0.0, ASK)
    return made, message


def outputs(number: int) -> pb.ComputeResponse:
    rows = np.arange(3 * WIDTH, dtype="<f4").tobytes()
    return pb.ComputeResponse(
        outputs=pb.Outputs(id=number, rows=rows, checksum=outputs_checksum(number, rows))
    )


def test_a_good_answer_is_taken():
    made, message = asked()
    good = outputs(message.rows.id)
    assert made.take(0.0, good).answer.rows == good.outputs.rows


_, MESSAGE = asked()
GOOD = outputs(MESSAGE.rows.id)


@settings(max_examples=300)
@given(damage(GOOD.SerializeToString()))
def test_no_damaged_answer_is_taken(data):
    """What a session makes of an answer is all of the right rows, or an error, or that they do not come."""
    made, _ = asked()
    try:
        news = made.take(0.0, pb.ComputeResponse.FromString(data))
    except (DecodeError, WireError):
        return
    if news.answer is not None and news.answer.rows is not None:
        assert news.answer.rows == GOOD.outputs.rows


@settings(max_examples=200)
@given(st.lists(st.one_of(
    st.binary(max_size=40), damage(WELCOME.SerializeToString()), damage(outputs(1).SerializeToString()),
    st.sampled_from([WELCOME, outputs(1), pb.ComputeResponse(held=pb.Held())]).map(
        lambda message: message.SerializeToString()),
), max_size=6))  # fmt: skip
def test_a_session_survives_any_shard(answers):
    made = session()
    for data in answers:
        try:
            made.take(0.0, pb.ComputeResponse.FromString(data))
        except (DecodeError, WireError):
            made.end("nonsense")
            made.begin(0.0)
        assert made.capacity <= EXPERTS
        assert made.held <= set(range(EXPERTS))
        made.ask(0.0, ASK)


@settings(max_examples=300)
@given(request=damage(MESSAGE.SerializeToString()))
def test_a_shard_computes_what_was_asked_or_nothing(memory, request):
    """The right rows, or a status that says why; the same from a request that was damaged without harm."""
    memory.assign(range(EXPERTS))  # the last one may have been taken for an Assign
    memory.load(EXPERTS)
    ids = np.array([[1], [1], [4]], np.int32)
    right = memory.compute(0, ASK.x[ASK.tokens], ids, WEIGHTS[:, None], inf).tobytes()
    found = answers(memory, request)
    if found is not None and found.WhichOneof("kind") == "outputs" and found.outputs.rows:
        assert found.outputs.rows == right


def answers(memory, *requests: bytes) -> pb.ComputeResponse | None:
    """The last answer to a Hello and these; None where the stream was ended with a status."""
    try:
        messages = [HELLO, *map(pb.ComputeRequest.FromString, requests)]
        return list(Service(memory, "").Compute(iter(messages), Context()))[-1]
    except (DecodeError, AbortedError):
        return None


KINDS = [
    each.SerializeToString()
    for each in (HELLO, MESSAGE, pb.ComputeRequest(assign=pb.Assign(experts=range(EXPERTS))))
]


@settings(max_examples=80)
@given(
    requests=st.lists(
        st.one_of(st.binary(max_size=40), *map(st.just, KINDS), *map(damage, KINDS)), max_size=5
    )
)
def test_a_shard_survives_any_engine(memory, requests):
    own = Memory(memory.model, EXPERTS - 1, RIGHT)
    answers(own, *requests)
    assert len(own.assigned) < EXPERTS
    assert answers(own, pb.ComputeRequest(ping=pb.Ping()).SerializeToString()) is not None


@pytest.mark.parametrize(
    "changes",
    [{"version": "x" * 101}, {"arithmetic": "a\x1b[2J"}, {"model": bytes(101)}, {"engine": bytes(15)}],
)
def test_a_hello_that_could_spoil_a_log_is_none(memory, changes):
    bad = pb.ComputeRequest(hello=HELLO.hello)
    for name, value in changes.items():
        setattr(bad.hello, name, value)
    with pytest.raises(AbortedError, match=r"INVALID_ARGUMENT"):
        next(Service(memory, "").Compute(iter([bad]), Context()))


def test_what_is_too_much_is_not_looked_at(memory):
    """Neither added up nor copied: not even by its checksum."""
    _, message = asked()
    message.rows.tokens.extend([0] * 100_000)
    with pytest.raises(AbortedError, match="DATA_LOSS: 100003 rows in one message, at most 256"):
        list(Service(memory, "").Compute(iter([HELLO, message]), Context()))
    many = pb.ComputeRequest(assign=pb.Assign(experts=[0] * 100_000))
    with pytest.raises(AbortedError, match="INVALID_ARGUMENT: 100000 experts: there are 8"):
        list(Service(memory, "").Compute(iter([HELLO, many]), Context()))
    for bad in (pb.Welcome(capacity=EXPERTS + 1), pb.Welcome(held=pb.Held(experts=[EXPERTS]))):
        with pytest.raises(WireError):
            session().take(0.0, pb.ComputeResponse(welcome=bad))
    with pytest.raises(WireError):
        session().take(0.0, pb.ComputeResponse(welcome=pb.Welcome(held=pb.Held(experts=[0] * 9))))


# Over real connections.

PARAMS = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("wired") / "tiny")


async def test_a_shard_and_what_is_no_grpc(model, monkeypatch):
    """Bytes of no protocol, messages that are none, streams that say nothing: an engine is served then."""
    monkeypatch.setattr(serving, "_HELLO_S", 0.2)
    rng = np.random.default_rng(3)
    async with opened(model) as alone:
        expected = (await alone.generate(prompt(20), PARAMS)).token_ids
    with here(model) as (server, _):
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        for start in (
            b"",
            preface,
            preface + b"\0\0\0\4\0\0\0\0\0",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01",
        ):
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.sendall(start + rng.bytes(2000))
        with grpc.insecure_channel(server.address) as channel:
            garbage = channel.stream_stream("/mer.v1.Expert/Compute")
            for data in (b"\xff" * 10, rng.bytes(500), b""):
                with pytest.raises(grpc.RpcError):
                    list(garbage(iter([data]), timeout=LONG))
            # As many as there is room for: each of them is ended, or no engine could come.
            ended = threading.Event()
            silent = [garbage(iter(ended.wait, True), timeout=LONG) for _ in range(serving.MOST_ENGINES)]
            for stream in silent:
                with pytest.raises(grpc.RpcError) as error:
                    await asyncio.to_thread(list, stream)
                assert error.value.code().name in ("CANCELLED", "RESOURCE_EXHAUSTED")
            ended.set()
        monkeypatch.setattr(serving, "_HELLO_S", LONG)
        async with with_peers(model, server) as engine:
            assert (await engine.generate(prompt(20), PARAMS)).token_ids == expected
            assert peers(engine)[0].held


@contextmanager
def nonsense(kind: str):
    """Something that is no shard, at an address."""
    if kind == "bytes":
        with socket.create_server(("127.0.0.1", 0)) as listening:
            closed = threading.Event()

            def serve():
                listening.settimeout(0.1)
                while not closed.is_set():
                    try:
                        raw, _ = listening.accept()
                    except TimeoutError:
                        continue
                    with raw:
                        raw.sendall(np.random.default_rng(5).bytes(3000))

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            yield f"127.0.0.1:{listening.getsockname()[1]}"
            closed.set()
            thread.join()
        return
    answer = {
        "messages": lambda _: b"\xff\xff\xff\xff",
        "too large": lambda _: bytes(64 << 20),
        "nothing": lambda _: b"",
        "another service": None,
    }[kind]
    server = grpc.server(serving.ThreadPoolExecutor(2))
    if answer is not None:
        method = grpc.stream_stream_rpc_method_handler(lambda requests, _: map(answer, requests))
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("mer.v1.Expert", {"Compute": method}),)
        )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("kind", ["bytes", "messages", "too large", "nothing", "another service"])
async def test_an_engine_and_what_is_no_shard(model, kind, monkeypatch):
    """It is lost, tried again, and nothing comes of it."""
    monkeypatch.setattr(talking, "LAST_DELAY", 0.3)
    async with opened(model) as alone:
        expected = (await alone.generate(prompt(20), PARAMS)).token_ids
    with nonsense(kind) as address:
        async with opened(model, peers=(address,), cache_experts=4, prefetch=0) as engine:
            await until(lambda: peers(engine)[0].failures > 1, "it was tried twice")
            assert (await engine.generate(prompt(20), PARAMS)).token_ids == expected
            assert (peers(engine)[0].condition, peers(engine)[0].held) == ("lost", 0)
            assert peers(engine)[0].error


def test_what_a_shard_says_is_clean():
    class Error(grpc.RpcError):
        def code(self):
            return grpc.StatusCode.FAILED_PRECONDITION

        def details(self):
            return "bad\x1b[2J\n" + "x" * 10_000

    words = of_one._words(Error())
    assert words.isprintable()
    assert len(words) < 500
