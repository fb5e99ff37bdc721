"""The HTTP API as clients see it: a real `mer serve`, asked by the official `openai` client."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import httpx
import jsonschema
import numpy as np
import openai
import pydantic
import pytest
from engine_models import write_text_model
from http_server import PATIENCE, serving

from mer import Engine, SamplingParams

ASK = [{"role": "user", "content": "What did the old man say?"}]
GREEDY = {"model": "small", "temperature": 0, "max_tokens": 10}
# What mer has beyond OpenAI's API.
MORE = {"ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("http") / "small"
    return write_text_model(path, chat=True, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def server(model):
    with serving(model, "--context", 2048, "--threads", 1) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
        yield http


@pytest.fixture(scope="module")
def expected(model):
    """What the library answers."""
    with asyncio.Runner() as runner:
        engine = runner.run(_open(model))

        def ask(prompt=None, **changes):
            params = {"temperature": 0, "max_tokens": 10, "ignore_eos": True} | changes
            tokens = engine.chat_prompt(ASK) if prompt is None else prompt
            return runner.run(engine.generate(tokens, SamplingParams(**params)))

        ask.engine = engine
        ask.embed = lambda prompt: runner.run(engine.embed(prompt))
        yield ask
        runner.run(engine.close())


async def _open(model):
    return await Engine.open(model, context=2048, threads=1)


def test_chat(expected, client):
    result = expected()
    answer = client.chat.completions.create(messages=ASK, extra_body=MORE, **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.model == "small"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", result.text)
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == result.usage.prompt_tokens
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (
        10,
        answer.usage.prompt_tokens + 10,
    )


def test_chat_stream(expected, client):
    result = expected()
    stream = client.chat.completions.create(
        messages=ASK, stream=True, stream_options={"include_usage": True}, extra_body=MORE, **GREEDY
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    *said, last = chunks
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == result.text
    reasons = [chunk.choices[0].finish_reason for chunk in said]
    assert reasons == [None] * (len(said) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in said)
    assert (last.choices, last.usage.completion_tokens) == ([], 10)


def test_stream_on_the_wire(http):
    """Events as they are sent: one line of JSON each, and the mark at the end."""
    body = {"messages": ASK, "max_tokens": 3, "stream": True, "seed": 1}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        chunk = json.loads(event.removeprefix("data: "))
        assert chunk["choices"]
        assert "usage" not in chunk


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(expected, client, stream):
    result = expected(logprobs=3)
    answer = client.chat.completions.create(
        messages=ASK, logprobs=True, top_logprobs=3, stream=stream, extra_body=MORE, **GREEDY
    )
    if stream:
        found = [
            each
            for chunk in answer
            if chunk.choices[0].logprobs
            for each in chunk.choices[0].logprobs.content
        ]
    else:
        found = answer.choices[0].logprobs.content
    assert [each.logprob for each in found] == [each.logprob for each in result.logprobs]
    assert [each.token for each in found] == [each.text for each in result.logprobs]
    assert b"".join(bytes(each.bytes) for each in found).decode(errors="replace") == result.text
    for mine, theirs in zip(found, result.logprobs, strict=True):
        assert [(top.token, top.logprob) for top in mine.top_logprobs] == [
            (text, logprob) for _, text, logprob in theirs.top
        ]


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(expected, client, stream):
    """Each as if asked alone with the next seed."""
    results = [expected(temperature=1.0, seed=seed) for seed in (7, 8, 9)]
    asked = {**GREEDY, "temperature": 1.0, "seed": 7, "n": 3, "stream": stream}
    answer = client.chat.completions.create(messages=ASK, extra_body=MORE, **asked)
    texts = ["", "", ""]
    if stream:
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        texts = [choice.message.content for choice in answer.choices]
        assert answer.usage.completion_tokens == 30
        assert answer.usage.prompt_tokens == results[0].usage.prompt_tokens
    assert texts == [result.text for result in results]


def test_what_a_request_may_ask(expected, client, http):
    """Every parameter arrives: the same as the library says."""
    changes = {
        "temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 3, "presence_penalty": 0.5,
        "frequency_penalty": 0.3, "repetition_penalty": 1.1, "logit_bias": {70: 5.0, 71: -100}, "stop": ["q"],
        "stop_token_ids": [9], "max_tokens": 40, "priority": 2, "timeout": 60.0, "speculative": "off",
    }  # fmt: skip
    result = expected(**changes)
    body = {"messages": ASK, "user": "someone", "max_completion_tokens": 40, **changes, **MORE}
    del body["max_tokens"]
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == result.text
    assert answer["choices"][0]["finish_reason"] == result.finish_reason
    for name in set(changes) - {
        "speculative",
        "priority",
        "timeout",
        "stop_token_ids",
        "min_p",
        "top_k",
        "stop",
    }:
        other = expected(**{key: value for key, value in changes.items() if key != name})
        assert (other.text, other.token_ids) != (result.text, result.token_ids), name


def test_messages_of_all_kinds(client):
    """Parts are joined, a developer is the system, what an answer carried may be sent back."""
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
        },
        {"role": "user", "content": "Yes?", "name": "me"},
        {"role": "assistant", "content": "No.", "refusal": None, "annotations": [], "audio": None},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    plain = [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": "Yes?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ]
    one, other = (
        client.chat.completions.create(messages=each, extra_body=MORE, **GREEDY) for each in (messages, plain)
    )
    assert one.choices == other.choices
    assert one.usage.prompt_tokens == other.usage.prompt_tokens
    again = client.chat.completions.create(
        messages=[*plain, one.choices[0].message.model_dump(), plain[1]], extra_body=MORE, **GREEDY
    )
    assert again.usage.prompt_tokens > one.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_completions(expected, client, http, stream):
    """Several prompts with several answers each, prompt by prompt; texts and token ids."""
    texts = ["The old man", "The sea"]
    ids = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    results = [expected(text, logprobs=2) for text in texts]
    for prompts in (texts, ids):
        answer = client.completions.create(
            prompt=prompts, n=2, logprobs=2, stream=stream, extra_body=MORE, **GREEDY
        )
        got, logprobs = [""] * 4, [[] for _ in range(4)]
        for chunk in answer if stream else [answer]:
            for choice in chunk.choices:
                got[choice.index] += choice.text
                logprobs[choice.index] += choice.logprobs.token_logprobs
        assert got == [results[i // 2].text for i in range(4)]
        assert logprobs == [[each.logprob for each in results[i // 2].logprobs] for i in range(4)]


def test_completion_logprobs_with_echo(expected, client):
    """The prompt's own log-probabilities, as evaluations ask for them, and where each token stands."""
    prompt = "The old man said: café"
    result = expected(prompt, logprobs=2, prompt_logprobs=2)
    answer = client.completions.create(prompt=prompt, echo=True, logprobs=2, extra_body=MORE, **GREEDY)
    (choice,) = answer.choices
    assert choice.text == prompt + result.text
    entries = [*result.prompt_logprobs, *result.logprobs]
    assert choice.logprobs.token_logprobs == [each and each.logprob for each in entries]
    assert choice.logprobs.token_logprobs[0] is None
    for found, each, token in zip(choice.logprobs.top_logprobs, entries, choice.logprobs.tokens, strict=True):
        if each is not None:
            assert found[token] == each.logprob
            assert set(found.values()) == {each.logprob, *(logprob for _, _, logprob in each.top)}
    spelled = [token for token in choice.logprobs.tokens if not token.startswith("bytes:")]
    assert len(spelled) < len(choice.logprobs.tokens), "é is two bytes, and each is a token"
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if offset < len("The old man said: caf"):
            assert choice.text[offset : offset + len(token)] == token
    alone = client.completions.create(
        model="small", prompt=prompt, echo=True, logprobs=0, max_tokens=0, temperature=0
    )
    assert alone.choices[0].text == prompt
    count = len(result.prompt_logprobs)
    assert alone.choices[0].logprobs.token_logprobs == choice.logprobs.token_logprobs[:count]
    assert alone.usage.completion_tokens == 0


def test_default_length_of_completions(client):
    answer = client.completions.create(model="small", prompt="The", temperature=0, extra_body=MORE)
    assert answer.usage.completion_tokens == 16


def test_embeddings(expected, client):
    """As the engine's, of length 1; the client asks for base64 and unpacks it, or for numbers."""
    texts = ["The old man", "the sea"]
    vectors = [expected.embed(text) for text in texts]
    for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="small", input=texts, **form)
        for mine, vector in zip(answer.data, vectors, strict=True):
            found = mine.embedding
            if isinstance(found, str):
                found = np.frombuffer(base64.b64decode(found), "<f4")
            np.testing.assert_allclose(found, vector / np.linalg.norm(vector), rtol=1e-5)
    assert answer.usage.prompt_tokens == sum(len(expected.engine.tokenizer.encode(text)) for text in texts)
    one = client.embeddings.create(model="small", input=expected.engine.tokenizer.encode(texts[1]))
    np.testing.assert_allclose(one.data[0].embedding, answer_of(client, texts[1]), rtol=1e-6)


def answer_of(client, text):
    return client.embeddings.create(model="small", input=text).data[0].embedding


def test_tokenize(expected, http):
    tokenizer = expected.engine.tokenizer
    answer = http.post("/tokenize", json={"prompt": "naïve", "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode("naïve")
    assert answer["token_strs"] == [tokenizer.token_text(token) for token in answer["tokens"]]
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 2048)
    text = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert text == {"prompt": "naïve"}
    chat = http.post("/tokenize", json={"messages": ASK}).json()["tokens"]
    assert chat == expected.engine.chat_prompt(ASK)
    bare = http.post("/tokenize", json={"messages": ASK, "add_generation_prompt": False}).json()["tokens"]
    assert bare == chat[: len(bare)]
    assert len(bare) < len(chat)


def test_models(client):
    (found,) = client.models.list().data
    assert (found.id, found.object, found.max_model_len) == ("small", "model", 2048)
    assert client.models.retrieve("small") == found
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt/5")
    assert (error.value.param, error.value.code) == ("model", "model_not_found")


def test_probes(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json().keys() == {"version"}


def test_many_clients_at_once(expected, client):
    """More than are computed at a time; everybody gets what it would alone."""
    prompts = [f"{i} old men" for i in range(24)]
    results = [expected(prompt) for prompt in prompts]

    def ask(prompt):
        stream = client.completions.create(prompt=prompt, stream=True, extra_body=MORE, **GREEDY)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, prompts)) == [result.text for result in results]


def test_cancelled_stream(expected, client):
    """A client that stops reading harms nobody, and the connection may be used again."""
    endless = {**GREEDY, "max_tokens": 1500}
    with client.chat.completions.create(messages=ASK, stream=True, extra_body=MORE, **endless) as stream:
        next(iter(stream))
    result = expected()
    answer = client.chat.completions.create(messages=ASK, extra_body=MORE, **GREEDY)
    assert answer.choices[0].message.content == result.text


def test_own_timeout(http):
    body = {"prompt": "The", "max_tokens": 1500, "timeout": 0.02, **MORE}
    answer = http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
    assert answer.headers["x-should-retry"] == "false"
    body["timeout"] = 0.3
    answer = http.post("/v1/completions", json={**body, "stream": True})
    assert answer.status_code == 200
    events = answer.text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert "[DONE]" not in answer.text


def test_error_in_a_stream_is_raised_by_the_client(client):
    with pytest.raises(openai.APIError, match="timeout"):
        list(
            client.completions.create(
                model="small", prompt="The", max_tokens=1500, stream=True, extra_body={"timeout": 0.3, **MORE}
            )
        )


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "ages": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_json_by_a_schema(client, stream):
    """A model that knows no JSON writes what the schema says."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    asked = {"messages": ASK, "model": "small", "max_tokens": 300, "seed": 1, "temperature": 0.7}
    answer = client.chat.completions.create(**asked, response_format=form, stream=stream)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    jsonschema.validate(json.loads(text), SCHEMA)


def test_the_client_parses_what_it_asked_for(client):
    class Person(pydantic.BaseModel):
        model_config = {"extra": "forbid"}
        name: Annotated[str, pydantic.Field(max_length=5)]
        old: bool

    answer = client.chat.completions.parse(
        model="small", messages=ASK, response_format=Person, max_tokens=200, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_other_structures(client):
    def ask(**more):
        answer = client.completions.create(
            model="small", prompt="The", max_tokens=100, seed=2, extra_body=more
        )
        return answer.choices[0].text

    assert ask(guided_choice=["sea", "rain"]) in ("sea", "rain")
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", ask(guided_regex=r"[0-9]{4}-[0-9]{2}"))
    assert re.fullmatch(r"(ab)+c", ask(guided_grammar='start: "ab"+ "c"'))
    jsonschema.validate(json.loads(ask(guided_json=SCHEMA)), SCHEMA)
    chat = client.chat.completions.create(
        model="small", messages=ASK, max_tokens=200, seed=1, temperature=0.5,
        response_format={"type": "json_object"},
    )  # fmt: skip
    text = chat.choices[0].message.content
    assert text.startswith("{")
    assert chat.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


def test_the_client_tries_again(tmp_path):
    """What it does by itself with 503 and Retry-After, until there is room."""
    model = write_text_model(tmp_path / "small", max_position_embeddings=1 << 17)
    endless = {"prompt": "men", "max_tokens": 100_000, "stream": True, **MORE}
    with (
        serving(model, "--max-running", 1, "--max-waiting", 1) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=20) as client,
        ThreadPoolExecutor(2) as pool,
    ):

        def ask(i):
            answer = client.completions.create(prompt=f"{i} men", extra_body=MORE, **GREEDY)
            return answer.usage.completion_tokens

        with httpx.stream("POST", f"{server.url}/v1/completions", json=endless, timeout=PATIENCE) as running:
            pieces = running.iter_bytes()  # with which it would be closed
            next(pieces)
            asked = pool.map(ask, range(2))  # of which one waits
            server.wait_for(" 503 ")
        assert list(asked) == [10] * 2
