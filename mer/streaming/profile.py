"""Profiles: where the time of every step went, as a Chrome trace that https://ui.perfetto.dev opens."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer._ext.recorder import KINDS, Recorder
from mer.streaming.trace import writing

# The decoder's methods that are spans. With the streamer's `forward` ('experts') they are all of a step that
# is not Python; embedding the tokens, some microseconds of numpy, counts as Python.
_CALLS: Final = ("begin", "attend", "mix", "feed", "mixture", "route", "predict", "finish", "logits")
_READS: Final = ("read", "read ahead")
_NESTED: Final = ("compute", "wait for reads")
_STEPS, _READING = 1, 2  # the rows of the picture


@frozen
class ProfileSummary:
    """Of the decode steps, those with one token of each sequence. Seconds, all together.

    kernel_s: in compiled code, waiting for reads included; the rest of step_s is Python between the calls,
    and what it takes to record them (some two microseconds a layer).
    """

    decode_steps: int
    step_s: float
    kernel_s: float

    @property
    def python_share(self) -> float:
        """Share of the steps that went by in Python."""
        return 1 - self.kernel_s / self.step_s if self.step_s else 0.0


class Profile:
    """Writes the spans of every step to a file, after the step. Used by the step thread.

    Every method but `timed` and `summary` raises ConfigError where the file can't be written.
    """

    def __init__(self, path: Path, *, model: str, n_experts: int) -> None:
        """n_experts: of each layer."""
        self.recorder = Recorder()
        self._path = path
        self._n_experts = n_experts
        self._origin = time.monotonic_ns()
        self._reads = 0
        self._steps, self._step_ns, self._kernel_ns = 0, 0, 0
        names = [("process_name", 0, f"mer {model}")]
        names += [("thread_name", _STEPS, "steps"), ("thread_name", _READING, "reads")]
        head = [
            json.dumps({"name": name, "ph": "M", "pid": 1, "tid": row, "args": {"name": text}})
            for name, row, text in names
        ]
        with writing("profile", path):
            self._file = path.open("w")
            self._file.write('{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(head))

    def timed(self, decoder: Any) -> Any:
        """The decoder, its calls recorded."""
        every = {name: getattr(decoder, name) for name in dir(decoder) if not name.startswith("_")}
        calls = [name for name in _CALLS if name in every]
        return SimpleNamespace(**every | {name: self.recorder.timed(name, every[name]) for name in calls})

    def step(self, start: int, tokens: int, sequences: int) -> None:
        """A step that began at `start`, ns of time.monotonic_ns(), is over."""
        end = time.monotonic_ns()
        spans = self.recorder.take()
        kernels = [kind for kind, name in enumerate(KINDS) if name not in (*_READS, *_NESTED)]
        if tokens == sequences:
            inside = spans[np.isin(spans[:, 0], kernels)]
            self._steps += 1
            self._step_ns += end - start
            self._kernel_ns += int((inside[:, 3] - inside[:, 2]).sum())
        arguments = f'{{"tokens": {tokens}, "sequences": {sequences}}}'
        events = [self._complete("step", start, end, arguments), *self._events(spans)]
        with writing("profile", self._path):
            self._file.write(",\n" + ",\n".join(events))
        self.span("write profile", end)

    def span(self, name: str, start: int) -> None:
        """Something between two steps that began at `start` is over."""
        with writing("profile", self._path):
            self._file.write(",\n" + self._complete(name, start, time.monotonic_ns()))

    def close(self) -> None:
        with writing("profile", self._path):
            self._file.write("\n]}\n")
            self._file.close()

    @property
    def summary(self) -> ProfileSummary:
        return ProfileSummary(self._steps, self._step_ns / 1e9, self._kernel_ns / 1e9)

    def _events(self, spans: NDArray[np.int64]) -> list[str]:
        found = []
        layer, began = 0, 0
        for kind, index, start, end, nbytes in spans.tolist():
            name = KINDS[kind]
            if name in _READS:
                found += self._read(name, index, start, end, nbytes)
                continue
            found.append(self._complete(name, start, end))
            if name in ("attend", "mix"):
                layer, began = index, start
            elif name in ("feed", "finish"):
                found.append(self._complete(f"layer {layer}", began, end))
        return found

    def _complete(self, name: str, start: int, end: int, arguments: str = "") -> str:
        more = f', "args": {arguments}' if arguments else ""
        return (
            f'{{"name": "{name}", "ph": "X", "pid": 1, "tid": {_STEPS}, '
            f'"ts": {self._us(start - self._origin)}, "dur": {self._us(end - start)}{more}}}'
        )

    def _read(self, name: str, key: int, start: int, end: int, nbytes: int) -> list[str]:
        self._reads += 1
        layer, expert = divmod(key, self._n_experts)
        head = f'{{"name": "{name}", "cat": "reads", "id": {self._reads}, "pid": 1, "tid": {_READING}, '
        arguments = f'{{"layer": {layer}, "expert": {expert}, "bytes": {nbytes}}}'
        return [
            f'{head}"ph": "b", "ts": {self._us(start - self._origin)}, "args": {arguments}}}',
            f'{head}"ph": "e", "ts": {self._us(end - self._origin)}}}',
        ]

    @staticmethod
    def _us(ns: int) -> str:
        """Microseconds, exactly: rounded times would not nest."""
        return f"{ns // 1000}.{ns % 1000:03d}"
