"""From logits to a token.

The steps, in the order of transformers' `generate`: biases, repetition penalty, then presence and frequency
penalties (where vLLM has them), what a structure excludes, temperature, top-k, top-p, min-p. Each filter sees
the distribution that the one before it left, and at least the likeliest token survives. Ties: greedy takes
the lowest index; top-k keeps every token that equals the k-th, as transformers does; of equal tokens at its
edge top-p keeps those of the lowest indices, so that it never loses greedy's choice.

Log-probabilities are natural logarithms of the model's own distribution, before all of these steps, as OpenAI
and vLLM report them.

A token's draw is a function of (seed, number of tokens drawn before) alone: Philox4x64-10 (Salmon et al.,
'Parallel random numbers: as easy as 1, 2, 3', 2011) keyed by the seed, with that number as the counter, as
numpy.random.Philox gives it. So neither preemption, nor the batch, nor speculation can change it. One uniform
number is enough, since the token is found by inverting the cumulative distribution in index order; Gumbel's
trick needs one per token of the vocabulary. Weights and sums are float64, added up in one fixed order with an
exp of their own, so every CPU draws the same token from the same logits.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mer._ext.sampling import Drawer, Room
from mer.engine.params import SamplingParams
from mer.errors import RequestError


class Sampled(NamedTuple):
    """A token, with log-probabilities where they were asked for.

    `top`: (token, log-probability) of the likeliest tokens, best first, the lower index first among equals;
    a token that the model excludes (a logit of -inf) has -inf.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws one request's tokens; holds its random state and the counts that penalties need.

    Only `sample` changes the state, so whoever computes logits again (after a preemption, or beyond a
    rejected draft) must not sample from them again. Where penalties are in use they take eight bytes per
    token of the vocabulary.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab: int) -> None:
        """`vocab`: the length of the logits; tokens of the prompt beyond it can't be drawn.

        Raises RequestError for a bias of a token outside the vocabulary.
        """
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        biased = params.logit_bias.tokens
        if len(biased) and biased.max() >= vocab:
            raise RequestError(
                f"logit_bias: token id {biased.max()} is outside the vocabulary, 0..{vocab - 1}",
                "logit_bias",
            )
        self._drawer = Drawer(
            vocab,
            self.seed % 2**64,
            np.asarray(prompt if params.repetition_penalty != 1 else [], np.int64),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            biased=biased,
            biases=params.logit_bias.biases,
        )

    def sample(self, logits: NDArray[np.float32], allowed: NDArray[np.bool_] | None = None) -> Sampled:
        """The next token. `logits`: f32 [vocab], neither kept nor changed.

        `allowed`: bool [vocab], the tokens to draw from, at least one; None: all.
        Raises MerError when the largest logit is not finite.
        """
        mask = None if allowed is None else allowed.view(np.uint8)
        token = self._drawer.draw(_room(len(logits)), logits, mask)
        count = self.params.logprobs
        return Sampled(token) if count is None else with_logprobs(token, logits, count)


def with_logprobs(token: int, logits: NDArray[np.float32], count: int) -> Sampled:
    """`token` with its log-probability in f32 [vocab] and those of the `count` likeliest tokens.

    Raises MerError when the largest logit is not finite.
    """
    return Sampled(token, *_room(len(logits)).logprobs(logits, token, count))


_here = threading.local()


def _room(vocab: int) -> Room:
    """This thread's memory for drawing."""
    room: Room | None = getattr(_here, "room", None)
    if room is None or room.vocab != vocab:
        room = _here.room = Room(vocab)
    return room
