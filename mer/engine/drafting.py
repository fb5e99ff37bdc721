"""Who drafts what of which request: prompt lookup, and draft engines where they are worth their time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, TypeVar

from mer._ext.acceptance import MOST_DRAFTED, Acceptance
from mer.config import EngineConfig
from mer.engine.budget import drafts
from mer.engine.draft import DraftEngine, DraftSource
from mer.engine.draft_model import ModelSource
from mer.engine.request import Request
from mer.engine.runner import Runner
from mer.engine.scheduler import Chunk, Sequence
from mer.engine.speculation import LOOKUP, Choice, Offer, Speculation, Verdict
from mer.engine.stats import StepStats
from mer.engine.tied import find_head
from mer.errors import ConfigError, GpuError, MerError
from mer.model.families import Architecture
from mer.model.tokenizer import Tokenizer
from mer.weights.checkpoint import Checkpoint
from mer.weights.hub import locate

_T = TypeVar("_T")

_log = logging.getLogger("mer")

# An engine that is behind by more tokens than a few steps bring catches up before it drafts.
_BEHIND: Final = 4 * MOST_DRAFTED
# What prompt lookup found was not worth verifying: so many steps until a find of that kind is weighed again.
_PASSED: Final = 8
# Of looks for nothing, each so-manieth step counts as one whose time is known: to count takes time, too.
_PRICED: Final = 4
# Plain steps of which Speculation is told at once, if nothing asks for it before.
_UNTOLD: Final = 32
# Steps that want nothing of what engines offer until they are left alone, and for how many.
_PATIENCE: Final = 4
_SLEEP: Final = 128


def sources(
    checkpoint: Checkpoint, architecture: Architecture, tokenizer: Tokenizer | None, config: EngineConfig
) -> list[DraftSource]:
    """The draft engines that there are for a model with this tokenizer. A head is the first of them.

    Raises ConfigError where one is asked for that can't be, CheckpointError or UnsupportedModelError.
    """
    spec = architecture.spec
    found: list[DraftSource] = []
    if drafts(config) and config.speculate != "ngram":
        head = find_head(checkpoint, architecture, config)
        if head is not None:
            found.append(head)
        if config.draft_model is not None:
            found.append(ModelSource.open(locate(config.draft_model), spec, tokenizer, config))
    asked = config.draft_model is not None or config.draft_head is not None
    if not found and (asked or config.speculate == "draft"):
        raise ConfigError(_why_not(config))
    return found


def _why_not(config: EngineConfig) -> str:
    asked = "draft_head" if config.draft_head is not None else "speculate draft"
    asked = "draft_model" if config.draft_model is not None else asked
    if config.trace is not None:
        return f"{asked}: nothing is drafted while a routing trace is written; leave one of the two out"
    return (
        f"{asked}: there is nothing to draft with; name a draft_model (--draft-model), or train a head (mer "
        "draft train)"
    )


def load(sources: list[DraftSource], runner: Runner, config: EngineConfig) -> Drafting | None:
    """With these engines; None where nothing is to be drafted."""
    if not drafts(config):
        return None
    engines = [source.load(runner) for source in sources]
    spec = runner.spec
    experts = spec.n_moe_layers * spec.n_experts if spec.router else 0
    return Drafting(engines, Speculation(len(engines), experts))


class Drafting:
    """Gives requests their drafts. Used by the worker's thread alone."""

    def __init__(self, engines: Iterable[DraftEngine], speculation: Speculation) -> None:
        """speculation: made for so many engines."""
        self.speculation = speculation
        self.experts = 0  # that drafted tokens alone wanted
        self._engines = list(engines)
        self._everybody = Acceptance(), Acceptance()  # of greedy answers and of drawn ones
        self._failed: set[DraftEngine] = set()
        self._listening = [True] * len(self._engines)  # whether each saw the last step's states
        self.listening = True  # whether any did: then `observe` wants to be called in each step
        self._nobody: list[int | None] = [None] * len(self._engines)
        self._verdicts: list[Verdict] = []  # of this step
        self._spent = 0.0  # on drafts, in this step
        self._pricing = 0.0  # seconds, to find out what the last look for nothing was worth
        self._looks = 0
        self._step = 0
        self._next = 0  # the step of the next look
        self.resting = False  # whether this one is plain, and `end_step` need not be told of it
        self._rests = 0  # such steps of which Speculation was not told
        self._idle = 0  # looks in a row for which engines offered drafts, and nothing was wanted
        self._awake = 0  # the step from which they are asked again

    def rests(self) -> bool:
        """Whether the step that begins is left out: `prepare` is not to be called.

        To look takes time, and where nothing was worth it for long, it is no loss to find something some
        steps later.
        """
        self._step += 1
        resting = self.resting = self._step < self._next
        self._rests += resting
        return resting

    def prepare(
        self, requests: list[Request], room: int, expect: Callable[[list[int]], None] = lambda _: None
    ) -> list[list[int]] | None:
        """Of each, what the next step had better verify, of `room` tokens in all; None: nothing of any.

        expect: see Runner.expect; called with the tokens behind which an engine is to draft, while the
        drive has nothing to do.
        """
        began = time.perf_counter()
        found = self._prepare(requests, room, expect)
        if found is None:
            self._found_nothing(began)
        return found

    def _found_nothing(self, began: float) -> None:
        """The look that began then: what it took says for how many steps there shall be none."""
        speculation = self.speculation
        if not self.listening and self._step >= self._awake - 1:
            self.listening = any(speculation.affordable(1 + at) for at in range(len(self._engines)))
        self.resting = self._looks % _PRICED != 0
        self._rests += self.resting
        now = time.perf_counter()
        self._next = self._step + 1 + speculation.looked(now - began + self._pricing)
        ended = time.perf_counter()
        self._pricing = ended - now
        if not self.resting:
            self._spent += ended - began

    def _prepare(
        self, requests: list[Request], room: int, expect: Callable[[list[int]], None]
    ) -> list[list[int]] | None:
        self._looks += 1
        if self._rests >= _UNTOLD:
            self._tell()
        kinds = [self._look_up(request) for request in requests]
        hopeful = self._hopeful(requests, kinds)
        awake = self.listening and self._step >= self._awake
        if not (hopeful or awake):
            return None
        self._tell()
        if not self.speculation.ready(len(requests)):
            return None
        if not self.speculation.affordable(LOOKUP):
            kinds, hopeful = [-1] * len(requests), False
        behind = [self._all_behind(request) if awake else self._nobody for request in requests]
        asked = awake and any(late != self._nobody for late in behind)
        if not (asked or hopeful):
            return None
        offers = [
            Offer(
                () if kind < 0 else self._chances(request, kind),
                tuple(
                    () if tokens is None else self._chances(request, engine.kind)
                    for engine, tokens in zip(self._engines, late, strict=True)
                )
                if asked
                else (),
            )
            for request, kind, late in zip(requests, kinds, behind, strict=True)
        ]
        choices = self.speculation.choose(offers, room)
        if asked:
            self._doze(choices)
        if not any(choice.length for choice in choices):
            for request, kind in zip(requests, kinds, strict=True):
                if kind >= 0:
                    request.passed[kind] = self._looks
            return None
        found: list[list[int]] = [[] for _ in requests]
        for at, (request, kind, choice) in enumerate(zip(requests, kinds, choices, strict=True)):
            if kind >= 0 and choice.length and request.drafter is not None:
                found[at] = request.drafter.draft(min(choice.length, request.room))
            request.draft_kind, request.draft_source = kind, LOOKUP
        for at in range(len(self._engines) if asked else 0):
            self._ask(at, requests, behind, choices, found, expect)
        return found

    def _tell(self) -> None:
        if self._rests:
            self.speculation.rested(self._rests)
            self._rests = 0

    def _hopeful(self, requests: list[Request], kinds: list[int]) -> bool:
        """Whether something that was found is to be weighed: its kind was not passed over a few looks ago."""
        for request, kind in zip(requests, kinds, strict=True):
            if kind >= 0 and self._looks - request.passed.get(kind, -_PASSED) >= _PASSED:
                return True
        return False

    def _look_up(self, request: Request) -> int:
        """The kind of what prompt lookup finds; -1: nothing that is of use."""
        if request.drafter is None:
            return -1
        kind = request.drafter.look(request.drafts, self._everybody[request.params.temperature > 0])
        return kind if kind >= 0 and request.room else -1

    def _doze(self, choices: list[Choice]) -> None:
        """To ask engines takes time, too: where what they offer does not pay they are left alone a while."""
        self._idle = 0 if any(choice.length for choice in choices) else self._idle + 1
        if self._idle == _PATIENCE:
            self._idle, self._awake = 0, self._step + _SLEEP

    def _ask(
        self,
        at: int,
        requests: list[Request],
        behind: list[list[int | None]],
        choices: list[Choice],
        found: list[list[int]],
        expect: Callable[[list[int]], None],
    ) -> None:
        """Put what this engine drafts for those for whom it was chosen in the place of what was found."""
        chosen = [i for i, choice in enumerate(choices) if choice.engine == at and choice.length]
        late = [i for i in chosen if (behind[i][at] or 0) > _BEHIND]
        for i in late:
            self._catch_up(at, requests[i])
        ready = [i for i in chosen if i not in late]
        if not ready:
            return
        expect([requests[i].tokens[-1] for i in ready])
        lengths = [min(choices[i].length, requests[i].room) for i in ready]
        for i, tokens in zip(ready, self._propose(at, [requests[i] for i in ready], lengths), strict=True):
            found[i] = tokens
            requests[i].draft_kind, requests[i].draft_source = self._engines[at].kind, 1 + at

    def observe(self, chunks: list[Chunk], runner: Runner) -> None:
        """A step of it has computed these; see DraftEngine.observe."""
        awake = self._step >= self._awake - 1  # from the step before they are asked on
        if not self.resting and any(chunk.draft for chunk in chunks):
            extra, in_all = runner.draft_experts(chunks)
            self.experts += in_all
            for chunk, count in zip(chunks, extra, strict=True):
                if isinstance(chunk.sequence, Request):
                    chunk.sequence.draft_experts += count
        for at, engine in enumerate(self._engines):
            listens = awake and self.speculation.affordable(1 + at)
            if listens or self._listening[at]:
                # Of so little work the processor's time: that others had it meanwhile is no cost of drafts.
                began = time.thread_time()
                self._guarded(engine, partial(engine.observe, chunks, runner.states if listens else None))
                self._spend(1 + at, time.thread_time() - began)
            self._listening[at] = listens
        self.listening = any(self._listening)

    def judge(self, request: Request, drafted: int, right: int) -> None:
        """Of its last draft so many tokens were verified, and the first `right` of them were right."""
        if drafted:
            if request.draft_source == LOOKUP and request.drafter is not None:
                request.drafter.verified()
            self._verdicts.append(Verdict(request.draft_source, drafted, right))
            request.drafts.judge(request.draft_kind, drafted, right, self._like(request))

    def replayed(self, seconds: float) -> None:
        """It took so long to set recurrent states back behind the wrong drafts of the step."""
        wrong = {verdict.source for verdict in self._verdicts if verdict.right < verdict.drafted}
        for source in wrong:
            self._spend(source, seconds / len(wrong))

    def end_step(self, sequences: int, seconds: float, stats: StepStats, *, alone: bool) -> None:
        """It is over: see Speculation.observe. seconds: all of it, with what is counted as spent already."""
        if self.resting:
            return
        self.speculation.observe(
            sequences,
            seconds - self._spent,
            self._verdicts,
            alone=alone,
            wait=stats.io_wait_s,
            experts=stats.hits + stats.misses + stats.vram_hits,
        )
        self._verdicts, self._spent = [], 0.0

    def forget(self, request: Sequence) -> None:
        for engine in self._working():
            self._guarded(engine, partial(engine.forget, request))

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def _working(self) -> list[DraftEngine]:
        return [engine for engine in self._engines if engine not in self._failed]

    def _spend(self, source: int, seconds: float) -> None:
        if not self.resting:
            self._spent += seconds
        self.speculation.spend(source, seconds)

    def _chances(self, request: Request, kind: int) -> tuple[float, ...]:
        return request.drafts.chances(kind, self._like(request))

    def _like(self, request: Request) -> Acceptance:
        """Of all answers like this one: what is drawn is seldom what a draft engine finds likeliest."""
        return self._everybody[request.params.temperature > 0]

    def _all_behind(self, request: Request) -> list[int | None]:
        """Of each engine, by how many tokens it is behind; None: it can't draft for this one or shall not."""
        if not (request.engines and request.room):
            return self._nobody
        return [self._behind(at, engine, request) for at, engine in enumerate(self._engines)]

    def _behind(self, at: int, engine: DraftEngine, request: Request) -> int | None:
        if not self.speculation.affordable(1 + at):
            return None
        tokens = self._guarded(engine, partial(engine.behind, request))
        late = tokens is not None and tokens > _BEHIND
        return None if late and not self.speculation.may_catch_up(at) else tokens

    def _catch_up(self, at: int, request: Request) -> None:
        engine, began = self._engines[at], time.perf_counter()
        self._guarded(engine, partial(engine.catch_up, request))
        seconds = time.perf_counter() - began
        self._spent += seconds
        self.speculation.caught_up(at, seconds)

    def _propose(self, at: int, requests: list[Request], lengths: list[int]) -> list[list[int]]:
        engine, began = self._engines[at], time.perf_counter()
        found = self._guarded(engine, partial(engine.propose, requests, lengths))
        seconds = time.perf_counter() - began
        self._spent += seconds
        self.speculation.proposed(at, len(requests), max(lengths), seconds)
        return [[] for _ in requests] if found is None else found

    def _guarded(self, engine: DraftEngine, call: Callable[[], _T]) -> _T | None:
        """What the call gives; None if it failed, and the engine is asked nothing more."""
        if engine in self._failed:
            return None
        try:
            return call()
        except GpuError:  # of the model's, whose states were asked for: none of the engine's concern
            raise
        except MerError as error:
            _log.warning("nothing is drafted by %s any more: %s", engine.name, error)
        except Exception:
            _log.exception("nothing is drafted by %s any more", engine.name)
        self._failed.add(engine)
        return None
