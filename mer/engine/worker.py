"""The thread that computes: takes requests in, forms steps, runs them, draws tokens."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mer.engine.drafting import Drafting
from mer.engine.mailbox import Mailbox, wake
from mer.engine.observer import EndReason, Observer
from mer.engine.pace import Pace
from mer.engine.prefix_store import PrefixStore
from mer.engine.request import Embedding, Job, Request
from mer.engine.runner import Runner
from mer.engine.scheduler import Chunk, Load, Scheduler
from mer.engine.stats import StepStats
from mer.errors import (
    EngineClosedError,
    EngineFailedError,
    GpuError,
    MerError,
    QueueFullError,
    RequestTimeoutError,
)

_log = logging.getLogger("mer")

# What other threads ask of this one; done between two steps.
_Command = Callable[[], None]
_T = TypeVar("_T")


class Worker:
    """Runs a Runner's steps on a thread of its own until `close`. Any thread may call its methods."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        max_waiting: int,
        drafting: Drafting | None = None,
    ) -> None:
        """drafting: None where nothing is to be drafted."""
        self._runner = runner
        self._counted = runner.stats
        self._totals = StepStats()  # of all steps that were somebody's
        self.store: PrefixStore | None = None  # changes on the thread, or before there are requests
        self._scheduler = scheduler
        self._began = 0.0  # the step
        self._pace = Pace(scheduler.step_tokens)
        self._drafting = drafting
        self._most = scheduler.max_running + max_waiting
        self._observers: list[Observer] = []
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._urgent: deque[_Command] = deque()  # done between two layers as well
        runner.between_layers(self._obey_urgent)
        self._closing = False
        self.failure = ""  # why the thread ended by itself
        self._ended = False  # no more commands are obeyed on the thread; changes under the lock
        self._here = 0  # requests submitted and not over; changes under the lock
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()
        self._unread: list[Mailbox[Any]] = []  # something was put into them, and nobody was told yet
        self._last_end: float | None = None
        self._end_gap = 1.0  # seconds from one request's end to the next, about
        self._thread = threading.Thread(target=self._run, name="mer-step", daemon=True)
        self._thread.start()

    def observe(self, observer: Observer) -> None:
        self._send(lambda: self._observers.append(observer))

    def submit(self, job: Job) -> None:
        """Its mailbox will get deltas or an array, or one exception. Raises QueueFullError."""
        with self._lock:
            if self._here >= self._most:
                raise QueueFullError(
                    f"{self._here} requests are running or waiting already; try again later",
                    min(max(self._end_gap, 1.0), 60.0),
                )
            self._here += 1
        self._send(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """Forget it at the next step, if it has not ended by itself; nothing more is delivered."""
        self._send(lambda: self._remove(job, "cancelled"))

    def call(self, work: Callable[[], _T], *, urgent: bool = False) -> Future[_T]:
        """What `work` returns or raises, done on the thread between two steps; or EngineClosedError.

        urgent: within a step, too, between two layers: a prompt's chunk may take seconds.
        """
        future: Future[_T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # nobody waits for it any more
            try:
                if self._closing:
                    raise self._closed("the engine is closed")
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        if urgent:
            self._urgent.append(run)
        self._send(self._obey_urgent if urgent else run)
        return future

    def resume(self, job: Job) -> None:
        """Its reader has caught up."""
        self._send(lambda: self._scheduler.resume(job))

    @property
    def jobs(self) -> list[Job]:
        """What was submitted and is not over."""
        return list(self._jobs)

    def hold(self, on: bool) -> None:
        """Whether requests that have not begun stay so; others go on."""

        def obey() -> None:
            self._scheduler.hold = on and not self._closing

        self._send(obey)

    def close(self, *, drain: bool) -> None:
        """Take no more requests, end (drain) or drop those that are there, and end the thread.

        Draining waits for no reader. May be called again, also while it is under way: to drop what it would
        have drained.
        """

        def begin() -> None:
            self._closing = True
            self._scheduler.hold = False
            if not drain:
                self._fail(list(self._jobs), EngineClosedError("the engine was closed"))
            for job in list(self._jobs):
                self._scheduler.resume(job)

        self._send(begin)
        self._thread.join()

    def _closed(self, text: str) -> EngineClosedError:
        return EngineFailedError(self.failure) if self.failure else EngineClosedError(text)

    def _send(self, command: _Command) -> None:
        with self._lock:
            if not self._ended:
                self._commands.put(command)
                return
        command()  # nothing is left but to be told so

    def _run(self) -> None:
        try:
            idle = False
            while not self._closing or self._scheduler:
                self._obey(wait=idle and not (self._closing and not self._scheduler))
                self._expire()
                self._wake()
                self._began = time.perf_counter()
                chunks = self._scheduler.schedule(lambda: self._pace.room)
                for load in self._scheduler.take_loads():
                    self._fetch(load)
                idle = not chunks
                if chunks:
                    self._step(self._with_drafts(chunks))
                    self._wake()
        except BaseException as error:
            _log.exception("the engine's thread ended")
            self._closing = True
            self.failure = f"the engine stopped by an error inside mer: {error!r}"
            self._fail(list(self._jobs), MerError(self.failure))
        self._wake()
        with self._lock:
            self._ended = True
        self._obey(wait=False)  # who came too late is told so

    def _obey(self, *, wait: bool) -> None:
        """All commands that are there; `wait`: for one, or for a deadline."""
        deadline = self._scheduler.next_deadline if wait else None
        timeout = None if deadline is None else max(deadline - time.perf_counter(), 0.0)
        while True:
            try:
                command = self._commands.get(block=wait, timeout=timeout)
            except queue.Empty:
                return
            command()
            wait = False

    def _obey_urgent(self) -> None:
        while self._urgent:
            with suppress(IndexError):  # another thread was quicker, of those that come after the end
                self._urgent.popleft()()

    def _fetch(self, load: Load) -> None:
        assert self.store is not None
        self.store.fetch(
            load.keys, load.blocks, lambda count: self._send(lambda: self._scheduler.loaded(load, count))
        )

    def _add(self, job: Job) -> None:
        if self._closing:
            self._gone()
            self._put(job, self._closed("the engine is closed and takes no more requests"))
            return
        self._jobs.add(job)
        self._scheduler.add(job)
        self._tell("queued", job.id)

    def _expire(self) -> None:
        for job in _jobs(self._scheduler.expired(time.perf_counter())):
            text = f"the request had not ended after {job.timeout:g} seconds, its timeout"
            self._fail([job], RequestTimeoutError(text), "timeout")

    def _remove(self, job: Job, reason: EndReason) -> None:
        if job not in self._jobs:
            return
        self._jobs.remove(job)
        self._scheduler.remove(job)
        if self._drafting is not None:
            self._drafting.forget(job)
        self._gone()
        now = time.perf_counter()
        if self._last_end is not None:
            self._end_gap += 0.1 * (now - self._last_end - self._end_gap)
        self._last_end = now
        usage = job.usage()
        known = usage.completion_tokens or reason in ("stop", "length", "embedded")
        self._tell("ended", reason, usage if known else None)

    def _put(self, job: Job, item: Any) -> None:
        if not job.mailbox.put(item):
            self._remove(job, "cancelled")
        elif self._ended:  # who is on another thread
            wake([job.mailbox])
        else:
            self._unread.append(job.mailbox)

    def _wake(self) -> None:
        """Tell the readers of what was put."""
        if self._unread:
            wake(self._unread)
            self._unread.clear()

    def _gone(self) -> None:
        with self._lock:
            self._here -= 1

    def _fail(self, jobs: Iterable[Job], error: Exception, reason: EndReason = "error") -> None:
        for job in jobs:
            self._remove(job, reason)
            self._put(job, error)

    def _with_drafts(self, chunks: list[Chunk]) -> list[Chunk]:
        if self._drafting is None or self._drafting.rests():
            return chunks
        requests = [chunk.sequence for chunk in chunks if isinstance(chunk.sequence, Request)]
        room = self._scheduler.draft_room(chunks)
        if not room or len(requests) < len(chunks):
            return chunks
        drafts = self._drafting.prepare(requests, room, self._runner.expect)
        if drafts is None:
            return chunks
        chunks = self._scheduler.with_drafts(chunks, drafts)
        if any(chunk.draft for chunk in chunks):
            self._runner.expect([token for chunk in chunks for token in chunk.tokens])
        return chunks

    def _step(self, chunks: list[Chunk]) -> bool:
        """False: the GPU was lost, everybody is computed again, and these chunks are of no use any more."""
        try:
            self._compute(chunks)
            return True
        except MerError as error:
            failed = error.with_traceback(None)  # whose frames hold what is to be given up
            self._uncounted()  # is nobody's
        if isinstance(failed, GpuError) and self._runner.placement.layers:
            self._leave_gpu(chunks, str(failed))
            return False
        if any(chunk.draft for chunk in chunks):
            # What can't be read may be wanted by a draft alone.
            return self._step([Chunk(chunk.sequence, chunk.count) for chunk in chunks])
        if len(chunks) == 1:
            self._fail(_chunk_jobs(chunks), failed)
            return True
        # Some expert can't be read. Only who needs it shall fail, so each is computed by itself.
        return all(self._step([chunk]) for chunk in chunks)

    def _leave_gpu(self, chunks: list[Chunk], why: str) -> None:
        """The CPU computes everything from now on; where it can't, whoever was in the failed step is told."""
        try:
            self._runner.leave_gpu(why)
        except MerError as error:
            self._fail(_chunk_jobs(chunks), error)
            return
        self._scheduler.restart()

    def _uncounted(self) -> StepStats:
        """Since the last call: reads for drafts begin between two steps, and are the next one's."""
        before, self._counted = self._counted, self._runner.stats
        return self._counted - before

    def _compute(self, chunks: list[Chunk]) -> None:
        jobs = _chunk_jobs(chunks)
        for job in jobs:
            if job.started_at is None:
                job.started_at = time.perf_counter()
                self._tell("started", job.started_at - job.asked_at)
        logits = self._runner.step(chunks)
        stats = self._uncounted()
        before, self._totals = self._totals, self._totals + stats
        decoding = sum(chunk.last and chunk.count == 1 for chunk in chunks)
        prompt = sum(chunk.count for chunk in chunks) - decoding
        self._pace.observe(decoding, prompt, stats.step_s)
        drafting = self._drafting
        if drafting is not None and (drafting.listening or not drafting.resting):
            drafting.observe(chunks, self._runner)
        self._scheduler.commit(chunks)
        self._tell("step", sum(chunk.width for chunk in chunks), len(chunks), stats)
        drawing = time.monotonic_ns()
        embeds = any(isinstance(job, Embedding) for job in jobs)
        hidden = self._runner.hidden() if embeds else logits
        token = row = 0
        for job, chunk in zip(jobs, chunks, strict=True):
            job.end_step(before, self._totals)
            try:
                if isinstance(job, Embedding):
                    self._embed(job, chunk.start, hidden[token : token + chunk.width])
                else:
                    assert isinstance(job, Request)
                    self._answer(job, chunk, logits[row : row + chunk.rows])
            except MerError as error:
                self._fail([job], error)
            except Exception as error:  # of one answer's tokens or text: the others go on
                _log.exception("a request ended")
                self._fail([job], MerError(f"the request ended by an error inside mer: {error!r}"))
            token, row = token + chunk.width, row + chunk.rows
        self._wake()
        if drafting is not None and not drafting.resting:
            self._set_back(chunks, drafting)
            drafting.end_step(decoding, time.perf_counter() - self._began, stats, alone=not prompt)
        self._began = time.perf_counter()  # of another step where this one was computed request by request
        if self._runner.profile is not None:
            self._runner.profile.span("sampling and text", drawing)

    def _set_back(self, chunks: list[Chunk], drafting: Drafting) -> None:
        """Have recurrent states behind the tokens that turned out right, without those of wrong drafts."""
        began, at = time.perf_counter(), 0
        spans: list[tuple[int, int, int, int]] = []
        held: list[Chunk] = []
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.draft and sequence.images.next:  # else it is over, or the model has no such states
                held.append(chunk)
                if sequence.computed < chunk.start + chunk.width:
                    before, after, *_ = sequence.images.move(chunk.start)
                    spans.append((at, sequence.computed - chunk.start, before, after))
            at += chunk.width
        if spans:
            self._runner.replay(spans)
            drafting.replayed(time.perf_counter() - began)
        for chunk in held:
            self._scheduler.commit_state(chunk)

    def _embed(self, job: Embedding, start: int, hidden: NDArray[np.float32]) -> None:
        mean = job.add(start, hidden)
        if mean is not None:
            self._remove(job, "embedded")
            self._put(job, mean)

    def _answer(self, request: Request, chunk: Chunk, logits: NDArray[np.float32]) -> None:
        if request.wants == "all":
            request.see_prompt(chunk.start, logits)
        if not chunk.last:
            return
        draft, right = chunk.draft, 0
        request.drafted += len(draft)
        for row in logits[-1 - len(draft) :]:
            self._accept(request, row)
            if request not in self._jobs:
                break
            # Drawn is what would have been drawn without a draft; the next row counts if that was drafted.
            if right == len(draft) or request.tokens[-1] != draft[right]:
                break
            right += 1
            request.accepted += 1
            self._scheduler.advance(request, 1)
        if self._drafting is not None and draft:
            self._drafting.judge(request, len(draft), right)
        if request not in self._jobs:
            return
        if request.constraint is not None:
            request.constraint.begin()
        if not self._closing and request.mailbox.hold_up():
            self._scheduler.pause(request)

    def _accept(self, request: Request, logits: NDArray[np.float32]) -> None:
        first, before = len(request.tokens) == request.prompt_tokens, request.last_at
        delta = request.accept(logits)
        if delta.token_ids:
            self._tell("token", first, request.last_at - before)
        if delta.finish_reason is not None:
            # before anybody knows: its blocks are free when the answer is there
            self._remove(request, delta.finish_reason)
        self._put(request, delta)

    def _tell(self, event: str, *facts: Any) -> None:
        for observer in self._observers:
            try:
                getattr(observer, event)(*facts)
            except Exception:  # of someone who only looks on
                _log.exception("an observer failed")


def _jobs(sequences: Iterable[Any]) -> list[Job]:
    return [sequence for sequence in sequences if isinstance(sequence, Job)]


def _chunk_jobs(chunks: list[Chunk]) -> list[Job]:
    return _jobs(chunk.sequence for chunk in chunks)
