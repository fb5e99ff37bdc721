"""One request on its way: its tokens, how the next is drawn, when it ends, and whom to tell."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from attrs import Factory, define, evolve, field
from numpy.typing import NDArray

from mer._ext.acceptance import Acceptance
from mer.engine.constraint import Constraint
from mer.engine.draft import Drafter
from mer.engine.mailbox import Mailbox
from mer.engine.outputs import Delta, FinishReason, Timings, TokenLogprob, Usage
from mer.engine.params import SamplingParams
from mer.engine.sampling import Sampled, Sampler, with_logprobs
from mer.engine.scheduler import Sequence
from mer.engine.speculation import LOOKUP
from mer.engine.stats import StepStats
from mer.model.detokenizer import Detokenizer
from mer.model.stopping import StopStrings
from mer.model.tokenizer import Tokenizer


@define(eq=False, kw_only=True)
class Job(Sequence):
    """What somebody waits for. Used by the worker's thread alone, but for the mailbox.

    id: number of the request in this engine. asked_at: seconds of time.perf_counter. timeout: seconds from
    there to its deadline.
    """

    id: int
    mailbox: Mailbox[Any]
    timeout: float | None = None
    asked_at: float = Factory(time.perf_counter)
    started_at: float | None = None
    _earlier: StepStats = Factory(StepStats)
    _since: StepStats | None = None
    _until: StepStats | None = None
    prompt_tokens: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        if self.timeout is not None:
            self.deadline = self.asked_at + self.timeout

    def end_step(self, before: StepStats, after: StepStats) -> None:
        """A step that it took part in has been computed: totals of all steps, without and with it.

        One step's `after` is the next one's `before`, the same object: so nothing is added up while it is in
        all of them.
        """
        if self._until is not before:
            self._earlier, self._since = self.steps, before
        self._until = after

    @property
    def steps(self) -> StepStats:
        """Of those that it took part in."""
        if self._since is None or self._until is None:
            return self._earlier
        return self._earlier + (self._until - self._since)

    def usage(self) -> Usage:
        """So far."""
        answer = len(self.tokens) - self.prompt_tokens
        return Usage(self.prompt_tokens, answer, self.cached or 0)


@define(eq=False, kw_only=True)
class Embedding(Job):
    """The mean over positions of the last hidden state."""

    _sum: NDArray[np.float32] = field(init=False, factory=lambda: np.zeros(0, np.float32))

    def add(self, start: int, hidden: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Take f32 [T, hidden], the states from position `start` on; f32 [hidden] when they were the last."""
        # Row by row, so that it does not matter how the prompt was cut; from the start after a preemption.
        rows = hidden if start == 0 else np.vstack([self._sum, hidden])
        self._sum = np.add.reduce(rows, axis=0)
        if start + len(hidden) < self.prompt_tokens:
            return None
        return self._sum / np.float32(self.prompt_tokens)


@define(eq=False, kw_only=True)
class Request(Job):
    """An answer that is drawn token by token.

    drafter: prompt lookup, None: not for this one. engines: whether draft engines may draft for it. drafts:
    what became of what was drafted. drafted, accepted: tokens of drafts that were verified, and those that
    were right. draft_experts: that drafted tokens wanted, and no others of their steps. draft_source: of the
    last draft, draft_kind: as Acceptance counts. passed: of kinds of drafts, in which of Drafting's steps one
    was not worth verifying.
    """

    params: SamplingParams
    sampler: Sampler
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    limit: int  # most tokens, prompt and answer together
    constraint: Constraint | None = None
    drafter: Drafter | None = None
    engines: bool = False
    drafts: Acceptance = Factory(Acceptance)
    passed: dict[int, int] = Factory(dict)
    drafted: int = 0
    accepted: int = 0
    draft_experts: int = 0
    draft_kind: int = 0
    draft_source: int = LOOKUP
    _detokenizer: Detokenizer | None = field(init=False)
    _stops: StopStrings = field(init=False)
    _end_ids: frozenset[int] = field(init=False)
    _prompt_logprobs: dict[int, TokenLogprob] = Factory(dict)
    _first_at: float | None = None
    _last_at: float = 0.0

    def usage(self) -> Usage:
        """See Job.usage."""
        return evolve(
            super().usage(),
            drafted=self.drafted,
            accepted=self.accepted,
            draft_experts=self.draft_experts,
        )

    def __attrs_post_init__(self) -> None:
        Job.__attrs_post_init__(self)
        shown = self.params.show_special
        if self.params.structure is not None and self.params.structure.behind:
            shown = (*shown, self.params.structure.behind)
        self._detokenizer = self.tokenizer.detokenizer(self.tokens, shown) if self.tokenizer else None
        self._stops = StopStrings(self.params.stop)
        self._end_ids = frozenset(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self._end_ids |= self.eos_ids

    @property
    def room(self) -> int:
        """Most tokens of a draft that are of use now; 0: it is not time for one."""
        if self.pending != 1 or self.wants != "last":
            return 0
        return max(self.limit - len(self.tokens) - 1, 0)

    def see_prompt(self, start: int, logits: NDArray[np.float32]) -> None:
        """Take f32 [T, vocab], what the model expected after each token from position `start` on."""
        count = self.params.prompt_logprobs
        assert count is not None
        for position, row in enumerate(logits, start + 1):
            if position < self.prompt_tokens:
                drawn = with_logprobs(self.tokens[position], row, count)
                self._prompt_logprobs[position] = self._logprob(drawn)

    def accept(self, logits: NDArray[np.float32]) -> Delta:
        """Draw the next token from f32 [vocab]: the piece to deliver; the last one has a finish_reason."""
        prompt_logprobs = None
        if self.wants == "all":
            prompt_logprobs = (None, *(self._prompt_logprobs[i] for i in range(1, self.prompt_tokens)))
            self.wants = "last"  # they are delivered: from here on it is a request like others
        drawn, complete = self._draw(logits)
        tokens: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprob, ...] | None = None
        if drawn is not None:
            tokens = (drawn.token,)
            self.tokens.append(drawn.token)
        self._last_at = time.perf_counter()
        self._first_at = self._first_at or self._last_at
        text, reason, stop = self._read(drawn.token if drawn else None, complete)
        if self.params.logprobs is not None:
            logprobs = (self._logprob(drawn),) if drawn else ()
        if reason is None:
            return Delta(text, tokens, logprobs, prompt_logprobs=prompt_logprobs)
        return Delta(text, tokens, logprobs, reason, self.usage(), self._timings(), prompt_logprobs, stop)

    @property
    def first_at(self) -> float | None:
        """When its first token was drawn."""
        return self._first_at

    @property
    def last_at(self) -> float:
        """When its last token was drawn; when it was asked for, if there is none."""
        return self._last_at or self.asked_at

    def _draw(self, logits: NDArray[np.float32]) -> tuple[Sampled | None, bool]:
        """The next token, and whether it completes what `structure` asks for; None: there is none to draw."""
        if self.prompt_tokens == self.limit:
            return None, False
        if self.constraint is None:
            return self.sampler.sample(logits), False
        allowed = self.constraint.allowed(self._end_ids)
        if allowed is None:
            return None, True
        drawn = self.sampler.sample(logits, allowed)
        return drawn, drawn.token not in self._end_ids and self.constraint.accept(drawn.token)

    def _read(self, token: int | None, complete: bool) -> tuple[str, FinishReason | None, str | None]:
        """The text that is certain now, and why the answer ends here if it does: with which stop string."""
        text = ""
        ended = complete or token in self._end_ids
        if self._detokenizer is not None and token is not None and token not in self._end_ids:
            text, stop = self._stops.push(self._detokenizer.push(token))
            if stop is not None:
                return text, "stop", stop
        if not ended and len(self.tokens) < self.limit:
            return text, None, None
        if self._detokenizer is not None:
            more, stop = self._stops.push(self._detokenizer.finish())
            text += more
            if stop is not None:
                return text, "stop", stop
            text += self._stops.finish()
        return text, "stop" if ended else "length", None

    def _logprob(self, drawn: Sampled) -> TokenLogprob:
        def text(token: int) -> str:
            return self.tokenizer.token_text(token) if self.tokenizer else ""

        top = tuple((token, text(token), logprob) for token, logprob in drawn.top)
        assert drawn.logprob is not None
        return TokenLogprob(drawn.token, text(drawn.token), drawn.logprob, top)

    def _timings(self) -> Timings:
        assert self.started_at is not None
        assert self._first_at is not None
        return Timings(
            queue_s=self.started_at - self.asked_at,
            prefill_s=self._first_at - self.started_at,
            decode_s=self._last_at - self._first_at,
            steps=self.steps,
            drafted=self.drafted,
            accepted=self.accepted,
            draft_experts=self.draft_experts,
        )
