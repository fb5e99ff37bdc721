"""Images of recurrent states: who has which, over random lives of sequences; where a prefix is taken up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_scheduler import sequence, step

from mer.engine.scheduler import Scheduler, Sequence
from mer.engine.states import IMAGES
from mer.model.kv import BLOCK


def make(**more) -> Scheduler:
    return Scheduler(**{"n_blocks": 100, "step_tokens": 64, "max_running": 4, "n_images": 12} | more)


@given(data=st.data())
def test_what_always_holds(data):
    """What is written to images, and who reads which: always the state behind its own tokens."""
    n_blocks, running = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    scheduler = make(
        n_blocks=n_blocks,
        step_tokens=data.draw(st.integers(running, 40)),
        max_running=running,
        n_images=running * data.draw(st.integers(2, 4)),
        prefix_cache=data.draw(st.booleans()),
    )
    content: dict[int, list[int]] = {}
    lives: dict[Sequence, int] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        prompt = data.draw(st.integers(1, n_blocks * BLOCK - 1))
        each = sequence(
            prompt,
            data.draw(st.integers(0, 1)),
            priority=data.draw(st.integers(0, 1)),
            wants=data.draw(st.sampled_from(["last", "last", "last", "hidden"])),
        )
        lives[each] = data.draw(st.integers(prompt + 1, n_blocks * BLOCK))
        scheduler.add(each)
    steps, paused = 0, set()
    while lives:
        steps += 1
        assert steps < 5000, "nothing gets done"
        event = "" if steps > 100 else data.draw(st.sampled_from(["", "", "", "pause", "resume", "cancel"]))
        who = data.draw(st.sampled_from(list(lives))) if event else None
        if event == "pause" and who not in paused:
            scheduler.pause(who)
            paused.add(who)
        elif event == "resume" or steps > 100:
            for each in [who] if who else list(paused):
                scheduler.resume(each)
                paused.discard(each)
        elif event == "cancel":
            scheduler.remove(who)
            paused.discard(who)
            del lives[who]
            continue
        chunks = scheduler.schedule()
        assert chunks or len(paused) == len(lives)
        written: list[int] = []
        for chunk in chunks:
            s = chunk.sequence
            now, after, kept, kept_at = s.images.move(s.computed)
            assert (now < 0) == (s.computed == 0)
            assert now < 0 or content[now] == s.tokens[: s.computed]
            assert kept < 0 or 0 < kept_at < chunk.count
            written += [image for image in (after, kept) if image >= 0]
        assert len(set(written)) == len(written)
        assert not set(written) & {image for s in lives for image in s.images.now}, "someone's state"
        if event == "resume":  # the step fails, and its chunks are computed one by one
            for image in written:
                content[image] = [-1]
        for chunk in chunks:
            s = chunk.sequence
            _, after, kept, kept_at = s.images.move(s.computed)
            content[after] = s.tokens[: s.computed + chunk.count]
            if kept >= 0:
                content[kept] = s.tokens[: s.computed + kept_at]
            scheduler.commit([chunk])
        for chunk in chunks:
            s = chunk.sequence
            if s.computed == len(s.tokens):
                s.tokens.append(0)
                if s.wants == "hidden" or len(s.tokens) >= lives[s]:
                    scheduler.remove(s)
                    del lives[s]
        held = {image for s in lives for image in (*s.images.now, *s.images.next, *s.images.kept)}
        assert len(held) + scheduler.states.pool.free == scheduler.states.pool.n_blocks
    assert scheduler.states.pool.free == scheduler.states.pool.n_blocks
    assert scheduler.pool.free == n_blocks


def run(scheduler: Scheduler, each: Sequence, answer: int = 0) -> int:
    """Compute a prompt and an answer to the end: how much of the prompt was there."""
    scheduler.add(each)
    for _ in range(100):
        step(scheduler)
        if len(each.tokens) - each.computed == 1 and answer <= 1:
            break
        answer -= each.computed + 1 == len(each.tokens)
    scheduler.remove(each)
    return each.cached


def test_where_a_prefix_is_taken_up():
    """At the last full block of a prompt, nowhere before it; and at the last full block of its answer."""
    scheduler = make()
    assert run(scheduler, sequence(50), answer=20) == 0
    assert run(scheduler, sequence(50)) == 48
    assert run(scheduler, sequence(60)) == 48
    assert run(scheduler, sequence(47)) == 0, "that is before the last block of all of them"
    assert run(scheduler, sequence(49)) == 48
    answered = sequence(50)
    answered.tokens += [0] * 30
    assert run(scheduler, answered) == 64


def test_a_common_beginning_is_found_by_the_third():
    """The first does not know how far others will begin like it; the second leaves a snapshot there."""
    scheduler = make(step_tokens=1000)
    chats = [sequence(100 + n) for n in range(4)]
    for n, each in enumerate(chats):
        each.tokens += [5000 + n] * 50
    assert run(scheduler, chats[0]) == 0
    scheduler.add(chats[1])
    assert [count for _, count in step(scheduler) + step(scheduler)] == [96, 55], (
        "a step ends where they part"
    )
    scheduler.remove(chats[1])
    assert run(scheduler, chats[2]) == 96
    scheduler.add(chats[3])
    assert step(scheduler) == [(chats[3], 57)], "and nothing more is to be left there"
    scheduler.remove(chats[3])


def test_a_short_common_beginning_is_not_worth_a_step():
    scheduler = make(step_tokens=1000)
    chats = [[*range(63), *[5000 + n] * 90] for n in range(3)]
    for tokens in chats:
        assert run(scheduler, each := Sequence(tokens)) == 0
        assert not each.images.branch


def test_the_same_prompt_at_once_waits_for_the_first():
    scheduler = make()
    all_of_it = [sequence(70) for _ in range(3)]
    for each in all_of_it:
        scheduler.add(each)
    assert step(scheduler) == [(all_of_it[0], 64)]
    assert step(scheduler) == [(all_of_it[0], 6), (all_of_it[1], 6), (all_of_it[2], 6)]
    assert [each.cached for each in all_of_it] == [0, 64, 64]


def test_an_answer_keeps_one_snapshot():
    """More would push out those of other prompts."""
    scheduler = make(max_running=1, n_images=5)
    assert run(scheduler, sequence(20, 1)) == 0
    assert run(scheduler, sequence(20, 2), answer=60) == 0
    assert run(scheduler, sequence(20, 1)) == 16
    scheduler = make(max_running=1, n_images=IMAGES)
    answered = sequence(20)
    assert run(scheduler, sequence(20), answer=60) == 0
    answered.tokens += [0] * 60
    assert (run(scheduler, sequence(20)), run(scheduler, answered)) == (16, 64)


@pytest.mark.parametrize("n_images", [2, 3])
def test_few_images(n_images):
    """Two are enough for one that runs; who waits or is paused gives its own up."""
    scheduler = make(max_running=1, n_images=n_images)
    a, b = sequence(40, 1), sequence(40, 2)
    scheduler.add(a)
    step(scheduler)
    scheduler.pause(a)
    scheduler.add(b)
    for _ in range(3):
        step(scheduler)
    assert b.computed == 42
    assert (a.computed, a.images.now, a.blocks) == (
        (0, [], []) if n_images == 2 else (40, a.images.now, a.blocks)
    )
    scheduler.remove(b)
    scheduler.resume(a)
    for _ in range(2):
        step(scheduler)
    assert a.computed >= 41
