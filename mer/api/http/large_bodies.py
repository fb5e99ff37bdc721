"""The body of a request, whatever its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from mer.api import large_json
from mer.api.http.errors import ApiError
from mer.api.http.schemas import converted, decode, malformed
from mer.api.large_json import PIECE, TooLargeError

_T = TypeVar("_T")
# Parameters that are long by nature; the others are copied, or written into a prompt, all at once.
_LONG: Final = frozenset(
    {"messages", "input", "prompt", "system", "instructions", "guided_choice", "logit_bias", "stop_token_ids"}
)


def decode_body(body: bytes, kind: type[_T], amend: Callable[[Any], Any] | None = None) -> _T:
    """As `schemas.decode`; one of more than PIECE bytes without keeping others waiting, on a thread.

    amend: what is done to the JSON before. Raises ApiError, 413 where there is more in it than makes sense.
    """
    try:
        if len(body) > PIECE:
            given = large_json.decode(body, _LONG)
        elif amend is not None:
            given = msgspec.json.decode(body)
        else:
            return decode(body, kind)
    except TooLargeError as error:
        where = error.name or "the request's body"
        raise ApiError(413, f"{where}: {error}", param=error.name or None, code="body_too_large") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise malformed(error) from None
    return converted(amend(given) if amend else given, kind)
