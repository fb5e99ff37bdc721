"""The gRPC API from another language: Node, with the .proto file and nothing else of mer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from engine_models import write_text_model
from http_server import serving

from mer import Engine, SamplingParams

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "tests/grpc_node"
NODE, NPM = shutil.which("node"), shutil.which("npm")

pytestmark = pytest.mark.skipif(NODE is None or NPM is None, reason="Node is not installed")


def node_modules() -> Path:
    """A directory with what the client needs, kept from run to run."""
    wanted = (CLIENT / "package.json").read_bytes()
    kept = Path(tempfile.gettempdir()) / f"mer-node-{os.getuid()}-{hashlib.sha256(wanted).hexdigest()[:12]}"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as made:
            (Path(made) / "package.json").write_bytes(wanted)
            subprocess.run(
                [str(NPM), "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"],
                cwd=made,
                check=True,
                timeout=300,
            )
            partial = kept.with_suffix(f".{os.getpid()}")
            shutil.copytree(made, partial)
            partial.rename(kept)
    return kept / "node_modules"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("node") / "tiny", chat=True)


@pytest.fixture(scope="module")
def seen(model):
    """What the client saw of a real server."""
    with serving(model, "--grpc-port", 0, "--context", 512) as server:
        done = subprocess.run(
            [str(NODE), CLIENT / "client.js", ROOT / "protos/mer/v1/inference.proto",
             f"127.0.0.1:{server.grpc_port}"],
            env={**os.environ, "NODE_PATH": str(node_modules())}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        server.signal()
        assert server.ended() == 0, "requests were left behind"
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
