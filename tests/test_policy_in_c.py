"""The policy next-use as the cache has it: bench/policy.py victim by victim, and what reading ahead adds."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from bench import policy
from mer._ext.cache import ExpertCache

PAGE = 4096


def trace_of(layers: int, experts: int, chosen: list[tuple[int, list[int]]]) -> policy.Trace:
    """chosen: (layer, experts of it) of one visit after the other."""
    visits = [
        policy.Visit(True, n, layer, np.array(ids), np.zeros(len(ids)))
        for n, (layer, ids) in enumerate(chosen)
    ]
    return policy.Trace(layers, experts, visits)


def skewed(seed: int, layers: int, experts: int, top_k: int, tokens: int) -> policy.Trace:
    """Favourites that change now and then, and neighbouring tokens that often agree."""
    rng = np.random.default_rng(seed)
    chosen, last = [], {}
    for token in range(tokens):
        if token % 50 == 0:
            weights = rng.dirichlet(np.full(experts, 0.3), layers) * 0.95 + 0.05 / experts
        for layer in range(layers):
            if layer not in last or rng.random() < 0.7:
                last[layer] = rng.choice(experts, top_k, replace=False, p=weights[layer]).tolist()
            chosen.append((layer, last[layer]))
    return trace_of(layers, experts, chosen)


TRACES = {
    "one layer": skewed(0, 1, 20, 3, 300),
    "two layers": skewed(1, 2, 9, 2, 300),
    "seven layers": skewed(2, 7, 16, 4, 200),
    # Of layer 0: 0 always, 1 at first, 2 now and then; layer 1 changes all the time.
    "by hand": trace_of(
        2, 5, [v for t in range(40) for v in ((0, [0, 1 if t < 9 else 2 + t % 3]), (1, [t % 5, (t + 2) % 5]))]
    ),
    # Each expert is used more often than what followed it can be counted.
    "a long one": skewed(3, 2, 5, 2, 1500),
    # 0 and 5 are unused for so long that their averages are as small as they get, and equal.
    "a long pause": trace_of(
        2, 6, [(n % 2, [e]) for n, e in enumerate((5, 5, 0, 0, *[1, 1, 2, 2] * 2000, 3, 3, 4, 4))]
    ),
}  # fmt: skip


def cache_of(trace: policy.Trace, slots: int) -> ExpertCache:
    experts = trace.n_layers * trace.n_experts
    return ExpertCache(experts, slots, PAGE, policy="next-use", n_layers=trace.n_layers)


def ids(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32)


def load(cache: ExpertCache, *experts: int) -> None:
    for expert in experts:
        found, _ = cache.acquire_py(expert)
        if found == "miss":
            cache.publish_py(expert)
        cache.release_py(expert)


def resident(cache: ExpertCache) -> set[int]:
    return {e for e in range(cache.n_experts) if cache.state_py(e) == "resident"}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", TRACES)
def test_victim_by_victim(name: str, share: float) -> None:
    trace = TRACES[name]
    slots = max(1, int(trace.n_layers * trace.n_experts * share))
    cache, model = cache_of(trace, slots), policy.NextUse(trace)
    owner: dict[int, int] = {}  # by slot
    hits = 0
    for visit in trace.visits:
        cache.visit_py(visit.layer, visit.experts.astype(np.int32)[None])
        model.visit(visit)
        for expert in (visit.layer * trace.n_experts + visit.experts).tolist():
            found, slot = cache.acquire_py(expert)
            assert slot is not None
            if found == "miss":
                if len(owner) == slots:
                    held = sorted(owner.values())
                    assert owner[slot] == held[model.scores()[held].argmax()]
                owner[slot] = expert
                cache.publish_py(expert)
            hits += found == "hit"
            assert owner[slot] == expert
            cache.release_py(expert)
    assert (hits, sum(len(v.experts) for v in trace.visits)) == policy.replay(
        trace, policy.NextUse(trace), slots
    )


@pytest.mark.parametrize("seed", range(5))
def test_tokens_of_one_step_count_as_the_mean_over_their_orders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, experts, slots, top_k = 2, 12, 11, 2
    empty = trace_of(layers, experts, [])
    cache, model = cache_of(empty, slots), policy.NextUse(empty)
    owner: dict[int, int] = {}
    last: list[list[np.ndarray]] = [[]] * layers
    for step in range(300):
        layer = step % layers
        rows = [
            rng.choice(experts // 2, top_k, replace=False) + step // 20 % 7
            for _ in range(rng.choice([step // 30 % 4 + 1, rng.integers(1, 5)], p=[0.8, 0.2]))
        ]
        cache.visit_py(layer, np.array(rows, np.int32))
        before, ends = model._averages.copy(), []
        followed, uses = model._followed.copy(), model._uses.copy()
        for order in permutations(rows):
            model._averages[:] = before
            for row in order:
                model.visit(policy.Visit(True, 0, layer, row, np.zeros(top_k)))
            ends.append(model._averages.copy())
        model._averages[:] = np.mean(ends, axis=0)
        model._followed, model._uses = followed, uses
        model._last.pop(layer)
        if len(rows) == len(last[layer]):  # taken for the next tokens of the same requests
            for row_before, row in zip(last[layer], rows, strict=True):
                model._learn(layer, row_before, row)
        last[layer] = rows
        model._chance[layer] = np.mean([model.chance(layer, row) for row in rows], axis=0)
        for expert in sorted({layer * experts + int(e) for row in rows for e in row}):
            found, slot = cache.acquire_py(expert)
            assert slot is not None
            if found == "miss":
                if len(owner) == slots:  # those with as many uses in all steps are as good as each other
                    highest = model.scores()[list(owner.values())].max()
                    assert model.scores()[owner[slot]] == pytest.approx(highest, rel=1e-12)
                owner[slot] = expert
                cache.publish_py(expert)
            cache.release_py(expert)


def used_cache() -> ExpertCache:
    """Two layers of four: both have used 0 and 1 ten times, which fills the four slots."""
    cache = ExpertCache(8, 4, PAGE, policy="next-use", n_layers=2)
    for _ in range(10):
        for layer in range(2):
            cache.visit_py(layer, ids([0, 1]))
            load(cache, 4 * layer, 4 * layer + 1)
    cache.visit_py(0, ids([0, 1]))
    return cache


def test_what_was_read_ahead_stays_until_its_turn() -> None:
    cache = used_cache()
    cache.visit_py(0, ids([2, 3]))
    found, _ = cache.acquire_early_py(7)  # nobody ever wanted it
    assert found == "miss"
    cache.publish_py(7)
    cache.release_py(7)
    load(cache, 2, 3)
    assert resident(cache) == {3, 4, 5, 7}, "0, 1 and even 2 made room"
    cache.visit_py(1, ids([0, 1]))
    load(cache, 4, 5, 6)
    assert 7 not in resident(cache), "its turn is over, and it was not wanted"


def test_reading_ahead_evicts_nothing_that_is_expected_as_soon() -> None:
    cache = used_cache()
    for expert in (4, 5, 6, 7):
        found, _ = cache.acquire_early_py(expert)
        assert found == ("hit" if expert < 6 else "miss")
        if found == "miss":
            cache.publish_py(expert)
        cache.release_py(expert)
    assert resident(cache) == {4, 5, 6, 7}
    cache = ExpertCache(9, 3, PAGE, policy="next-use", n_layers=1)
    cache.visit_py(0, ids([0, 1, 2]))
    for expert in range(3):
        assert cache.acquire_early_py(expert)[0] == "miss"
        cache.publish_py(expert)
        cache.release_py(expert)
    assert cache.acquire_early_py(3) == ("full", None)
    load(cache, 3)  # which is wanted now
    assert 3 in resident(cache)


def test_wrong_visits() -> None:
    cache = ExpertCache(8, 4, PAGE, policy="next-use", n_layers=2)
    with pytest.raises(IndexError, match=r"layer 2 is outside 0\.\.1"):
        cache.visit_py(2, ids([0]))
    with pytest.raises(IndexError, match="can't choose 5 of 4"):
        cache.visit_py(0, ids([0, 1, 2, 3, 0]))
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match=rf"expert {wrong} of a layer is outside 0\.\.3"):
            cache.visit_py(0, ids([0, wrong]))
    for layers in (0, 3):
        with pytest.raises(ValueError, match=f"8 experts can't be divided into {layers} layers"):
            ExpertCache(8, 4, PAGE, n_layers=layers)


def test_a_recorded_trace(tmp_path: Path) -> None:
    """Through the file format, prefill and all."""
    trace = TRACES["seven layers"]
    lines = ["# n_layer=7 n_expert=16", "phase,step,layer,expert"]
    for n, v in enumerate(trace.visits):
        lines += [f"{int(n > 70)},{n},{v.layer},{e}" for e in v.experts]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    read = policy.read_trace(tmp_path / "t.csv")
    cache, hits = cache_of(read, 30), 0
    for visit in read.visits:
        cache.visit_py(visit.layer, visit.experts.astype(np.int32)[None])
        before = cache.stats()["hits"]
        load(cache, *(visit.layer * 16 + visit.experts).tolist())
        hits += (cache.stats()["hits"] - before) * visit.decode
    assert hits == policy.replay(read, policy.NextUse(read), 30)[0]
