"""Peers come, go, freeze, are cut off and exchanged, in any order: what is computed is right all the time,
and once the network is well again everybody holds what they should.

    python tests/test_membership.py 100 0 50

runs 100 such histories with each of the seeds 0 to 49; the test suite runs some.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from moe_model import EXPERTS, Model, Streamed
from simulated_cluster import KEPT, World

from mer.cluster.guests import Guests
from mer.cluster.placement import STAY
from mer.weights import formats

SHARDS, LAYERS = 3, 2
TOTAL = LAYERS * EXPERTS
few = st.integers(0, 5)
shards = st.integers(0, SHARDS - 1)
engines = st.integers(0, 1)
rooms = st.integers(1, TOTAL)
_made: list[tuple[Model, list[Streamed]]] = []


def made() -> tuple[Model, list[Streamed]]:
    """A model and two engines' streamers, which are used again and again."""
    if not _made:
        form = formats.by_name("q8_0")
        with tempfile.TemporaryDirectory() as folder:
            model = Model(Path(folder), [(form, form, 32, 32)] * LAYERS)
            _made.append((model, [Streamed(model, 2, threads=1, max_tokens=4) for _ in range(2)]))
    return _made[0]


class Cluster(RuleBasedStateMachine):
    @initialize(capacities=st.lists(rooms, min_size=SHARDS, max_size=SHARDS))
    def begin(self, capacities):
        self.world = World(*made(), capacities)

    # What an engine does.

    @rule(e=engines, layer=st.integers(0, 1), tokens=st.integers(1, 4), seed=few, how=st.lists(
        st.sampled_from(["now", "now", "later", "lost"]), min_size=1, max_size=4))  # fmt: skip
    def step(self, e, layer, tokens, seed, how):
        self.world.nodes[e].step(layer, tokens, seed, how)

    @rule(e=engines, seed=few, much=st.booleans())
    def drift(self, e, seed, much):
        node = self.world.nodes[e]
        node.heat = np.random.default_rng(seed).random(TOTAL).astype(np.float32)
        node.tokens += 1 << 19 if much else 100

    # What the network and time do.

    @rule(k=st.integers(0, 30), up=st.booleans(), n=st.integers(1, 4))
    def deliver(self, k, up, n):
        if links := self.world.links:
            for _ in range(n):
                (self.world.to_server if up else self.world.to_engine)(links[k % len(links)])

    @rule()
    def deliver_all(self):
        for link in list(self.world.links):
            self.world.flush(link)

    @rule(seconds=st.sampled_from([0.1, 0.5, 0.5, 2.0, 25.0]))
    def pass_time(self, seconds):
        self.world.advance(seconds)

    @rule(seconds=st.sampled_from([2.0, 10.0]))
    def go_well_for_a_while(self, seconds):
        self.world.run(seconds, 0.5)

    @rule(k=st.integers(0, 30))
    def cut(self, k):
        if links := self.world.links:
            self.world.cut(links[k % len(links)])

    @rule(k=st.integers(0, 30))
    def notice(self, k):
        if links := self.world.links:
            self.world.notice(links[k % len(links)])

    @rule(e=engines, s=shards, on=st.booleans())
    def partition(self, e, s, on):
        pair = self.world.streamed[e], s
        (self.world.apart.add if on else self.world.apart.discard)(pair)

    @rule(addresses=st.frozensets(st.sampled_from(["s0", "s1", "s2", "s0-again"])))
    def name(self, addresses):
        self.world.names = addresses
        for node in self.world.nodes:
            node.members.resolved("shards", addresses)

    # What machines do.

    @rule(s=shards, n=st.integers(1, 8))
    def load(self, s, n):
        process = self.world.processes[s]
        if process.alive and not process.frozen:
            process.memory.load(n)

    @rule(s=shards, lose=st.booleans())
    def kill(self, s, lose):
        if self.world.processes[s].alive:
            self.world.kill(s, lose)

    @rule(s=shards, capacity=rooms, other=st.sampled_from(["", "", "", "model", "version"]))
    def start(self, s, capacity, other):
        self.world.start(s, capacity, other)

    @rule(s=shards, on=st.booleans())
    def freeze(self, s, on):
        self.world.processes[s].frozen = on

    @rule(e=engines)
    def restart(self, e):
        self.world.restart(e)

    # What holds at any time.

    @invariant()
    def nobody_holds_more_than_it_has_room_for(self):
        for process in self.world.processes:
            assert len(process.memory.loaded) <= process.memory.capacity

    @invariant()
    def who_is_asked_is_said_to_hold_it(self):
        for node in self.world.nodes:
            for key, index in enumerate(node.found):
                assert index < 0 or key in node.members.sessions[index].held

    @invariant()
    def little_gives_way_to_hotter_ones(self):
        for node in self.world.nodes:
            assert node.gave_way <= SHARDS * TOTAL * (1 + node.placed / 4)

    @invariant()
    def nobody_is_told_what_can_not_be(self):
        assert all("FAILED_PRECONDITION" in each for each in self.world.refusals), self.world.refusals

    def teardown(self):
        if not hasattr(self, "world"):
            return
        world = self.world
        world.heal()
        world.run(150)
        for _ in range(5):  # a quarter of what is held may move each time
            for node in world.nodes:
                node.tokens += 1 << 20
            world.run(10)
        reads = sum(memory.reads for memory in world.healthy())
        self.check_converged()
        assigns = sum(node.assigns for node in world.nodes)
        world.run(30)
        assert assigns == sum(node.assigns for node in world.nodes), "nobody is told anything new"
        assert reads == sum(memory.reads for memory in world.healthy()), "nothing moves any more"
        everything = sum(memory.capacity for memory in world.healthy()) >= TOTAL
        for node in world.nodes:
            before = node.tier.stats()["peer_hits"]
            node.step(0, 4, 1, ["now"])  # of more experts than there are slots
            assert node.tier.stats()["peer_hits"] > before or not everything, "peers are used again"

    def check_converged(self):
        world = self.world
        memories = world.healthy()
        for node in world.nodes:
            for session in node.members.sessions.values():
                memory = world.processes[world.addresses[session.address]].memory
                right = memory in memories
                assert session.lost != right
                assert session.held == (memory.loaded if right else frozenset())
        room = sum(min(memory.capacity, TOTAL) for memory in memories)
        copies = np.zeros(TOTAL, int)
        for memory in memories:
            assert memory.loaded == memory.assigned
            copies[list(memory.loaded)] += 1
        assert copies.sum() == room, "all room is used"
        assert np.count_nonzero(copies) == min(room, TOTAL), (
            "nothing is held twice while something has no place"
        )
        first = min(world.nodes, key=lambda node: node.number)
        hot = np.argsort(-first.heat, kind="stable")[KEPT:]
        out = [key for key in hot if not copies[key]]
        held = [key for key in hot if copies[key]]
        if out and held:
            hottest, coldest = max(first.heat[out]), min(first.heat[held])
            assert hottest <= STAY * coldest + 1e-6, "hotter ones are left out"


def test_who_decides():
    """The least engine, by its last stream: its connection may have broken without the shard knowing."""
    guests = Guests()
    second, first = guests.come(b"b"), guests.come(b"a")
    assert guests.decides(first)
    assert not guests.decides(second)
    again = guests.come(b"a")
    assert guests.decides(again)
    assert not guests.decides(first)
    guests.leave(first)
    assert guests.decides(again)
    guests.leave(again)
    assert guests.decides(second)


Cluster.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCluster = Cluster.TestCase


def main(histories: int, first: int, seeds: int) -> None:
    """Raises what is wrong, with the steps that lead there."""
    logging.disable()
    given = settings(Cluster.TestCase.settings, max_examples=histories, stateful_step_count=60, database=None)
    for number in range(first, first + seeds):
        run_state_machine_as_test(seed(number)(Cluster), settings=given)
        print(f"seed {number}: {histories} histories", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
