"""Keys and values on disk: the same bytes as computed ones, across restarts, and never anybody else's."""

from __future__ import annotations

import asyncio
import json
import os
import shutil

import pytest
from engine_models import check_idle, opened
from oracle.make_checkpoints import make
from prefix_stores import LONG, PARAMS, ask, quiet, take_turns

from bench import prefix
from mer import Engine
from mer.errors import ConfigError

FAMILIES = ("qwen3_moe", "deepseek_v3", "mixtral")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    paths = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, path in paths.items():
        make(path, family, num_hidden_layers=2)
    return paths


@pytest.fixture
def model(models):
    return models["qwen3_moe"]


@pytest.mark.parametrize("io_backend", ["uring", "preadv", "buffered"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_it_survives_a_restart(models, family, io_backend, tmp_path):
    path, settings = models[family], {"prefix_store": tmp_path / "store", "io_backend": io_backend}
    expected, _, _ = await ask(path, prefix_cache=False)
    assert (await ask(path, **settings))[:2] == (expected, [0, 0, 0])
    found = await ask(path, **settings)
    assert found[:2] == (expected, [96, 80, 64])
    # In other chunks, with other neighbours, f16 instead of f32: another store.
    found = await ask(path, **settings, step_tokens=9, cache_experts=3)
    assert found[:2] == (expected, [96, 80, 64])
    assert (await ask(path, **settings, kv_dtype="f16"))[1] == [0, 0, 0]


async def test_what_falls_out_of_memory_comes_back(model, tmp_path):
    """Memory for one prompt at a time."""
    expected, _, _ = await ask(model, prefix_cache=False)
    async with opened(model, context=112, prefix_store=tmp_path) as engine:
        await take_turns(engine, expected)


async def test_damage_is_a_miss(model, tmp_path):
    expected, _, _ = await ask(model, prefix_store=tmp_path)
    blocks, index = tmp_path / "prefix.blocks", tmp_path / "prefix.index"
    whole = blocks.read_bytes(), index.read_bytes()
    slot = len(whole[0]) // 17  # 6 + 5 + 5 blocks of prompts, 1 of an answer's

    def restore() -> None:
        blocks.write_bytes(whole[0])
        index.write_bytes(whole[1])

    async def damaged(hits):
        answers, cached, _ = await ask(model, prefix_store=tmp_path)
        assert answers == expected
        assert sum(cached) in hits
        restore()

    await damaged([240])
    flipped = bytearray(whole[0])
    for at in range(5 * slot + 7, len(flipped), slot * 4):
        flipped[at] ^= 1
    blocks.write_bytes(flipped)
    await damaged(range(1, 239))
    blocks.write_bytes(whole[0][: slot * 7 + 11])
    await damaged(range(1, 239))
    blocks.write_bytes(b"")
    await damaged([0])
    blocks.write_bytes(whole[0][slot:] + whole[0][:slot])  # all in another's slot
    await damaged([0])
    blocks.unlink()
    await damaged([0])
    index.unlink()
    await damaged([0])
    for cut in (0, 10, 40, 41, 100):
        index.write_bytes(whole[1][:cut])
        await damaged(range(240))
    index.write_bytes(whole[1][:40] + os.urandom(24 * 40))
    await damaged([0])
    index.write_bytes(os.urandom(1000))
    await damaged([0])
    await damaged([240])


async def test_a_failing_device_is_a_miss(model, tmp_path):
    expected, _, _ = await ask(model, prefix_store=tmp_path)
    async with opened(model, prefix_store=tmp_path) as engine:
        engine._store._reader.set_fault(0, 0, 1 << 40, times=1 << 30)
        results = [await engine.generate(ids, PARAMS) for ids in LONG]
        assert [(each.token_ids, each.logprobs) for each in results] == expected
        assert sum(each.usage.cached_tokens for each in results) == 0
        await quiet(engine)
        engine._store._reader.clear_faults()


async def test_a_disk_that_is_full_is_only_a_warning(model, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    expected, _, _ = await ask(model, prefix_store=tmp_path)
    assert "No space left" in caplog.text
    monkeypatch.undo()
    answers, cached, _ = await ask(model, prefix_store=tmp_path)
    assert (answers, cached) == (expected, [0, 0, 0])


async def test_never_that_of_another_model(models, tmp_path):
    for family in FAMILIES:
        assert (await ask(models[family], prefix_store=tmp_path))[1] == [0, 0, 0]
    # The same shapes, other weights.
    make(tmp_path / "other", "qwen3_moe", num_hidden_layers=2, seed=1)
    expected, _, _ = await ask(tmp_path / "other")
    await ask(models["qwen3_moe"], prefix_store=tmp_path)
    answers, cached, _ = await ask(tmp_path / "other", prefix_store=tmp_path)
    assert (answers, cached) == (expected, [0, 0, 0])
    # Changed in place, the time put back: nothing but the content tells.
    model = shutil.copytree(models["qwen3_moe"], tmp_path / "copy")
    for file in model.iterdir():
        os.utime(file, ns=(0, 0))
    await ask(model, prefix_store=tmp_path)
    assert (await ask(model, prefix_store=tmp_path))[1] == [96, 80, 64]
    for file in (tmp_path / "other").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
        os.utime(model / file.name, ns=(0, 0))
    answers, cached, _ = await ask(model, prefix_store=tmp_path)
    assert (answers, cached) == (expected, [0, 0, 0])


async def test_the_size_is_kept_and_the_last_used_stay(model, tmp_path):
    await ask(model, LONG[:1], prefix_store=tmp_path)
    slot = (tmp_path / "prefix.blocks").stat().st_size // 6
    shutil.rmtree(tmp_path)
    settings = {"prefix_store": tmp_path, "prefix_store_size": 8 * slot, "context": 112}
    for _ in range(2):
        await ask(model, LONG, **settings)
        assert (tmp_path / "prefix.blocks").stat().st_size <= 8 * slot
    cached = (await ask(model, LONG[2:], **settings))[1]
    assert cached[0] > 0
    # Made smaller: what is beyond is given back.
    settings["prefix_store_size"] = 3 * slot + 1
    await ask(model, LONG[:1], **settings)
    assert (tmp_path / "prefix.blocks").stat().st_size <= 3 * slot
    with pytest.raises(ConfigError, match="prefix_store_size 100"):
        await Engine.open(model, prefix_store=tmp_path, prefix_store_size=100)


async def test_directories_that_cannot_be_used(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"prefix_store .*file"):
        await Engine.open(model, prefix_store=tmp_path / "file")
    with pytest.raises(ConfigError, match="prefix_cache"):
        await Engine.open(model, prefix_store=tmp_path, prefix_cache=False)
    async with Engine.open(model, prefix_store=tmp_path / "used"):
        with pytest.raises(ConfigError, match="another process uses it"):
            await Engine.open(model, prefix_store=tmp_path / "used")
    async with Engine.open(model, prefix_store=tmp_path / "used"):
        pass


async def test_closing_without_draining_keeps_what_is_there(model, tmp_path):
    engine = await Engine.open(model, prefix_store=tmp_path, context=512)
    await engine.generate(LONG[0], PARAMS)
    tasks = [asyncio.create_task(engine.generate(ids, PARAMS)) for ids in LONG]
    await asyncio.sleep(0)
    await asyncio.gather(engine.close(drain=False), engine.close(), engine.close(drain=False))
    await asyncio.gather(*tasks, return_exceptions=True)
    check_idle(engine)
    assert (await ask(model, LONG[:1], prefix_store=tmp_path))[1] == [96]


def test_the_benchmark(model, tmp_path, monkeypatch, capsys):
    """It checks itself that what was read gives the same tokens."""
    given = [str(model), "--lengths", "16,40", "--repeat", "2", "--store", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["prefix", *given, "--json", str(tmp_path / "found.json")])
    prefix.main()
    assert "times faster" in capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())["lengths"]
    assert [row["tokens"] for row in rows] == [16, 32]
    assert all(row["computed_s"] > 0 < row["read_s"] for row in rows)
