"""The size of the KV cache where nobody asks for one."""

from __future__ import annotations

import asyncio

import pytest
from engine_models import GREEDY, opened, prompt, runnable, write_text_model
from oracle.family_cases import LONGROPE
from oracle.make_checkpoints import make

from mer import Engine, EngineConfig, SamplingParams
from mer.engine import budget as budgets
from mer.engine.runner import Runner
from mer.engine.sharing import needed, survey
from mer.errors import ConfigError, RequestError
from mer.model.families import load
from mer.streaming.experts import expert_tables
from mer.weights.checkpoint import open_checkpoint

SHORT, LONG = 64, 1 << 15  # positions of the models
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("context") / "small", max_position_embeddings=SHORT)


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    path = tmp_path_factory.mktemp("context") / "longer"
    return write_text_model(path, max_position_embeddings=LONG)


def measure(path, *, alone=False, **settings) -> budgets.Budget:
    checkpoint = open_checkpoint(path)
    architecture = load(checkpoint)
    tables = expert_tables(architecture.experts, path)
    config = EngineConfig(**settings)
    return budgets.measure(checkpoint, architecture, tables, config, process=100 * MIB, alone=alone)


@pytest.mark.parametrize(
    ("running", "tokens"), [(1, SHORT), (3, 3 * SHORT), (16, 16 * SHORT), (64, 4096), (1000, 4096)]
)
def test_room_for_all_that_run(model, running, tokens):
    assert measure(model, ram="4GiB", max_running=running).context == tokens


def test_a_longer_context_has_no_more(longer):
    assert measure(longer, ram="4GiB").context == 4096
    assert measure(longer, ram="4GiB", context=1 << 14).context == 1 << 14


@pytest.mark.parametrize(("running", "tokens"), [(1, 4096), (3, 3 * 4096), (16, 16 * 4096)])
def test_who_is_alone_has_room_for_all_that_run(longer, running, tokens):
    found = measure(longer, ram="4GiB", max_running=running, alone=True)
    assert (found.context, found.longest) == (tokens, 4096)
    assert measure(longer, ram="4GiB", max_running=running, context=5000, alone=True).longest == 5008


def test_of_what_is_left_once_all_experts_are_there(longer, model, monkeypatch):
    """Half of it, and nothing while one has no slot: an engine that streams has what it has anyway."""
    for path in longer, model:
        plain, plenty = measure(path, ram="4GiB"), measure(path, ram="4GiB", max_running=100, alone=True)
        assert plenty.context == 100 * plain.longest
        everything = budgets.with_page_tables(plain.total)
        more = plenty.total - plain.total
        before = 0
        for ram in (plain.floor, everything - plain.slot, everything - 1, everything, everything + more,
                    everything + 2 * more, everything + 3 * more):  # fmt: skip
            found = measure(path, ram=ram, max_running=100, alone=True)
            without = measure(path, ram=ram, max_running=100)
            assert (found.slots, found.longest) == (without.slots, without.longest)
            assert found.fits == without.fits
            left = budgets.usable(ram) - without.total
            assert 0 <= found.total - without.total <= max(0, left // 2)
            if found.slots < found.experts:
                assert found.context == without.context
            assert found.context >= before
            before = found.context
        assert found.context == plenty.context
        assert measure(path, ram=everything + more, max_running=100, alone=True).context < plenty.context
    monkeypatch.setattr(budgets, "uses_gpu", lambda config: True)
    assert measure(longer, ram="4GiB", alone=True).context == 4096, "a GPU's memory is not told"


def test_what_was_asked_for(model):
    assert measure(model, ram="4GiB", context=32).context == 32
    assert measure(model, ram="4GiB", context=16 * SHORT).context == 16 * SHORT
    with pytest.raises(ConfigError, match="context 1040: 16 requests of this model's 64 positions"):
        measure(model, ram="4GiB", context=16 * SHORT + 16)


def test_never_at_the_price_of_experts(model):
    """From the least that works on, a budget has as many slots as with a single context."""
    several, one = measure(model, ram="4GiB"), measure(model, ram="4GiB", context=SHORT)
    assert (several.context, one.context) == (16 * SHORT, SHORT)
    assert several.slots == one.slots == several.experts
    enough = budgets.with_page_tables(several.total)
    for ram, tokens in (
        (one.floor, SHORT),
        (budgets.with_page_tables(one.total), SHORT),
        (enough - one.slot, SHORT),
        (enough, 16 * SHORT),
    ):
        given, single = measure(model, ram=ram), measure(model, ram=ram, context=SHORT)
        assert given.fits
        assert (given.context, given.slots) == (tokens, single.slots)
        assert (given.slots == given.experts) == (ram != one.floor)
    assert measure(model, ram=one.least // 2).least == one.least, "the least is that of a single context"


def test_nor_of_requests_that_run_at_a_time(tmp_path):
    """Where each has a recurrent state."""
    make(tmp_path / "hf", "qwen3_next", max_position_embeddings=SHORT)
    path = runnable(tmp_path / "hf", "qwen3_next")
    plenty = measure(path, ram="4GiB")
    for ram in range(measure(path, ram="4GiB", context=SHORT).least, plenty.total, MIB):
        given, single = measure(path, ram=ram), measure(path, ram=ram, context=SHORT)
        assert (given.slots, given.max_running) == (single.slots, single.max_running)


def test_what_comes_in_the_place_of_another(longer):
    """The same rule, of what is left beside all but the old one's cache: both fit, whatever the memory."""
    plain, plenty = measure(longer, ram="4GiB"), measure(longer, ram="4GiB", alone=True)
    twice = budgets.with_page_tables(plain.total + plenty.fixed - plenty.interpreter)
    more = plenty.total - plain.total
    before = 0
    for ram in (plain.least, twice - 1, twice, twice + more // 2, twice + 2 * more, twice + 3 * more):
        old = measure(longer, ram=ram, alone=True)
        new = survey(longer, EngineConfig(ram=ram), old.interpreter, [old])
        assert survey(longer, EngineConfig(ram=ram), old.interpreter).context == 4096
        assert (new.slots, new.longest) == (new.experts, 4096) or new.context == 4096
        least = [min(each.least_slots, each.slots) for each in (old, new)]
        assert needed([old, new], least) <= ram or ram < twice
        left = budgets.usable(ram - (old.fixed - old.interpreter)) - plain.total
        assert 0 <= new.total - plain.total <= max(0, left // 2) or new.context == 4096
        assert before <= new.context <= old.context
        before = new.context
    assert before == plenty.context == 16 * 4096
    small = survey(longer, EngineConfig(ram=twice + more), plain.interpreter, [plenty])
    assert 4096 < small.context < plenty.context
    assert survey(longer, EngineConfig(ram=1 << 32), 0, []).context == plenty.context, "nobody is there"
    asked = EngineConfig(ram=1 << 32, context=5008)
    assert survey(longer, asked, 0, [plenty]).context == 5008


@pytest.fixture
def the_program_itself(monkeypatch):
    """That of pytest may take more than all of an engine."""
    monkeypatch.setattr(budgets, "resident_bytes", lambda: 100 * MIB)


@pytest.mark.usefixtures("the_program_itself")
async def test_an_engine_that_is_alone(longer):
    """A request has as much room as beside others, more of them have it at the same time."""
    for opening, tokens in ((Engine.open, 16 * 4096), (Engine.beside, 4096)):
        async with opening(longer, EngineConfig(ram="4GiB", device="cpu")) as engine:
            assert (engine.context, engine.budget.context) == (4096, tokens)
            assert engine.snapshot().kv_blocks == tokens // 16
            with pytest.raises(RequestError, match="4097 tokens; 4096 is the most here") as error:
                await engine.generate([1] * 4097, GREEDY)
            assert ("`context`" in str(error.value)) == (tokens > 4096)


@pytest.mark.usefixtures("the_program_itself")
def test_longrope_goes_by_what_a_request_may_have(tmp_path):
    """Else an answer would depend on how much memory there is."""
    rope = LONGROPE | {"original_max_position_embeddings": 4096}
    make(tmp_path, "phimoe", max_position_embeddings=1 << 17, rope_parameters=rope)
    ropes = []
    for context in None, 4096, 4112:
        runner = Runner.open(tmp_path, EngineConfig(ram="4GiB", device="cpu", context=context), alone=True)
        assert (runner.budget.context > 4096) == (context != 4096)
        ropes.append(runner.spec.rope)
        runner.close()
    assert ropes[0] == ropes[1]
    assert ropes[0].long == ropes[2] != ropes[0]


async def test_streams_of_a_whole_context_run_at_the_same_time(model):
    """Each has its own limit, and nobody gives blocks up for another."""
    asked = SamplingParams(temperature=0, ignore_eos=True)  # to the end of the context
    prompts = [prompt(20, seed) for seed in range(8)]
    async with opened(model, context=None) as engine:
        assert (engine.context, engine.budget.context) == (SHORT, 16 * SHORT)
        alone = [await engine.generate(ids, asked) for ids in prompts]
        steps = engine.view().steps
        engine.pause()
        tasks = [asyncio.create_task(engine.generate(ids, asked)) for ids in prompts]
        while engine.snapshot().waiting < len(tasks):  # noqa: ASYNC110 (it happens elsewhere)
            await asyncio.sleep(0.001)
        engine.resume()
        together = await asyncio.gather(*tasks)
        assert [each.token_ids for each in together] == [each.token_ids for each in alone]
        assert {each.usage.total_tokens for each in together} == {SHORT}
        assert engine.snapshot().preemptions == 0
        assert engine.view().steps - steps < 2 * (SHORT - 20), "they took turns"
        with pytest.raises(RequestError, match="64 is the most here"):
            await engine.generate(prompt(SHORT + 1), GREEDY)
