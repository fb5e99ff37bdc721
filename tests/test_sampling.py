"""The sampler against transformers' logits processors, OpenAI's formula, torch and numpy's own generator.

And against what it was before it was written in C: by numpy, in sampling_reference.py.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sampling_reference
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mer._ext import sampling
from mer._ext.sampling import Room, uniform
from mer.engine.params import SamplingParams
from mer.engine.sampling import Sampler
from mer.errors import MerError

CSRC = Path(__file__).parent.parent / "mer/_ext/csrc"
NAN, INF = float("nan"), float("inf")
BIG = np.finfo(np.float32).max


def row(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def random_row(seed: int, vocab: int, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def warped(logits: NDArray[np.float32], params: SamplingParams) -> torch.Tensor:
    """float64 [vocab]: transformers' scores after the warpers that `generate` would apply, in its order."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    ids = torch.zeros((1, 0), dtype=torch.long)
    scores = TemperatureLogitsWarper(float(params.temperature))(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return scores[0]


def on_an_edge(logits: NDArray[np.float32], params: SamplingParams) -> bool:
    """Whether top_p or min_p lies so close to a token's value that rounding decides over the token."""
    scores = warped(logits, SamplingParams(temperature=params.temperature, top_k=params.top_k))
    probs = scores.softmax(0)
    near_p = (
        params.top_p < 1 and (probs.sort(descending=True)[0].cumsum(0) - params.top_p).abs().min() < 1e-12
    )
    ratios = probs / probs.max()
    near_min = params.min_p > 0 and ((ratios - params.min_p).abs() < 1e-12 * params.min_p).any()
    return bool(near_p or near_min)


def distribution(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """The tokens that survive, and their probabilities."""
    filters = params.temperature, params.top_k, params.top_p, params.min_p
    found = Room(logits.size).survivors(logits, *filters)
    if found is None:
        found = Room(logits.size).survivors(logits, params.temperature, 0, 1.0, 1e-320)
        assert found is not None
    ids, weights = found
    assert weights.max() == 1
    return ids, weights / weights.sum()


def check(logits: NDArray[np.float32], params: SamplingParams) -> None:
    """`distribution` keeps transformers' tokens with transformers' probabilities.

    Which of several equal tokens top-p cuts transformers leaves open (its sort is unstable): the lowest stay.
    """
    before = logits.copy()
    ids, probs = distribution(logits, params)
    np.testing.assert_array_equal(logits, before)
    want = warped(logits, params).softmax(0).numpy()
    kept = np.flatnonzero(want)
    assert all(a < b for a, b in pairwise(ids.tolist()))
    np.testing.assert_array_equal(np.sort(logits[ids]), np.sort(logits[kept]))
    lowest = logits[ids].min()
    np.testing.assert_array_equal(ids[logits[ids] > lowest], kept[logits[kept] > lowest])
    equals = ids[logits[ids] == lowest]
    np.testing.assert_array_equal(equals, np.flatnonzero(logits == lowest)[: equals.size])
    np.testing.assert_allclose(np.sort(probs), np.sort(want[kept]), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(probs[logits[ids] > lowest], want[kept[logits[kept] > lowest]], rtol=1e-9)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 3},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 50},
        {"top_k": 10**6},
        {"top_p": 0.0},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"min_p": 0.03},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.07, "temperature": 0.9},
        {"top_p": 0.97, "min_p": 0.01, "temperature": 1.7},
        {"temperature": 100.0, "top_p": 0.5},
        {"temperature": 0.01, "top_p": 0.99},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("vocab", [1, 7, 1023, 32000])
def test_survivors_are_those_of_transformers(params: dict[str, float], scale: float, vocab: int) -> None:
    logits = random_row(vocab, vocab, scale)
    check(logits, SamplingParams(**params))


@pytest.mark.parametrize(
    ("logits", "params"),
    [
        (row(0, 0, 0, 0), {"top_p": 0.5}),  # exact in binary: two are enough
        (row(0, 0, 0, 0), {"top_p": 0.51}),
        (row(0, 0, 0, 0), {"top_k": 2}),  # equals of the k-th stay
        (row(1, 2, 2, 2, 3), {"top_k": 2}),
        (row(1, 2, 2, 2, 3), {"top_p": 0.6}),
        (row(-INF, 1, -INF, 0), {"top_k": 3}),
        (row(-INF, 1, -INF, 0), {}),
        (row(-INF, -INF, 5), {"top_p": 0.1, "min_p": 0.5}),
        (row(BIG, -BIG, 0), {}),
        (row(-BIG, -BIG, -INF), {"top_p": 0.3}),
        (row(1e30, 1e30, -1e30), {"temperature": 0.5, "top_p": 0.9}),
        (row(-1000, 0, -700), {}),  # exp(-1000) is 0
    ],
    ids=str,
)
def test_ties_and_extremes(logits: NDArray[np.float32], params: dict[str, float]) -> None:
    check(logits, SamplingParams(**params))


logit = st.one_of(
    st.floats(-30, 30, width=32),
    st.sampled_from([-INF, -1.0, 0.0, 0.5, 2.0]),  # ties
    st.floats(-1e6, 1e6, width=32),
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(logit, min_size=1, max_size=60),
    st.floats(0.05, 20),
    st.integers(0, 70),
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.one_of(st.just(0.0), st.floats(1e-6, 1)),
)
@example([0.0, 0.0, 1.0], 1.0, 2, 0.5, 0.5)
def test_survivors_on_any_logits(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = row(*values)
    assume(np.isfinite(logits.max()))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assume(not on_an_edge(logits, params))
    check(logits, params)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 8), st.integers(0, 3000), st.floats(0.05, 0.999), st.booleans())
def test_survivors_in_large_vocabularies(
    seed: int, scale: float, top_k: int, top_p: float, tied: bool
) -> None:
    logits = random_row(seed, 9001, scale)
    if tied:
        logits = np.round(logits)
    params = SamplingParams(top_k=top_k, top_p=top_p)
    assume(not on_an_edge(logits, params))
    check(logits, params)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 2, "min_p": 0.5}], ids=str)
def test_no_temperature_overflows(temperature: float, filters: dict[str, float]) -> None:
    logits = row(3, 1, -INF, 3, 2, -BIG)
    ids, probs = distribution(logits, SamplingParams(temperature=temperature, **filters))
    assert np.isfinite(probs).all()
    assert probs.sum() == pytest.approx(1)
    if temperature < 1:  # only the two largest are left, or the first of them where half is enough
        assert ids.tolist() == ([0] if "top_p" in filters else [0, 3])
        np.testing.assert_array_equal(probs, 1 / len(ids))


def test_greedy_is_argmax_with_the_lowest_index() -> None:
    for seed in range(20):
        logits = np.round(random_row(seed, 500, 1))
        sampler = Sampler(SamplingParams(temperature=0), [], 500)
        assert sampler.sample(logits).token == int(torch.from_numpy(logits).argmax()) == logits.argmax()
        for nearly in ({"top_p": 0.0}, {"temperature": 1e-300, "top_p": 0.1}):
            assert distribution(logits, SamplingParams(**nearly))[0].tolist() == [logits.argmax()]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 100.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    vocab, prompt = 50, [3, 7, 7, 49]
    sampler = Sampler(SamplingParams(repetition_penalty=penalty, temperature=0), prompt, vocab)
    tokens = list(prompt)
    for step in range(60):
        logits = random_row(step, vocab)
        scores = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([tokens]), torch.from_numpy(logits)[None]
        )
        want = scores[0].numpy()
        got = sampler._drawer.adjusted(Room(logits.size), logits)
        np.testing.assert_array_equal(got, want)
        tokens.append(sampler.sample(logits).token)
        assert tokens[-1] == want.argmax()


def test_presence_and_frequency_penalties_are_those_of_openai() -> None:
    """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c over the answer."""
    vocab, presence, frequency, repetition = 20, 0.7, -0.4, 1.2
    params = SamplingParams(
        temperature=0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
    )
    prompt = [0, 1, 1, 2]
    sampler = Sampler(params, prompt, vocab)
    answer: list[int] = []
    for step in range(80):
        logits = random_row(step, vocab, 1)
        want = []
        for j in range(vocab):
            mu = float(logits[j])
            if j in prompt or j in answer:
                mu = mu * repetition if mu < 0 else mu / repetition
            c = answer.count(j)
            want.append(mu - c * frequency - float(c > 0) * presence)
        np.testing.assert_allclose(
            sampler._drawer.adjusted(Room(logits.size), logits), want, rtol=1e-5, atol=1e-5
        )
        answer.append(sampler.sample(logits).token)
        assert answer[-1] == max(range(vocab), key=want.__getitem__)
    assert len(set(answer)) < len(answer)


def test_penalties_leave_the_logits_alone_and_skip_tokens_beyond_the_vocabulary() -> None:
    logits = random_row(0, 10)
    before = logits.copy()
    params = SamplingParams(temperature=0, repetition_penalty=2, presence_penalty=1, logprobs=2)
    sampler = Sampler(params, [1, 10, 12], 10)
    for _ in range(5):
        sampler.sample(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"temperature": 2, "top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -1])
def test_drawn_frequencies_follow_the_probabilities(params: dict[str, float], seed: int) -> None:
    logits, n = random_row(4, 12, 1.5), 4000
    logits[5] = -INF
    settings_ = SamplingParams(seed=seed, **params)
    want = warped(logits, settings_).softmax(0).numpy()
    sampler = Sampler(settings_, [], 12)
    counts = Counter(sampler.sample(logits).token for _ in range(n))
    assert all(want[token] > 0 for token in counts)
    likely = [token for token in range(12) if want[token] * n >= 5]
    expected = np.array([want[token] * n for token in likely])
    seen = np.array([counts[token] for token in likely])
    statistic = float((((seen - expected) ** 2) / expected).sum())
    freedom = len(likely) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4  # mean + 4 standard deviations of chi-square


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 5, 31, 32, 33, 64, 100, 1000, 5003]),
    scale=st.sampled_from([0.1, 1.0, 4.0, 20.0]),
    masked=st.booleans(),
    params=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.0, 1e-300, 0.3, 0.8, 1.7, 50.0]),
            "top_k": st.sampled_from([1, 2, 5, 40, 200, 10**6]),
            "top_p": st.floats(0.01, 0.9999),
            "min_p": st.floats(1e-6, 0.9),
            "repetition_penalty": st.sampled_from([0.7, 1.2, 3.0]),
            "presence_penalty": st.sampled_from([-1.5, 0.6]),
            "frequency_penalty": st.sampled_from([-0.3, 2.0]),
            "logit_bias": st.sampled_from([{0: 3.0}, {0: -100.0}]),
        },
    ),
)
def test_tokens_are_those_of_numpy(
    seed: int, vocab: int, scale: float, masked: bool, params: dict[str, float]
) -> None:
    """Random logits lie on no edge, where the order of a sum would decide."""
    random = np.random.default_rng(seed)
    given_ = SamplingParams(seed=seed, **params)
    prompt = random.integers(0, vocab + 10, 20).tolist()
    sampler, reference = Sampler(given_, prompt, vocab), sampling_reference.Sampler(given_, prompt, vocab)
    for step in range(12):
        logits = random_row(seed + step, vocab, scale)
        allowed = random.random(vocab) < 0.5 if masked else None
        if allowed is not None:
            allowed[random.integers(vocab)] = True
        assert sampler.sample(logits, allowed).token == reference.sample(logits, allowed)


def test_ties_are_drawn_as_by_numpy() -> None:
    for seed in range(60):
        logits = np.round(random_row(seed, 700, 1))
        logits[seed] = -0.0
        params = SamplingParams(seed=seed, top_k=seed % 30, min_p=seed % 3 / 3)
        sampler, reference = Sampler(params, [], 700), sampling_reference.Sampler(params, [], 700)
        for _ in range(10):
            assert sampler.sample(logits).token == reference.sample(logits)


def test_weights_are_exp_to_the_last_bits() -> None:
    """Those of numpy's numbers of 80 bits; results down to the least number that there is."""
    depths = np.concatenate([np.linspace(0, 40, 30_001), np.linspace(40, 746, 5_003)])
    logits = (-depths).astype(np.float32)
    for temperature in (1.0, 0.7):
        found = Room(logits.size).survivors(logits, temperature, 0, 1.0, 5e-324)
        assert found is not None
        want = np.exp((logits.astype(float) * (1 / temperature)).astype(np.longdouble))
        ids, weights = found
        np.testing.assert_allclose(weights, want[ids].astype(float), rtol=2**-51, atol=1e-323)
        left_out = np.setdiff1d(np.arange(logits.size), ids)
        assert want[left_out].astype(float).max() < 1e-323


def test_every_processor_weighs_alike(tmp_path: Path) -> None:
    """Compiled for the oldest one, with checks of what is undefined; the engine has the best one's code."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    flags = ["-std=gnu11", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
    flags += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-shared", "-fPIC", f"-I{CSRC}"]
    sources = sorted(map(str, (CSRC / "sampling").glob("*.c")))
    command = [compiler, *flags, "-DMER_CLONES=", "-o", str(tmp_path / "plain.so"), *sources, "-lm"]
    subprocess.run(command, check=True)
    plain, best = (ctypes.CDLL(str(path)) for path in (tmp_path / "plain.so", sampling.__file__))
    logits = random_row(5, 4999, 20)
    logits[77] = -INF
    n, peak, slope = ctypes.c_long(logits.size), ctypes.c_float(logits.max()), ctypes.c_double(1 / 0.8)
    got: dict[str, list[bytes]] = {}
    for name, lib in (("plain", plain), ("best", best)):
        sums, weights = np.empty(logits.size), np.empty(logits.size)
        peaks = np.empty(157, np.float32)
        x, *out = (ctypes.c_void_p(each.ctypes.data) for each in (logits, sums, weights, peaks))
        lib.mer_block_sums(x, n, peak, slope, out[0])
        lib.mer_weights(x, n, peak, slope, out[1])
        assert not lib.mer_peaks(x, n, out[2])
        got[name] = [sums[:157].tobytes(), weights.tobytes(), peaks.tobytes()]
    assert got["plain"] == got["best"]


def test_uniform_numbers_are_those_of_numpy() -> None:
    for seed in (0, 1, 2**63, 2**64 - 1):
        for position in (0, 1, 2**32, 2**63 + 5):
            want = np.random.Generator(np.random.Philox(key=seed, counter=position)).random()
            assert uniform(seed, position) == want


def test_draws_invert_the_cumulative_distribution_with_philox() -> None:
    """numpy's Generator over a Philox of its own gives the uniform numbers; a loop finds the tokens."""
    logits, seed = random_row(1, 300, 1), 1234567890123456789
    probs = torch.from_numpy(logits.astype(np.float64)).softmax(0).tolist()
    sampler = Sampler(SamplingParams(seed=seed), [], 300)
    for position in range(200):
        u = np.random.Generator(np.random.Philox(key=seed, counter=position)).random()
        token, total = 0, probs[0]
        while total <= u:
            token += 1
            total += probs[token]
        assert sampler.sample(logits).token == token


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.5 - 2**-53, 1), (0.5, 3), (1 - 2**-53, 3)])
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_draw_on_the_edge_of_two_tokens(u: float, token: int, top_k: int) -> None:
    assert Room(5).pick(row(-INF, 2, -INF, 2, -INF), 1.0, top_k, 1.0, 0.0, u) == token


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    rows = [random_row(i, 100, 1) for i in range(40)]
    first, second = (Sampler(SamplingParams(seed=7), [1], 100) for _ in range(2))
    want = [first.sample(r).token for r in rows]
    for position, logits in enumerate(
        rows
    ):  # other logits at every other position: later draws stay the same
        got = second.sample(rows[0] if position % 2 else logits)
        if position % 2 == 0:
            assert got.token == want[position]
    other = Sampler(SamplingParams(seed=8), [1], 100)
    assert [other.sample(r).token for r in rows] != want


def test_a_missing_seed_is_drawn_and_reported() -> None:
    rows = [random_row(i, 100, 1) for i in range(30)]
    one, two = (Sampler(SamplingParams(), [], 100) for _ in range(2))
    assert one.seed != two.seed
    again = Sampler(SamplingParams(seed=one.seed), [], 100)
    assert again.seed == one.seed
    assert [one.sample(r).token for r in rows] == [again.sample(r).token for r in rows]


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 0.3, "top_k": 2}, {"presence_penalty": 2}], ids=str
)
def test_logprobs_are_those_of_the_raw_logits(count: int, params: dict[str, float]) -> None:
    sampler = Sampler(SamplingParams(logprobs=count, seed=3, **params), [1, 2], 15)
    for step in range(20):
        logits = np.round(random_row(step, 15) * 2) / 2  # ties
        logits[step % 15] = -INF
        want = torch.from_numpy(logits.astype(np.float64)).log_softmax(0).numpy()
        got = sampler.sample(logits)
        assert got.logprob == pytest.approx(want[got.token], rel=1e-12)
        order = sorted(range(15), key=lambda i: (-want[i], i))[:count]
        assert [token for token, _ in got.top] == order
        np.testing.assert_allclose([p for _, p in got.top], want[order], rtol=1e-12)
    assert Sampler(SamplingParams(), [], 15).sample(row(*range(15))).logprob is None


def test_logprobs_in_a_large_vocabulary() -> None:
    logits = random_row(0, 151936)
    want = torch.from_numpy(logits.astype(np.float64)).log_softmax(0)
    got = Sampler(SamplingParams(temperature=0, logprobs=20), [], logits.size).sample(logits)
    values, ids = want.topk(20)
    assert [token for token, _ in got.top] == ids.tolist()
    np.testing.assert_allclose([p for _, p in got.top], values.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {}, {"top_k": 2}, {"repetition_penalty": 1.5}], ids=str
)
@pytest.mark.parametrize(
    ("logits", "named"),
    [
        (row(1, NAN, 3), "NaN"),
        (row(NAN, NAN, NAN), "NaN"),
        (row(1, INF, NAN), "NaN"),
        (row(1, INF, 2), "inf"),
    ],
    ids=str,
)
def test_logits_that_are_no_numbers_are_an_error(
    logits: NDArray[np.float32], named: str, params: dict[str, float]
) -> None:
    with pytest.raises(MerError, match=f"the model gave {named}"):
        Sampler(SamplingParams(**params), [0], 3).sample(logits)


def test_no_possible_token_is_an_error() -> None:
    with pytest.raises(MerError, match="-inf as its largest"):
        Sampler(SamplingParams(), [], 2).sample(row(-INF, -INF))
