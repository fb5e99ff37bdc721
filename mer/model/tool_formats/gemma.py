"""Gemma-4's calls: like JSON, but keys are bare, and strings stand between tokens of their own.

<|tool_call>call:NAME{city:<|"|>Bern<|"|>,days:3,more:{list:[true,null]}}<tool_call|>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from attrs import frozen

from mer.model.tool_formats.base import Opened, object_schema, random_id
from mer.model.tool_formats.lark import Lark
from mer.model.tool_formats.source import Source, Steps

_QUOTE: Final = '<|"|>'
_HEAD: Final = re.compile(r"\s*call:\s*([^\s<>{}\"]+)\s*(\{.*\})\s*", re.DOTALL)
_PARTS: Final = re.compile(
    r"""<\|"\|>(?P<string>.*?)<\|"\|>\s*   # a string; of what is in it, nothing is special
      | (?P<mark>[{}\[\],:])\s*
      | (?P<bare>[^{}\[\],:]+)             # a key, a number, true, false, null
    """,
    re.DOTALL | re.VERBOSE,
)
_WORDS: Final = {"True": "true", "False": "false", "None": "null"}  # templates may write them so
_BARE_KEY: Final = r"/[^{}\[\],:<\" \n]+/"


@frozen
class Gemma(Opened):
    markers: ClassVar = ("<|tool_call>", "<tool_call|>", _QUOTE)
    opener: ClassVar = "<|tool_call>"

    def read(self, source: Source) -> Steps[None]:
        begin, end, _ = self.markers
        while (yield from source.until((begin,), source.content)):
            text, tag = yield from source.hold(end)
            call = _HEAD.fullmatch(text)
            arguments = _as_json(call[2]) if call else None
            if tag is None or call is None or arguments is None:
                source.reject()
                continue
            source.call(call[1])
            source.arguments(arguments)
            yield from source.space()

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        whole = object_schema(schema)
        return f"{lark.text(f'call:{name}')} {_Grammar(lark, whole).value(whole)} {lark.tag(self.markers[1])}"

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        return f"{one} ({lark.tag(self.opener)} {one})*" if several else one

    def new_id(self) -> str:
        return random_id()


def _as_json(text: str) -> str | None:
    """The arguments as JSON; None where they are no object of this form."""
    parts: list[str] = []
    at = 0
    for part in _PARTS.finditer(text):
        if part.start() != at:
            return None
        at = part.end()
        if part["string"] is not None:
            parts.append(json.dumps(part["string"], ensure_ascii=False))
        elif part["mark"]:
            parts.append(part["mark"])
        elif word := part["bare"].strip():
            word = _WORDS.get(word, word)
            parts.append(json.dumps(word) if text[at : at + 1] == ":" else word)
    try:
        value = json.loads("".join(parts))
    except (ValueError, RecursionError):
        return None
    return json.dumps(value, ensure_ascii=False) if at == len(text) and isinstance(value, dict) else None


class _Grammar:
    """Grammars of values of a schema."""

    def __init__(self, lark: Lark, whole: Mapping[str, Any]) -> None:
        self._lark = lark
        self._definitions = {key: whole[key] for key in ("$defs", "definitions") if key in whole}

    def value(self, schema: Any) -> str:
        """Where the schema says too much, any value is taken."""
        lark = self._lark
        if not isinstance(schema, dict):
            return self._anything()
        for choices in schema.get("enum"), [schema["const"]] if "const" in schema else None:
            if choices:
                return f"({' | '.join(map(self._exactly, choices))})"
        for several in schema.get("anyOf"), schema.get("oneOf"):
            if several:
                return lark.rule(" | ".join(map(self.value, several)))
        kind = schema.get("type")
        if isinstance(kind, list) and kind:
            return lark.rule(" | ".join(self.value({**schema, "type": each}) for each in kind))
        if kind == "string":
            return f"{lark.tag(_QUOTE)} {lark.before(_QUOTE)}"
        if kind in ("integer", "number", "boolean", "null"):
            return lark.json({**schema, **self._definitions})
        if kind == "array":
            return self._array(schema)
        return self._object(schema) if kind == "object" else self._anything()

    def _exactly(self, value: Any) -> str:
        """This value, as the models write it."""
        text, quote = self._lark.text, self._lark.tag(_QUOTE)
        if isinstance(value, str):
            return f"{quote} {text(value)} {quote}"
        comma = f" {text(',')} "
        if isinstance(value, dict):
            pairs = comma.join(f"{text(f'{key}:')} {self._exactly(each)}" for key, each in value.items())
            return f"{text('{')} {pairs} {text('}')}"
        if isinstance(value, list):
            return f"{text('[')} {comma.join(map(self._exactly, value))} {text(']')}"
        return text(json.dumps(value))

    def _array(self, schema: Mapping[str, Any]) -> str:
        lark, item = self._lark, self.value(schema.get("items"))
        most = schema.get("maxItems")
        if most == 0:
            return lark.text("[]")
        more = f"({lark.text(',')} {item})" + ("*" if most is None else f"{{0,{most - 1}}}")
        inside = f"{item} {more}"
        return f"{lark.text('[')} {inside if schema.get('minItems') else f'({inside})?'} {lark.text(']')}"

    def _object(self, schema: Mapping[str, Any]) -> str:
        lark = self._lark
        required = schema.get("required", [])
        others = schema.get("additionalProperties", not schema.get("properties"))
        pair = f"{_BARE_KEY} {lark.text(':')} {self._anything()}" if others else ""
        # From the last property on: what may follow when something stands before, and when nothing does.
        behind = lark.rule(f"({lark.text(',')} {pair})*") if others else lark.text("")
        first = lark.rule(f"({pair} {behind})?") if others else lark.text("")
        for key, value in reversed(list(schema.get("properties", {}).items())):
            own = f"{lark.text(f'{key}:')} {self.value(value)}"
            with_it = f"{own} {behind}"
            skip = "" if key in required else f" | {first}"
            next_behind = "" if key in required else f" | {behind}"
            first = lark.rule(f"{with_it}{skip}")
            behind = lark.rule(f"{lark.text(',')} {with_it}{next_behind}")
        return f"{lark.text('{')} {first} {lark.text('}')}"

    def _anything(self) -> str:
        quote = self._lark.tag(_QUOTE)
        string = f"{quote} /(?s:.*)/ {quote}" if quote.startswith("<[") else f"{quote} TEXT {quote}"
        number = r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/"
        return self._lark.nested(
            "start: value\n"
            f'value: {string} | {number} | "true" | "false" | "null"\n'
            '  | "[" (value ("," value)*)? "]" | "{" (pair ("," pair)*)? "}"\n'
            f'pair: {_BARE_KEY} ":" value\n' + ("TEXT: /[^<]*/\n" if "TEXT" in string else "")
        )
