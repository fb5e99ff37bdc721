"""Files that are written over in place while they are read: no token comes of what is half of each."""

from __future__ import annotations

import os
import shutil

import pytest
from http_server import asking

from mer import Engine, SamplingParams
from mer.demo import model_path
from mer.engine import runner
from mer.errors import CheckpointError

GREEDY = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(model_path(), tmp_path / "demo")


def write_over(file):
    """Noise in place of every expert, beginning behind the header."""
    with open(file, "r+b") as opened:
        opened.seek(4096 * 4)
        opened.write(os.urandom(os.path.getsize(file) - 4096 * 4))


@pytest.mark.parametrize("io", ["auto", "preadv", "buffered"])
async def test_no_token_comes_of_it(model, io):
    async with Engine.open(model, context=512) as engine:
        expected = (await engine.generate("Once upon a time", GREEDY)).token_ids
    async with Engine.open(model, context=512, cache_experts="15%", io_backend=io) as engine:
        seen = []

        async def read():
            async for delta in engine.stream("Once upon a time", GREEDY):
                seen.extend(delta.token_ids)
                if len(seen) == 5:
                    write_over(model / "experts-00001.safetensors")

        with pytest.raises(CheckpointError, match=r"experts-00001\.safetensors was written over"):
            await read()
        assert tuple(seen) == expected[: len(seen)]
        assert len(seen) < len(expected)
        with pytest.raises(CheckpointError, match="was written over"):
            await engine.generate("Once upon a time", GREEDY)


async def test_nor_while_the_model_is_opened(model, monkeypatch):
    load_dense = runner.load_dense

    def then_changed(*given):
        dense = load_dense(*given)
        os.utime(model / "dense.safetensors")
        return dense

    monkeypatch.setattr(runner, "load_dense", then_changed)
    held = []
    for _ in range(6):
        with pytest.raises(CheckpointError, match=r"dense\.safetensors was written over"):
            await Engine.open(model, context=512)
        held.append(len(os.listdir("/proc/self/fd")))
    assert held[-1] <= held[0] + 2  # the last error may keep a descriptor; a leak is one each time


async def test_others_put_in_their_place_are_not_looked_at(model):
    async with Engine.open(model, context=512, cache_experts="15%") as engine:
        expected = await engine.generate("Once upon a time", GREEDY)
        other = model / "other"
        shutil.copy(model / "experts-00001.safetensors", other)
        write_over(other)
        os.replace(other, model / "experts-00001.safetensors")
        again = await engine.generate("Once upon a time", GREEDY)
        assert again.token_ids == expected.token_ids


async def test_clients_are_told_to_try_again(model):
    async with Engine.open(model, context=512, cache_experts="15%") as engine, asking(engine) as http:
        body = {"prompt": "Once", "max_tokens": 20, "ignore_eos": True}
        assert (await http.post("/v1/completions", json=body)).status_code == 200
        write_over(model / "experts-00001.safetensors")
        answer = await http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "files_changed")
        assert answer.headers["Retry-After"] == "2"
