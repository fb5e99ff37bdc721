"""Which of several engines a request goes to: one that knows how it begins, unless that one has more to do.

An engine computes a prompt's beginning once and keeps its keys and values, so requests of the same beginning
belong together. Pure logic: no clock, no I/O.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final

import msgspec
from google.protobuf.message import Message

from mer.v1 import inference_pb2 as pb

# Bytes of text by which beginnings are compared, and the most such pieces that are looked at.
PIECE: Final = 256
_MOST_PIECES: Final = 256
# Bytes of a body that is still read as JSON for that; of a larger one the bytes as they are must do.
_LARGE: Final = 1 << 20
# Pieces that are remembered, of all requests.
_REMEMBERED: Final = 1 << 16
# Requests that an engine may have beyond the one with the fewest before another one is asked.
_SLACK: Final = 4


def beginnings(text: bytes) -> list[bytes]:
    """A key for each beginning of `text`, of one piece, of two, and so on; none for less than a piece."""
    keys: list[bytes] = []
    so_far = blake2b(digest_size=12)
    for at in range(0, min(len(text) // PIECE, _MOST_PIECES) * PIECE, PIECE):
        so_far.update(text[at : at + PIECE])
        keys.append(so_far.digest())
    return keys


def text_of(body: bytes) -> bytes:
    """Of a body of the HTTP API: bytes that begin alike as far as the prompts of two requests do."""
    if len(body) > _LARGE:
        return body[: PIECE * _MOST_PIECES]
    try:
        given: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return b""
    if not isinstance(given, dict):
        return b""
    names = "model", "tools", "system", "instructions", "messages", "prompt", "input"
    return msgspec.json.encode([given[name] for name in names if given.get(name)])


def prompt_of(request: Message) -> bytes:
    """The same of a request of the gRPC API, or of a session; nothing where there is no prompt."""
    if isinstance(request, pb.SessionRequest):
        request = request.generate if request.HasField("generate") else request.chat
    if isinstance(request, pb.GenerateRequest):
        return request.model.encode() + (request.text.encode() or request.token_ids.SerializeToString())
    if isinstance(request, pb.ChatRequest):
        parts = *request.tools, *request.messages
        return request.model.encode() + b"".join([part.SerializeToString() for part in parts])
    return b""


class Affinity:
    """Remembers which engine was sent what. Engines are anything hashable that can be put in order."""

    def __init__(self, slack: int = _SLACK, remembered: int = _REMEMBERED) -> None:
        self._slack, self._remembered = slack, remembered
        self._sent: OrderedDict[bytes, Any] = OrderedDict()

    def order(self, keys: Sequence[bytes], loads: Mapping[Any, int]) -> list[Any]:
        """The engines of `loads` (requests that each has now), the best one first.

        First comes the one that was sent the longest of these beginnings, if it has not `slack` requests
        more than another; then those with the fewest.
        """
        few = sorted(loads, key=lambda engine: (loads[engine], engine))
        for key in reversed(keys):
            engine = self._sent.get(key)
            if engine in loads:
                if loads[engine] - loads[few[0]] < self._slack:
                    return [engine, *(other for other in few if other != engine)]
                break
        return few

    def sent(self, keys: Sequence[bytes], engine: Any) -> None:
        """A request with these beginnings went to `engine`."""
        for key in keys:
            self._sent[key] = engine
            self._sent.move_to_end(key)
        while len(self._sent) > self._remembered:
            self._sent.popitem(last=False)

    def gone(self, engine: Any) -> None:
        """It remembers nothing any more."""
        for key in [key for key, other in self._sent.items() if other == engine]:
            del self._sent[key]
