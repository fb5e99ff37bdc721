"""The body of a request, whatever its size."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import msgspec

from mer.api import large_json
from mer.api.http.errors import ApiError
from mer.api.http.schemas import Biases, converted, decode, malformed, refusal
from mer.api.large_json import PIECE, TooLargeError, most_text
from mer.engine import params

_T = TypeVar("_T")
# Parameters that are long by nature; the others are copied, or written into a prompt, all at once.
_LONG: Final = frozenset(
    {"messages", "input", "prompt", "system", "instructions", "guided_choice", "logit_bias", "stop_token_ids"}
)
# No schema has a text for "role", so this is a message.
_ROLE: Final = re.compile(rb'"role"[ \t\r\n]*:[ \t\r\n]*"(user|assistant)"')
_ROLE_BYTES: Final = 64
# Biases that are converted at once.
_BIASES: Final = 4096


def decode_body(
    body: bytes, kind: type[_T], amend: Callable[[Any], Any] | None = None, context: int | None = None
) -> _T:
    """As `schemas.decode`; one of more than PIECE bytes without keeping others waiting, on a thread.

    amend: what is done to the JSON before. context: the most tokens that make sense. Raises ApiError, 413
    where there is more in it than makes sense, 400 for a text that has more tokens.
    """
    try:
        if len(body) > PIECE:
            given = large_json.decode(body, _LONG, None if context is None else most_text(context))
        elif amend is not None:
            given = msgspec.json.decode(body)
        else:
            return decode(body, kind)
    except TooLargeError as error:
        if error.text and error.name in _LONG:
            raise too_long(f"{error.name}: {error}", error.name, context or 0) from None
        where = error.name or "the request's body"
        raise ApiError(413, f"{where}: {error}", param=error.name or None, code="body_too_large") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise malformed(error) from None
    return _by_pieces(amend(given) if amend else given, kind)


def decode_conversation(
    body: bytes,
    kind: type[_T],
    amend: Callable[[Any], Any] | None,
    context: int,
    too_many: Callable[[Callable[[], Iterator[str]]], bool],
) -> _T:
    """As `decode_body`; refuses more messages than have room before they are read.

    too_many: whether messages of these roles have none.
    """
    # In a text quotes have a backslash before them.
    key = b'"role"'
    count = sum(body[at : at + PIECE + len(key) - 1].count(key) for at in range(0, len(body), PIECE))
    if count > context and too_many(lambda: _roles(body)):
        raise too_long(f"the conversation has some {count} messages", "messages", context)
    return decode_body(body, kind, amend, context)


def _roles(body: bytes) -> Iterator[str]:
    """Who speaks, message by message, as far as that can be seen without decoding it."""
    for at in range(0, len(body), PIECE):
        for found in _ROLE.finditer(body[at : at + PIECE + _ROLE_BYTES]):
            if found.start() < PIECE:
                yield found[1].decode()


def too_long(what: str, param: str | None, context: int) -> ApiError:
    """For what can't be so few tokens, told by its size."""
    return ApiError(
        400, f"{what}; {context} tokens are the most here", param=param, code="context_length_exceeded"
    )


def _by_pieces(given: Any, kind: type[_T]) -> _T:
    """As `converted`; of many biases some at a time, since Python's lock is held meanwhile."""
    name = "logit_bias"
    biases = given.get(name) if isinstance(given, dict) else None
    if (
        not isinstance(biases, dict)
        or len(biases) <= _BIASES
        or name not in getattr(kind, "__struct_fields__", ())
    ):
        return converted(given, kind)
    made, entries = converted({**given, name: None}, kind), iter(biases.items())

    def pieces() -> Iterator[dict[int, float]]:
        while piece := dict(itertools.islice(entries, _BIASES)):
            yield msgspec.convert(piece, Biases, str_keys=True)

    try:
        setattr(made, name, params.Biases.of(pieces()))
    except msgspec.ValidationError as error:
        raise refusal(str(error).replace("`$", f"`$.{name}")) from None
    return made
