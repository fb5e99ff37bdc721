"""Dense models: nothing to stream, and everything else as with experts."""

from __future__ import annotations

import json

import pytest
from cli_models import mer
from engine_models import GREEDY, convert_to, opened, prompt
from oracle.make_checkpoints import make

from mer.api.metrics import Metrics
from mer.engine import budget as budgets
from mer.errors import BudgetError, CheckpointError, ConfigError
from mer.weights.checkpoint import open_checkpoint

PROMPT = prompt(30)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "llama"
    make(path, "llama")
    return path


async def test_no_part_of_an_engine_is_for_experts(model):
    async with opened(model) as engine:
        assert engine._runner.experts is None
        budget = engine.budget
        assert (budget.slots, budget.slot, budget.experts, budget.cache) == (0, 0, 0, 0)
        result = await engine.generate(PROMPT, GREEDY)
        steps = result.timings.steps
        assert steps.step_s > 0
        assert (steps.hits, steps.misses, steps.bytes_read, steps.expert_s, steps.io_wait_s) == (0,) * 5
        assert result.timings.hit_rate == 1
        assert engine.facts()["prefetch_depth"] == 0
        now = engine.snapshot()
        assert (now.experts, now.resident, now.pinned, now.evictions) == (0, 0, 0, 0)
        assert b"mer_experts 0.0" in Metrics(engine, "dense").render()[0]


async def test_settings_for_experts_change_nothing(model, tmp_path, monkeypatch):
    """And it is said that they do; but one that asks for a file of what there is not is refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers = set()
    for settings in {}, {"cache_experts": 3, "prefetch": 0}, {"cache_experts": "50%", "warm_start": True}:
        async with opened(model, **settings) as engine:
            answers.add((await engine.generate(PROMPT, GREEDY)).token_ids)
            told = engine.facts()["advice"] or ""
            for name in "cache_experts", "warm_start":
                assert (f"--{name.replace('_', '-')}" in told) == (name in settings)
    assert len(answers) == 1
    run = "run", str(model), "1 2 3", "--ids", "-n", "2", "--cache-experts", "25%"
    assert "--cache-experts did nothing: the model is dense" in mer(*run).stderr
    assert not list(tmp_path.rglob("*.json"))
    with pytest.raises(ConfigError, match="trace: this is a dense model"):
        async with opened(model, trace=tmp_path / "trace.csv"):
            pass


async def test_the_least_memory(model, monkeypatch):
    """Enough is what the error names, too little what it says; the reason is that nothing can be streamed."""
    monkeypatch.setattr(budgets, "resident_bytes", lambda: 100 << 20)  # that of pytest may grow meanwhile
    with pytest.raises(BudgetError, match=r"dense model.*nothing to stream.*--context") as caught:
        async with opened(model, ram=1 << 20):
            pass
    least = int(str(caught.value).split("at least ")[1].split(" MiB")[0].replace(",", "")) << 20
    async with opened(model, ram=least) as engine:
        assert engine.budget.total <= least
    with pytest.raises(BudgetError):
        async with opened(model, ram=least // 2):
            pass


async def test_profile(model, tmp_path):
    async with opened(model, profile=tmp_path / "profile.json") as engine:
        await engine.generate(PROMPT, GREEDY)
    events = json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {"attend", "feed", "logits", "layer 2"} <= names
    assert not {"route", "experts", "read"} & names


def test_commands(model, tmp_path):
    """What they say of a dense model."""

    def said(*words):
        done = mer(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    assert "dense: none has experts" in said("inspect", model)[0]
    facts = json.loads(said("inspect", model, "--ram", "1MiB", "--json")[0])
    assert facts["parameters"] == facts["active_parameters"]
    assert [(row["what"], row["runs"]) for row in facts["memory"]["budgets"]] == [
        ("as given", False),
        ("the least that works", True),
    ]
    assert "model.safetensors" in said("doctor", model, "--block", "4096")[0]
    assert "the model is dense" in said("run", model, "--ids", "1 2 3", "-n", "3")[1]
    store = tmp_path / "store"
    written, notes = said("convert", model, store, "--experts", "q4_0")
    assert "--experts changes nothing" in notes
    assert "q8_0" in written
    assert "checksum is right" in said("verify", store)[0]
    # A second time nothing is rounded again unasked.
    written, notes = said("convert", store, tmp_path / "again")
    assert "second time" not in notes
    assert (tmp_path / "again/dense.safetensors").read_bytes() == (store / "dense.safetensors").read_bytes()


def test_a_store_without_experts(model, tmp_path):
    """One file; a store that has lost its experts is still told from it."""
    store = convert_to(model, tmp_path / "dense", None, None)
    assert [file.name for file in open_checkpoint(store).files] == ["dense.safetensors"]
    make(tmp_path / "sparse", "mixtral")
    other = convert_to(tmp_path / "sparse", tmp_path / "store", None, None)
    (other / "experts-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"experts-00001.safetensors is missing"):
        open_checkpoint(other)
