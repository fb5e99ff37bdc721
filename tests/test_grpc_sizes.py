"""gRPC requests of many bytes, messages or characters: refused by their size, and nobody waits for that."""

from __future__ import annotations

import threading

import grpc
import pytest
from engine_models import write_text_model
from grpc_client import chat, generate, refused, served, text_of

from mer import Engine
from mer.api.grpc import convert
from mer.model.tokenizer import Tokenizer
from mer.v1 import inference_pb2 as pb

Params, Message = pb.SamplingParams, pb.Message


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("sizes") / "tiny", chat=True)


@pytest.fixture
async def tiny(model):
    async with served(model) as given:
        yield given


async def test_many_short_messages_are_a_threads_work(tiny, monkeypatch):
    """Converting and rendering them takes longer than a step: streams beside them would wait."""
    stub, _, _ = tiny
    threads, convert_them, render = [], convert.conversation, Engine.chat_prompt

    def conversation(*given):
        threads.append(threading.current_thread())
        return convert_them(*given)

    def chat_prompt(self, *given, **more):
        threads.append(threading.current_thread())
        return render(self, *given, **more)

    monkeypatch.setattr(convert, "conversation", conversation)
    monkeypatch.setattr(Engine, "chat_prompt", chat_prompt)
    error = await refused(stub.Chat(pb.ChatRequest(messages=[Message(role="user", content="x" * 30)] * 400)))
    assert error.fields == ["messages"]
    assert len(threads) >= 2
    assert threading.main_thread() not in threads


async def test_messages_that_are_too_large(model):
    async with served(model, {"max_body": 10_000}) as (stub, _, _):
        error = await refused(stub.Generate(generate("x" * 20_000)))
        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await text_of(stub.Generate(generate("x")))


async def test_more_bytes_than_tokens(model):
    """Refused before they are looked at: to decode them takes milliseconds on the event loop."""
    text = "x" * 6_000_000
    async with served(model) as (stub, _, _):
        for call in (
            stub.Generate(generate(text)),
            stub.Chat(chat(text)),
            stub.Tokenize(pb.TokenizeRequest(text=text)),
        ):
            error = await refused(call)
            assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
            assert "bytes, more than 5,242,880; 512 tokens is the most here" in error.message
        error = await refused(stub.Generate(generate([1] * 1_000_000)))
        assert "1000000 tokens; 512 is the most here" in error.message
        error = await refused(stub.Detokenize(pb.DetokenizeRequest(token_ids=[1] * 5_300_000 + [300])))
        assert error.fields == ["token_ids[5300000]"]
        assert await text_of(stub.Generate(generate("x")))


async def test_more_messages_than_tokens(tiny, monkeypatch):
    """Refused before any is converted; a session goes on."""

    def conversation(*_given):
        raise AssertionError("converted")

    stub, _, _ = tiny
    monkeypatch.setattr(convert, "conversation", conversation)
    many = [Message(role=("user", "assistant")[i % 2], content=f"{i}") for i in range(20_000)]
    for call in stub.Chat(pb.ChatRequest(messages=many)), stub.Tokenize(pb.TokenizeRequest(messages=many)):
        error = await refused(call)
        assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["messages"])
        assert "the conversation has 20000 messages; 512 tokens is the most here" in error.message
    session = stub.Session()
    await session.write(pb.SessionRequest(id="a", chat=pb.ChatRequest(messages=many)))
    await session.write(pb.SessionRequest(id="b", generate=generate("x", Params(max_tokens=1))))
    await session.done_writing()
    answers = {}
    async for each in session:
        answers.setdefault(each.id, each)
    assert answers["a"].error.field == "messages"
    assert answers["b"].HasField("generate")


async def test_a_text_that_is_too_long_by_its_length(tiny, monkeypatch):
    def encode(*_given, **_more):
        raise AssertionError("tokenised")

    stub, _, _ = tiny
    monkeypatch.setattr(Tokenizer, "encode", encode)
    text = "the sea and " * 250_000
    for call, words in (
        (stub.Generate(generate(text)), "the prompt has at least"),
        (stub.Tokenize(pb.TokenizeRequest(text=text)), "text: it has at least"),
    ):
        error = await refused(call)
        assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["text"])
        assert words in error.message
        assert f"tokens; {512 if 'prompt' in words else 65536} is the most here" in error.message


async def test_an_unknown_field_of_a_message_is_named(tiny):
    _, _, server = tiny
    data = pb.ChatRequest(messages=[Message(role="user")]).SerializeToString()
    data += b"\x0a\x03\xf8\x07\x01"  # a second message with a field 127
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        error = await refused(channel.unary_stream("/mer.v1.Inference/Chat")(data))
    assert error.fields == ["messages[1].127"]
    assert "mer.v1.Message has no field 127" in error.message
