"""What a server writes to standard error: lines for people, or JSON for programs."""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections import deque
from contextlib import nullcontext
from typing import Any, Final

from mer.api.settings import LogFormat

_KEPT: Final = 500  # lines
# What stands at the beginning of a request's line; the rest follows as name=value.
_FIRST: Final = ("client", "method", "path", "status", "seconds")


def configure(format: LogFormat) -> None:
    """Have the loggers 'mer', 'mer.*' and 'asyncio' write in this format."""
    handler = logging.StreamHandler(sys.stderr)
    TAIL.setFormatter(_Text())
    handler.setFormatter(_Json() if format == "json" else _Text())
    # asyncio warns of each client that went away while something was written to it.
    for name, level in (("mer", logging.INFO), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers = [handler, TAIL]
        logger.propagate = False
        logger.setLevel(level)
    # Hypercorn says by itself where it listens, and that in its own way.
    logging.getLogger("mer.http.connections").setLevel(logging.WARNING)


class Tail(logging.Handler):
    """Keeps the latest lines, without what was asked. lines: (number, line), numbers from 1 on."""

    # What --log-prompts adds.
    _private: Final = frozenset(("prompt", "messages"))

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[tuple[int, str]] = deque(maxlen=_KEPT)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", None)
        if fields is not None and not self._private.isdisjoint(fields):
            record = copy.copy(record)
            kept = {name: value for name, value in fields.items() if name not in self._private}
            record.fields = kept
        for line in self.format(record).splitlines():
            self._count += 1
            self.lines.append((self._count, line))

    def since(self, number: int) -> list[tuple[int, str]]:
        """Those behind the one of this number."""
        with self.lock or nullcontext():
            return [each for each in self.lines if each[0] > number]


TAIL: Final = Tail()


class _Json(logging.Formatter):
    """One object a line: time, level, logger, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        made: dict[str, Any] = {
            "time": f"{clock}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            made["traceback"] = self.formatException(record.exc_info)
        return json.dumps(made, ensure_ascii=False)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields: dict[str, Any] | None = getattr(record, "fields", None)
        if fields is None:
            record.message = record.getMessage()
            text = f"{clock} {record.levelname.lower()}: {record.message}"
            return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text
        first = " ".join("-" if fields[name] is None else _printable(str(fields[name])) for name in _FIRST)
        skipped = {*_FIRST, "caller"} if fields["caller"] == fields["client"] else _FIRST
        rest = {name: value for name, value in fields.items() if name not in skipped}
        more = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in rest.items())
        return f"{clock} {first} {more}"


def _printable(text: str) -> str:
    """On one line, whatever a client wrote into its path."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
