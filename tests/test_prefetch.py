"""Reading ahead changes when experts are read, and never what comes out."""

from __future__ import annotations

import numpy as np
import pytest
from moe_model import EXPERTS, KERNELS, MAX_TOKENS, TOP_K, Model, Streamed, assert_idle, open_reader

from mer._ext.cache import POLICIES, ExpertCache
from mer._ext.recorder import KINDS, Recorder
from mer.errors import DeviceReadError
from mer.weights import formats

LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("ahead"), [(formats.Q8_0, formats.Q4_0, 96, 160)] * LAYERS)


def cache_of(model: Model, slots: int, policy: str) -> ExpertCache:
    tables = model.tables
    return ExpertCache(tables.total, slots, tables.slot_bytes, policy=policy, n_layers=LAYERS)


def walk(model: Model, streamed: Streamed, tokens: int, seed: int, guess: str) -> None:
    """All layers in turn, each telling what the next one wants, or something else."""
    rng = np.random.default_rng(seed)
    steps = [model.inputs(layer, tokens, seed) for layer in range(LAYERS)]
    for layer, (x, ids, weights) in enumerate(steps):
        ahead = steps[(layer + 1) % LAYERS][1]
        if guess == "wrong":
            ahead = (EXPERTS - 1 - ahead).astype(np.int32)
        elif guess == "nonsense":
            ahead = rng.integers(-5, EXPERTS + 5, ids.shape).astype(np.int32)
        out = streamed.forward(layer, x, ids, weights, ahead)
        assert out.tobytes() == model.exact(KERNELS, layer, x, ids, weights).tobytes()


@pytest.mark.parametrize("guess", ["right", "wrong", "nonsense"])
@pytest.mark.parametrize("slots", [1, 2, TOP_K, TOP_K + 2, 2 * EXPERTS, LAYERS * EXPERTS])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", ["uring", "preadv", "buffered"])
def test_the_same_bytes(model: Model, backend: str, policy: str, slots: int, guess: str) -> None:
    with open_reader(model, backend, queue_depth=2) as reader:
        cache = cache_of(model, slots, policy)
        streamed = Streamed(model, cache=cache, reader=reader, prefetch=4)
        for seed, tokens in enumerate([1, 1, 1, 2, 7, MAX_TOKENS, 1, 1]):
            walk(model, streamed, tokens, seed, guess)
        stats = streamed.streamer.stats()
        assert stats["prefetch_used"] <= stats["prefetched"]


def test_a_right_guess_is_there_when_it_is_wanted(model: Model) -> None:
    """From an empty cache that holds everything: only the first layer misses."""
    streamed = Streamed(model, prefetch=TOP_K)
    with streamed.reader:
        walk(model, streamed, 1, 0, "right")
        stats = streamed.streamer.stats()
    assert stats["misses"] == TOP_K
    assert stats["hits"] == stats["prefetched"] == stats["prefetch_used"] == (LAYERS - 1) * TOP_K
    used = {(layer, e) for layer in range(LAYERS) for e in model.inputs(layer, 1, 0)[1][0].tolist()}
    assert stats["bytes_read"] == sum(model.length(layer * EXPERTS + e) for layer, e in used)


@pytest.mark.parametrize(("tokens", "after"), [(1, True), (2, False), (MAX_TOKENS, False)])
def test_a_token_waits_for_its_own_reads_alone(model: Model, tokens: int, after: bool) -> None:
    """Reads ahead begin when those of the layer are over; with more than one token right behind them."""
    streamed, recorder = Streamed(model, prefetch=TOP_K), Recorder()
    streamed.streamer.record(recorder)
    with streamed.reader:
        x, ids, weights = model.inputs(0, tokens)
        streamed.forward(0, x, ids, weights, ids)
        streamed.streamer.settle()
    spans = recorder.take()
    own, ahead = (spans[spans[:, 0] == KINDS.index(kind)] for kind in ("read", "read ahead"))
    assert len(own) == len(np.unique(ids))
    assert len(ahead) == TOP_K
    assert (ahead[:, 2].min() >= own[:, 3].max()) == after


def test_what_is_read_ahead_and_not_wanted_is_counted_as_unused(model: Model) -> None:
    streamed = Streamed(model, prefetch=TOP_K)
    with streamed.reader:
        x, ids, weights = model.inputs(0, 1)
        streamed.forward(0, x, ids, weights, ids)
        x, _, weights = model.inputs(1, 1)
        others = np.array([[e for e in range(EXPERTS) if e not in ids][:TOP_K]], np.int32)
        streamed.forward(1, x, others, weights)
        stats = streamed.streamer.stats()
    assert (stats["prefetched"], stats["prefetch_used"], stats["misses"]) == (TOP_K, 0, 2 * TOP_K)


def test_no_more_than_the_limit_is_under_way(model: Model) -> None:
    streamed = Streamed(model, prefetch=1)
    with streamed.reader:
        x, ids, weights = model.inputs(0, MAX_TOKENS)
        streamed.forward(0, x, ids, weights, ids)
        assert streamed.streamer.stats()["prefetched"] == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_guesses_that_are_there_are_not_evicted_for_guesses_that_are_not(model: Model, policy: str) -> None:
    """The cache is full, and what it used longest ago is what the next layer wants."""
    streamed = Streamed(model, cache=cache_of(model, 2 * TOP_K, policy), prefetch=TOP_K)
    with streamed.reader:
        x, _, weights = model.inputs(1, 1)
        wanted, other = np.array([[0, 1, 2]], np.int32), np.array([[5, 6, 7]], np.int32)
        streamed.forward(1, x, wanted, weights)
        streamed.forward(2, *(model.inputs(2, 1)[0], other, weights))
        x = model.inputs(0, 1)[0]
        # Layer 0 evicts one of layer 1's; of the guesses one is there and two are not.
        streamed.forward(0, x, other, weights, np.array([[4, 3, 2]], np.int32))
        before = streamed.streamer.stats()["misses"]
        streamed.forward(1, model.inputs(1, 1)[0], np.array([[4, 3, 2]], np.int32), weights)
        assert streamed.streamer.stats()["misses"] - before <= 1


@pytest.mark.parametrize("times", [1, 1000])
def test_a_read_ahead_that_fails(model: Model, times: int) -> None:
    """Nobody hears of it until the expert is wanted; then it is read again, the error told if it lasts."""
    streamed = Streamed(model, prefetch=TOP_K)
    with streamed.reader as reader:
        x, ids, weights = model.inputs(1, 1)
        victim = model.tables.reads[EXPERTS + ids[0, 0], 0]
        reader.set_fault(int(victim[0]), int(victim[1]), int(victim[1]) + 1, times=times)
        first = model.inputs(0, 1)
        out = streamed.forward(0, *first, ids)
        assert out.tobytes() == model.exact(KERNELS, 0, *first).tobytes()
        if times > 1:
            with pytest.raises(DeviceReadError):
                streamed.forward(1, x, ids, weights)
            reader.clear_faults()
        out = streamed.forward(1, x, ids, weights)
        assert out.tobytes() == model.exact(KERNELS, 1, x, ids, weights).tobytes()
        assert_idle(streamed.cache)


@pytest.mark.parametrize("closed", [False, True])
def test_a_streamer_that_goes_waits_for_its_reads(model: Model, closed: bool) -> None:
    streamed = Streamed(model, prefetch=TOP_K)
    cache, reader = streamed.cache, streamed.reader
    x, ids, weights = model.inputs(0, 1)
    streamed.forward(0, x, ids, weights, ids)
    if closed:
        reader.close()
    del streamed
    assert_idle(cache)
    reader.close()


def test_the_shape_of_guesses_is_checked(model: Model) -> None:
    streamed = Streamed(model, prefetch=1)
    x, ids, weights = model.inputs(0, 2)
    with streamed.reader, pytest.raises(ValueError, match="ahead"):
        streamed.forward(0, x, ids, weights, ids[:1].copy())


def test_a_cache_for_other_layers(model: Model) -> None:
    tables = model.tables
    with open_reader(model) as reader:
        for experts, layers in ((tables.total, 1), (2 * tables.total, LAYERS)):
            cache = ExpertCache(experts, 1, tables.slot_bytes, policy="next-use", n_layers=layers)
            with pytest.raises(
                ValueError, match=f"the cache is made for {layers} layers and {experts} experts"
            ):
                Streamed(model, cache=cache, reader=reader)


# --- before a step


def likely_of(model: Model, tokens: int, seed: int, layers: int = LAYERS) -> np.ndarray:
    return np.stack([model.inputs(layer, tokens, seed)[1] for layer in range(layers)])


@pytest.mark.parametrize("guess", ["right", "wrong", "nonsense"])
@pytest.mark.parametrize("slots", [1, TOP_K + 2, LAYERS * EXPERTS])
@pytest.mark.parametrize("backend", ["uring", "preadv", "buffered"])
def test_the_same_bytes_with_likely_experts(model: Model, backend: str, slots: int, guess: str) -> None:
    rng = np.random.default_rng(slots)
    with open_reader(model, backend, queue_depth=2) as reader:
        streamed = Streamed(model, cache=cache_of(model, slots, "lru"), reader=reader, prefetch=4)
        for seed, tokens in enumerate([1, 2, 1, 7, 1]):
            likely = likely_of(model, tokens, seed)
            if guess == "wrong":
                likely = EXPERTS - 1 - likely
            elif guess == "nonsense":
                likely = rng.integers(-5, EXPERTS + 5, likely.shape)
            streamed.streamer.prefetcher.read_likely(likely[:, :1].astype(np.int32).copy())
            streamed.streamer.prefetcher.read_likely(likely.astype(np.int32))
            walk(model, streamed, tokens, seed, guess)
        stats = streamed.streamer.stats()
        assert 0 < stats["prefetched_early"] <= stats["prefetched"] or slots == LAYERS * EXPERTS
        streamed.streamer.settle()
        assert_idle(streamed.cache)


def test_likely_experts_are_there_when_they_are_wanted(model: Model) -> None:
    """Those that are known, layer by layer, as far as there is room; what is there is not read again."""
    streamed = Streamed(model, prefetch=2 * TOP_K - 1)
    with streamed.reader:
        likely = likely_of(model, 1, 0)
        likely[0, 0, 0] = -1
        for _ in range(2):
            streamed.streamer.prefetcher.read_likely(likely)
        for layer in range(LAYERS):
            streamed.check(layer, 1)
        stats = streamed.streamer.stats()
    assert stats["prefetched"] == stats["prefetched_early"] == stats["prefetch_used"] == 2 * TOP_K - 1
    assert stats["misses"] == LAYERS * TOP_K - (2 * TOP_K - 1)


def test_likely_experts_that_never_are_wanted_are_given_up(model: Model) -> None:
    """Of the layers whose reads are wrong, and of those behind them; not of those before."""
    streamed = Streamed(model, cache=cache_of(model, LAYERS * TOP_K, "lru"), prefetch=LAYERS * TOP_K)
    streamed.streamer.prefetcher.switch = None
    with streamed.reader:
        for seed in range(60):
            likely = likely_of(model, 1, seed)
            for layer in range(1, LAYERS):
                others = np.setdiff1d(np.arange(EXPERTS), likely[layer])
                likely[layer] = np.roll(others, seed)[:TOP_K]
            streamed.streamer.prefetcher.read_likely(likely)
            streamed.streamer.settle()
            walk(model, streamed, 1, seed, "right")
        assert streamed.streamer.prefetcher.early_layers == 1


def test_the_shape_of_likely_experts_is_checked(model: Model) -> None:
    streamed = Streamed(model, prefetch=1)
    with streamed.reader, pytest.raises(ValueError, match="likely"):
        streamed.streamer.prefetcher.read_likely(np.zeros((1, 2, TOP_K + 1), np.int32))
