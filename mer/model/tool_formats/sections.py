"""Calls between tokens of their own, several in a section: DeepSeek, Kimi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from attrs import frozen

from mer.model.tool_formats.base import Opened, object_schema, random_id
from mer.model.tool_formats.lark import Lark
from mer.model.tool_formats.source import Source, Steps

_FENCE: Final = "```json"


@frozen
class DeepSeek(Opened):
    """V3 and R1 (fenced): type, separator, name, a fence with arguments. V3.1: name, separator, arguments."""

    fenced: bool
    markers: ClassVar = (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    )
    opener: ClassVar = "<｜tool▁calls▁begin｜>"

    def read(self, source: Source) -> Steps[None]:
        section, begin, separator, end, section_end = self.markers
        while (yield from source.until((section,), source.content)):
            yield from source.space()
            while (yield from source.starts(begin)):
                head, tag = yield from source.hold(separator, end)
                yield from source.space()
                if tag == separator and not source.text.startswith("{"):  # V3: what came was the type
                    head, tag = yield from source.hold("\n", end)
                    yield from source.space()
                    yield from source.starts(_FENCE)
                    yield from source.space()
                if tag in (separator, "\n") and head.strip() and source.text.startswith("{"):
                    source.call(head.strip())
                    yield from source.json(source.arguments)
                else:
                    source.reject()
                junk, tag = ("", tag) if tag == end else (yield from source.hold(end, section_end))
                source.content(junk.strip().strip("`").strip())
                source.mark()
                yield from source.space()
                if tag != end:
                    break
            source.reject()
            yield from source.starts(section_end)
            yield from source.space()

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        _, begin, separator, end, _ = map(lark.tag, self.markers)
        arguments = lark.json(object_schema(schema))
        if not self.fenced:
            return f"{begin} {lark.text(name)} {separator} {arguments} {end}"
        head, tail = lark.text(f"{name}\n{_FENCE}\n"), lark.text("\n```")
        return f"{begin} {lark.text('function')} {separator} {head} {arguments} {tail} {end}"

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        more = f"({lark.text(chr(10)) if self.fenced else ''} {one})*" if several else ""
        return f"{one} {more} {lark.tag(self.markers[-1])}"

    def new_id(self) -> str:
        return random_id()


@frozen
class Kimi(Opened):
    """The id, functions.NAME:NUMBER, is part of the call. Kimi-K2."""

    markers: ClassVar = (
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    )
    opener: ClassVar = "<|tool_calls_section_begin|>"

    def read(self, source: Source) -> Steps[None]:
        section, begin, separator, end, section_end = self.markers
        while (yield from source.until((section,), source.content)):
            yield from source.space()
            while (yield from source.starts(begin)):
                head, tag = yield from source.hold(separator, end)
                id = head.strip()
                name = id.removeprefix("functions.").rpartition(":")[0]
                yield from source.space()
                if tag == separator and name and source.text.startswith("{"):
                    source.call(name, id)
                    yield from source.json(source.arguments)
                else:
                    source.reject()
                junk, tag = ("", tag) if tag == end else (yield from source.hold(end, section_end))
                source.content(junk.strip())
                source.mark()
                yield from source.space()
                if tag != end:
                    break
            source.reject()
            yield from source.starts(section_end)
            yield from source.space()

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        _, begin, separator, end, _ = map(lark.tag, self.markers)
        id = f"{lark.text(f'functions.{name}:')} /[0-9]{{1,3}}/"
        return f"{begin} {id} {separator} {lark.json(object_schema(schema))} {end}"

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        return f"({one}){'+' if several else ''} {lark.tag(self.markers[-1])}"

    def new_id(self) -> str:
        return random_id()
