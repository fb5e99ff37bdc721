"""The text of an answer while it comes, and the questions that a format asks about it.

A format is a generator that reads the answer from front to back. What it asks here waits (`yield from`) until
the text that is there decides it, so the same pieces come out however the text was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

from mer.model.pieces import Content, Piece, Reasoning, ToolArguments, ToolCall

_T = TypeVar("_T")

Steps = Generator[None, None, _T]
Deliver = Callable[[str], None]
Schemas = Mapping[str, Mapping[str, Any]]  # the JSON schema of each tool's arguments, by its name


class Source:
    """text: what is there and was not taken yet. schemas: of the tools that may be called."""

    def __init__(self, schemas: Schemas, new_id: Callable[[], str]) -> None:
        self.text = ""
        self.schemas = schemas
        self.calls = 0
        self.argued = False  # the last call has arguments
        self.frame: tuple[str, ...] = ()  # tags that stand around content and are none of it
        self._new_id = new_id
        self._ended = False
        self._pieces: list[Piece] = []
        self._taken: str | None = None  # since `mark`

    def feed(self, text: str, *, ended: bool = False) -> None:
        """More of the answer."""
        self.text += text
        self._ended = ended

    def pieces(self) -> list[Piece]:
        """What was found since the last time."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def content(self, text: str) -> None:
        if text:
            self._pieces.append(Content(text))

    def reasoning(self, text: str) -> None:
        if text:
            self._pieces.append(Reasoning(text))

    def call(self, name: str, id: str | None = None) -> None:
        """A call begins; `arguments` adds to it."""
        self._taken = None
        self._pieces.append(ToolCall(self.calls, id or self._new_id(), name))
        self.calls += 1
        self.argued = False

    def arguments(self, text: str) -> None:
        if text:
            self.argued = True
            self._pieces.append(ToolArguments(self.calls - 1, text))

    def more(self) -> Steps[bool]:
        """Wait for more text; False when there is none to come."""
        if self._ended:
            return False
        before = len(self.text)
        while len(self.text) == before and not self._ended:
            yield
        return True

    def take(self, length: int) -> str:
        taken, self.text = self.text[:length], self.text[length:]
        if self._taken is not None:
            self._taken += taken
        return taken

    def back(self, text: str) -> None:
        """Put back what was taken last."""
        self.text = text + self.text
        if self._taken is not None:
            self._taken = self._taken.removesuffix(text)

    def mark(self) -> None:
        """Something begins here that may be a call (`call` says so) or not (`reject`)."""
        self._taken = ""

    def reject(self) -> None:
        """What was taken since `mark` is no call: it is content, if it is more than white space."""
        if self._taken and not self._taken.isspace():
            self.content(self._taken)
        self._taken = None

    def space(self) -> Steps[None]:
        """Pass over white space."""
        while True:
            self.take(len(self.text) - len(self.text.lstrip()))
            if self.text or not (yield from self.more()):
                return

    def starts(self, *tags: str) -> Steps[str | None]:
        """Take the tag that stands here; None when there is none of these."""
        while any(len(self.text) < len(tag) and tag.startswith(self.text) for tag in tags):
            if not (yield from self.more()):
                break
        tag = max((tag for tag in tags if self.text.startswith(tag)), key=len, default=None)
        self.take(len(tag or ""))
        return tag

    def until(self, tags: Sequence[str], deliver: Deliver, *, trim: bool = True) -> Steps[str | None]:
        """Deliver the text before the first of the tags, and take that tag; None: the rest was delivered.

        trim: white space right before a tag is left out. It and the tag are marked.
        """
        frame = self.frame if deliver == self.content else ()
        wanted = (*tags, *frame)
        while True:
            if found := self._first(wanted):
                at, tag = found
                if tag in frame:
                    deliver(self.take(at).rstrip())
                    self.take(len(tag))
                    yield from self.space()
                    continue
                if trim:
                    bare = len(self.text[:at].rstrip())
                    deliver(self.take(bare))
                    self.mark()
                    self.take(at - bare)
                else:
                    deliver(self.take(at))
                self.take(len(tag))
                return tag
            sure = len(self.text) - self._beginning(wanted)
            if trim or frame:
                sure = len(self.text[:sure].rstrip())
            deliver(self.take(sure))
            if not (yield from self.more()):
                deliver(self.take(len(self.text)))
                return None

    def hold(self, *tags: str) -> Steps[tuple[str, str | None]]:
        """The text before the first of the tags and that tag, taken; (the rest, None) without one."""
        held: list[str] = []
        tag = yield from self.until(tags, held.append, trim=False)
        return "".join(held), tag

    def json(self, deliver: Deliver) -> Steps[bool]:
        """Deliver the JSON object or array that begins here; False when the answer ends before it does."""
        brackets = Brackets()
        while (end := brackets.end(self.text)) is None:
            deliver(self.take(len(self.text)))
            if not (yield from self.more()):
                return False
        deliver(self.take(end))
        return True

    def _first(self, tags: Sequence[str]) -> tuple[int, str] | None:
        found = [(at, -len(tag), tag) for tag in tags if (at := self.text.find(tag)) >= 0]
        return min(found)[::2] if found else None

    def _beginning(self, tags: Sequence[str]) -> int:
        """Length of the longest end of the text that one of the tags begins with."""
        firsts, size = {tag[0] for tag in tags}, len(self.text)
        for at in range(max(0, size - max(map(len, tags)) + 1), size):
            if self.text[at] in firsts and any(tag.startswith(self.text[at:]) for tag in tags):
                return size - at
        return 0


class Brackets:
    """Where a JSON object or array ends, its text given in pieces. depth: brackets open before it."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """Index right behind the bracket that closes the outermost one; None: not in this piece."""
        for index, char in enumerate(text):
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._string = False
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return None
