"""Warm start: what was in memory is read back, and whatever stands in the file, the answers are the same."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from engine_models import GREEDY, opened, prompt
from moe_model import Model, assert_idle, open_reader
from oracle.make_checkpoints import make

from mer import Engine
from mer._ext.cache import POLICIES, ExpertCache
from mer._ext.sweep import Sweep
from mer.weights import formats

SETTINGS = {"warm_start": True, "prefetch": 0, "cache_experts": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of 24 experts in all."""
    path = tmp_path_factory.mktemp("warm") / "model"
    make(path, "qwen3_moe", num_hidden_layers=3)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mer" / "hot"


def wait_until_warm(engine, experts: int) -> None:
    end = time.monotonic() + 60
    while engine._runner.experts.cache.stats()["resident"] < experts:
        assert time.monotonic() < end
        time.sleep(0.01)


async def cold(model):
    async with opened(model, prefetch=0, cache_experts=8) as engine:
        return await engine.generate(prompt(5), GREEDY)


@pytest.mark.parametrize("policy", POLICIES)
async def test_what_was_hot_is_there_before_it_is_asked_for(model, home, policy):
    first = await cold(model)
    async with opened(model, **SETTINGS, cache_policy=policy) as engine:
        assert engine._runner.experts.cache.stats()["resident"] == 0
        await engine.generate(prompt(5), GREEDY)
    (file,) = home.iterdir()
    remembered = {key for key, _ in json.loads(file.read_text())["experts"]}
    assert len(remembered) == 8
    async with opened(model, **SETTINGS, cache_policy=policy) as engine:
        wait_until_warm(engine, 8)
        cache = engine._runner.experts.cache
        assert {key for key in range(24) if cache.state_py(key) == "resident"} == remembered
        warm = await engine.generate(prompt(5), GREEDY)
    assert warm.token_ids == first.token_ids
    assert not list(home.glob("*.part"))


async def test_chances_outlive_the_run(model, home):
    async with opened(model, **SETTINGS) as engine:
        await engine.generate(prompt(5), GREEDY)
    (file,) = home.iterdir()
    before = dict(json.loads(file.read_text())["experts"])
    assert len(set(before.values())) > 1
    async with opened(model, **SETTINGS) as engine:
        wait_until_warm(engine, 8)
        after = engine._runner.experts.cache.chances()
        assert {key: after[key] for key in range(24) if after[key] >= 0} == pytest.approx(before, rel=1e-5)


async def test_a_request_does_not_wait_for_it(model):
    first = await cold(model)
    for _ in range(3):
        async with opened(model, **SETTINGS | {"cache_experts": "100%"}) as engine:
            assert (await engine.generate(prompt(5), GREEDY)).token_ids == first.token_ids


async def test_a_run_that_computed_nothing_forgets_nothing(model, home):
    async with opened(model, **SETTINGS) as engine:
        await engine.generate(prompt(5), GREEDY)
    (file,) = home.iterdir()
    before = file.read_bytes()
    async with Engine.open(model, context=512, **SETTINGS):
        pass
    assert file.read_bytes() == before


BAD = {
    "empty": lambda text: b"",
    "cut": lambda text: text[:-5],
    "bytes": lambda text: bytes(range(256)),
    "nested": lambda text: b"[" * 100_000,
    "a list": lambda text: b"[]",
    "another version": lambda text: text.replace(b'"version": 1', b'"version": 2'),
    "other weights": lambda text: text.replace(b'"weights": "', b'"weights": "0'),
    "no experts": lambda text: text.replace(b"experts", b"expert"),
    "no such expert": lambda text: text.replace(b"[[", b"[[24, 0.5], ["),
    "a negative one": lambda text: text.replace(b"[[", b"[[-1, 0.5], ["),
    "no number": lambda text: text.replace(b"[[", b'[["a", 0.5], ['),
    "one twice": lambda text: text.replace(b"[[", b"[[3, 0.5], [3, 0.5], ["),
    "no chance": lambda text: text.replace(b"[[", b"[[3, NaN], ["),
    "a heat that is none": lambda text: text.replace(b"]]}", b']], "heat": 7}'),
    "a heat above 1": lambda text: text.replace(b"]]}", b']], "heat": [[3, 1.5]]}'),
    "a chance above 1": lambda text: text.replace(b"[[", b"[[3, 1.5], ["),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_file_that_cannot_be_used_is_ignored(model, home, caplog, case):
    async with opened(model, **SETTINGS) as engine:
        first = await engine.generate(prompt(5), GREEDY)
    (file,) = home.iterdir()
    file.write_bytes(BAD[case](file.read_bytes()))
    with caplog.at_level(logging.WARNING, "mer"):
        async with opened(model, **SETTINGS) as engine:
            assert engine._runner.experts.cache.stats()["resident"] == 0
            assert (await engine.generate(prompt(5), GREEDY)).token_ids == first.token_ids
    assert [r.message for r in caplog.records if "warm start" in r.message and "ignored" in r.message]
    assert json.loads(file.read_text())["version"] == 1, "a good one takes its place"


async def test_changed_weights_are_noticed(model, home, caplog):
    async with opened(model, **SETTINGS) as engine:
        await engine.generate(prompt(5), GREEDY)
    os.utime(model / "model.safetensors", ns=(1, 1))
    async with opened(model, **SETTINGS) as engine:
        assert engine._runner.experts.cache.stats()["resident"] == 0
        await engine.generate(prompt(5), GREEDY)
    assert "made with other weights; ignored" in caplog.text


async def test_no_place_for_the_file(model, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    async with opened(model, **SETTINGS) as engine:
        await engine.generate(prompt(5), GREEDY)
    assert "starting cold" in caplog.text
    assert "nothing was remembered" in caplog.text


def test_the_command(model, home):
    command = [sys.executable, "-c", "from mer.cli.main import main; main()", "run", str(model), "--ids"]
    options = [
        "5 6 7",
        "-n",
        "6",
        "--temperature",
        "0",
        "--ignore-eos",
        "--context",
        "64",
        "-q",
        "--warm-start",
    ]
    answers = []
    for _ in range(2):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        answers.append(done.stdout)
    assert answers[0] == answers[1]
    assert len(list(home.iterdir())) == 1


@pytest.fixture(scope="module")
def awkward(tmp_path_factory) -> Model:
    return Model(tmp_path_factory.mktemp("sweep"), [(formats.Q8_0, formats.Q4_0, 96, 160)] * 2)


@pytest.mark.parametrize("backend", ["uring", "preadv", "buffered"])
def test_a_sweep_fills_free_slots_and_evicts_nothing(awkward, backend):
    tables = awkward.tables
    with open_reader(awkward, backend) as reader:
        cache = ExpertCache(tables.total, 10, tables.slot_bytes)
        assert cache.acquire_py(15)[0] == "miss"
        cache.publish_py(15)
        cache.release_py(15)
        sweep = Sweep(cache, reader, tables.reads)
        sweep.run(np.arange(16, dtype=np.int64))
        resident = [e for e in range(16) if cache.state_py(e) == "resident"]
        assert resident == [*range(9), 15]
        assert (sweep.experts, sweep.nbytes) == (9, sum(awkward.length(e) for e in range(9)))
        assert cache.stats()["evictions"] == 0
        assert_idle(cache)
        with pytest.raises(IndexError, match="16"):
            sweep.run(np.array([16], np.int64))


def test_a_sweep_that_meets_a_bad_read_leaves_it_to_others(awkward):
    tables = awkward.tables
    with open_reader(awkward) as reader:
        cache = ExpertCache(tables.total, tables.total, tables.slot_bytes)
        file, offset = (int(part) for part in tables.reads[3, 0, :2])
        reader.set_fault(file, offset, offset + 1, times=1000)
        Sweep(cache, reader, tables.reads).run(np.arange(16, dtype=np.int64))
        assert cache.state_py(3) == "absent"
        assert cache.stats()["resident"] >= 13  # neighbours may share the block
        assert_idle(cache)


def test_a_sweep_that_is_stopped_begins_nothing(awkward):
    tables = awkward.tables
    with open_reader(awkward) as reader:
        cache = ExpertCache(tables.total, tables.total, tables.slot_bytes)
        sweep = Sweep(cache, reader, tables.reads)
        sweep.stop()
        sweep.run(np.arange(16, dtype=np.int64))
        assert cache.stats()["resident"] == 0
