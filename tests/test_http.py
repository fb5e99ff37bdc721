"""The HTTP API as clients see it: a real `mer serve`, asked by the official `openai` client."""

from __future__ import annotations

import openai
import pytest
from engine_models import write_text_model
from http_server import serving

from mer import Engine, SamplingParams

ASK = [{"role": "user", "content": "What did the old man say?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(
        tmp_path_factory.mktemp("http") / "small", chat=True, max_position_embeddings=4096
    )


@pytest.fixture(scope="module")
def server(model):
    with serving(model, "--context", 2048, "--threads", 1) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def expected(model, **changes):
    async with Engine.open(model, context=2048) as engine:
        params = {"temperature": 0, "max_tokens": 10, "ignore_eos": True} | changes
        return await engine.generate(engine.chat_prompt(ASK), SamplingParams(**params))


async def test_chat(model, client):
    result = await expected(model)
    answer = client.chat.completions.create(
        model="small", messages=ASK, temperature=0, max_tokens=10, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].message.content == result.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == result.usage.prompt_tokens
    assert answer.usage.completion_tokens == 10
