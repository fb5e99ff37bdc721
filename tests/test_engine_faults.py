"""Reads that fail while the engine runs: who needs the expert is told so, all others get the right bytes.

Who needs which expert is taken from transformers' router.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from engine_models import opened, prompt, write_single_choice
from safetensors.numpy import load_file, save_file

from mer import Engine, SamplingParams
from mer.errors import CheckpointError, DeviceReadError, MerError
from mer.model import families

PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True)
PROMPTS = [prompt(3, seed=n) for n in range(12)]
BACKENDS = ("uring", "preadv", "buffered")
FOR_EVER = 1 << 30


@pytest.fixture(scope="module", params=["mixtral", "qwen3_next"])
def made(request, tmp_path_factory):
    """With keys and values alone, and with a recurrent state before the experts that fail."""
    return write_single_choice(tmp_path_factory.mktemp("faults"), PROMPTS, 6, request.param)


@pytest.fixture
def store(made, tmp_path):
    """A copy that a test may damage."""
    path = tmp_path / "store"
    path.mkdir()
    for file in made[0].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def some_expert(needed) -> int:
    """One that a few of the prompts need, but not most."""
    counts = {e: sum(e in each for each in needed) for e in range(16)}
    return next(e for e, count in sorted(counts.items()) if 2 <= count <= 6)


def break_expert(engine: Engine, expert: int, times: int = FOR_EVER, **fault) -> None:
    """Reads of a byte in the middle of this expert fail."""
    runner = engine._runner
    piece = families.load(runner.checkpoint).experts[0].experts[expert].pieces[0]
    middle = piece.offset + piece.nbytes // 2
    runner.reader.set_fault(piece.file, middle, middle + 1, times=times, **fault)


async def answers(engine: Engine):
    """What each prompt gets: a result's content, or an exception."""
    found = await asyncio.gather(*(engine.generate(ids, PARAMS) for ids in PROMPTS), return_exceptions=True)
    return [each if isinstance(each, Exception) else (each.token_ids, each.logprobs) for each in found]


async def right(made):
    async with opened(made[0]) as engine:
        found = await answers(engine)
    assert not any(isinstance(each, Exception) for each in found)
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"step_tokens": 1}, {"context": 32}], ids=["all", "cut", "few-blocks"]
)
@pytest.mark.parametrize("io_backend", BACKENDS)
async def test_exactly_who_needs_it_fails(made, io_backend, settings):
    path, needed = made
    expected, expert = await right(made), some_expert(needed)
    async with opened(path, io_backend=io_backend, cache_experts=2, **settings) as engine:
        break_expert(engine, expert)
        for _ in range(2):
            for n, found in enumerate(await answers(engine)):
                if expert in needed[n]:
                    assert isinstance(found, DeviceReadError), n
                    assert "experts-00001.safetensors" in str(found)
                else:
                    assert found == expected[n]
        engine._runner.reader.clear_faults()
        assert await answers(engine) == expected, "the engine goes on, with the right bytes"


@pytest.mark.parametrize("io_backend", BACKENDS)
async def test_one_error_fails_one_request_alone_and_none_of_a_batch(made, io_backend):
    path, needed = made
    expected, expert = await right(made), some_expert(needed)
    victim = next(n for n, each in enumerate(needed) if expert in each)
    async with opened(path, io_backend=io_backend, cache_experts=2) as engine:
        break_expert(engine, expert, times=1)
        with pytest.raises(DeviceReadError):
            await engine.generate(PROMPTS[victim], PARAMS)
        result = await engine.generate(PROMPTS[victim], PARAMS)
        assert (result.token_ids, result.logprobs) == expected[victim]
        # In a batch each is then computed by itself, and the second read works.
        await engine.generate([1], PARAMS)
        break_expert(engine, expert, times=1)
        assert sum(isinstance(each, Exception) for each in await answers(engine)) <= 1
        assert await answers(engine) == expected


async def test_a_stream_breaks_midway(made):
    """What was there before the error is right, and is there."""
    path, needed = made
    expected, expert = await right(made), some_expert(needed)
    async with opened(path, cache_experts=1) as engine:
        for n, (tokens, _) in enumerate(expected):
            found = []
            stream = engine.stream(PROMPTS[n], PARAMS)
            found += (await anext(stream)).token_ids
            break_expert(engine, expert)
            try:
                async for piece in stream:
                    found += piece.token_ids
            except DeviceReadError:
                assert expert in needed[n]
                assert tuple(found) == tokens[: len(found)]
                assert len(found) < 6
            else:
                assert tuple(found) == tokens
            engine._runner.reader.clear_faults()


@pytest.mark.parametrize("io_backend", BACKENDS)
async def test_short_reads_are_no_error(made, io_backend):
    path, needed = made
    expected, expert = await right(made), some_expert(needed)
    async with opened(path, io_backend=io_backend, cache_experts=2) as engine:
        break_expert(engine, expert, limit=4096, times=3)
        assert await answers(engine) == expected


@pytest.mark.parametrize("io_backend", BACKENDS)
async def test_truncated_while_it_runs(made, store, io_backend):
    expected = await right(made)
    _, needed = made
    file = store / "experts-00001.safetensors"
    whole = file.read_bytes()
    async with Engine.open(store, io_backend=io_backend, cache_experts=1, context=512) as engine:
        extents = [e.pieces[0] for e in families.load(engine._runner.checkpoint).experts[0].experts]
        end = extents[10].offset + 4096
        os.truncate(file, end)
        lost = {e for e, piece in enumerate(extents) if piece.offset + piece.nbytes > end}
        assert lost == set(range(10, 16))
        for n, found in enumerate(await answers(engine)):
            # A file that changes is not read any more; what was in memory may still do for an answer.
            if needed[n] & lost or isinstance(found, Exception):
                assert isinstance(found, CheckpointError), n
                assert file.name in str(found)
                assert "truncated" in str(found) or "written over" in str(found)
            else:
                assert found == expected[n]
    _restore(file, whole)
    async with opened(store, io_backend=io_backend, cache_experts=1) as engine:
        assert await answers(engine) == expected


def _restore(file: Path, content: bytes) -> None:
    """The same file again, not a new one of its name."""
    with open(file, "r+b") as again:
        again.write(content)
        os.fsync(again.fileno())


async def test_deleted_while_it_runs(made, store):
    """An open file stays; opening it anew says what is missing."""
    expected = await right(made)
    async with opened(store, cache_experts=1) as engine:
        (store / "experts-00001.safetensors").unlink()
        assert await answers(engine) == expected
    with pytest.raises(CheckpointError, match=r"experts|safetensors"):
        await Engine.open(store)


@pytest.mark.parametrize("value", [np.nan, np.inf])
async def test_weights_that_are_no_numbers(made, tmp_path, value):
    """A token whose embedding is damaged fails the requests that hold it, and leaves no trace in others."""
    expected = await right(made)
    path = tmp_path / "hf"
    shutil.copytree(made[0].parent / "hf", path)
    tensors = load_file(path / "model.safetensors")
    seen = {token for tokens, _ in expected for token in tokens} | {t for ids in PROMPTS for t in ids}
    bad = next(token for token in range(211) if token not in seen)
    tensors["model.embed_tokens.weight"][bad] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    async with opened(path) as engine:
        others = asyncio.create_task(answers(engine))
        for ids in ([bad], [4, bad, 5]):
            with pytest.raises(MerError, match="NaN"):
                await engine.generate(ids, PARAMS)
        assert await others == expected
        assert await answers(engine) == expected


async def test_shorter_than_its_header_says(store):
    file = store / "experts-00001.safetensors"
    for size in (file.stat().st_size - 1, file.stat().st_size // 2, 100, 0):
        os.truncate(file, size)
        with pytest.raises(CheckpointError, match=file.name):
            await Engine.open(store)
    assert not [name for name in os.listdir("/proc/self/fd") if _target(name).endswith(file.name)]


def _target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""
