"""The expert cache in one thread: every step against a plain model of it, and what it refuses."""

from __future__ import annotations

import gc
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bench.policy import NextUse, Trace, Visit
from mer._ext.cache import ACQUIRED, POLICIES, STATES, ExpertCache
from mer.errors import ConfigError

EXPERTS = 12
LAYERS = 3
PAGE = 4096
COUNTS = ("hits", "misses", "busy", "full", "evictions", "failures")


class CacheMachine(RuleBasedStateMachine):
    """Random calls, sensible or not. The model: each expert, who holds it, what the policy knows."""

    experts = st.integers(0, EXPERTS - 1)

    @initialize(slots=st.integers(1, 5), policy=st.sampled_from(sorted(POLICIES)), huge_pages=st.booleans())
    def start(self, slots: int, policy: str, huge_pages: bool) -> None:
        self.cache = ExpertCache(EXPERTS, slots, PAGE, policy=policy, n_layers=LAYERS, huge_pages=huge_pages)
        self.policy = policy
        self.next_use = NextUse(Trace(LAYERS, EXPERTS // LAYERS, []))
        self.wanted: set[int] = set()  # at their layer's next turn
        self.slots = slots
        self.state: dict[int, str] = {}  # absent experts are not in it
        self.slot: dict[int, int] = {}
        self.pins: Counter[int] = Counter()
        self.protected: set[int] = set()
        self.recent: list[int] = []  # of those that have a slot, the least recently acquired first
        self.counts: Counter[str] = Counter()
        self.bytes: dict[int, int] = {}  # by slot, what was last written there

    def use(self, expert: int) -> None:
        if expert in self.recent:
            self.recent.remove(expert)
        self.recent.append(expert)

    def drop(self, expert: int) -> None:
        del self.state[expert], self.slot[expert]
        self.recent.remove(expert)

    def evictable(self) -> list[int]:
        return [
            e
            for e in self.recent
            if self.state[e] == "resident" and not self.pins[e] and e not in self.protected
        ]

    def expected(self, expert: int) -> float:
        """Layers until it is wanted."""
        size = EXPERTS // LAYERS
        turn = (expert // size - self.next_use._layer - 1) % LAYERS + 1
        return turn if expert in self.wanted else float(self.next_use.scores()[expert])

    def victim(self, expert: int, early: bool) -> int | None:
        """Whom this one's policy evicts for it, exactly."""
        candidates = self.evictable()
        if self.policy == "lru":
            return candidates[0] if candidates else None
        if early:
            candidates = [e for e in candidates if self.expected(e) > self.expected(expert)]
        return max(sorted(candidates), key=self.expected, default=None)

    @rule(layer=st.integers(0, LAYERS - 1), chosen=st.sets(st.integers(0, EXPERTS // LAYERS - 1), min_size=1))
    def visit(self, layer: int, chosen: set[int]) -> None:
        ids = np.array([sorted(chosen)], np.int32)
        self.cache.visit_py(layer, ids)
        self.next_use.visit(Visit(True, 0, layer, ids[0].astype(np.int64), np.zeros(len(chosen))))
        self.wanted -= {e for e in range(EXPERTS) if e // (EXPERTS // LAYERS) == layer}

    @rule(expert=experts, early=st.booleans())
    def acquire(self, expert: int, early: bool = False) -> None:
        if early:
            self.wanted.add(expert)
        got, slot = (self.cache.acquire_early_py if early else self.cache.acquire_py)(expert)
        found = self.state.get(expert)
        if found is None:
            if len(self.state) == self.slots:
                victim = self.victim(expert, early)
                if victim is None:
                    assert (got, slot) == ("full", None)
                    self.counts["full"] += 1
                    return
                assert slot == self.slot[victim]
                self.drop(victim)
                self.counts["evictions"] += 1
            assert got == "miss"
            assert slot in set(range(self.slots)) - set(self.slot.values())
            self.slot[expert] = slot
        else:
            assert got == {"resident": "hit", "loading": "busy", "failed": "miss"}[found]
            assert slot == self.slot[expert]
        if got == "miss":
            self.state[expert] = "loading"
        self.counts[{"hit": "hits", "miss": "misses", "busy": "busy"}[got]] += 1
        self.pins[expert] += 1
        self.use(expert)

    @rule(expert=experts, value=st.integers(1, 255))
    def publish(self, expert: int, value: int) -> None:
        if self.state.get(expert) != "loading":
            with pytest.raises(ValueError, match=f"expert {expert} is .*, not loading"):
                self.cache.publish_py(expert)
            return
        self.cache.slot_view(self.slot[expert])[:] = self.bytes[self.slot[expert]] = value
        self.cache.publish_py(expert)
        self.state[expert] = "resident"

    @rule(expert=experts)
    def fail(self, expert: int) -> None:
        if self.state.get(expert) != "loading":
            with pytest.raises(ValueError, match=f"expert {expert} is .*, not loading"):
                self.cache.fail_py(expert)
            return
        self.cache.fail_py(expert)
        self.state[expert] = "failed"
        self.counts["failures"] += 1

    @rule(expert=experts)
    def release(self, expert: int) -> None:
        if not self.pins[expert]:
            with pytest.raises(ValueError, match=f"expert {expert} is not pinned"):
                self.cache.release_py(expert)
        elif self.pins[expert] == 1 and self.state[expert] == "loading":
            with pytest.raises(ValueError, match=f"expert {expert} is still loading"):
                self.cache.release_py(expert)
        else:
            self.cache.release_py(expert)
            self.pins[expert] -= 1
            if not self.pins[expert] and self.state[expert] == "failed":
                self.drop(expert)

    def held(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(e for e, n in self.pins.items() if n)))

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def acquire_again(self, data: st.DataObject) -> None:
        self.acquire(self.held(data))

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data(), fails=st.booleans())
    def end_one(self, data: st.DataObject, fails: bool) -> None:
        """A sensible caller goes on: without it most runs would end with every slot held."""
        expert = self.held(data)
        if self.state[expert] == "loading" and fails:
            self.fail(expert)
        elif self.state[expert] == "loading":
            self.publish(expert, 1 + expert)
        self.release(expert)

    @rule(chosen=st.sets(experts, max_size=3))
    def pin_set(self, chosen: set[int]) -> None:
        self.cache.pin_set(chosen)
        self.protected |= chosen

    @rule(chosen=st.sets(experts))
    def unpin_set(self, chosen: set[int]) -> None:
        self.cache.unpin_set(chosen)
        self.protected -= chosen

    @rule()
    def clear(self) -> None:
        victims = self.evictable()
        assert self.cache.clear() == len(victims)
        for expert in victims:
            self.drop(expert)

    @rule()
    def reset(self) -> None:
        self.cache.reset_stats()
        self.counts.clear()

    @invariant()
    def agrees(self) -> None:
        states = Counter(self.state.values())
        assert self.cache.stats() == {name: self.counts[name] for name in COUNTS} | {
            "resident": states["resident"],
            "loading": states["loading"],
            "failed": states["failed"],
            "in_use": sum(n > 0 for n in self.pins.values()),
            "pinned_set": len(self.protected),
        }
        assert len(self.state) <= self.slots
        for expert in range(EXPERTS):
            assert self.cache.state_py(expert) == self.state.get(expert, "absent")
            assert self.cache.pins(expert) == self.pins[expert]
        assert len(set(self.slot.values())) == len(self.slot)
        for slot, value in self.bytes.items():
            assert np.all(self.cache.slot_view(slot) == value)


CacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestModel = CacheMachine.TestCase


def load(cache: ExpertCache, *experts: int) -> None:
    """Each of them acquired, read and let go of."""
    for expert in experts:
        found, _ = cache.acquire_py(expert)
        if found == "miss":
            cache.publish_py(expert)
        cache.release_py(expert)


def resident(cache: ExpertCache) -> list[int]:
    return [e for e in range(cache.n_experts) if cache.state_py(e) == "resident"]


@pytest.mark.parametrize(
    ("uses", "left"),
    [
        ([0, 1, 2], [0, 1, 2]),
        ([0, 1, 2, 3], [1, 2, 3]),
        ([0, 1, 2, 0, 3], [0, 2, 3]),  # 0 was used again
        ([0, 1, 2, 1, 0, 3, 4], [0, 3, 4]),
        ([0, 0, 0, 1, 2, 3], [1, 2, 3]),  # recency counts, not frequency
        ([5, 4, 3, 2, 1, 0], [0, 1, 2]),
    ],
)
def test_the_least_recently_used_goes(uses: list[int], left: list[int]) -> None:
    cache = ExpertCache(6, 3, PAGE)
    load(cache, *uses)
    assert resident(cache) == left


def test_two_acquires_of_a_missing_expert_make_one_read() -> None:
    cache = ExpertCache(4, 2, PAGE)
    first, second = cache.acquire_py(3), cache.acquire_py(3)
    assert (first[0], second[0]) == ("miss", "busy")
    assert first[1] == second[1]
    assert cache.pins(3) == 2
    cache.publish_py(3)
    assert cache.acquire_py(3) == ("hit", first[1])


def test_an_expert_in_use_or_in_the_pinned_set_stays() -> None:
    cache = ExpertCache(9, 3, PAGE)
    load(cache, 0)
    cache.acquire_py(0)
    cache.pin_set([1, 8])  # 8 before it is there
    load(cache, 1, *range(2, 8))
    assert resident(cache) == [0, 1, 7]
    load(cache, 8)
    assert cache.acquire_py(2) == ("full", None)
    assert cache.clear() == 0
    cache.unpin_set([1])
    load(cache, 2)
    assert resident(cache) == [0, 2, 8]
    cache.release_py(0)
    assert cache.clear() == 2
    assert resident(cache) == [8]


def test_a_failed_read_is_forgotten_with_the_last_pin() -> None:
    cache = ExpertCache(3, 1, PAGE)
    assert cache.acquire_py(0)[0] == "miss"
    assert cache.acquire_py(0)[0] == "busy"
    cache.fail_py(0)
    cache.release_py(0)
    assert cache.state_py(0) == "failed"
    assert cache.acquire_py(1) == ("full", None)
    cache.release_py(0)
    assert cache.state_py(0) == "absent"
    assert cache.acquire_py(1)[0] == "miss"  # the slot is free again


def test_whoever_acquires_a_failed_expert_reads_it_again() -> None:
    cache = ExpertCache(3, 2, PAGE)
    _, slot = cache.acquire_py(0)
    cache.acquire_py(0)
    cache.fail_py(0)
    cache.release_py(0)
    assert cache.acquire_py(0) == ("miss", slot)  # the other one holds the slot
    assert cache.acquire_py(0) == ("busy", slot)
    cache.publish_py(0)
    assert cache.pins(0) == 3
    assert cache.stats()["misses"] == 2
    assert cache.stats()["failures"] == 1


def test_bytes_stay_where_they_were_written() -> None:
    slot_bytes = 3 * PAGE
    cache = ExpertCache(20, 7, slot_bytes)
    rng = np.random.default_rng(3)
    written = {}
    for expert in rng.permutation(20)[:7].tolist():
        _, slot = cache.acquire_py(expert)
        written[expert] = (slot, rng.integers(0, 256, slot_bytes, np.uint8))
        cache.slot_view(slot)[:] = written[expert][1]
        cache.publish_py(expert)
    arena = np.frombuffer(cache, np.uint8)
    assert arena.nbytes == cache.arena_bytes == 7 * slot_bytes
    assert arena.ctypes.data == cache.arena_address
    assert cache.arena_address % (2 << 20) == 0
    for expert, (slot, content) in written.items():
        assert cache.acquire_py(expert) == ("hit", slot)
        assert np.array_equal(arena[slot * slot_bytes : (slot + 1) * slot_bytes], content)


def test_a_view_keeps_the_arena_alive() -> None:
    view = ExpertCache(1, 1, PAGE).slot_view(0)
    gc.collect()
    view[:] = 7
    assert view.sum() == 7 * PAGE


def test_memory_is_taken_when_it_is_touched() -> None:
    """2^40 bytes: more than any machine that runs this has."""
    try:
        cache = ExpertCache(1 << 10, 1 << 10, 1 << 30)
    except MemoryError:
        pytest.skip("this machine does not promise more memory than it has")
    cache.slot_view(1023)[-1] = 1
    assert cache.slot_view(1023)[-1] == 1


@pytest.mark.parametrize("call", ["acquire_py", "publish_py", "fail_py", "release_py", "state_py", "pins"])
@pytest.mark.parametrize("expert", [-1, 5, 1 << 40])
def test_experts_that_do_not_exist(call: str, expert: int) -> None:
    with pytest.raises(IndexError, match=f"expert {expert} is outside 0..4"):
        getattr(ExpertCache(5, 2, PAGE), call)(expert)


def test_sets_with_a_wrong_expert_change_nothing() -> None:
    cache = ExpertCache(5, 2, PAGE)
    with pytest.raises(IndexError, match="expert 5"):
        cache.pin_set([0, 5])
    assert cache.stats()["pinned_set"] == 0
    cache.pin_set([0, 1])
    with pytest.raises(IndexError, match="expert -1"):
        cache.unpin_set([0, -1])
    assert cache.stats()["pinned_set"] == 2


@pytest.mark.parametrize("slot", [-1, 2])
def test_slots_that_do_not_exist(slot: int) -> None:
    with pytest.raises(IndexError, match=f"slot {slot} is outside 0..1"):
        ExpertCache(5, 2, PAGE).slot_view(slot)


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 1, PAGE),
        (1, 0, PAGE),
        (1, -1, PAGE),
        (1, 1, 0),
        (1, 1, 100),
        (1, 1, -PAGE),
        (1, (1 << 24) + 1, PAGE),
    ],
)
def test_sizes_that_can_not_be(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        ExpertCache(*sizes)


def test_too_much_memory() -> None:
    with pytest.raises(MemoryError, match="no memory for 16777216 slots"):
        ExpertCache(1, 1 << 24, 1 << 40)


def test_names() -> None:
    assert ExpertCache(1, 1, PAGE).policy in POLICIES
    with pytest.raises(ConfigError, match="unknown cache policy 'belady': choose from next-use, lru"):
        ExpertCache(1, 1, PAGE, policy="belady")
    assert ACQUIRED == ("hit", "miss", "busy", "full")
    assert STATES == ("absent", "loading", "resident", "evicting", "failed")
    assert not ExpertCache(1, 1, PAGE, huge_pages=False).huge_pages
