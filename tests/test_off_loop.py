"""What grows with a request is done on threads: on the event loop it would hold up everybody's tokens.

No times are looked at, but who does it: the thread of the event loop, which is the test's own, or another.
"""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager

import pytest
from engine_models import opened, write_text_model
from grpc_client import generate, pieces, refused, served
from http_server import asking

from mer import Engine
from mer.api import large_json
from mer.api.grpc import convert
from mer.api.http import large_bodies, service
from mer.api.large_json import PIECE
from mer.model.tokenizer import Tokenizer
from mer.v1 import inference_pb2 as pb

# Large enough that nothing is refused unseen; what is tokenized here has more, so that it is not computed.
CONTEXT = 20_000
TEXT = "x" * (PIECE + 9)
IDS = [65] * PIECE
PADDING = {"user": TEXT}  # what nobody tokenizes
ASKED = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(
        tmp_path_factory.mktemp("loop") / "tiny", chat=True, max_position_embeddings=1 << 15
    )


class Watched:
    """Which functions were called, and which of them on the thread that made this."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self._loop = patch, threading.get_ident()
        self.seen: set[str] = set()
        self.on_loop: list[str] = []

    def note(self, what: str) -> None:
        self.seen.add(what)
        if threading.get_ident() == self._loop:
            self.on_loop.append(what)

    def watch(self, where: object, name: str, large=lambda *_: True) -> None:
        """large: of the arguments, whether such a call may take long."""
        done = getattr(where, name)

        def noted(*given, **more):
            if large(*given):
                self.note(name)
            return done(*given, **more)

        self._patch.setattr(where, name, noted)


class Parts(list):
    """Of a body: to join them is to go through them, once their sizes are known."""

    def __init__(self, parts: list[bytes], watched: Watched) -> None:
        super().__init__(parts)
        self._watched = watched
        self._sizes_are_known = False

    def __iter__(self):
        if self._sizes_are_known:
            self._watched.note("join")
        self._sizes_are_known = True
        return super().__iter__()


@asynccontextmanager
async def watching_http(model, monkeypatch):
    async with opened(model, context=CONTEXT) as engine, asking(engine) as client:
        watched = Watched(monkeypatch)
        read = service._read

        async def parts(context):
            return Parts(await read(context), watched)

        monkeypatch.setattr(service, "_read", parts)
        watched.watch(large_json, "decode")
        watched.watch(service, "decode_body", lambda body, *_: len(body) > PIECE)
        watched.watch(service, "decode_large")
        watched.watch(service, "decode_conversation")
        watched.watch(large_bodies, "converted")
        watched.watch(Tokenizer, "encode", lambda _, text, *__: len(text) > PIECE)
        watched.watch(Tokenizer, "decode", lambda _, ids, *__: len(ids) > PIECE // 2)
        yield client, watched


@pytest.mark.parametrize(
    ("path", "body", "status", "work"),
    [
        ("/v1/chat/completions", {"messages": ASKED, "max_tokens": 1, **PADDING}, 200, set()),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 1, **PADDING}, 200, set()),
        ("/v1/completions", {"prompt": IDS}, 400, set()),
        ("/v1/embeddings", {"input": "Hello", **PADDING}, 200, set()),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 1, **PADDING}, 200, set()),
        ("/v1/messages", {"messages": ASKED, "max_tokens": 1, "metadata": {"user_id": TEXT}}, 200, set()),
        ("/v1/messages/count_tokens", {"messages": ASKED, "system": TEXT}, 200, {"encode"}),
        ("/tokenize", {"prompt": TEXT}, 400, {"encode"}),
        ("/detokenize", {"tokens": IDS}, 200, {"decode"}),
    ],
)
async def test_a_large_body_of_http(model, monkeypatch, path, body, status, work):
    async with watching_http(model, monkeypatch) as (client, watched):
        answer = await client.post(path, json={"model": "small", **body})
        assert answer.status_code == status, answer.text[:300]
        assert watched.on_loop == []
        assert watched.seen >= {"join", *work}
        assert watched.seen & {"decode_large", "decode_conversation"}


@asynccontextmanager
async def watching_grpc(model, monkeypatch):
    async with served(model, context=CONTEXT) as (stub, _, _):
        watched = Watched(monkeypatch)
        watched.watch(convert, "parsed", lambda _, data: len(data) > PIECE)
        watched.watch(Tokenizer, "encode", lambda _, text, *__: len(text) > PIECE)
        watched.watch(Tokenizer, "decode", lambda _, ids, *__: len(ids) > PIECE // 2)
        watched.watch(Engine, "chat_prompt")
        yield stub, watched


async def test_a_large_message_of_grpc(model, monkeypatch):
    """Refused or not: who is told so has had his message read."""
    many = [pb.Message(role="user", content=TEXT[: PIECE // 8])] * 9

    async def refused_in_a_session():
        session = stub.Session()
        await session.write(pb.SessionRequest(id="a", generate=generate(TEXT)))
        await session.done_writing()
        return [each.error.message for each in await pieces(session)]

    async with watching_grpc(model, monkeypatch) as (stub, watched):
        for call, work in (
            (lambda: refused(stub.Tokenize(pb.TokenizeRequest(text=TEXT))), {"encode"}),
            (lambda: refused(stub.Tokenize(pb.TokenizeRequest(messages=many))), {"chat_prompt", "encode"}),
            (lambda: stub.Detokenize(pb.DetokenizeRequest(token_ids=IDS)), {"decode"}),
            (lambda: refused(stub.Generate(generate(IDS))), set()),
            (lambda: refused(stub.Chat(pb.ChatRequest(messages=many))), {"chat_prompt", "encode"}),
            (lambda: refused(stub.Embed(pb.EmbedRequest(text=TEXT))), {"encode"}),
            (refused_in_a_session, set()),
            (lambda: refused(stub.Watch(pb.WatchRequest(model=TEXT))), set()),
        ):
            watched.seen.clear()
            await call()
            assert watched.seen >= {"parsed", *work}
            assert watched.on_loop == []
