"""What clients do that no library of gRPC would: frames that end, stop or pile up where they should not."""

from __future__ import annotations

import asyncio

import pytest
from engine_models import write_text_model
from grpc_client import FOREVER, asked, generate, served, text_of, until
from grpc_frames import frames

from mer.api.grpc import convert
from mer.api.grpc import session as sessions
from mer.v1 import inference_pb2 as pb


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(
        tmp_path_factory.mktemp("frames") / "tiny", chat=True, max_position_embeddings=16384
    )


@pytest.mark.parametrize(
    ("name", "message", "made"),
    [
        ("Generate", generate("Hello", FOREVER), "generated"),
        ("Watch", pb.WatchRequest(), "watched"),
    ],
)
async def test_who_leaves_while_a_piece_waits_for_it(model, monkeypatch, caplog, name, message, made):
    """To grpc that piece fails before it hears that the call is over. It is no error of the server's."""
    caplog.set_level("INFO", "mer.access")
    make, pieces = getattr(convert, made), []

    def counted(*args, **kwargs):
        pieces.append(1)
        return make(*args, **kwargs)

    monkeypatch.setattr(convert, made, counted)
    async with served(model, context=16384) as (stub, engine, server):
        async with frames(server.port, window=0) as client:
            calls = [await client.call(name, message) for _ in range(8)]
            await until(lambda: len(pieces) >= len(calls), "there are pieces of all of them")
            await until(lambda: all(call in client.headers for call in calls), "they are on their way")
            await client.reset(*calls)
            await until(lambda: not server.running, "the calls are over")
        await until(lambda: not asked(engine), "nothing is left of them")
        assert await text_of(stub.Generate(generate("the sea")))
    told = [each.fields["status"] for each in caplog.records if each.name == "mer.access"]
    assert told == ["CANCELLED"] * len(calls) + ["OK"]
    assert {each.name for each in caplog.records} == {"mer.access"}


async def test_a_session_that_is_not_read_holds_no_more_than_so_much(model, monkeypatch):
    """Further ones are not even taken off the connection then. Who reads gets an answer to each of them."""
    monkeypatch.setattr(sessions, "_MOST_HELD", 1 << 19)
    held = [0]
    serve = sessions.Session._serve

    async def counted(self, message, size):
        held.append(20_000 * len(self._tasks))
        await serve(self, message, size)

    monkeypatch.setattr(sessions.Session, "_serve", counted)
    wrong = pb.SamplingParams(top_p=2, stop=["x" * 20_000])
    messages = [pb.SessionRequest(id=str(i), generate=generate("x", wrong)) for i in range(1500)]
    async with served(model) as (stub, _, server), frames(server.port, window=0) as client:
        call = await client.call("Session", end=False)
        sending = asyncio.create_task(client.all_of(call, messages))
        await until(lambda: max(held) > 380_000, "there is no room for another one")
        await until(lambda: client.stuck or sending.done(), "the server takes no more")
        await asyncio.sleep(0.2)
        assert max(held) <= 1 << 19
        assert not sending.done()
        assert await text_of(stub.Generate(generate("the sea")))
        await client.read_on(call)
        await sending
        assert (await client.over(call))["grpc-status"] == "0"
    errors = [pb.SessionResponse.FromString(data).error for data in client.messages(call)]
    assert len(errors) == len(messages)
    assert {error.reason for error in errors} == {"INVALID_REQUEST", "QUEUE_FULL"}
    assert all(error.retry_after for error in errors if error.reason == "QUEUE_FULL")
