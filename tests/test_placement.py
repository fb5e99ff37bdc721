"""Which expert is held where: by table, and what must hold of any cluster."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mer.cluster.identity import Identity
from mer.cluster.members import Local, Members, holders
from mer.cluster.placement import place
from mer.cluster.session import Session

# As many moves as are wanted.
ALL = 1 << 30


def heats(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_the_hottest_stay_here_and_the_next_are_held():
    heat = heats([0.1, 0.9, 0.3, 0.2], [0.8, 0.0, 0.4, 0.7])
    placed = place(heat, 2, {0: 1, 1: 2}, {}, ALL)
    assert placed[0] | placed[1] == {7, 6, 2}
    assert (len(placed[0]), len(placed[1])) == (1, 2)


def test_a_layer_is_spread():
    placed = place(heats([0.4, 0.3, 0.2, 0.1]), 0, {0: 2, 1: 2}, {}, ALL)
    assert placed == {0: {0, 3}, 1: {1, 2}}


def test_with_room_the_local_ones_are_held_too_and_then_the_hottest_twice():
    heat = heats([0.4, 0.3, 0.2, 0.1])
    placed = place(heat, 2, {0: 2, 1: 1}, {}, ALL)
    assert placed[0] | placed[1] == {2, 3, 0}
    placed = place(heat, 2, {0: 3, 1: 2}, {}, ALL)
    assert sorted([*placed[0], *placed[1]]) == [0, 0, 1, 2, 3]


def test_little_hotter_is_not_worth_a_move():
    held = {0: frozenset({0, 1})}
    assert place(heats([0.2, 0.3, 0.29, 0.0]), 0, {0: 2}, held, ALL) == {0: {0, 1}}
    assert place(heats([0.2, 0.3, 0.31, 0.0]), 0, {0: 2}, held, ALL) == {0: {1, 2}}


def test_before_anything_is_known_what_is_held_stays():
    """Also the experts that an engine would keep itself, as it knows none better."""
    held = {0: frozenset({0, 1, 4}), 1: frozenset({2})}
    placed = place(np.zeros((2, 4), np.float32), 3, {0: 3, 1: 2}, held, ALL)
    assert placed[0] == {0, 1, 4}
    assert placed[1] > {2}


@st.composite
def clusters(draw):
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    total = layers * experts
    values = draw(st.lists(st.sampled_from([0, 0.1, 0.2, 0.5, 1.0]), min_size=total, max_size=total))
    sizes = draw(st.dictionaries(st.integers(0, 4), st.integers(0, total), max_size=4))
    return heats(*np.reshape(values, (layers, experts))), draw(st.integers(0, total)), sizes


def check(heat, local, sizes, held, moves=ALL):
    """What must hold of any placement; returns it."""
    placed = place(heat, local, sizes, held, moves)
    assert placed == place(heat, local, sizes, held, moves)
    assert placed.keys() == sizes.keys()
    for peer, keys in placed.items():
        assert len(keys) == min(sizes[peer], heat.size), "all room is used, and no more"
        assert all(0 <= key < heat.size for key in keys)
    anywhere = frozenset().union(*placed.values())
    assert len(anywhere) == min(sum(min(s, heat.size) for s in sizes.values()), heat.size), (
        "nothing is held twice while something has no place"
    )
    return placed


@given(clusters(), st.data())
def test_any_cluster(cluster, data):
    heat, local, sizes = cluster
    placed = check(heat, local, sizes, {})
    if sum(sizes.values()) + local <= heat.size:
        coldest_here = sorted(heat.ravel(), reverse=True)[: local + sum(sizes.values())]
        assert sorted(heat.flat[key] for keys in placed.values() for key in keys) == sorted(
            coldest_here[local:]
        )
    # The same again moves nothing.
    if sum(sizes.values()) <= heat.size:
        assert check(heat, local, sizes, placed) == placed
    # One comes: what was held once stays where it is.
    joined = sizes | {9: data.draw(st.integers(0, heat.size))}
    after = check(heat, local, joined, placed)
    if sum(joined.values()) <= heat.size:
        assert all(after[peer] == placed[peer] for peer in sizes)
    # It leaves again: what comes to the others is what it had, or what was not held.
    left = check(heat, local, sizes, {peer: after[peer] for peer in sizes})
    if sum(sizes.values()) <= heat.size:
        kept = frozenset().union(*(after[peer] for peer in sizes)) if sizes else frozenset()
        for peer in sizes:
            assert not (left[peer] - after[peer]) & kept, "nothing moves between those that stay"


@given(clusters(), st.data())
def test_no_more_gives_way_than_may(cluster, data):
    heat, local, sizes = cluster
    held = check(heat, local, sizes, {})
    heat = heat.ravel()[data.draw(st.permutations(range(heat.size)))].reshape(heat.shape)
    moves = data.draw(st.integers(0, heat.size))
    placed = check(heat, local, sizes, held, moves)
    assert sum(len(held[peer] - placed[peer]) for peer in sizes) <= moves
    free = check(heat, local, sizes, held)
    if sum(len(held[peer] - free[peer]) for peer in sizes) <= moves:
        assert placed == free


def test_heat_that_goes_to_and_fro_moves_little():
    """What it moves to once and for all it does, soon."""
    members = Members(Local(2, 8, 4, 0), ["one"], [])
    made = Session("one", bytes(16), Identity("1", b"model", "avx2", b"probe"), 16)
    members.reach(lambda _: made)
    made.capacity, made.assigns = 8, True
    first, second = np.zeros((2, 2, 8), np.float32)
    first[:, :4], second[:, 4:] = 1, 1
    tokens, moved = 0, 0
    held = members.place(first, tokens)[0]
    assert held == set(np.flatnonzero(first))

    def place_again(heat):
        nonlocal tokens, moved, held
        tokens += 1 << 20
        before, held = held, members.place(heat, tokens)[0]
        moved += len(before - held)

    place_again(second)
    assert held == set(np.flatnonzero(second)), "all of it at once"
    moved = 0
    for _ in range(20):
        place_again(first)
        place_again(second)
    assert 0 < moved <= 40 * 8 // 4
    for _ in range(4):
        place_again(first)
    assert held == set(np.flatnonzero(first))


@given(st.lists(st.frozensets(st.integers(0, 9)), max_size=4))
def test_who_is_asked_is_one_that_holds_it(held):
    held = {3 * i: keys for i, keys in enumerate(held)}
    found = holders(held, 10)
    for key, peer in enumerate(found):
        assert (peer == -1) == all(key not in keys for keys in held.values())
        assert peer == -1 or key in held[peer]


def test_what_several_hold_is_shared_among_them():
    every = frozenset(range(9))
    assert np.bincount(holders({0: every, 2: frozenset(), 3: every, 4: every}, 9)).tolist() == [3, 0, 0, 3, 3]
