"""JSON of many bytes, decoded a piece at a time.

msgspec and Python's json hold Python's lock from the first byte to the last: for 16 MiB a tenth of a second,
and seconds where they are many small values. Nobody else's token is delivered meanwhile. Here every call of
theirs gets one number or a piece of a text, and all between is Python's, which can be interrupted.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final

import msgspec

# Bytes that are decoded within a millisecond or so.
PIECE: Final = 1 << 16
# Values of one text; those of each member of an object at the top, and its bytes: other code copies or writes
# such a member at once. Those that are long by nature may have any bytes, and so many values in each item.
MOST: Final = 1 << 17
MOST_IN_ONE: Final = 20_000
MOST_BYTES: Final = 1 << 20
# Bytes for each token of the context, and beside the texts: tools, a schema, biases.
_PER_TOKEN: Final = 32
_BESIDE: Final = 1 << 22

_SPACE: Final = re.compile(rb"[ \t\r\n]{0,%d}" % PIECE)
_SCALAR: Final = re.compile(rb"[-+.0-9A-Za-z]{1,4096}")
# Of a text in quotes: characters, escapes, pairs of escapes that are one character.
_PART: Final = re.compile(
    rb"""(?:[^"\\]++ | \\[^u] | \\u[dD][89abAB]..\\u.... | \\u(?![dD][89abAB])....)*+""",
    re.DOTALL | re.VERBOSE,
)


class TooLargeError(ValueError):
    """name: the member of the object at the top that is too large; empty: all together.

    text: it is one text that is too long.
    """

    def __init__(self, name: str, what: str, *, text: bool = False) -> None:
        super().__init__(f"more than {what}")
        self.name = name
        self.text = text


def _values(most: int) -> str:
    return f"{most:,} values (numbers, texts, lists, objects)"


def most_text(context: int) -> int:
    """Bytes of JSON that one text may have; more can't become `context` tokens.

    Of English a token is some 4 bytes, of Cyrillic letters as escapes 20. Who takes, cuts or copies a text
    does so at once, and holds Python's lock meanwhile.
    """
    return max(MOST_BYTES, _PER_TOKEN * context)


def most_bytes(context: int) -> int:
    """Bytes of a request with one conversation: its texts, and what stands beside them."""
    return most_text(context) + _BESIDE


def decode(text: bytes, lists: Collection[str] = (), most_text: int | None = None) -> Any:
    """What `text` says, as `msgspec.json.decode` gives it, on a thread of its own.

    lists: the members of the object at the top that are long by nature. most_text: bytes of any one text.
    Raises msgspec.DecodeError, TooLargeError, RecursionError.
    """
    return _Reader(text, lists, most_text).whole()


class _Reader:
    def __init__(self, text: bytes, lists: Collection[str], most_text: int | None) -> None:
        self._text = text
        self._lists = lists
        self._most_text = len(text) if most_text is None else most_text
        self._name = ""
        self._left = MOST
        self._left_in_one = MOST_IN_ONE

    def whole(self) -> Any:
        text, at = self._text, self._space(0)
        if text[at : at + 1] == b"{":
            value, at = self._object(at, top=True)
        else:
            value, at = self._value(at)
        if (at := self._space(at)) != len(text):
            raise self._broken(at)
        return value

    def _value(self, at: int, *, items: bool = False) -> tuple[Any, int]:
        """The value that begins at `at`, and where it ends. items: each of its items may be long."""
        self._left -= 1
        self._left_in_one -= 1
        if self._left < 0:
            raise TooLargeError("", _values(MOST))
        if self._left_in_one < 0:
            raise TooLargeError(self._name, _values(MOST_IN_ONE))
        first = self._text[at : at + 1]
        if first == b'"':
            return self._string(at)
        if first == b"{":
            return self._object(at, items=items)
        if first == b"[":
            return self._array(at, items=items)
        if (found := _SCALAR.match(self._text, at)) is None:
            raise self._broken(at)
        return msgspec.json.decode(found[0]), found.end()

    def _object(self, at: int, *, items: bool = False, top: bool = False) -> tuple[dict[str, Any], int]:
        made: dict[str, Any] = {}
        at = self._space(at + 1)
        if self._text[at : at + 1] == b"}":
            return made, at + 1
        while True:
            if self._text[at : at + 1] != b'"':
                raise self._broken(at)
            key, at = self._string(at)
            at = self._space(at)
            if self._text[at : at + 1] != b":":
                raise self._broken(at)
            if top:
                self._name = key
            if top or items:
                self._left_in_one = MOST_IN_ONE
            begin, long = self._space(at + 1), key in self._lists
            made[key], at = self._value(begin, items=top and long)
            if top and not long and at - begin > MOST_BYTES:
                raise TooLargeError(key, f"{MOST_BYTES:,} bytes")
            at, more = self._more(at, b"}")
            if not more:
                return made, at

    def _array(self, at: int, *, items: bool) -> tuple[list[Any], int]:
        made: list[Any] = []
        at = self._space(at + 1)
        if self._text[at : at + 1] == b"]":
            return made, at + 1
        while True:
            if items:
                self._left_in_one = MOST_IN_ONE
            value, at = self._value(at)
            made.append(value)
            at, more = self._more(at, b"]")
            if not more:
                return made, at

    def _more(self, at: int, end: bytes) -> tuple[int, bool]:
        """Behind the comma or the end that comes next, and whether it was a comma."""
        at = self._space(at)
        mark = self._text[at : at + 1]
        if mark == end:
            return at + 1, False
        if mark != b",":
            raise self._broken(at)
        return self._space(at + 1), True

    def _string(self, at: int) -> tuple[str, int]:
        text, parts = self._text, []
        start = at + 1
        while True:
            end = self._part(start)
            if end - at > self._most_text:  # before the parts become one, at once
                raise TooLargeError(self._name, f"{self._most_text:,} bytes in one text", text=True)
            if text[end : end + 1] == b'"':
                parts.append(_text(text[start:end]))
                return "".join(parts), end + 1
            while end > start and end < len(text) and text[end] & 0xC0 == 0x80:
                end -= 1  # no character of several bytes is split
            if end == start:
                raise self._broken(end)
            parts.append(_text(text[start:end]))
            start = end

    def _part(self, at: int) -> int:
        """The end of the text that begins at `at`, or of a piece of it in which all escapes are whole."""
        found = _PART.match(self._text, at, at + PIECE)
        assert found is not None
        return found.end()

    def _space(self, at: int) -> int:
        """The first place from `at` on without white space."""
        while True:
            found = _SPACE.match(self._text, at)
            assert found is not None
            if found.end() - at < PIECE:
                return found.end()
            at = found.end()

    def _broken(self, at: int) -> msgspec.DecodeError:
        what = "the text ends too early" if at >= len(self._text) else "JSON is malformed: invalid character"
        return msgspec.DecodeError(f"{what} (byte {at})")


def _text(raw: bytes) -> str:
    return msgspec.json.decode(b'"' + raw + b'"', type=str)
