"""Models are exchanged and loaded while they serve: no request fails, memory and descriptors stay."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import threading

import httpx
import pytest
from drafted import always
from engine_models import write_text_model
from http_server import PATIENCE, serving

from mer import Engine, SamplingParams
from mer.api import models as api_models
from mer.api.admin import changed
from mer.api.model import LoadingError, Model, ReloadError
from mer.api.models import Models
from mer.config import EngineConfig
from mer.demo import model_path
from mer.engine import budget as budgets
from mer.engine.sharing import needed

assert always

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
CONFIG = EngineConfig(context=256)


def damaged(path):
    """A copy of the bundled model with one byte of its experts wrong."""
    shutil.copytree(model_path(), path)
    file = path / "experts-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    return path


async def ask(models, name=None):
    async with models.use(models.find(name)) as engine:
        return (await engine.generate("Once upon a time", GREEDY)).token_ids


async def test_a_further_model_is_loaded_when_it_is_asked_for(tmp_path):
    models = Models([Model("demo", model_path(), CONFIG), Model("two", model_path(), CONFIG)])
    await models.open_first()
    assert [each.state for each in models.states()] == ["ready", "unloaded"]
    answers = await asyncio.gather(ask(models), ask(models, "two"), ask(models, "two"))
    assert answers[0] == answers[1] == answers[2]
    assert [(each.state, each.generation) for each in models.states()] == [("ready", 1), ("ready", 1)]
    await models.close(drain=True)


async def until(condition):
    for _ in range(100 * PATIENCE):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


async def test_files_that_are_written_over_in_place_end_the_model_until_it_is_reloaded(tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(model_path(), path)
    models = Models([Model("demo", path, CONFIG)])
    await models.open_first()
    expected = await ask(models)
    file = path / "experts-00001.safetensors"
    good = file.read_bytes()
    file.write_bytes((damaged(tmp_path / "bad") / file.name).read_bytes())
    await models.check_files()
    assert models.first.state == "failed"
    assert "written over" in models.first.error
    await until(lambda: "its checksum is" in models.first.error)
    assert models.first.state == "failed"
    with pytest.raises(LoadingError, match="written over"):
        await ask(models)
    file.write_bytes(good)
    await models.reload(models.first)
    assert (models.first.state, models.first.error) == ("ready", "")
    assert await ask(models) == expected
    await models.close(drain=True)


async def test_a_file_that_was_touched_is_verified_and_the_model_served_again(tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(model_path(), path)
    models = Models([Model("demo", path, CONFIG)])
    await models.open_first()
    expected = await ask(models)
    os.utime(path / "experts-00001.safetensors", ns=(1, 1))
    await models.check_files()
    await until(lambda: models.first.state == "ready")
    assert (models.first.generation, models.first.error, models.first.files_changed) == (2, "", False)
    assert await ask(models) == expected
    await models.close(drain=True)


def within(models):
    """Whether all engines together keep to the budget."""
    return needed(models.budgets, [each.slots for each in models.budgets]) <= models.ram


def half(budget):
    """The `ram` of two such models with caches of a quarter of the experts."""
    return needed([budget] * 2, [budget.experts // 4] * 2)


async def test_what_leaves_has_its_part_of_the_memory_until_it_has_ended():
    models = Models([Model("demo", model_path(), CONFIG)])
    await models.open_first()
    async with models.use(models.first) as old:
        await models.reload(models.first)
        new = models.first.engine
        await models.set_ram(half(old.budget))
        assert within(models)
        assert models.budgets == [old.budget, new.budget]
        assert max(each.slots for each in models.budgets) < old.budget.experts
        before = new.budget.slots
    await until(lambda: len(models.budgets) == 1)
    await until(lambda: new.budget.slots > before)
    assert within(models)
    await models.close(drain=True)


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    path = tmp_path_factory.mktemp("reload") / "longer"
    return write_text_model(path, max_position_embeddings=1 << 15)


async def before_and_after(path, names=("demo",), **settings):
    """Budgets of a model's first engine and of the one that takes its place, while both are there."""
    config = EngineConfig(device="cpu", **settings)
    models = Models([Model(name, path, config) for name in names])
    await models.open_first()
    async with models.use(models.first) as old:
        await models.reload(models.first)
        found = [old.budget, models.first.engine.budget]
        assert models.budgets == found
        assert within(models)
    await until(lambda: len(models.budgets) == 1)
    new = models.first.engine
    assert new.budget.context == found[1].context
    assert new.context == new.budget.longest
    assert within(models)
    await models.close(drain=True)
    return found


async def test_what_is_loaded_anew_has_a_kv_cache_of_the_default_size(longer, monkeypatch):
    """As tests/test_context.py tells, of the memory that the old one's cache could not give."""
    monkeypatch.setattr(budgets, "resident_bytes", lambda: 100 << 20)  # not what pytest holds
    both = await before_and_after(longer, ram="4GiB")
    assert [(each.context, each.longest) for each in both] == [(16 * 4096, 4096)] * 2
    both = await before_and_after(longer, ram="4GiB", context=5008)
    assert [(each.context, each.longest) for each in both] == [(5008, 5008)] * 2
    both = await before_and_after(longer, ("demo", "two"), ram="4GiB")
    assert [each.context for each in both] == [4096, 4096], "others may want the memory"


async def test_memory_is_given_back_while_a_model_is_being_opened(monkeypatch):
    models = Models([Model("demo", model_path(), CONFIG)])
    await models.open_first()
    expected, beside, there, go = await ask(models), Engine.beside, asyncio.Event(), asyncio.Event()

    async def slow(*given, **settings):
        there.set()
        await go.wait()
        return await beside(*given, **settings)

    monkeypatch.setattr(Engine, "beside", staticmethod(slow))
    reloading = asyncio.create_task(models.reload(models.first))
    await there.wait()
    old = models.first.engine
    await asyncio.wait_for(models.set_ram(half(old.budget)), PATIENCE)
    assert old.budget.slots <= old.budget.experts // 4 + 1
    go.set()
    await reloading
    assert within(models)
    assert await ask(models) == expected
    await models.close(drain=True)


@pytest.mark.usefixtures("always")
async def test_draft_engines_come_and_go_under_load(tmp_path):
    """As they are asked for; one that can't draft for the model is refused. No answer is another one."""
    models = Models([Model("demo", model_path(), CONFIG)])
    await models.open_first()
    expected, done = await ask(models), 0
    head = models.first.engine.budget.drafting  # the bundled one

    async def client():
        nonlocal done
        while True:
            assert await ask(models) == expected
            done += 1

    clients = [asyncio.create_task(client()) for _ in range(3)]

    async def answered():
        aim = done + 6
        await until(lambda: done >= aim or any(each.done() for each in clients))
        assert not any(each.done() for each in clients)
        return models.first.engine.snapshot()

    async def change(**given):
        config = changed(models.first.config, {name.replace("_", "-"): text for name, text in given.items()})
        await models.reload(models.first, config=config)

    await change(speculate="off")
    assert (await answered()).drafted == 0
    for _ in range(2):
        await change(speculate="draft", draft_model="demo")
        now = await answered()
        assert now.drafted >= now.accepted > 0
        assert models.first.engine.budget.drafting > head
    other = write_text_model(tmp_path / "other")
    engine = models.first.engine
    with pytest.raises(ReloadError, match="draft_model"):
        await change(draft_model=str(other))
    assert models.first.engine is engine
    await change(draft_model="", speculate="")
    await answered()
    assert models.first.engine.budget.drafting == head
    for each in clients:
        each.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    await models.close(drain=True)


async def test_each_engine_writes_a_trace_of_its_own(tmp_path):
    config = EngineConfig(context=256, trace=tmp_path / "trace.csv")
    models = Models([Model("demo", model_path(), config)])
    await models.open_first()
    for _ in range(2):
        await ask(models)
        await models.reload(models.first)
    await ask(models)
    await models.close(drain=True)
    sizes = {file.name: len(file.read_text().splitlines()) for file in tmp_path.iterdir()}
    assert sorted(sizes) == ["trace.2.csv", "trace.3.csv", "trace.csv"]
    assert len(set(sizes.values())) == 1
    assert sizes["trace.csv"] > 100


async def test_nobody_loads_a_model_past_its_verification(tmp_path, monkeypatch):
    path = tmp_path / "copy"
    shutil.copytree(model_path(), path)
    models = Models([Model("demo", path, CONFIG)])
    await models.open_first()
    expected, verify, waiting = await ask(models), api_models._verify, threading.Event()

    def slow(*given):
        assert waiting.wait(PATIENCE)
        verify(*given)

    monkeypatch.setattr(api_models, "_verify", slow)
    os.utime(path / "experts-00001.safetensors", ns=(1, 1))
    await models.check_files()
    await until(lambda: models.first.state == "reloading")
    asked = asyncio.create_task(ask(models))
    await asyncio.sleep(0.05)
    assert (models.first.engine, models.first.state) == (None, "reloading")
    waiting.set()
    assert await asked == expected
    assert models.first.generation == 2
    await models.close(drain=True)


async def test_files_that_are_replaced_after_they_were_verified_are_refused(tmp_path, monkeypatch):
    path, name = tmp_path / "copy", "experts-00001.safetensors"
    shutil.copytree(model_path(), path)
    bad = damaged(tmp_path / "bad") / name
    models = Models([Model("demo", path, CONFIG)])
    await models.open_first()
    expected, verify = await ask(models), api_models._verify

    def then_replaced(*given):
        verify(*given)
        os.replace(bad, path / name)

    monkeypatch.setattr(api_models, "_verify", then_replaced)
    with pytest.raises(ReloadError, match="its files changed while they were opened"):
        await models.reload(models.first)
    assert await ask(models) == expected
    await models.close(drain=True)


def test_over_the_admin_port(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("operator secret\n")
    with serving("demo", "--context", 256, "--admin-port", 0, "--admin-key-file", keys) as server:
        url = re.search(r"admin endpoints at (\S+)", "".join(server.lines))[1]
        client = httpx.Client(base_url=url, timeout=PATIENCE, headers={"X-Api-Key": "secret"})
        assert httpx.get(f"{url}/admin/models", timeout=PATIENCE).status_code == 401
        assert httpx.get(f"{server.url}/admin/models", timeout=PATIENCE).status_code == 404
        assert client.post("/admin/reload", json={}).json()["model"]["generation"] == 2
        refused = client.post("/admin/reload", json={"path": str(damaged(tmp_path / "bad"))})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_refused")
        assert client.post("/admin/ram", json={"ram": "1KiB"}).status_code == 400
        assert client.post("/admin/ram", json={"ram": "2GiB"}).json()["ram_bytes"] == 2 << 30
        asked = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Once"}, timeout=PATIENCE)
        assert asked.status_code == 200
