"""An engine with recurrent states: how much memory they take, what is refused, what is shown."""

from __future__ import annotations

import asyncio
import json

import pytest
from cli_models import mer
from engine_models import GREEDY, opened, prompt
from oracle.make_checkpoints import make

from mer import SamplingParams
from mer.config import EngineConfig
from mer.engine import budget as budgets
from mer.engine.states import IMAGES
from mer.errors import ConfigError
from mer.model.families import load
from mer.streaming.experts import expert_tables
from mer.weights.checkpoint import open_checkpoint

# Of each of two layers: 16 heads of 128 x 128, and three inputs of the convolution; in F32.
STATE = 2 * 4 * (16 * 128 * 128 + 3 * (2 * 2 * 128 + 16 * 128))
HEADS = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_value_heads": 16}
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("states")
    make(path, "qwen3_next", num_hidden_layers=3, **HEADS)
    return path


@pytest.fixture(autouse=True)
def the_program_itself(monkeypatch):
    """It would take more from one test to the next."""
    monkeypatch.setattr(budgets, "resident_bytes", lambda: 100 * MIB)


def measure(path, **settings) -> budgets.Budget:
    checkpoint = open_checkpoint(path)
    architecture = load(checkpoint)
    tables = expert_tables(architecture.experts, path)
    return budgets.measure(checkpoint, architecture, tables, EngineConfig(context=512, **settings))


def test_states_are_counted(model):
    plenty = measure(model, ram="8GiB")
    assert (plenty.max_running, plenty.state_images) == (16, 16 * IMAGES)
    assert plenty.states == 16 * IMAGES * STATE
    assert measure(model, ram="8GiB", max_running=2).states == 2 * IMAGES * STATE
    some = measure(model, ram=plenty.total - plenty.states + 21 * IMAGES * STATE)
    assert some.max_running == 5, "a quarter of what is left"
    assert some.total <= some.ram
    least = measure(model, ram=some.fixed - 4 * IMAGES * STATE + 2 * MIB)
    assert (least.max_running, least.states) == (1, IMAGES * STATE)
    assert least.least < some.ram


async def test_little_memory_for_states(model):
    """Fewer are computed at a time then, and all get the same bytes."""
    prompts = [prompt(20 + n, seed=n) for n in range(6)]
    asked = SamplingParams(temperature=0, max_tokens=10, logprobs=3, ignore_eos=True)
    found, running = [], []
    for ram in ("8GiB", measure(model, ram="8GiB", max_running=1).total):
        async with opened(model, ram=ram) as engine:
            answers = await asyncio.gather(*(engine.generate(ids, asked) for ids in prompts))
            found.append([(each.token_ids, each.logprobs) for each in answers])
            running.append(engine.budget.max_running)
    assert found[0] == found[1]
    assert running[0] == 16
    assert running[1] < 6


async def test_no_prefix_store(model, tmp_path):
    with pytest.raises(ConfigError, match="prefix_store: layers of qwen3_next keep a state"):
        async with opened(model, prefix_store=tmp_path / "store"):
            pass


async def test_a_cancelled_one_gives_its_state_back(model):
    async with opened(model, max_running=1) as engine:
        stream = engine.stream(prompt(30), SamplingParams(max_tokens=400, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await engine.generate(prompt(7), GREEDY)


def test_inspect(model):
    shown = " ".join(mer("inspect", model).stdout.replace("│", " ").split())
    assert "gated delta rule, 16 heads of 128 x 128, in 2 of 3 layers; a request's states 2.06 MiB" in shown
    assert "recurrent states of a request 8.23 MiB" in shown
    facts = json.loads(mer("inspect", model, "--json").stdout)
    assert facts["memory"]["states"] == IMAGES * STATE
