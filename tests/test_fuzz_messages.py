"""Messages that make no sense: two thousand by tests/fuzz_messages.py, some hundred to a real server."""

import random
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from engine_models import write_text_model
from grpc_client import served
from messages import KINDS, changed, seeds

from mer.v1 import inference_pb2 as pb

SCRIPT = Path(__file__).with_name("fuzz_messages.py")
# What a server may say to them; anything else is an error of its own.
TOLD = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION,
}  # fmt: skip


def test_what_becomes_of_messages(tmp_path):
    pytest.importorskip("atheris", reason="has no wheel for this Python")
    words = [sys.executable, str(SCRIPT), "--runs", "2000"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 2000 runs" in done.stderr


def test_a_schema_that_is_nested_without_end_is_refused():
    from mer import SamplingParams
    from mer.engine.structure import Structure
    from mer.errors import RequestError

    for schema in ("[" * 5000, '{"a":' * 5000):
        with pytest.raises(RequestError, match="nested too deeply"):
            SamplingParams(structure=Structure.json_schema(schema))


async def test_a_server_that_gets_them_goes_on(tmp_path):
    draw = random.Random(4)
    model = write_text_model(tmp_path, chat=True)
    async with served(model, context=64) as (stub, engine, _):
        methods = {
            pb.GenerateRequest: stub.Generate, pb.ChatRequest: stub.Chat, pb.TokenizeRequest: stub.Tokenize,
            pb.DetokenizeRequest: stub.Detokenize, pb.EmbedRequest: stub.Embed,
        }  # fmt: skip
        sound = [each for each in seeds() if KINDS[each[0]] in methods]
        codes = []
        for _ in range(250):
            data = draw.choice(sound)
            for _ in range(draw.randrange(1, 4)):
                data = changed(data, draw)
            kind = KINDS[data[0] % len(KINDS)]
            if kind not in methods:
                continue
            call = methods[kind](kind.FromString(data[1:]), timeout=5)
            try:
                if hasattr(call, "__aiter__"):
                    async for _ in call:
                        pass
                else:
                    await call
                codes.append((grpc.StatusCode.OK, data))
            except grpc.aio.AioRpcError as error:
                codes.append((error.code(), data))
        assert [each for each in codes if each[0] not in TOLD] == []
        codes = [code for code, _ in codes]
        assert grpc.StatusCode.OK in codes
        assert grpc.StatusCode.INVALID_ARGUMENT in codes
        assert engine.failure == ""
