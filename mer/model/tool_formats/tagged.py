"""Calls whose arguments stand between tags, each by itself: Qwen3-Coder, GLM-4, MiniMax-M2, newer DeepSeek.

Mostly the text of an argument says nothing of its type: the tool's schema decides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from attrs import evolve, field, frozen

from mer.model.tool_formats.base import Opened, one_call, random_id
from mer.model.tool_formats.lark import Lark
from mer.model.tool_formats.source import Schemas, Source, Steps

_NAME: Final = re.compile(r"[^\s<>{}\"]+")
_PYTHON: Final = {"True": "true", "False": "false", "None": "null"}  # templates write them so
_STRING: Final = 'string="true"'
_TYPES: Final = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


@frozen
class Tagged(Opened):
    """The tags, in the order in which they come; `begin` opens one call, or several when `head` is not empty.

    head, head_end: around the tool's name; without a head it ends where the first key or the end of the call
    is. line: name and values stand on lines of their own. typed: an argument says whether it is a string,
    behind its key: string="true">.
    """

    begin: str
    head: str
    head_end: str
    key: str
    key_end: str
    value: str
    value_end: str
    call_end: str
    end: str
    line: bool
    typed: bool = False
    markers: tuple[str, ...] = field(init=False)

    @markers.default
    def _markers(self) -> tuple[str, ...]:
        tags = (self.begin, self.key, self.key_end, self.value, self.value_end, self.call_end, self.end)
        return tuple(tag for tag in tags if tag.startswith("<") and tag.endswith(">"))

    @property
    def opener(self) -> str:
        return self.begin

    def read(self, source: Source) -> Steps[None]:
        openers = tuple(filter(None, (self.begin, self.head)))  # Qwen3-Coder may forget the outer tag
        while tag := (yield from source.until(openers, source.content)):
            if tag == self.begin:
                yield from source.space()
            else:
                source.back(tag)
            while not self.head or (yield from source.starts(self.head)):
                if not (yield from self._read_call(source)):
                    break
                source.mark()
                yield from source.space()
                if not self.head:
                    break
            else:
                source.reject()
                if (yield from source.starts(self.end)):
                    yield from source.space()

    def _read_call(self, source: Source) -> Steps[bool]:
        """Read one from the name on; False when it is none, and was content."""
        stops = tuple(filter(None, (self.head_end, self.key, self.call_end)))
        name, tag = yield from source.hold(*stops)
        if tag is None or (self.head and tag != self.head_end) or not _NAME.fullmatch(name.strip()):
            source.reject()
            return False
        if tag != self.head_end:
            source.back(tag)
        name = name.strip()
        properties = source.schemas.get(name, {}).get("properties", {})
        source.call(name)
        source.arguments("{")
        comma = ""
        while (tag := (yield from source.until((self.key, self.call_end), source.content))) == self.key:
            key, tag = yield from source.hold(self.key_end)
            if tag is None:
                return True
            source.arguments(f"{comma}{_dumps(key.strip())}: ")
            comma = ", "
            types = _types(properties.get(key.strip(), {}))
            if self.value:
                yield from source.space()
                yield from source.starts(self.value)
            if self.typed:
                attributes, _ = yield from source.hold(">")
                types = {"string"} if _STRING in attributes else types - {"string"}
            yield from self._read_value(source, types)
        if tag:
            source.arguments("}")
        return True

    def _read_value(self, source: Source, types: set[str]) -> Steps[None]:
        ends = (self.value_end, "\n" + self.value_end) if self.line else (self.value_end,)
        if self.line:
            yield from source.starts("\n")
        if types == {"string"}:
            source.arguments('"')
            if (yield from source.until(ends, lambda text: source.arguments(_dumps(text)[1:-1]), trim=False)):
                source.arguments('"')
            return
        text, tag = yield from source.hold(*ends)
        if tag:
            source.arguments(_typed(text, types))

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        return f"{self._text(lark, self.head)} {self._headless(lark, name, schema)}"

    def _headless(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        newline = lark.text("\n")
        properties, required = schema.get("properties", {}), schema.get("required", [])
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        parts: list[str] = []
        for key, value in properties.items():
            open = f"{self._text(lark, self.key)} {lark.text(key)} {self._text(lark, self.key_end)}"
            if self.value:
                open += f" {newline} {lark.tag(self.value)}"
            if self.typed:
                text = f" {_STRING}>" if _types(value) == {"string"} else ' string="false">'
                open += f" {lark.text(text)}"
            body = self._value(lark, value, definitions)
            part = lark.rule(f"{open} {newline if self.line else ''} {body} {newline}")
            parts.append(part if key in required else f"{part}?")
        if schema.get("additionalProperties"):
            parts.append(f"{self._any_argument(lark)}*")
        if self.head:
            head = f"{lark.text(name)} {lark.tag(self.head_end)}"
            return f"{head} {newline} {' '.join(parts)} {lark.tag(self.call_end)}"
        return f"{lark.text(name)} {newline} {' '.join(parts)} {lark.tag(self.call_end)}"

    def _any_argument(self, lark: Lark) -> str:
        newline = lark.text("\n")
        open = f"{self._text(lark, self.key)} /[A-Za-z0-9_.$-]+/ {self._text(lark, self.key_end)}"
        if self.value:
            open += f" {newline} {lark.tag(self.value)}"
        if self.typed:
            open += " /" + r' string="(true|false)">' + "/"
        body = lark.before(("\n" if self.line else "") + self.value_end)
        return lark.rule(f"{open} {newline if self.line else ''} {body} {newline}")

    def _value(self, lark: Lark, schema: Any, definitions: Mapping[str, Any]) -> str:
        newline = "\n" if self.line else ""
        end = f"{lark.text(newline)} {lark.tag(self.value_end)}" if newline else lark.tag(self.value_end)
        if _types(schema) != {"string"}:
            return f"{lark.json({**schema, **definitions} if isinstance(schema, dict) else {})} {end}"
        choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
        if choices:
            return f"({' | '.join(map(lark.text, choices))}) {end}"
        return lark.before(newline + self.value_end)

    def _text(self, lark: Lark, tag: str) -> str:
        return lark.tag(tag) if tag else ""

    def mixed(self, lark: Lark, schemas: Schemas, several: bool) -> str:
        """The outer tag may be forgotten, as `read` takes it: then a call begins with the head."""
        if not self.head:
            return Opened.mixed(self, lark, schemas, several)
        newline, end = lark.text("\n"), lark.tag(self.end)
        one = one_call(lark, self, schemas)
        named = [lark.rule(self._headless(lark, name, schema)) for name, schema in schemas.items()]
        bare = f"({' | '.join(named)}) ({newline}? {end})?"
        if several:
            bare += f" ({newline}? ({lark.tag(self.begin)} {newline})? {one} ({newline}? {end})?)*"
        outer = f"{lark.before(self.begin, self.head)} {self.calls(lark, one, several)}"
        return (
            f"({outer} | {lark.before(self.head, self.begin)} {bare} | {lark.without(self.begin, self.head)})"
        )

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        begin, newline = lark.tag(self.begin), lark.text("\n")
        if not self.head:
            return f"{one} ({newline} {begin} {one})*" if several else one
        end = lark.tag(self.end)
        if self.line:  # one call in each
            one = f"{newline} {one} {newline} {end}"
            return f"{one} ({newline} {begin} {one})*" if several else one
        more = f"({newline} {one})*" if several else ""
        return f"{newline} {one} {more} {newline} {end}"

    def new_id(self) -> str:
        return random_id()


QWEN_CODER: Final = Tagged(
    begin="<tool_call>",
    head="<function=",
    head_end=">",
    key="<parameter=",
    key_end=">",
    value="",
    value_end="</parameter>",
    call_end="</function>",
    end="</tool_call>",
    line=True,
)
MINIMAX: Final = Tagged(
    begin="<minimax:tool_call>",
    head='<invoke name="',
    head_end='">',
    key='<parameter name="',
    key_end='">',
    value="",
    value_end="</parameter>",
    call_end="</invoke>",
    end="</minimax:tool_call>",
    line=False,
)
DEEPSEEK_V32: Final = Tagged(
    begin="<｜DSML｜function_calls>",
    head='<｜DSML｜invoke name="',
    head_end='">',
    key='<｜DSML｜parameter name="',
    key_end='"',
    value="",
    value_end="</｜DSML｜parameter>",
    call_end="</｜DSML｜invoke>",
    end="</｜DSML｜function_calls>",
    line=False,
    typed=True,
)
DEEPSEEK_V4: Final = evolve(DEEPSEEK_V32, begin="<｜DSML｜tool_calls>", end="</｜DSML｜tool_calls>")
GLM: Final = Tagged(
    begin="<tool_call>",
    head="",
    head_end="",
    key="<arg_key>",
    key_end="</arg_key>",
    value="<arg_value>",
    value_end="</arg_value>",
    call_end="</tool_call>",
    end="",
    line=False,
)


def _dumps(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _types(schema: Any) -> set[str]:
    """JSON types that the schema allows; empty when it does not say."""
    if not isinstance(schema, dict):
        return set()
    declared = schema.get("type")
    if declared is not None:
        return {declared} if isinstance(declared, str) else set(declared)
    for values in schema.get("enum"), [schema["const"]] if "const" in schema else None:
        if values:
            return {_TYPES.get(type(value), "null") for value in values}
    for choices in schema.get("anyOf"), schema.get("oneOf"):
        if choices:
            found = [_types(choice) for choice in choices]
            return set().union(*found) if all(found) else set()
    return set()


def _typed(text: str, types: set[str]) -> str:
    """The text of an argument as JSON of one of these types, else as a string."""
    bare = text.strip()
    bare = _PYTHON.get(bare, bare)
    try:
        value = json.loads(bare, strict=False)
    except (ValueError, RecursionError):
        return _dumps(text)
    kind = _TYPES.get(type(value), "null")
    if not types or kind in types or (kind == "integer" and "number" in types):
        return bare
    return _dumps(text)
