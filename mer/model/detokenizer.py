"""Token strings to text, piece by piece: the decoders of a tokenizer.json as streams.

`tokenizers` decodes a whole answer at a time. Here each of its decoders is a stage that takes the strings of
tokens and gives what is certain, so that a token costs the same wherever in the answer it stands. The text of
all tokens is the same to the character.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final, Protocol

from tokenizers import Regex, decoders

from mer.errors import UnsupportedModelError

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT: Final = "\ufffd"


class Vocabulary(Protocol):
    """What both kinds of tokenizer file come to."""

    @property
    def size(self) -> int:
        """One more than the highest id."""

    @property
    def longest(self) -> int:
        """Characters of the longest token as it stands in the vocabulary."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that mean something else than their text, e.g. the end of an answer."""

    @property
    def decoder(self) -> dict[str, Any] | None:
        """The decoder, as in tokenizer.json."""

    def encode(self, text: str, special: bool, fits: Callable[[int], object] | None = None) -> list[int]:
        """Ids of `text`; with `special`, also those that open and close every text. fits: as Tokenizer's."""

    def token(self, id: int) -> str | None:
        """The token as it stands in the vocabulary; None for an id that has none."""

    def id(self, token: str) -> int | None:
        """The id of a token of the vocabulary."""


class Stage:
    """One decoder. This one changes nothing."""

    def push(self, pieces: list[str]) -> list[str]:
        """What is certain once these pieces are there."""
        return pieces

    def settle(self) -> list[str]:
        """The prompt ends here: give out its complete characters, they are not of the answer."""
        return []

    def finish(self) -> list[str]:
        """The rest."""
        return []

    def alone(self, piece: bytes | str) -> bytes | str:
        """What this decoder makes of one token in the middle of a text, regardless of its neighbours."""
        return piece


class Each(Stage):
    """A decoder that looks at one token at a time."""

    def __init__(self, one: Callable[[str], str]) -> None:
        self._one = one

    def push(self, pieces: list[str]) -> list[str]:
        return [self._one(piece) for piece in pieces]

    def alone(self, piece: bytes | str) -> bytes | str:
        return self._one(piece) if isinstance(piece, str) else piece


class First(Stage):
    """Metaspace, or no decoder at all: the first token of a text is treated unlike all others."""

    def __init__(self, first: Callable[[str], str], other: Callable[[str], str]) -> None:
        self._first, self._other = first, other
        self._started = False

    def push(self, pieces: list[str]) -> list[str]:
        if self._started or not pieces:
            return [self._other(piece) for piece in pieces]
        self._started = True
        return [self._first(pieces[0]), *(self._other(piece) for piece in pieces[1:])]

    def alone(self, piece: bytes | str) -> bytes | str:
        return self._other(piece) if isinstance(piece, str) else piece


class ByteFallback(Stage):
    """Tokens <0x00>..<0xFF> are bytes.

    `tokenizers` decodes a run of them as UTF-8 if all of it is valid, else each of its bytes becomes
    U+FFFD. So a run is uncertain until another token ends it.
    """

    def __init__(self) -> None:
        self._run = bytearray()
        # How many bytes of the run are characters of the prompt.
        self._shown = 0

    def push(self, pieces: list[str]) -> list[str]:
        out: list[str] = []
        for piece in pieces:
            if match := _BYTE.fullmatch(piece):
                self._run.append(int(match[1], 16))
            else:
                out += self.finish()
                out.append(piece)
        return out

    def settle(self) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(self._run)
        self._shown = len(self._run) - len(decoder.getstate()[0])
        return [text]

    def finish(self) -> list[str]:
        run, shown = self._run, self._shown
        self._run, self._shown = bytearray(), 0
        try:
            run.decode()
        except UnicodeDecodeError:
            return [_REPLACEMENT] * (len(run) - shown)
        return [run[shown:].decode()] if len(run) > shown else []

    def alone(self, piece: bytes | str) -> bytes | str:
        match = _BYTE.fullmatch(piece) if isinstance(piece, str) else None
        return bytes.fromhex(match[1]) if match else piece


class ByteLevel(Stage):
    """Each character of a token stands for one byte; a token with any other character is text itself."""

    def __init__(self) -> None:
        self._begun = b""  # what may become a character

    def push(self, pieces: list[str]) -> list[str]:
        data = self._begun + b"".join(map(_byte_level, pieces))
        try:
            text, self._begun = data.decode(), b""  # nearly always, and sooner done than what follows
        except UnicodeDecodeError:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            text = decoder.decode(data)
            self._begun = decoder.getstate()[0]
        return [text]

    def finish(self) -> list[str]:
        text, self._begun = self._begun.decode(errors="replace"), b""
        return [text]

    def alone(self, piece: bytes | str) -> bytes | str:
        return _byte_level(piece) if isinstance(piece, str) else piece


class StripLeft(Stage):
    """Takes up to `count` characters `content` from the beginning of the text."""

    def __init__(self, content: str, count: int) -> None:
        self._content, self._left = content, count

    def push(self, pieces: list[str]) -> list[str]:
        if not self._left:
            return pieces
        text = "".join(pieces)
        while self._left and text.startswith(self._content):
            text = text[len(self._content) :]
            self._left -= 1
        if text:
            self._left = 0
        return [text]


class Detokenizer:
    """The text of one answer, as its tokens come.

    The answer's text is what decoding prompt and answer together adds to the prompt's. A character that the
    prompt leaves incomplete belongs to the answer.
    """

    def __init__(
        self, piece: Callable[[int], str | None], decoder: dict[str, Any] | None, prompt: Iterable[int]
    ) -> None:
        """piece: the string of a token, None if it is not shown. decoder: as in tokenizer.json."""
        self._piece = piece
        self._stages = stages(decoder)
        self._any = False
        pieces = [shown for id in prompt if (shown := piece(id)) is not None]
        for stage in self._stages:
            pieces = stage.push(pieces)
            pieces += stage.settle()

    def push(self, token_id: int) -> str:
        """The text that is certain now; never half a character. Raises RequestError for an impossible id."""
        piece = self._piece(token_id)
        if piece is None:
            return ""
        self._any = True
        pieces = [piece]
        for stage in self._stages:
            pieces = stage.push(pieces)
        return "".join(pieces)

    def finish(self) -> str:
        """What is left; an incomplete character becomes U+FFFD."""
        if not self._any:
            return ""
        pieces: list[str] = []
        for stage in self._stages:
            pieces = stage.push(pieces)
            pieces += stage.finish()
        return "".join(pieces)


def stages(decoder: dict[str, Any] | None) -> list[Stage]:
    """The decoder of a tokenizer.json as stages. Raises UnsupportedModelError."""
    if decoder is None:
        return [First(str, " {}".format)]
    found: list[Stage] = []
    fused = False
    for each in _flat(decoder):
        match each["type"]:
            case "ByteLevel" if not fused:
                found.append(ByteLevel())
                fused = True
            case "ByteFallback" if not fused:
                found.append(ByteFallback())
            case "Fuse":
                fused = True
            case "Replace" if not fused:
                found.append(Each(_replace(each["pattern"], each["content"])))
            case "Strip" if not fused:
                found.append(Each(_first(decoders.Strip(each["content"], each["start"], each["stop"]))))
            case "Strip" if not each["stop"]:
                found.append(StripLeft(each["content"], each["start"]))
            case "Metaspace" if not fused:
                rust = decoders.Metaspace(each["replacement"], each.get("prepend_scheme", "always"))
                found.append(First(_first(rust), _other(rust)))
            case kind:
                raise UnsupportedModelError(
                    f"tokenizer.json: the decoder {kind!r} is not supported at this place"
                )
    return found


def _replace(pattern: dict[str, str], content: str) -> Callable[[str], str]:
    if "String" in pattern:
        return lambda piece: piece.replace(pattern["String"], content)
    return _first(decoders.Replace(Regex(pattern["Regex"]), content))


def _first(rust: decoders.Decoder) -> Callable[[str], str]:
    return lambda piece: rust.decode([piece])


def _other(rust: decoders.Decoder) -> Callable[[str], str]:
    return lambda piece: rust.decode(["", piece])


def _flat(decoder: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for each in decoder["decoders"]:
            yield from _flat(each)
    else:
        yield decoder


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones are themselves, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET: Final = _alphabet()


@lru_cache(1 << 14)  # a token's bytes are wanted each time it is drawn
def _byte_level(piece: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in piece])
    except KeyError:
        return piece.encode()
