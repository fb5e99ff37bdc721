"""The sampler as numpy computes it: mer/engine/sampling.py before its arithmetic went to C."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mer.engine.params import SamplingParams
from mer.errors import MerError

_WORD = 2**64 - 1
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_TINY = float(np.nextafter(0.0, 1.0))
_BINS = 4096
_NEAR = (4.0, 8.0, 12.0, 16.0, 32.0, 750.0)  # nats below the likeliest token; exp(-750) is 0: everything


class Sampler:
    """Draws one request's tokens; holds its random state and the counts that penalties need."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab: int) -> None:
        """`vocab`: the length of the logits; tokens of the prompt beyond it can't be drawn."""
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._drawn = 0
        self._biased, self._biases = params.logit_bias.tokens, params.logit_bias.biases
        self._seen: NDArray[np.bool_] | None = None
        self._counts: NDArray[np.uint32] | None = None
        if params.repetition_penalty != 1:
            tokens = np.asarray(prompt, dtype=np.int64)
            self._seen = np.zeros(vocab, dtype=np.bool_)
            self._seen[tokens[tokens < vocab]] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = np.zeros(vocab, dtype=np.uint32)

    def sample(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token. `logits`: f32 [vocab], neither kept nor changed.

        `allowed`: bool [vocab], the tokens to draw from, at least one; None: all.
        Raises MerError when the largest logit is not finite.
        """
        adjusted = self._penalised(logits)
        if allowed is not None:
            adjusted = np.where(allowed, adjusted, np.float32(-np.inf))
        if self.params.temperature == 0:
            token = _likeliest(adjusted)
        else:
            ids, probs = distribution(adjusted, self.params)
            cumulative = probs.cumsum(out=probs)
            # below the last sum, since the uniform number is at most 1 - 2**-53; a weight of 0 is never found
            point = _uniform(self.seed, self._drawn) * cumulative[-1]
            token = int(ids[cumulative.searchsorted(point, side="right")])
        self._drawn += 1
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def _penalised(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits after biases and penalties; the same array where there are none."""
        if self._seen is None and self._counts is None and not len(self._biased):
            return logits
        logits = logits.copy()
        logits[self._biased] += self._biases
        if self._seen is not None:
            ids, penalty = np.flatnonzero(self._seen), self.params.repetition_penalty
            scores = logits[ids]
            with np.errstate(over="ignore"):
                logits[ids] = np.where(scores < 0, scores * penalty, scores / penalty)
        if self._counts is not None:
            ids = np.flatnonzero(self._counts > 0)  # a mask first: numpy finds bools faster
            logits[ids] -= self._counts[ids] * self.params.frequency_penalty + self.params.presence_penalty
        return logits


def distribution(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that survive temperature, top-k, top-p and min-p, ascending, and their probabilities.

    `logits`: f32 [vocab], after penalties. Raises MerError when the largest is not finite.
    """
    best = _likeliest(logits)
    if params.temperature == 0:
        return np.array([best]), np.ones(1)
    if 0 < params.top_k < logits.size:
        ids = _top_k(logits, params.top_k)
        scores = logits[ids]
    else:
        ids, scores = _all_ids(logits.size), logits
    # From the largest, so that it has weight 1 and no temperature overflows into NaN. In place, here and
    # below: pages that the allocator takes from the kernel for a new array cost more than the arithmetic.
    with np.errstate(over="ignore", under="ignore"):
        weights = np.subtract(scores, logits[best], dtype=np.float64)
        weights /= params.temperature
        np.exp(weights, out=weights)
    if params.top_p < 1:
        kept = _top_p(scores, weights, params)
        ids, weights = ids[kept], weights[kept]
    alive = weights >= max(params.min_p, _TINY)
    if not alive.all():
        kept = np.flatnonzero(alive)
        ids, weights = ids[kept], weights[kept]
    weights /= weights.sum()
    return ids, weights


@lru_cache(maxsize=1)
def _all_ids(vocab: int) -> NDArray[np.int64]:
    ids = np.arange(vocab)
    ids.flags.writeable = False
    return ids


def _likeliest(logits: NDArray[np.float32]) -> int:
    """The index of the largest logit, the lowest among equals."""
    best = int(logits.argmax())  # a NaN counts as the largest
    if not np.isfinite(logits[best]):
        value = "NaN" if np.isnan(logits[best]) else f"{logits[best]} as its largest logit"
        raise MerError(
            f"the model gave {value}: its weights may be damaged, `mer verify` checks them; or it is too "
            "much for --expert-wire f16, where that is given"
        )
    return best


def _top_k(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The indices, ascending, of the k largest logits and of those that equal the k-th; k <= logits.size."""
    # The k-th largest of any groups' maxima is a lower bound of the k-th largest: few logits pass it.
    groups = min(logits.size, max(1024, 8 * k))
    rows = logits.size // groups
    maxima = logits[: rows * groups].reshape(rows, groups).max(axis=0)
    ids: NDArray[np.int64] = np.flatnonzero(logits >= np.partition(maxima, groups - k)[groups - k])
    scores = logits[ids]
    return ids[np.flatnonzero(scores >= np.partition(scores, ids.size - k)[ids.size - k])]


def _top_p(
    scores: NDArray[np.float32], weights: NDArray[np.float64], params: SamplingParams
) -> NDArray[np.int64]:
    """The positions, ascending, of the fewest tokens whose share of `weights` reaches top_p, likeliest first.

    Instead of sorting everything, look near the top first, weigh narrow bins of the scores there, and sort
    the one bin in which top_p is reached. Rounding keeps the order, so float32 will do for the bins.
    """
    goal = params.top_p * weights.sum()
    for nats in _NEAR:
        near = np.flatnonzero(weights >= np.exp(-nats))
        if (mass := weights[near]).sum() >= goal:
            break
    with np.errstate(over="ignore", under="ignore"):
        depth = scores.max() - scores[near]
        # a factor that is neither 0 nor inf in float32: 0 * inf would be NaN
        depth *= min(max(_BINS / nats / params.temperature, 1e-30), 1e30)
    bins = np.minimum(depth, _BINS - 1, out=depth).astype(np.intp)
    reached = np.bincount(bins, mass, _BINS).cumsum()
    edge = int(reached.searchsorted(goal))
    inside = np.flatnonzero(bins == edge)
    inside = inside[np.argsort(-scores[near[inside]], kind="stable")]
    sums = mass[inside].cumsum() + (reached[edge - 1] if edge else 0.0)
    kept = bins < edge
    kept[inside[: int(sums.searchsorted(goal)) + 1]] = True
    return near[np.flatnonzero(kept)]


def _uniform(seed: int, position: int) -> float:
    """A number of [0, 1), a multiple of 2**-53, from Philox with key `seed` and counter `position` + 1.

    As numpy.random.Philox gives it, which takes longer to be made than the few numbers of this.
    """
    a, b, c, d = (position + 1) & _WORD, 0, 0, 0
    key, other = seed & _WORD, 0
    for _ in range(10):
        left, right = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (right >> 64) ^ b ^ key, right & _WORD, (left >> 64) ^ d ^ other, left & _WORD
        key, other = (key + _WEYL[0]) & _WORD, (other + _WEYL[1]) & _WORD
    return (a >> 11) * 2.0**-53
