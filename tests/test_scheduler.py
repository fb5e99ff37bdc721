"""The scheduler by table and, over random lives of many sequences, by what must always hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mer.engine.scheduler import Scheduler, Sequence, blocks_for
from mer.model.kv import BLOCK


def sequence(prompt: int) -> Sequence:
    return Sequence(list(range(prompt)))


def step(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """Schedule, commit, and let each sequence whose logits are there draw a token."""
    chunks = scheduler.schedule()
    drawn = [chunk.sequence for chunk in chunks if chunk.last]
    scheduler.commit(chunks)
    for each in drawn:
        each.tokens.append(0)
    return [(chunk.sequence, chunk.count) for chunk in chunks]


def test_decode_comes_before_prompts_and_prompts_are_cut():
    scheduler = Scheduler(n_blocks=100, step_tokens=10, max_running=8)
    a, b, c = sequence(4), sequence(23), sequence(3)
    for each in (a, b, c):
        scheduler.add(each)
    assert step(scheduler) == [(a, 4), (b, 6)]
    assert step(scheduler) == [(a, 1), (b, 9)]
    assert step(scheduler) == [(a, 1), (b, 8), (c, 1)]
    assert step(scheduler) == [(a, 1), (b, 1), (c, 2)]
    assert step(scheduler) == [(a, 1), (b, 1), (c, 1)]


def test_no_more_than_max_running():
    scheduler = Scheduler(n_blocks=100, step_tokens=10, max_running=2)
    a, b, c = sequence(1), sequence(1), sequence(1)
    for each in (a, b, c):
        scheduler.add(each)
    assert step(scheduler) == [(a, 1), (b, 1)]
    scheduler.remove(a)
    assert step(scheduler) == [(b, 1), (c, 1)]


def test_a_prompt_waits_for_blocks_for_all_of_it():
    scheduler = Scheduler(n_blocks=3, step_tokens=64, max_running=8)
    a, b, c = sequence(BLOCK + 1), sequence(2 * BLOCK), sequence(1)
    for each in (a, b, c):
        scheduler.add(each)
    assert step(scheduler) == [(a, BLOCK + 1)], "c does not overtake b"
    scheduler.remove(a)
    assert step(scheduler) == [(b, 2 * BLOCK), (c, 1)]


def test_the_last_one_gives_up_its_blocks_and_is_computed_again():
    scheduler = Scheduler(n_blocks=3, step_tokens=64, max_running=8)
    a, b = sequence(BLOCK), sequence(BLOCK - 1)
    scheduler.add(a)
    scheduler.add(b)
    assert step(scheduler) == [(a, BLOCK), (b, BLOCK - 1)]
    assert step(scheduler) == [(a, 1), (b, 1)]  # a has two blocks now, b one
    assert step(scheduler) == [(a, 1)], "b needs a second block and was the last to come"
    assert (b.computed, b.blocks, len(b.tokens), scheduler.preemptions) == (0, [], BLOCK + 1, 1)
    scheduler.remove(a)
    assert step(scheduler) == [(b, BLOCK + 1)]
    scheduler.remove(b)
    assert not scheduler
    assert scheduler.pool.free == 3


def test_removing_one_that_waits():
    scheduler = Scheduler(n_blocks=1, step_tokens=4, max_running=1)
    a, b = sequence(1), sequence(1)
    scheduler.add(a)
    scheduler.add(b)
    step(scheduler)
    scheduler.remove(b)
    scheduler.remove(a)
    assert not scheduler


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_always_holds(data):
    n_blocks = data.draw(st.integers(1, 12))
    step_tokens = data.draw(st.integers(1, 40))
    scheduler = Scheduler(
        n_blocks=n_blocks, step_tokens=step_tokens, max_running=data.draw(st.integers(1, 5))
    )
    most = n_blocks * BLOCK
    lives: dict[int, tuple[Sequence, int]] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        prompt = data.draw(st.integers(1, most - 1))
        end = data.draw(st.integers(prompt + 1, most))
        each = sequence(prompt)
        lives[id(each)] = each, end
        scheduler.add(each)
    arrival = list(lives)
    steps = 0
    while lives:
        steps += 1
        assert steps < 5000, "nothing gets done"
        chunks = scheduler.schedule()
        assert chunks
        assert sum(chunk.count for chunk in chunks) <= step_tokens
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        assert len(scheduler.running) <= scheduler.max_running
        held = [block for s, _ in lives.values() for block in s.blocks]
        assert len(set(held)) == len(held), "a block has two holders"
        assert len(held) + scheduler.pool.free == n_blocks
        for chunk in chunks:
            s = chunk.sequence
            assert 0 < chunk.count <= s.pending
            assert len(s.blocks) >= blocks_for(s.computed + chunk.count)
        first = next(i for i in arrival if i in lives)
        assert lives[first][0] in scheduler.running, "the oldest is never set back"
        scheduler.commit(chunks)
        for s in [chunk.sequence for chunk in chunks if not chunk.sequence.pending]:
            s.tokens.append(0)
            if len(s.tokens) == lives[id(s)][1]:
                del lives[id(s)]
                scheduler.remove(s)
    assert not scheduler
    assert scheduler.pool.free == n_blocks
