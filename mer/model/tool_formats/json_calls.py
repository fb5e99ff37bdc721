"""Calls as JSON objects {"name": ..., "arguments": {...}}: one by one between tags, or in a list."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from attrs import frozen

from mer.model.tool_formats.base import Opened, object_schema, one_call, random_id
from mer.model.tool_formats.lark import Lark, pattern
from mer.model.tool_formats.source import Brackets, Schemas, Source, Steps

_HEAD: Final = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)


def read_call(source: Source, end: str | None = None, *, known: bool = False) -> Steps[bool]:
    """Read the object that begins here as a call. If it is none, all since the mark is content.

    end: a tag at which the object ends at the latest; it is not taken. known: the name must be a tool's.
    """
    brackets, seen = Brackets(), 0
    while True:
        closed = brackets.end(source.text[seen:])
        if closed is not None:
            closed += seen
        seen = len(source.text)
        tag = source.text.find(end) if end else -1
        if tag >= 0 and (closed is None or tag < closed):
            closed = tag
        head = _HEAD.match(source.text)
        name = _name(head[1]) if head and (closed is None or head.end() <= closed) else None
        if head and name is not None and (not known or name in source.schemas):
            source.take(head.end())
            source.call(name)
            if (yield from source.json(source.arguments)):
                yield from _close(source, end)
            return True
        if closed is not None:
            break
        if not (yield from source.more()):
            closed = len(source.text)
            break
    text = source.take(closed)
    call = _whole(text)
    if call is None or (known and call[0] not in source.schemas):
        source.reject()
        return False
    source.call(call[0])
    source.arguments(call[1])
    return True


def _name(text: str) -> str | None:
    try:
        name = json.loads(text, strict=False)
    except ValueError:
        return None
    return name if isinstance(name, str) and name else None


def _close(source: Source, end: str | None) -> Steps[None]:
    """What stands between the arguments and the end of the object: further keys, which mean nothing."""
    brackets, seen = Brackets(depth=1), 0
    while True:
        closed = brackets.end(source.text[seen:])
        tag = source.text.find(end) if end else -1
        if closed is not None and (tag < 0 or seen + closed <= tag):
            source.take(seen + closed)
            return
        if tag >= 0:
            source.content(source.take(tag).strip())
            return
        seen = len(source.text)
        if not (yield from source.more()):
            source.content(source.take(seen).strip())
            return


def _whole(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call whose keys come in another order, or with others; None: it is no call."""
    try:
        call = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):  # JSON in a string
        return call["name"], arguments
    if arguments is None or isinstance(arguments, dict):
        return call["name"], json.dumps(arguments or {}, ensure_ascii=False)
    return None


def read_list(source: Source, end: str | None = None) -> Steps[None]:
    """Read `[call, call ...]`, whose bracket comes next. What is no call in it is content."""
    source.take(1)
    while True:
        yield from source.space()
        if not source.text.startswith("{"):
            source.reject()
            return
        yield from read_call(source, end)
        source.mark()
        yield from source.space()
        if (yield from source.starts(",", "]")) != ",":
            return


def json_call(lark: Lark, name: str, schema: Mapping[str, Any], arguments: str = "arguments") -> str:
    """Grammar of one object."""
    head = lark.text(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{arguments}": ')
    return f"{head} {lark.json(object_schema(schema))} {lark.text('}')}"


@frozen
class Hermes(Opened):
    """<tool_call>{...}</tool_call>, once for each call: Qwen2, Qwen3, Hermes, Granite 4."""

    markers: ClassVar = ("<tool_call>", "</tool_call>")
    opener: ClassVar = "<tool_call>"

    def read(self, source: Source) -> Steps[None]:
        begin, end = self.markers
        while (yield from source.until((begin,), source.content)):
            yield from source.space()
            if source.text.startswith("["):
                yield from read_list(source, end)
            elif not source.text.startswith("{"):
                source.reject()
                continue
            elif not (yield from read_call(source, end)):
                continue
            junk, tag = yield from source.hold(end, begin)
            source.content(junk.strip().strip("}").strip())
            if tag == begin:  # the end was forgotten
                source.back(begin)
            yield from source.space()

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        newline = lark.text("\n")
        return f"{newline} {json_call(lark, name, schema)} {newline} {lark.tag(self.markers[1])}"

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        return f"{one} ({lark.text(chr(10))} {lark.tag(self.opener)} {one})*" if several else one

    def new_id(self) -> str:
        return random_id()


@frozen
class JsonList(Opened):
    """<|tool_call|>[{...}, {...}]: Granite 3, Phi-4; between other tags Hunyuan."""

    markers: tuple[str, str] = ("<|tool_call|>", "<|/tool_call|>")
    closes: bool = False  # the model was taught to write the closing tag

    @property
    def opener(self) -> str:
        return self.markers[0]

    def read(self, source: Source) -> Steps[None]:
        begin, end = self.markers
        while (yield from source.until((begin,), source.content)):
            yield from source.space()
            if source.text.startswith("["):
                yield from read_list(source, end)
            elif source.text.startswith("{"):
                yield from read_call(source, end)
            else:
                source.reject()
            yield from source.space()
            yield from source.starts(end)
            yield from source.space()

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        return json_call(lark, name, schema)

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        more = f"({lark.text(', ')} {one})*" if several else ""
        end = lark.tag(self.markers[1]) if self.closes else ""
        return f"{lark.text('[')} {one} {more} {lark.text(']')} {end}"

    def new_id(self) -> str:
        return random_id()


@frozen
class Mistral(Opened):
    """[TOOL_CALLS] [{...}, {...}], and newer [TOOL_CALLS]name[ARGS]{...} once for each call (named)."""

    named: bool
    markers: ClassVar = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    opener: ClassVar = "[TOOL_CALLS]"

    def read(self, source: Source) -> Steps[None]:
        begin, arguments, id = self.markers
        while (yield from source.until((begin,), source.content)):
            yield from source.space()
            if source.text.startswith("["):
                yield from read_list(source)
            elif source.text.startswith("{"):
                yield from read_call(source)
            else:
                name, tag = yield from source.hold("{", arguments, id)
                if tag == id:
                    _, tag = yield from source.hold("{", arguments)
                if tag == "{":
                    source.back(tag)
                yield from source.space()
                if not source.text.startswith("{") or not name.strip():
                    source.reject()
                    continue
                source.call(name.strip())
                yield from source.json(source.arguments)
            yield from source.space()

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        if not self.named:
            return json_call(lark, name, schema)
        return f"{lark.text(name)} {lark.tag(self.markers[1])} {lark.json(object_schema(schema))}"

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        if self.named:
            return f"{one} ({lark.tag(self.opener)} {one})*" if several else one
        more = f"({lark.text(', ')} {one})*" if several else ""
        return f"{lark.text(' [')} {one} {more} {lark.text(']')}"

    def new_id(self) -> str:
        """Nine letters and digits: its templates refuse others."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@frozen
class Llama:
    """The answer is {"name": ..., "parameters": {...}}, perhaps behind <|python_tag|>: Llama 3."""

    markers: ClassVar = ("<|python_tag|>",)
    opener: ClassVar = ""

    def read(self, source: Source) -> Steps[None]:
        (marker,) = self.markers
        source.mark()
        yield from source.space()
        yield from source.starts(marker)
        while True:
            yield from source.space()
            while source.text.startswith("{") and (yield from read_call(source, known=True)):
                yield from source.space()
                yield from source.starts(";")
                source.mark()
                yield from source.space()
            source.reject()
            if not (yield from source.until((marker,), source.content)):
                return

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        return json_call(lark, name, schema, "parameters")

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        return f"{one} ({lark.text('; ')} {one})*" if several else one

    def mixed(self, lark: Lark, schemas: Schemas, several: bool) -> str:
        calls = self.calls(lark, one_call(lark, self, schemas), several)
        (marker,) = self.markers
        begins = r'\s*\{\s*"name"'
        text = lark.terminal(f"/(?s:.*)/ & ~/({begins}|{pattern(marker)})(?s:.*)/")
        return f"({text} | {lark.tag(marker)}? {calls})"

    def new_id(self) -> str:
        return random_id()
