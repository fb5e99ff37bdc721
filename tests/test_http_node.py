"""The HTTP API from OpenAI's own JavaScript client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_models import write_text_model
from http_server import serving
from node_packages import needs_node, run_node

from mer import Engine, SamplingParams

ASK = [{"role": "user", "content": "What did the old man say?"}]

pytestmark = needs_node


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("node") / "small"
    return write_text_model(path, chat=True, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def seen(model):
    """What the client saw of a real server."""
    with serving(model, "--context", 2048) as server:
        printed = run_node(Path(__file__).parent / "http_node", "client.mjs", f"{server.url}/v1")
        server.signal()
        assert server.ended() == 0, "requests were left behind"
    return json.loads(printed)


async def test_answers_are_those_of_the_library(seen, model):
    async with Engine.open(model, context=2048) as engine:
        greedy = {"temperature": 0, "ignore_eos": True}
        chat = engine.chat_prompt(ASK)
        result = await engine.generate(chat, SamplingParams(max_tokens=10, logprobs=2, **greedy))
        text = await engine.generate("The sea", SamplingParams(max_tokens=5, temperature=0))
        hidden = engine.spec.hidden
    assert seen["chat"] == seen["stream"] == result.text
    assert seen["several"] == [result.text] * 2
    assert seen["logprobs"] == [each.logprob for each in result.logprobs]
    assert seen["usage"]["completion_tokens"] == seen["streamUsage"]["completion_tokens"] == 10
    assert seen["completion"] == text.text
    assert seen["embeddings"] == [hidden, hidden]
    assert seen["models"] == ["small"]


def test_json_is_what_the_schema_says(seen):
    assert list(seen["json"]) == ["yes"]
    assert type(seen["json"]["yes"]) is bool


def test_errors_and_ends(seen):
    assert seen["error"] == [True, 400, "temperature", "invalid_value"]
    assert seen["aborted"] is True
