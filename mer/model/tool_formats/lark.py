"""Grammars of answers, in llguidance's Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

# JSON as models were trained to write it: without this, white space may go on for ever.
_SPACING = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


def with_members(schema: str, members: Mapping[str, Any]) -> str:
    """The JSON text of an object with these members more, unless it has them itself.

    Put together as text: a schema may be long, and is read with Python's lock held.
    """
    if any(f'"{name}"' in schema for name in members):
        return json.dumps({**members, **json.loads(schema)}, ensure_ascii=False)
    rest = schema[1:].lstrip()
    return json.dumps(members)[:-1] + ("" if rest.startswith("}") else ", ") + rest


class Lark:
    """Writes a grammar. special: the id of a text that is one special token, None for other texts."""

    def __init__(self, special: Callable[[str], int | None]) -> None:
        self._special = special
        self._rules: list[str] = []

    def rule(self, body: str, options: str = "") -> str:
        """A new rule's name. options: as in `name[options]`."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def tag(self, tag: str) -> str:
        """A tag: the token itself where it is a special one, which no text can stand for."""
        id = self._special(tag)
        return json.dumps(tag, ensure_ascii=False) if id is None else f"<[{id}]>"

    def text(self, text: str) -> str:
        """Exactly this text."""
        return json.dumps(text, ensure_ascii=False)

    def json(self, schema: Mapping[str, Any]) -> str:
        """A JSON value of this schema."""
        return self.json_text(json.dumps(schema, ensure_ascii=False))

    def json_text(self, schema: str) -> str:
        """The same of the text of one, an object."""
        return self.rule("%json " + with_members(schema, _SPACING))

    def before(self, tag: str, *others: str) -> str:
        """Any text up to and with the first `tag`; with none of the others before it."""
        text = self.without(*others)
        if self._special(tag) is not None:
            return f"{text} {self.tag(tag)}"
        return self.rule(text, f"[suffix={json.dumps(tag, ensure_ascii=False)}]")

    def without(self, *tags: str) -> str:
        """Any text without these tags in it."""
        found = "|".join(pattern(tag) for tag in tags if self._special(tag) is None)
        if not found:
            return "/(?s:.*)/"
        return self.terminal(f"/(?s:.*)/ & ~/(?s:.*)({found})(?s:.*)/")

    def terminal(self, body: str) -> str:
        """The name of a new terminal: what the lexer takes for one word, however large the choice is."""
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def nested(self, source: str) -> str:
        """A whole grammar, from its own `start` on."""
        return self.rule(f"%lark {{\n{source}\n}}")

    def grammar(self, start: str) -> str:
        """The whole, beginning with this expression."""
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules])


def pattern(text: str) -> str:
    """A regular expression, to stand between slashes, of exactly this text."""
    return re.sub(r"[][\\.+*?()|{}^$#&~/-]", r"\\\g<0>", text)
