"""What an answer must look like: JSON, a text that a pattern or a grammar describes, or one of several."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final, Literal, Self

from attrs import evolve, frozen

from mer.errors import RequestError

MAX_CHOICES: Final = 100_000  # which take some two seconds to be compiled

StructureKind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]


@frozen
class Structure:
    """source: the schema as JSON, the pattern, the grammar, or the choices as a JSON list; else empty.

    behind: a tag after which the text has this form, as `after` says; empty: from its beginning on.

    Made by the methods below, which raise RequestError (`param` is "structure") for what can't be meant.
    """

    kind: StructureKind
    source: str
    behind: str = ""

    def after(self, tag: str) -> Self:
        """The same behind the first `tag`: a model that thinks first says what it likes up to there.

        tag: such as "</think>". Two line breaks may follow it.
        """
        return evolve(self, behind=_text("tag", tag))

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls("json_object", "")

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | str) -> Self:
        """JSON that is valid by this JSON schema (an object, or its text)."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise _no_json(error) from None
        if not isinstance(schema, dict):
            raise RequestError("structure: a JSON schema must be an object", "structure")
        try:
            # In pieces: json.dumps holds Python's lock, for a schema of 1 MiB 7 ms.
            return cls("json_schema", "".join(json.JSONEncoder(ensure_ascii=False).iterencode(schema)))
        except (TypeError, ValueError, RecursionError) as error:
            raise _no_json(error) from None

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """A text that matches this regular expression as a whole (Rust's syntax: no look-around)."""
        return cls("regex", _text("regular expression", pattern))

    @classmethod
    def grammar(cls, source: str) -> Self:
        """A text of the language that this grammar describes: llguidance's kind of Lark, or GBNF."""
        return cls("grammar", _text("grammar", source))

    @classmethod
    def choice(cls, choices: Iterable[str]) -> Self:
        """One of these texts."""
        found = [] if isinstance(choices, str) else list(choices)
        if not found or not all(isinstance(each, str) and each for each in found):
            raise RequestError("structure: choices must be a list of texts, none of them empty", "structure")
        if len(found) > MAX_CHOICES:
            raise RequestError(
                f"structure: {len(found)} choices; {MAX_CHOICES} are the most: describe them by a pattern or "
                "a grammar",
                "structure",
            )
        return cls("choice", json.dumps(found, ensure_ascii=False))


def _text(what: str, source: str) -> str:
    if not isinstance(source, str) or not source:
        raise RequestError(f"structure: the {what} must be a text that is not empty", "structure")
    return source


def _no_json(error: Exception) -> RequestError:
    why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return RequestError(f"structure: the JSON schema is no JSON: {why}", "structure")
