"""The gRPC API of a real `mer serve`: what a client gets is what the Python library gives, byte for byte."""

from __future__ import annotations

import asyncio
import json
from typing import get_args

import grpc
import numpy as np
import pytest
from engine_models import write_text_model
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_client import GREEDY, chat, connected, generate, pieces, text_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from http_server import serving

from mer import Engine, SamplingParams
from mer.api.grpc import convert
from mer.config import Speculate
from mer.v1 import inference_pb2 as pb

PROMPTS = ["The old man", "the sea", "Hello", "é漢字", "a" * 100]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("grpc") / "tiny", chat=True)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, "--grpc-port", 0, "--cache-experts", 4) as server:
        yield server


@pytest.fixture
async def stub(server):
    async with connected(server.grpc_port) as stub:
        yield stub


async def test_answers_are_those_of_the_library(model, stub):
    """All at once, with logprobs and drawn by a seed; the server's cache holds a third of the experts."""
    fields = {"temperature": 1.5, "seed": 7, "max_tokens": 20, "logprobs": 3, "stop": ["zz"], "top_k": 50}
    async with Engine.open(model) as engine:
        expected = [await engine.generate(text, SamplingParams(**fields)) for text in PROMPTS]
    params = pb.SamplingParams(**fields)
    answers = await asyncio.gather(*(pieces(stub.Generate(generate(text, params))) for text in PROMPTS))
    for answer, result in zip(answers, expected, strict=True):
        assert "".join(piece.text for piece in answer) == result.text
        assert [token for piece in answer for token in piece.token_ids] == list(result.token_ids)
        given = [each for piece in answer for each in piece.logprobs]
        assert [
            (each.token_id, each.text, each.logprob, [(t.token_id, t.text, t.logprob) for t in each.top])
            for each in given
        ] == [(each.token_id, each.text, each.logprob, list(each.top)) for each in result.logprobs]
        final = answer[-1].final
        assert not any(piece.HasField("final") for piece in answer[:-1])
        assert final.finish_reason == {"stop": 1, "length": 2}[result.finish_reason]
        assert final.usage.prompt_tokens == result.usage.prompt_tokens
        assert final.usage.completion_tokens == result.usage.completion_tokens
        assert final.seed == 7
    assert answers[3][0].logprobs[0].raw  # bytes, where the text of a token is half a character


def test_how_to_draft_is_said_by_a_word_or_by_yes_and_no():
    def asked(**given):
        return convert.sampling(pb.SamplingParams(**given), None).speculate

    assert asked() == asked(speculative=True) == "auto"
    assert asked(speculative=False) == "off"
    assert asked(speculative=False, speculate=pb.SPECULATE_NGRAM) == "ngram"
    names = [value.name for value in pb.Speculate.DESCRIPTOR.values[1:]]
    assert [asked(speculate=name) for name in names] == list(get_args(Speculate))


async def test_token_ids_are_a_prompt(model, stub):
    async with Engine.open(model) as engine:
        ids = engine.tokenizer.encode(PROMPTS[0])
    by_ids, by_text = [await text_of(stub.Generate(generate(prompt))) for prompt in (ids, PROMPTS[0])]
    assert by_ids == by_text


async def test_a_seed_draws_the_same_again(stub):
    """The one that the server chose is told."""
    params = pb.SamplingParams(temperature=2, max_tokens=8)
    first = await pieces(stub.Generate(generate("once", params)))
    second = await pieces(stub.Generate(generate("once", params)))
    params.seed = first[-1].final.seed
    again = await pieces(stub.Generate(generate("once", params)))
    assert second[-1].final.seed != first[-1].final.seed
    assert [piece.token_ids for piece in again] == [piece.token_ids for piece in first]


async def test_a_conversation_is_written_by_the_template(model, stub):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    async with Engine.open(model) as engine:
        prompt = engine.chat_prompt(messages)
        result = await engine.generate(prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    request = pb.ChatRequest(messages=[pb.Message(**each) for each in messages], params=GREEDY)
    answer = await pieces(stub.Chat(request))
    assert "".join(piece.content for piece in answer) == result.text
    assert [token for piece in answer for token in piece.token_ids] == list(result.token_ids)
    assert answer[-1].final.usage.prompt_tokens == len(prompt)
    tokenized = await stub.Tokenize(pb.TokenizeRequest(messages=request.messages))
    assert list(tokenized.token_ids) == prompt


@pytest.mark.parametrize("n", [3, 700])
async def test_logprobs_of_the_prompt(model, stub, n):
    """Those of a long prompt come in several pieces; none of it is the answer's."""
    text = ("the sea " * 1000)[:n]
    fields = {"temperature": 0, "max_tokens": 0, "prompt_logprobs": 2}
    async with Engine.open(model) as engine:
        expected = (await engine.generate(text, SamplingParams(**fields))).prompt_logprobs
        ids = engine.tokenizer.encode(text)
    answer = await pieces(stub.Generate(generate(text, pb.SamplingParams(**fields))))
    given = [each for piece in answer for each in piece.prompt_logprobs]
    assert [each.token_id for each in given] == ids
    assert not given[0].HasField("logprob")
    for each, right in zip(given[1:], expected[1:], strict=True):
        assert (each.token_id, each.text, each.logprob) == (right.token_id, right.text, right.logprob)
        assert [(top.token_id, top.text, top.logprob) for top in each.top] == list(right.top)
    assert all(len(piece.prompt_logprobs) <= 512 for piece in answer)
    assert not any(piece.token_ids for piece in answer)
    assert answer[-1].final.usage.completion_tokens == 0


async def test_what_was_computed_before_is_not_again(stub):
    request = chat("A question that was asked before, and is longer than a block of the KV cache")
    first, second = [(await pieces(stub.Chat(request)))[-1].final.usage for _ in range(2)]
    assert first.prompt_tokens == second.prompt_tokens
    assert second.cached_tokens >= 16


async def test_embeddings(model, stub):
    async with Engine.open(model) as engine:
        for text in PROMPTS:
            told = await stub.Embed(pb.EmbedRequest(text=text))
            assert np.array_equal(np.float32(told.values), await engine.embed(text))
            assert told.prompt_tokens == len(engine.tokenizer.encode(text))


async def test_stats(stub):
    before = await stub.GetStats(pb.GetStatsRequest())
    await pieces(stub.Generate(generate("Some text that was not seen before")))
    after = await stub.GetStats(pb.GetStatsRequest())
    assert (after.running, after.waiting, after.pinned) == (0, 0, 0)
    assert after.kv_blocks_free == after.kv_blocks > 0
    assert (after.cache_slots, after.experts) == (4, 12)
    assert 0 < after.resident <= 4
    assert after.steps.step_s > before.steps.step_s
    assert after.steps.guesses > before.steps.guesses >= before.steps.guesses_right
    assert (after.steps.prefetch_bytes > 0) == (after.steps.prefetched > 0)
    assert after.steps.prefetch_used_bytes <= after.steps.prefetch_bytes
    assert after.prefix_query_tokens > before.prefix_query_tokens
    assert after.resident_bytes > 1 << 20
    assert after.uptime_s > before.uptime_s


async def test_where_the_time_went(stub):
    final = (await pieces(stub.Generate(generate("Some more text"))))[-1].final
    timings = final.timings
    assert timings.prefill_s > 0
    assert timings.steps.step_s > 0
    assert timings.steps.hits + timings.steps.misses > 0
    assert timings.steps.bytes_read > 0, "a cache of 4 of 12 experts must read"
    assert timings.hit_rate == timings.steps.hits / (timings.steps.hits + timings.steps.misses)


@pytest.mark.parametrize("text", ["The old man", "", "é漢字🎉", "</s>x"])
async def test_tokens_and_back(model, stub, text):
    async with Engine.open(model) as engine:
        tokenizer = engine.tokenizer
        ids = list((await stub.Tokenize(pb.TokenizeRequest(text=text))).token_ids)
        assert ids == tokenizer.encode(text)
        plain = await stub.Tokenize(pb.TokenizeRequest(text=text, add_special_tokens=False))
        assert list(plain.token_ids) == tokenizer.encode(text, special=False)
        for keep in (False, True):
            request = pb.DetokenizeRequest(token_ids=ids, keep_special_tokens=keep)
            assert (await stub.Detokenize(request)).text == tokenizer.decode(ids, skip_special=not keep)


async def test_the_model_is_described(model, stub):
    told = await stub.GetModel(pb.GetModelRequest())
    config = json.loads((model / "config.json").read_text())
    assert told.name == "tiny"
    assert told.has_tokenizer
    assert told.has_chat_template
    assert told.vocab_size == config["vocab_size"]
    assert told.layers == config["num_hidden_layers"]
    assert told.hidden_size == config["hidden_size"]
    assert told.experts_per_layer == config.get("num_experts", config.get("num_local_experts"))
    assert told.experts_per_token == config["num_experts_per_tok"]
    assert list(told.eos_token_ids) == [0]
    assert told.facts["cache_slots"] == "4"
    assert "None" not in told.facts.values()


async def test_request_ids(stub):
    """The client's own comes back in the trailing metadata; without one, or with one that can't be, ours."""
    for given, kept in [("mine-1", True), ("two words", False), (None, False)]:
        metadata = [("x-request-id", given)] if given else None
        call = stub.GetModel(pb.GetModelRequest(), metadata=metadata)
        await call
        told = dict(await call.trailing_metadata())["x-request-id"]
        assert (told == given) == kept
        assert told.startswith("mine-1" if kept else "req-")


async def test_reflection_describes_everything(server):
    """As grpcurl sees it: from reflection alone, without the .proto file, a request is made and answered."""

    def ask() -> tuple[list[str], str]:
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = DescriptorPool(database)
            service = pool.FindServiceByName("mer.v1.Inference")
            from google.protobuf import message_factory

            method = service.FindMethodByName("Tokenize")
            request = message_factory.GetMessageClass(method.input_type)(text="the sea")
            answer = message_factory.GetMessageClass(method.output_type)
            call = channel.unary_unary(
                f"/{service.full_name}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=answer.FromString,
            )
            names = list(database.get_services())
            assert {each.name for each in service.methods} == {
                each.name for each in pb.DESCRIPTOR.services_by_name["Inference"].methods
            }
            return names, list(call(request).token_ids)

    names, ids = await asyncio.to_thread(ask)
    assert set(names) >= {"mer.v1.Inference", "grpc.health.v1.Health"}
    async with connected(server.grpc_port) as stub:
        assert ids == list((await stub.Tokenize(pb.TokenizeRequest(text="the sea"))).token_ids)


@pytest.mark.parametrize(("name", "code"), [("", None), ("mer.v1.Inference", None), ("other", "NOT_FOUND")])
async def test_health(server, name, code):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=name)
        if code is None:
            assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
            return
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Check(request)
        assert error.value.code().name == code


async def test_prompts_stay_out_of_the_log(server, stub):
    call = stub.Chat(chat("a secret of mine"), metadata=[("x-request-id", "look-for-me")])
    await pieces(call)
    line = (await asyncio.to_thread(server.wait_for, "look-for-me")).string
    assert "Chat OK" in line
    assert "prompt_tokens=" in line
    assert "secret" not in "".join(server.lines)
