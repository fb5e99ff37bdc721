"""Peers in bad times: killed, frozen, exchanged. Every request ends with the bytes of one machine."""

from __future__ import annotations

import asyncio
import json
import threading
from functools import partial

import grpc
import numpy as np
import pytest
import shards
import trustme
from engine_models import answers, opened, prompt, write_text_model
from shards import LONG, certificates, here, peers, shard, until, with_peers

from mer import Engine, SamplingParams
from mer._ext.remote import Ask
from mer.cluster import peers as of_all
from mer.cluster import server as serving
from mer.cluster import session as of_one
from mer.cluster.peer import Peer
from mer.cluster.server import ShardSettings
from mer.cluster.session import Answer, Session
from mer.cluster.shard import Shard
from mer.cluster.wire import make_rows, rows_checksum
from mer.config import EngineConfig
from mer.errors import BudgetError, ConfigError
from mer.v1 import expert_pb2 as pb
from mer.v1 import expert_pb2_grpc as rpc

TOKENS = 60
PARAMS = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
PROMPTS = [prompt(n) for n in (40, 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("faults") / "tiny")


@pytest.fixture(scope="module")
def expected(model):
    return answers(model, PROMPTS, PARAMS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Who is lost is tried again soon."""
    monkeypatch.setattr(of_one, "LAST_DELAY", 0.5)


async def streams(engine, when: int, act) -> list[tuple[int, ...]]:
    return await shards.streams(engine, PROMPTS, PARAMS, when, act)


async def test_killed_and_started_again(model, expected, monkeypatch, caplog):
    monkeypatch.setattr(of_all, "PATIENCE_NS", int(LONG * 1e9))
    with shard(model) as one, here(model) as (two, _):
        async with with_peers(model, one, two) as engine:
            assert await streams(engine, 10, one.kill) == expected
            await until(lambda: peers(engine)[0].condition == "lost", "it is known")
            assert peers(engine)[0].held == 0
            assert f"peer {one.address} is lost" in caplog.text
            before = peers(engine)[1].answers
            assert await streams(engine, 10, lambda: None) == expected
            assert peers(engine)[1].answers > before
            with here(model, port=one.port):
                await until(lambda: peers(engine)[0].held, "it is there again")
                assert await streams(engine, 10, lambda: None) == expected
                assert peers(engine)[0].answers > 0


async def test_frozen(model, expected, monkeypatch):
    """Its experts are read from the own drive; used again when it thaws, given up if it does not."""
    with shard(model) as one:
        async with with_peers(model, one) as engine:
            assert await streams(engine, 10, one.freeze) == expected
            await until(lambda: peers(engine)[0].condition in ("late", "lost"), "it is known")
            assert await streams(engine, 10, lambda: one.freeze(False)) == expected
            await until(lambda: peers(engine)[0].condition == "up", "it is used again")
            monkeypatch.setattr(of_one, "LOST", 0.5)
            assert await streams(engine, 10, one.freeze) == expected
            await until(lambda: "no answer for" in peers(engine)[0].error, "it is given up")


async def test_exchanged_for_one_with_another_model(model, expected, tmp_path, caplog):
    other = write_text_model(tmp_path / "other", initializer_range=0.03)
    with here(model) as (one, _):
        async with with_peers(model, one) as engine:
            one.stop()
            with here(other, port=one.port):
                await until(lambda: "another model" in peers(engine)[0].error, "it is refused")
                assert await streams(engine, 10, lambda: None) == expected
                assert peers(engine)[0].held == 0
    assert "it refuses: the shard has another model than the engine" in caplog.text


async def test_join_token(model, expected, tmp_path):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("0123456789abcdef0123\n")
    wrong.write_text("0123456789abcdef0124\n")
    with here(model, right) as (server, _):
        async with with_peers(model, server, peer_token=right) as engine:
            assert await streams(engine, 10, lambda: None) == expected
        for given in ({"peer_token": wrong}, {}):
            async with with_peers(model, server, held=False, **given) as engine:
                await until(lambda engine=engine: "join token" in peers(engine)[0].error, "it is refused")
                assert (await engine.generate(PROMPTS[0], PARAMS)).token_ids == expected[0]


@pytest.mark.parametrize("damage", ["checksum", "short", "other id"])
async def test_damaged_answers(model, expected, monkeypatch, damage):
    """They are noticed, and nothing of them gets into an answer."""
    monkeypatch.setattr(of_all, "PATIENCE_NS", int(LONG * 1e9))
    outputs = serving.Service._outputs
    damaged = []

    def spoil(self, *request):
        response = outputs(self, *request)
        if len(damaged) < 3:
            found = response.outputs
            damaged.append(found.id)
            if damage == "checksum":
                found.rows = found.rows[:-1] + bytes([found.rows[-1] ^ 1])
            elif damage == "short":
                found.rows = found.rows[:-4]
                found.checksum = serving.outputs_checksum(found.id, found.rows)
            else:
                found.id += 1
                found.checksum = serving.outputs_checksum(found.id, found.rows)
        return response

    monkeypatch.setattr(serving.Service, "_outputs", spoil)
    with here(model) as (server, _):
        async with with_peers(model, server) as engine:
            for _ in range(100):
                assert await streams(engine, 10, lambda: None) == expected
                if len(damaged) == 3 and peers(engine)[0].answers:
                    break
                await asyncio.sleep(0.1)
            now = peers(engine)[0]
            assert now.failures == 3
            assert now.answers > 0
            assert engine.snapshot().peer_hits > 0


def call(stub, *requests):
    """The answers to these requests and the status at the end."""
    found = []
    try:
        found.extend(stub.Compute(iter(requests), timeout=LONG))
    except grpc.RpcError as error:
        return found, error.code().name, error.details()
    return found, "OK", ""


def test_what_is_no_request(model):
    """Each is answered with a status that says why, and the next engine is served."""
    with here(model) as (server, made), grpc.insecure_channel(server.address) as channel:
        stub, mine = rpc.ExpertStub(channel), made.identity
        hello = pb.ComputeRequest(
            hello=pb.Hello(
                protocol=mine.protocol, version=mine.version, model=mine.model, arithmetic=mine.arithmetic,
                probe=mine.probe, engine=bytes(16), wire="f32",
            )
        )  # fmt: skip
        x = np.ones((3, made.hidden[0]), np.float32)

        def rows(**changes):
            good = make_rows(7, 0, x, [1, 4], [2, 1], np.array([0, 2, 1], np.int32), np.ones(3, np.float32))
            for name, value in changes.items():
                if isinstance(value, list):
                    del getattr(good, name)[:]
                    getattr(good, name).extend(value)
                else:
                    setattr(good, name, value)
            if "checksum" not in changes:
                good.checksum = rows_checksum(good)
            return pb.ComputeRequest(rows=good)

        found, status, _ = call(stub, hello, rows())
        assert status == "OK"
        assert [each.WhichOneof("kind") for each in found] == ["welcome", "outputs"]
        assert found[1].outputs.rows == b"", "it holds nothing yet"
        for bad, words in (
            (rows(checksum=1), "checksum of the rows is wrong"),
            (rows(layer=99), "layer 99"),
            (rows(experts=[1, 600]), "expert 600"),
            (rows(counts=[2, 2]), "do not fit"),
            (rows(counts=[3, 0]), "do not fit"),
            (rows(counts=[], experts=[], tokens=[]), "do not fit"),
            (rows(tokens=[0, 2, 3]), "no rows of"),
            (rows(weights=bytes(8)), "8 bytes of weights do not fit 3 tokens"),
            (rows(x=b"abc"), "no rows of"),
            (rows(x=bytes(4 * made.hidden[0] * 257)), "no rows of"),
            (rows(counts=[2, 400], tokens=[0] * 402), "at most 256"),
        ):
            found, status, details = call(stub, hello, bad)
            assert (len(found), status) == (1, "DATA_LOSS"), words
            assert words in details
        assert call(stub, rows())[1] == "INVALID_ARGUMENT"
        assert call(stub, hello, hello)[1] == "INVALID_ARGUMENT"
        assert (
            call(stub, hello, pb.ComputeRequest(assign=pb.Assign(experts=[10**6])))[1] == "INVALID_ARGUMENT"
        )
        assert call(stub, hello, rows(x=bytes(made.most_bytes + 1)))[1] == "RESOURCE_EXHAUSTED"
        nameless = pb.ComputeRequest(hello=hello.hello)
        nameless.hello.engine = b"short"
        assert call(stub, nameless)[1] == "INVALID_ARGUMENT"
        for wire in "", "f64":
            strange = pb.ComputeRequest(hello=hello.hello)
            strange.hello.wire = wire
            _, status, details = call(stub, strange)
            assert (status, details) == (
                "INVALID_ARGUMENT",
                "rows can be f32, bf16, f16, and the engine's are something else",
            )
        for name, value, words in (
            ("protocol", 99, "protocol 99"),
            ("version", "0.0", "install the same version"),
            ("model", b"other", "another model"),
            ("arithmetic", "abacus", "MER_ISA"),
            ("probe", b"other", "computes other bytes"),
        ):
            changed = pb.ComputeRequest()
            changed.CopyFrom(hello)
            setattr(changed.hello, name, value)
            found, status, details = call(stub, changed)
            assert (found, status) == ([], "FAILED_PRECONDITION")
            assert words in details
        assert call(stub, hello, rows())[1] == "OK"


def test_what_was_asked_of_a_peer_that_is_closed(model, monkeypatch):
    """It does not come, and that is told: a step may have asked just before the peer left its name."""
    going, told, outputs = threading.Event(), [], serving.Service._outputs

    def late(*request):
        going.wait(LONG)
        return outputs(*request)

    monkeypatch.setattr(serving.Service, "_outputs", late)
    with here(model) as (server, made):
        session = Session(server.address, bytes(16), made.identity, made.total)
        channel = partial(grpc.insecure_channel, server.address)
        peer = Peer(session, channel, "", answered=told.append, changed=lambda: None)
        peer.start()
        peer.wait_tried(LONG)
        x = np.ones((1, made.hidden[0]), np.float32)
        assert peer.ask(Ask(1, 0, 0, x, [3], [1], np.zeros(1, np.int32), np.ones(1, np.float32)))
        peer.close()
        assert told == [Answer(1, [3], None)]
        going.set()


async def test_one_engine_decides(model, expected):
    """The first one; when it leaves, another does."""
    with here(model) as (server, made):
        first = await Engine.open(model, peers=(server.address,))
        async with with_peers(model, server) as second:
            assert await streams(second, 10, lambda: None) == expected
            assert not second._runner.experts._peers._members.sessions[0].assigns
            await first.close()
            await until(lambda: second._runner.experts._peers._members.sessions[0].assigns, "it decides")
            assert await streams(second, 10, lambda: None) == expected
            assert len(made.held()) == made.total


async def test_a_restarted_engine_places_as_before(model, tmp_path, monkeypatch):
    """By the heat that it remembers, though the shard is an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with here(model, most=3) as (server, made):
        async with with_peers(model, server, warm_start=True) as engine:
            await streams(engine, 10, lambda: None)
            members = engine._runner.experts._peers._members
            members._next_tokens = 0  # placed again by what was counted
            await until(lambda: not members._due and members._next_tokens, "placed")
            placed = members._placed[0]
            await until(lambda: set(made.held()) == placed, "read")
    (file,) = tmp_path.glob("mer/hot/*.json")
    heat = np.zeros(made.total, np.float32)
    for key, share in json.loads(file.read_text())["heat"]:
        heat[key] = share
    assert placed < set(np.argsort(-heat, kind="stable")[:8].tolist())
    with here(model, most=3) as (server, made):
        async with with_peers(model, server, warm_start=True) as engine:
            assert set(made.held()) == placed
            assert engine._runner.experts._tier.heats()[0].tobytes() == heat.tobytes()


async def test_mutual_tls(model, expected, tmp_path):
    own, stranger = trustme.CA(), trustme.CA()
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123\n")
    good, bad = certificates(tmp_path / "own", own), certificates(tmp_path / "stranger", stranger)
    tls = {"tls_cert": good["cert"], "tls_key": good["key"], "tls_client_ca": good["ca"]}
    with here(model, token, **tls) as (server, _):

        def asking(files):
            return {f"peer_{part}": file for part, file in files.items()} | {"peer_token": token}

        async with with_peers(model, server, **asking(good)) as engine:
            assert await streams(engine, 10, lambda: None) == expected
            assert peers(engine)[0].answers > 0
        for files, words in (
            (asking(bad), "CERTIFICATE_VERIFY_FAILED"),
            (asking({**bad, "ca": good["ca"]}), "does it want a certificate of its CA"),
            ({}, "does it want a certificate of its CA"),
        ):
            async with with_peers(model, server, held=False, **files) as engine:
                await until(lambda engine=engine: peers(engine)[0].failures > 0, "it is refused")
                assert peers(engine)[0].capacity == 0
                assert words in peers(engine)[0].error


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "192.0.2.1:9100", "node1:9100", "[::]:0"])
def test_outside_this_machine_certificates_and_a_token_are_needed(listen):
    with pytest.raises(ConfigError, match="--tls-client-ca"):
        ShardSettings(listen=listen)
    for own in ("localhost:1", "[::1]:1", "127.0.0.1:1"):
        ShardSettings(listen=own)


async def test_a_peer_outside_this_machine_needs_them_too(model):
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:9100 is another machine"):
        await open_engine(model, peers=("192.0.2.1:9100",))


async def open_engine(model, **settings):
    async with opened(model, **settings):
        pass


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peers": ("node1",)}, "HOST:PORT"),
        ({"peers": ("node1:99999",)}, "HOST:PORT"),
        ({"peers": ("a:1", "b:2", "a:1")}, "a:1 is named twice"),
        ({"peer_token": "x"}, "peer_token is for peers"),
        ({"peers": ("a:1",), "peer_ca": "x"}, "peer_ca alone will not do"),
    ],
)
def test_settings_that_can_not_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**settings)


def test_too_little_memory(model):
    with pytest.raises(BudgetError, match=r"ram 60 MiB is too little.*raise --ram"):
        Shard(model, 60 << 20, 0)


async def test_experts_that_have_no_room_are_not_held(model, expected, monkeypatch):
    """A shard for five of twelve; which, is the engine's choice."""
    monkeypatch.setattr(of_all, "PATIENCE_NS", int(LONG * 1e9))
    with here(model, most=5) as (server, small):
        async with with_peers(model, server) as engine:
            assert await streams(engine, 10, lambda: None) == expected
            now = engine.snapshot()
            assert (now.peers[0].capacity, now.peers[0].held) == (5, 5)
            assert now.peer_hits > 0
            assert now.steps.misses > 0
            with pytest.raises(ConfigError, match="6 of 12 experts can't be held: 5 have room"):
                small.assign(range(6))
