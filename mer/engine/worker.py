"""The thread that computes: takes requests in, forms steps, runs them, draws tokens."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable

from mer.engine.request import Request
from mer.engine.runner import Runner
from mer.engine.scheduler import Chunk, Scheduler
from mer.errors import EngineClosedError, MerError

_log = logging.getLogger("mer")

# What other threads ask of this one; done between two steps.
_Command = Callable[[], None]


class Worker:
    """Runs a Runner's steps on a thread of its own until `close`. Any thread may call its methods."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._closing = False
        self._failure = ""  # why the thread ended by itself
        self._ended = False  # no more commands are obeyed on the thread; changes under the lock
        self._ending = threading.Lock()
        self._requests: set[Request] = set()
        self._thread = threading.Thread(target=self._run, name="mer-step", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Its `deliver` is called on the worker's thread: with deltas, or with one exception."""
        self._send(lambda: self._add(request))

    def cancel(self, request: Request) -> None:
        """Forget it at the next step, if it has not ended by itself; nothing more is delivered."""
        self._send(lambda: self._remove(request))

    def close(self, *, drain: bool) -> None:
        """Take no more requests, end (drain) or drop those that are there, and end the thread.

        May be called again, also while it is under way: to drop what it would have drained.
        """

        def begin() -> None:
            self._closing = True
            if not drain:
                self._fail(set(self._requests), EngineClosedError("the engine was closed"))

        self._send(begin)
        self._thread.join()

    def _send(self, command: _Command) -> None:
        with self._ending:
            if not self._ended:
                self._commands.put(command)
                return
        command()  # nothing is left but to be told so

    def _run(self) -> None:
        try:
            while not self._closing or self._scheduler:
                self._obey()
                if self._scheduler:
                    self._step(self._scheduler.schedule())
        except BaseException as error:
            _log.exception("the engine's thread ended")
            self._closing = True
            self._failure = f"the engine stopped by an error inside mer: {error!r}"
            self._fail(set(self._requests), MerError(self._failure))
        with self._ending:
            self._ended = True
        self._obey()  # who came too late is told so

    def _obey(self) -> None:
        """All commands that are there; waits for one when there is nothing to compute."""
        while True:
            try:
                command = self._commands.get(block=not self._scheduler and not self._closing)
            except queue.Empty:
                return
            command()

    def _add(self, request: Request) -> None:
        if self._closing:
            text = self._failure or "the engine is closed and takes no more requests"
            request.deliver(EngineClosedError(text))
            return
        self._requests.add(request)
        self._scheduler.add(request)

    def _remove(self, request: Request) -> None:
        if request in self._requests:
            self._requests.remove(request)
            self._scheduler.remove(request)

    def _fail(self, requests: Iterable[Request], error: Exception) -> None:
        for request in requests:
            self._remove(request)
            request.deliver(error)

    def _step(self, chunks: list[Chunk]) -> None:
        try:
            self._compute(chunks)
        except MerError as error:
            if len(chunks) == 1:
                self._fail(_requests(chunks), error)
                return
            # Some expert can't be read. Only who needs it shall fail, so each is computed by itself.
            for chunk in chunks:
                self._step([chunk])

    def _compute(self, chunks: list[Chunk]) -> None:
        for request in _requests(chunks):
            request.begin_step()
        before = self._runner.stats
        logits = self._runner.step(chunks)
        stats = self._runner.stats - before
        wanted = _requests([chunk for chunk in chunks if chunk.last])
        self._scheduler.commit(chunks)
        for request in _requests(chunks):
            request.end_step(stats)
        for row, request in zip(logits, wanted, strict=True):
            try:
                delta = request.accept(row)
                if delta.finish_reason is not None:
                    self._remove(
                        request
                    )  # before anybody knows: its blocks are free when the answer is there
                request.deliver(delta)
            except MerError as error:
                self._fail([request], error)
            except Exception as error:  # of one answer's tokens or text: the others go on
                _log.exception("a request ended")
                self._fail([request], MerError(f"the request ended by an error inside mer: {error!r}"))


def _requests(chunks: list[Chunk]) -> list[Request]:
    return [chunk.sequence for chunk in chunks if isinstance(chunk.sequence, Request)]
