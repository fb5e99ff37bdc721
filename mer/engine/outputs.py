"""What a request gives back: pieces of a stream, and the whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from attrs import field, frozen

from mer.engine.stats import StepStats

FinishReason = Literal["stop", "length"]


@frozen
class TokenLogprob:
    """A drawn token. logprob: natural logarithm of its probability in the model's own distribution.

    top: the likeliest tokens at this place, likeliest first, as (token id, text, logprob).
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


# Of each token of a prompt, given those before it; the first has none.
PromptLogprobs = tuple[TokenLogprob | None, ...]


@frozen
class Usage:
    """cached_tokens: those of the prompt whose keys and values were found in the prefix cache.

    drafted, accepted, draft_experts: as in Timings. They say how the answer was made, not what it is: two
    that differ in them alone are equal.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted: int = field(default=0, eq=False)
    accepted: int = field(default=0, eq=False)
    draft_experts: int = field(default=0, eq=False)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@frozen
class Timings:
    """Seconds, bytes and counts of one request.

    Steps are shared by the requests of a batch, so the reads and waits of a step count for each of them.
    drafted: tokens of drafts that were verified; accepted: those that were right, and so came for nothing;
    draft_experts: experts, of all layers, that drafted tokens wanted and none of the others in their step.
    """

    queue_s: float  # until its first step began
    prefill_s: float  # from then to its first token
    decode_s: float  # from there to its last token
    steps: StepStats
    drafted: int = 0
    accepted: int = 0
    draft_experts: int = 0

    @property
    def io_wait_s(self) -> float:
        """Time in which there was nothing to compute because reads were not there yet."""
        return self.steps.io_wait_s

    @property
    def bytes_read(self) -> int:
        """Bytes of experts that were read from disk."""
        return self.steps.bytes_read

    @property
    def hits(self) -> int:
        """Experts that were found in the cache."""
        return self.steps.hits

    @property
    def misses(self) -> int:
        """Experts that had to be read."""
        return self.steps.misses

    @property
    def hit_rate(self) -> float:
        """Share of experts that need not be read; 1 when no expert was needed."""
        found = self.hits + self.steps.vram_hits
        wanted = found + self.misses
        return found / wanted if wanted else 1.0


@frozen
class Delta:
    """The next piece of a stream. finish_reason, usage and timings come with the last one.

    prompt_logprobs comes with the first one, where it was asked for. stop: the stop string that ended the
    answer; None when something else did.

    text: what became certain with these tokens; it may be empty, and never holds half a character or the
    beginning of what may turn out to be a stop string.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_logprobs: PromptLogprobs | None = None
    stop: str | None = None


@frozen
class Result:
    """A whole answer. token_ids: as drawn, the token that ended it included; text: without that."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    prompt_logprobs: PromptLogprobs | None = None


def join(deltas: Iterable[Delta], seed: int) -> Result:
    """The whole of a finished stream."""
    pieces = list(deltas)
    last = pieces[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    assert last.timings is not None
    logprobs = None
    if last.logprobs is not None:
        logprobs = tuple(each for piece in pieces for each in piece.logprobs or ())
    return Result(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
        seed=seed,
        prompt_logprobs=pieces[0].prompt_logprobs,
    )
