"""The scheduler by table and, over random lives of many sequences, by what must always hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mer.engine.blocks import blocks_for, extend_keys
from mer.engine.scheduler import AGEING, Load, Scheduler, Sequence
from mer.model.kv import BLOCK


def sequence(prompt: int, kind: int = 0, **more) -> Sequence:
    """Those of one kind begin with the same tokens."""
    return Sequence([1000 * kind + i for i in range(prompt)], **more)


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
    a, b, c = sequence(4, 1), sequence(23, 2), sequence(3, 3)
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
    a, b, c = sequence(BLOCK + 1, 1), sequence(2 * BLOCK, 2), sequence(1, 3)
    for each in (a, b, c):
        scheduler.add(each)
    assert step(scheduler) == [(a, BLOCK + 1)], "c does not overtake b"
    scheduler.remove(a)
    assert step(scheduler) == [(c, 1), (b, 2 * BLOCK)]


def test_the_last_one_gives_up_its_blocks_and_is_computed_again():
    scheduler = Scheduler(n_blocks=3, step_tokens=64, max_running=8)
    a, b = sequence(BLOCK, 1), sequence(BLOCK - 1, 2)
    scheduler.add(a)
    scheduler.add(b)
    assert step(scheduler) == [(a, BLOCK), (b, BLOCK - 1)]
    assert step(scheduler) == [(a, 1), (b, 1)]  # a has two blocks now, b one
    assert step(scheduler) == [(a, 1)], "b needs a second block and was the last to come"
    assert (b.computed, b.blocks, len(b.tokens), scheduler.preemptions) == (0, [], BLOCK + 1, 1)
    scheduler.remove(a)
    assert step(scheduler) == [(b, 1)], "its first block was still there"
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


def test_priority_and_ageing():
    scheduler = Scheduler(n_blocks=100, step_tokens=4, max_running=1)
    running = sequence(1, 1)
    scheduler.add(running)
    step(scheduler)
    low, middle, high = sequence(1, 2, priority=1), sequence(1, 3), sequence(1, 4)
    for each in (low, middle, high):
        scheduler.add(each)
    order = []
    scheduler.remove(running)
    for n in range(AGEING + 3):
        [(each, _)] = step(scheduler)
        order.append(each)
        scheduler.remove(each)
        scheduler.add(sequence(1, 5 + n))
    assert order[:2] == [middle, high]
    assert order.index(low) == AGEING - 1, "those that come so much later do not overtake it any more"


def test_a_more_urgent_one_takes_the_place_of_another():
    scheduler = Scheduler(n_blocks=100, step_tokens=8, max_running=1)
    slow, urgent = sequence(20, 1, priority=1), sequence(3, 2)
    scheduler.add(slow)
    assert step(scheduler) == [(slow, 8)]
    scheduler.add(urgent)
    assert step(scheduler) == [(urgent, 3)]
    assert slow.computed == 8, "there was room for its blocks"
    scheduler.remove(urgent)
    assert step(scheduler) == [(slow, 8)]
    scheduler.add(sequence(1, 3, priority=1))
    assert step(scheduler) == [(slow, 4)], "an equal one waits"


def test_a_more_urgent_one_takes_the_blocks_of_another():
    scheduler = Scheduler(n_blocks=2, step_tokens=64, max_running=2)
    slow, urgent = sequence(20, 1, priority=1), sequence(25, 2)
    scheduler.add(slow)
    assert step(scheduler) == [(slow, 20)]
    scheduler.add(urgent)
    assert step(scheduler) == [(urgent, 25)]
    assert (slow.blocks, slow.computed) == ([], 0)
    scheduler.remove(urgent)
    assert step(scheduler) == [(slow, 21)]


def test_a_paused_one_gives_way_and_comes_back():
    scheduler = Scheduler(n_blocks=3, step_tokens=64, max_running=1)
    a, b = sequence(17, 1), sequence(10, 2)
    scheduler.add(a)
    scheduler.add(b)
    assert step(scheduler) == [(a, 17)]
    scheduler.pause(a)
    assert step(scheduler) == [(b, 10)]
    assert a.computed == 17, "nobody needed its blocks"
    scheduler.resume(a)
    assert step(scheduler) == [(b, 1)], "it comes earlier, but has no place"
    scheduler.remove(b)
    assert step(scheduler) == [(a, 1)]
    scheduler.pause(a)
    c = sequence(20, 3)
    scheduler.add(c)
    assert step(scheduler) == [(c, 20)]
    assert (a.blocks, a.computed) == ([], 0)
    scheduler.remove(c)
    assert step(scheduler) == []
    assert scheduler
    scheduler.resume(a)
    assert step(scheduler) == [(a, 19 - BLOCK)], "its first block was still there"


def test_deadlines():
    scheduler = Scheduler(n_blocks=3, step_tokens=64, max_running=1)
    a, b, c = sequence(1, 1, deadline=7.5), sequence(1, 2, deadline=3.0), sequence(1, 3)
    assert scheduler.next_deadline is None
    for each in (a, b, c):
        scheduler.add(each)
    assert scheduler.next_deadline == 3.0
    assert scheduler.expired(2.9) == []
    assert scheduler.expired(3.0) == [b]
    scheduler.remove(b)
    assert (scheduler.next_deadline, scheduler.expired(7.6)) == (7.5, [a])
    scheduler.remove(a)
    assert scheduler.next_deadline is None


def test_a_prefix_is_shared():
    scheduler = Scheduler(n_blocks=20, step_tokens=64, max_running=4)
    a, b, c = sequence(40), sequence(40), sequence(32)
    scheduler.add(a)
    scheduler.add(b)
    assert step(scheduler) == [(a, 40)], "b waits for what a computes"
    assert step(scheduler) == [(a, 1), (b, 8)]
    assert a.blocks[:2] == b.blocks[:2]
    assert a.blocks[2] != b.blocks[2]
    assert (a.cached, b.cached) == (0, 32)
    assert scheduler.pool.free == 16
    scheduler.remove(a)
    scheduler.remove(b)
    assert (scheduler.pool.free, scheduler.pool.cached) == (20, 2)
    scheduler.add(c)
    assert step(scheduler) == [(c, BLOCK)], "the last token is always computed"
    assert c.cached == BLOCK
    assert scheduler.pool.cached == 0, "what c computed was here already, and took its place"
    assert (scheduler.hit_tokens, scheduler.query_tokens) == (48, 112)


def test_a_key_stands_for_all_tokens_before_it():
    """The same tokens behind other ones have other keys and values."""
    scheduler = Scheduler(n_blocks=20, step_tokens=64, max_running=4)
    same = list(range(BLOCK))
    a, b = Sequence([1] * BLOCK + same + [5]), Sequence([2] * BLOCK + same + [5])
    other = Sequence(list(a.tokens))
    scheduler.add(a)
    step(scheduler)
    scheduler.add(b)
    scheduler.add(other)
    assert step(scheduler) == [(a, 1), (other, 1), (b, 2 * BLOCK + 1)]
    assert len({*a.keys, *b.keys}) == 4
    elsewhere = Scheduler(n_blocks=20, step_tokens=64, max_running=4, root=b"another model")
    elsewhere.add(c := Sequence(list(a.tokens)))
    assert not {*a.keys} & {*c.keys}


def test_who_wants_all_logits_shares_nothing_and_gets_few_tokens_a_step():
    scheduler = Scheduler(n_blocks=20, step_tokens=64, max_running=5)
    a, b, c = sequence(40), sequence(22, wants="all"), sequence(40, wants="hidden")
    scheduler.add(a)
    assert step(scheduler) == [(a, 40)]
    scheduler.add(b)
    scheduler.add(c)
    assert step(scheduler) == [(a, 1), (b, 4), (c, 40)]
    scheduler.remove(c)
    assert [count for _, count in step(scheduler)] == [1, 4]
    assert (b.cached, c.cached) == (0, 0)


def test_without_a_prefix_cache():
    scheduler = Scheduler(n_blocks=20, step_tokens=64, max_running=4, prefix_cache=False)
    a, b = sequence(20), sequence(20)
    scheduler.add(a)
    scheduler.add(b)
    assert step(scheduler) == [(a, 20), (b, 20)]
    scheduler.remove(a)
    assert (scheduler.pool.cached, scheduler.hit_tokens, scheduler.query_tokens) == (0, 0, 0)


def test_the_end_of_a_prefix_goes_first():
    dropped = []
    scheduler = Scheduler(n_blocks=3, step_tokens=64, max_running=4)
    scheduler.pool.dropped = lambda key, block: dropped.append(key)
    a, b = sequence(48, 1), sequence(17, 2)
    scheduler.add(a)
    step(scheduler)
    scheduler.remove(a)
    scheduler.add(b)
    assert step(scheduler) == [(b, 17)]
    assert dropped == [a.keys[2], a.keys[1]]
    assert scheduler.pool.match(a.keys) == 1


class Content:
    """What each block holds: the tokens up to its end, as whoever computes them would write them.

    And what the disk holds.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, list[tuple[int, ...] | None]] = {}
        self.disk: dict[bytes, list[tuple[int, ...] | None]] = {}

    def write(self, s: Sequence, count: int) -> None:
        for position in range(s.computed, s.computed + count):
            block = self.blocks.setdefault(s.blocks[position // BLOCK], [None] * BLOCK)
            block[position % BLOCK] = tuple(s.tokens[: position + 1])

    def spill(self, key: bytes, block: int) -> None:
        self.disk[key] = list(self.blocks[block])

    def load(self, load: Load, count: int) -> None:
        for key, block in list(zip(load.keys, load.blocks, strict=True))[:count]:
            self.blocks[block] = list(self.disk[key])

    def __contains__(self, key: bytes) -> bool:
        return key in self.disk

    def check(self, s: Sequence) -> None:
        for position in range(s.computed):
            found = self.blocks[s.blocks[position // BLOCK]][position % BLOCK]
            assert found == tuple(s.tokens[: position + 1]), "keys and values of something else"


def test_what_is_being_read_is_lost_with_the_rest():
    scheduler = Scheduler(n_blocks=4, step_tokens=64, max_running=2, store=(content := Content()))
    a = sequence(2 * BLOCK + 1)
    extend_keys(a.keys, a.tokens)
    content.disk = {key: [] for key in a.keys}
    scheduler.add(a)
    assert scheduler.schedule() == []
    (load,) = scheduler.take_loads()
    scheduler.restart()
    scheduler.loaded(load, 2)
    assert scheduler.pool.match(a.keys) == 0
    assert scheduler.schedule() == []
    (load,) = scheduler.take_loads()
    scheduler.loaded(load, 2)
    assert step(scheduler) == [(a, 1)]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_always_holds(data):
    n_blocks = data.draw(st.integers(1, 12))
    step_tokens = data.draw(st.integers(1, 40))
    scheduler = Scheduler(
        n_blocks=n_blocks,
        step_tokens=step_tokens,
        max_running=data.draw(st.integers(1, 5)),
        prefix_cache=data.draw(st.booleans()),
        store=(content := Content()),
    )
    if data.draw(st.booleans()):
        scheduler.pool.dropped = content.spill
    most = n_blocks * BLOCK
    loads: list[Load] = []
    lives: dict[Sequence, int] = {}
    paused: set[Sequence] = set()
    lost: set[Load] = set()
    for _ in range(data.draw(st.integers(1, 8))):
        prompt = data.draw(st.integers(1, most - 1))
        end = data.draw(st.integers(prompt + 1, most))
        each = sequence(
            prompt,
            data.draw(st.integers(0, 2)),
            priority=data.draw(st.integers(0, 1)),
            wants=data.draw(st.sampled_from(["last", "last", "last", "all"])),
        )
        lives[each] = end
        scheduler.add(each)
    drawn = data.draw(st.integers(0, 1))  # whether answers are the same
    calm = data.draw(st.booleans())  # nobody is paused or cancelled
    passed: set[Sequence] = set()  # while they waited for a prefix; who took their place may keep it
    steps = 0
    while lives:
        steps += 1
        assert steps < 5000, "nothing gets done"
        event = (
            ""
            if calm or steps > 200
            else data.draw(st.sampled_from(["", "", "pause", "resume", "cancel", "lost"]))
        )
        if event:
            who = data.draw(st.sampled_from(list(lives)))
            if event == "pause" and who not in paused:
                scheduler.pause(who)
                paused.add(who)
            elif event == "resume":
                scheduler.resume(who)
                paused.discard(who)
            elif event == "cancel":
                scheduler.remove(who)
                paused.discard(who)
                assert not who.blocks
                del lives[who]
            elif event == "lost":  # after these were read
                lost |= set(loads)
                scheduler.restart()
                content.blocks.clear()
        if steps > 200:
            for who in paused:
                scheduler.resume(who)
            paused.clear()
        while loads and (steps > 200 or data.draw(st.booleans())):
            load = loads.pop(0)
            count = data.draw(st.integers(0, len(load.keys)))
            if load not in lost:
                content.load(load, count)
            scheduler.loaded(load, count)
        chunks = scheduler.schedule()
        loads += scheduler.take_loads()
        assert chunks or loads or len(paused) == len(lives)
        assert sum(chunk.count for chunk in chunks) <= step_tokens
        assert sum(chunk.rows for chunk in chunks) <= scheduler.max_running
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        assert len(scheduler.running) <= scheduler.max_running
        places = [*scheduler.waiting, *scheduler.running, *scheduler.paused]
        assert len(places) == len(set(places)) == len(lives)
        assert paused == set(scheduler.paused)
        held = {block for s in [*lives, *loads] for block in s.blocks}
        assert len(held) + scheduler.pool.free == n_blocks
        written = [chunk.sequence.blocks[chunk.sequence.computed // BLOCK] for chunk in chunks]
        assert len(set(written)) == len(written), "two write to one block"
        for chunk in chunks:
            s = chunk.sequence
            assert s not in paused
            assert 0 < chunk.count <= s.pending
            assert len(s.blocks) >= blocks_for(s.computed + chunk.count)
            content.check(s)
            content.write(s, chunk.count)
        ready = scheduler.waiting + scheduler.running
        if ready and calm and not content.disk:
            first = min(ready, key=lambda s: s.place)
            begun = [r.keys[:1] for r in [*scheduler.running, *loads]]
            passed |= {s for s in scheduler.waiting if s.keys and s.keys[:1] in begun}
            assert first in scheduler.running or first in passed, "the first one is never set back"
        scheduler.commit(chunks)
        for s in [chunk.sequence for chunk in chunks if not chunk.sequence.pending]:
            s.wants = "last"
            s.tokens.append(7 if drawn else -len(s.tokens) - int(id(s) % 1000))
            if len(s.tokens) == lives[s]:
                del lives[s]
                scheduler.remove(s)
    for load in loads:
        assert scheduler
        scheduler.loaded(load, 0)
    assert not scheduler
    assert scheduler.pool.free == n_blocks
