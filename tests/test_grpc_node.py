"""The gRPC API from another language: Node, with the .proto file and nothing else of mer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_models import write_text_model
from http_server import serving
from node_packages import needs_node, run_node

from mer import Engine, SamplingParams

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "tests/grpc_node"

pytestmark = needs_node


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("node") / "tiny", chat=True)


@pytest.fixture(scope="module")
def seen(model):
    """What the client saw of a real server."""
    with serving(model, "--grpc-port", 0, "--context", 512) as server:
        printed = run_node(
            CLIENT, "client.js", ROOT / "protos/mer/v1/inference.proto", f"127.0.0.1:{server.grpc_port}"
        )
        server.signal()
        assert server.ended() == 0, "requests were left behind"
    return json.loads(printed)


async def test_answers_are_those_of_the_library(seen, model):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    async with Engine.open(model) as engine:
        answer = await engine.generate("é漢字", params)
        turn = await engine.generate(engine.chat_prompt([{"role": "user", "content": "Hi"}]), params)
        other = await engine.generate("the sea", params)
        ids = engine.tokenizer.encode("the sea")
    given = seen["generate"]
    assert "".join(piece["text"] for piece in given["pieces"]) == answer.text
    assert [token for piece in given["pieces"] for token in piece["token_ids"]] == list(answer.token_ids)
    assert given["pieces"][-1]["final"]["finish_reason"] == "FINISH_REASON_LENGTH"
    assert given["pieces"][-1]["final"]["usage"]["completion_tokens"] == 12
    assert (given["code"], given["request_id"]) == (0, "from-node")
    assert "".join(piece["content"] for piece in seen["chat"]["pieces"]) == turn.text
    assert seen["session"]["texts"]["a"] == other.text
    assert seen["tokens"]["token_ids"] == ids


def test_streams_are_cancelled(seen):
    assert seen["cancelled"]["code"] == 1
    assert 3 <= len(seen["cancelled"]["pieces"]) < 500
    assert seen["session"]["ends"] == {"a": "FINISH_REASON_LENGTH", "b": "CANCELLED"}
    assert seen["session"]["code"] == 0


def test_errors_have_their_codes(seen):
    assert seen["wrong"]["code"] == 3
    assert "top_p must be a number from 0 to 1" in seen["wrong"]["details"]
    assert seen["wrong"]["request_id"].startswith("req-")
    assert seen["late"]["code"] == 4


def test_the_model_is_described(seen):
    assert seen["model"]["name"] == "tiny"
    assert seen["model"]["has_chat_template"] is True
