"""Long lists of token ids in a body, read a piece at a time.

msgspec holds Python's lock while it decodes: four million ids at once take a quarter of a second, in which
nobody else's token is delivered.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from mer.api.http.errors import ApiError, invalid
from mer.api.http.large_bodies import decode_body
from mer.api.http.schemas import MAX_TEXTS, TokenId, refusal
from mer.api.large_json import PIECE

_T = TypeVar("_T")
_ID_TEXT: Final = b"0123456789, \t\r\n[]"
_BETWEEN: Final = b", \t\r\n"
_STAND_IN: Final = [2**31 - 1, 0, 2**31 - 1]  # in the place of the list


def decode_large(body: bytes, kind: type[_T], name: str, most: int) -> _T:
    """As `decode_body`, where the value of `name` may be a long list of ids, or of lists of ids.

    most: tokens that make sense.

    Raises ApiError; for a list of more than `most` ids before they are decoded.
    """
    found = _find(body, name)
    if found is None:
        return decode_body(body, kind, context=most)
    start, end = found
    if _count(body, b"[", start, end) == 1:
        _check(_count(body, b",", start, end) + 1, name, most)  # before any of it is copied
    made = decode_body(body[:start] + msgspec.json.encode(_STAND_IN) + body[end:], kind, context=most)
    if getattr(made, name) != _STAND_IN:  # it was a key of something else
        return decode_body(body, kind, context=most)
    setattr(made, name, _ids(body[start:end], name, most))
    return made


def _find(body: bytes, name: str) -> tuple[int, int] | None:
    """Where the list stands; None where `name` is something else, or short, or broken: for `decode_body`.

    In a text of the body quotes would have a backslash before them, so what is found is a key.
    """
    key = b'"' + name.encode() + b'"'
    at = _next(body, key, 0)
    while at >= 0:
        start = _skip(body, at + len(key), b" \t\r\n")
        if body[start : start + 1] == b":" and body[at - 1 : at] != b"\\":
            start = _skip(body, start + 1, b" \t\r\n")
            end = _skip(body, start, _ID_TEXT) if body[start : start + 1] == b"[" else start
            if end - start > PIECE:
                end = _stripped(body, start, end)
                return (start, end) if body[end - 1 : end] == b"]" else None
        at = _next(body, key, at + 1)
    return None


def _next(body: bytes, key: bytes, at: int) -> int:
    """The first place of `key` from `at` on, or -1; Python's lock is let go of on the way."""
    while at < len(body):
        found = body.find(key, at, at + PIECE + len(key) - 1)
        if found >= 0:
            return found
        at += PIECE
    return -1


def _count(body: bytes, mark: bytes, start: int, end: int) -> int:
    """How often the byte `mark` stands there."""
    return sum(body.count(mark, at, min(at + PIECE, end)) for at in range(start, end, PIECE))


def _stripped(body: bytes, start: int, end: int) -> int:
    """Before `end`, without what may stand between items."""
    while end > start:
        piece = body[max(start, end - PIECE) : end]
        kept = len(piece.rstrip(_BETWEEN))
        end -= len(piece) - kept
        if kept:
            break
    return end


def _skip(body: bytes, at: int, chars: bytes) -> int:
    """The first place from `at` on with another byte than these."""
    while at < len(body):
        piece = body[at : at + PIECE]
        if rest := piece.lstrip(chars):
            return at + len(piece) - len(rest)
        at += PIECE
    return len(body)


def _ids(text: bytes, name: str, most: int) -> list[Any]:
    if _count(text, b"[", 0, len(text)) == 1:
        return _flat(text, name, most)
    inner = text[1:-1].split(b"]")
    if inner.pop().strip(_BETWEEN) or text.count(b"[") != len(inner) + 1:
        raise _broken()
    if len(inner) > MAX_TEXTS:
        raise invalid(f"{name}: {len(inner)} of them; at most {MAX_TEXTS} at a time", name)
    lists = []
    for i, each in enumerate(inner):
        comma, _, numbers = each.partition(b"[")
        if comma.strip() != (b"," if i else b""):
            raise _broken()
        lists.append(_flat(b"[" + numbers + b"]", f"{name}[{i}]", most))
    return lists


def _flat(text: bytes, name: str, most: int) -> list[int]:
    count = _count(text, b",", 0, len(text)) + 1
    _check(count, name, most)
    ids: list[int] = []
    at, end = 1, len(text) - 1
    while at < end:
        cut = text.find(b",", at + PIECE, end)
        cut = end if cut < 0 else cut
        try:
            ids += msgspec.json.decode(b"[" + text[at:cut] + b"]", type=list[TokenId])
        except msgspec.ValidationError as error:
            raise refusal(str(error).replace("`$", f"`$.{name}")) from None
        except msgspec.DecodeError:
            raise _broken() from None
        at = cut + 1
    if at == end and count > 1:  # the last piece ended before a comma that nothing follows
        raise _broken()
    return ids


def _check(count: int, name: str, most: int) -> None:
    if count > most:
        text = f"{name}: {count} tokens; {most} is the most here"
        raise ApiError(400, text, param=name, code="context_length_exceeded")


def _broken() -> ApiError:
    return ApiError(400, "the request's body: a list of token ids is malformed", code="invalid_json")
