"""Which expert is held by which peer. Pure logic: no I/O, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

# What is held already counts as so much hotter: experts do not take turns, each of which is read again.
STAY: Final = 1.5


def place(
    heat: NDArray[np.float32],
    local: int,
    capacities: Mapping[int, int],
    held: Mapping[int, frozenset[int]],
    moves: int,
) -> dict[int, frozenset[int]]:
    """The experts of each peer.

    heat: f32 [layers, experts], how often each is wanted. local: how many of the hottest this machine keeps
    for itself. capacities: of each peer, in experts. held: what each was to hold before. moves: how many of
    these may give way to hotter ones.

    The hottest beside the local ones are held once; with room for all of these, the local ones too, for the
    time before they are in memory here; with room for all experts the hottest several times, once a peer.
    Where an expert is held, it stays; a new one goes to the peer that has least of its layer's heat, so that
    a layer's work is spread. Before anything is known of heat, nothing that is held moves.
    """
    n_experts = heat.shape[1]
    if not heat.any():  # nothing is known: what is held is as good as anything
        local = 0
    order = _order(heat)
    ranked = [*order[local:], *order[:local]]
    free = dict(capacities)
    placed: dict[int, set[int]] = {peer: set() for peer in capacities}
    total = sum(capacities.values())
    if not total:
        return {peer: frozenset() for peer in capacities}
    first = ranked if total >= len(ranked) else _chosen(heat, ranked, total, held, local, moves)
    load = {peer: np.zeros(len(heat)) for peer in capacities}

    def put(key: int, peer: int) -> None:
        placed[peer].add(key)
        free[peer] -= 1
        load[peer][key // n_experts] += float(heat.flat[key])

    homeless = []
    for key in first:
        at = [peer for peer in capacities if key in held.get(peer, ()) and free[peer]]
        if at:
            put(key, at[0])
        else:
            homeless.append(key)
    for key in homeless:
        put(key, _least_loaded(key // n_experts, [peer for peer in capacities if free[peer]], load, free))
    times = Counter(key for keys in held.values() for key in keys)
    again = sorted(order, key=lambda key: -float(heat.flat[key]) * (STAY if times[key] > 1 else 1.0))
    spare = {peer: free[peer] - len(held.get(peer, frozenset()) - placed[peer]) for peer in capacities}
    for key in again:  # once more, as long as there is room
        while sum(free.values()):
            others = [peer for peer in capacities if free[peer] and key not in placed[peer]]
            at = [peer for peer in others if key in held.get(peer, ())]
            if not at:
                others = [peer for peer in others if moves > 0 or spare[peer] > 0]
                if not others:
                    break
                at = [_least_loaded(key // n_experts, others, load, free)]
                moves -= spare[at[0]] <= 0
                spare[at[0]] -= 1
            put(key, at[0])
    return {peer: frozenset(keys) for peer, keys in placed.items()}


def _order(heat: NDArray[np.float32]) -> list[int]:
    """Experts by heat; of equal ones the first of every layer, then the second, so that each has a share."""
    layers, experts = heat.shape
    keys = np.arange(layers * experts)
    ranks = np.lexsort((keys // experts, keys % experts, -heat.ravel()))
    return [int(key) for key in ranks]


def _chosen(
    heat: NDArray[np.float32],
    ranked: list[int],
    total: int,
    held: Mapping[int, frozenset[int]],
    local: int,
    moves: int,
) -> list[int]:
    """The `total` hottest that are not local, what is held counting as hotter; the local ones last. At most
    `moves` of what is held are not among them.
    """
    others = ranked[: len(ranked) - local] if local else ranked
    stays = frozenset().union(*held.values())
    position = {key: i for i, key in enumerate(others)}

    def rank(key: int) -> tuple[float, int, int]:
        stay = key in stays
        return -float(heat.flat[key]) * (STAY if stay else 1.0), not stay, position[key]

    chosen: list[int] = []
    new = max(total - len(stays), 0) + moves
    for key in (*sorted(others, key=rank), *ranked[len(others) :]):
        if key in stays or new > 0:
            chosen.append(key)
            new -= key not in stays
    return chosen[:total]


def _least_loaded(
    layer: int, peers: list[int], load: Mapping[int, NDArray[np.float64]], free: Mapping[int, int]
) -> int:
    return min(peers, key=lambda peer: (load[peer][layer], -free[peer], peer))
