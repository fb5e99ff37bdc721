"""One request on its way: its tokens, how the next is drawn, when it ends, and whom to tell."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from attrs import Factory, define, field
from numpy.typing import NDArray

from mer.engine.outputs import Delta, FinishReason, Timings, TokenLogprob, Usage
from mer.engine.params import SamplingParams
from mer.engine.runner import StepStats
from mer.engine.sampling import Sampled, Sampler
from mer.engine.scheduler import Sequence
from mer.model.detokenizer import Detokenizer
from mer.model.stopping import StopStrings
from mer.model.tokenizer import Tokenizer

Deliver = Callable[[Delta | BaseException], None]


@define(eq=False, kw_only=True)
class Request(Sequence):
    """Used by the worker's thread alone, but for `deliver`, which passes each piece on."""

    params: SamplingParams
    sampler: Sampler
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    limit: int  # most tokens, prompt and answer together
    deliver: Deliver
    prompt_tokens: int = field(init=False)
    _detokenizer: Detokenizer | None = field(init=False)
    _stops: StopStrings = field(init=False)
    _end_ids: frozenset[int] = field(init=False)
    _asked_at: float = Factory(time.perf_counter)
    _started_at: float | None = None
    _first_at: float | None = None
    _steps: StepStats = Factory(StepStats)

    def __attrs_post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        self._detokenizer = self.tokenizer.detokenizer(self.tokens) if self.tokenizer else None
        self._stops = StopStrings(self.params.stop)
        self._end_ids = frozenset(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self._end_ids |= self.eos_ids

    def begin_step(self) -> None:
        if self._started_at is None:
            self._started_at = time.perf_counter()

    def end_step(self, stats: StepStats) -> None:
        """A step that it took part in has been computed."""
        self._steps += stats

    def accept(self, logits: NDArray[np.float32]) -> Delta:
        """Draw the next token from f32 [vocab]: the piece to deliver; the last one has a finish_reason."""
        drawn = self.sampler.sample(logits)
        self.tokens.append(drawn.token)
        now = time.perf_counter()
        self._first_at = self._first_at or now
        text, reason = self._read(drawn.token)
        logprobs = None
        if self.params.logprobs is not None:
            logprobs = (self._logprob(drawn),)
        if reason is None:
            return Delta(text, (drawn.token,), logprobs)
        usage = Usage(self.prompt_tokens, len(self.tokens) - self.prompt_tokens)
        return Delta(text, (drawn.token,), logprobs, reason, usage, self._timings(now))

    def _read(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that is certain now, and why the answer ends here if it does."""
        text = ""
        ended = token in self._end_ids
        if self._detokenizer is not None and not ended:
            text, stop = self._stops.push(self._detokenizer.push(token))
            if stop is not None:
                return text, "stop"
        if not ended and len(self.tokens) < self.limit:
            return text, None
        if self._detokenizer is not None:
            more, stop = self._stops.push(self._detokenizer.finish())
            text += more
            if stop is not None:
                return text, "stop"
            text += self._stops.finish()
        return text, "stop" if ended else "length"

    def _logprob(self, drawn: Sampled) -> TokenLogprob:
        def text(token: int) -> str:
            return self.tokenizer.token_text(token) if self.tokenizer else ""

        top = tuple((token, text(token), logprob) for token, logprob in drawn.top)
        assert drawn.logprob is not None
        return TokenLogprob(drawn.token, text(drawn.token), drawn.logprob, top)

    def _timings(self, now: float) -> Timings:
        assert self._started_at is not None
        assert self._first_at is not None
        return Timings(
            queue_s=self._started_at - self._asked_at,
            prefill_s=self._first_at - self._started_at,
            decode_s=now - self._first_at,
            steps=self._steps,
        )
