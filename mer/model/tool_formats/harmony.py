"""Harmony, the format of GPT-OSS: an answer is several messages, each in a channel.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

A call is a message to=functions.NAME, in the header before or behind the channel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from attrs import frozen

from mer.model.tool_formats.base import object_schema, one_call, random_id
from mer.model.tool_formats.lark import Lark
from mer.model.tool_formats.source import Schemas, Source, Steps

_TO: Final = re.compile(r"\bto=([^\s<]+)")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")


@frozen
class Harmony:
    markers: ClassVar = (
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|end|>",
        "<|call|>",
        "<|return|>",
        "<|constrain|>",
    )
    opener: ClassVar = ""

    def read(self, source: Source) -> Steps[None]:
        start, channel, message, *ends, _ = self.markers
        # The prompt ends with <|start|>assistant, so the answer begins inside a header.
        begin = yield from source.starts(start, channel, " to=", "to=")
        begin = begin or (yield from source.until((start, channel), source.content))
        thought = False
        while begin is not None:
            header, found = yield from source.hold(message)
            if found is None:
                return
            header = begin + header
            stops = (*ends, start)
            if to := _TO.search(header):
                source.call(to[1].removeprefix("functions."))
                end = yield from source.until(stops, source.arguments)
                if not source.argued:
                    source.arguments("{}")
            elif (name := _CHANNEL.search(header)) and name[1] == "analysis":
                if thought:
                    source.reasoning("\n")
                thought = True
                end = yield from source.until(stops, source.reasoning)
            else:
                end = yield from source.until(stops, source.content, trim=False)
            begin = end if end == start else (yield from source.until((start, channel), source.content))

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        _, channel, message, _, call, _, constrain = map(lark.tag, self.markers)
        header = lark.text(f"commentary to=functions.{name} ")
        return (
            f"{channel} {header} {constrain} {lark.text('json')} {message} "
            f"{lark.json(object_schema(schema))} {call}"
        )

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        return one  # after a call the model waits for its result

    def thought(self, lark: Lark) -> str:
        """Grammar of the reasoning that may come first."""
        start, channel, message, *_ = map(lark.tag, self.markers)
        body = lark.before("<|end|>")
        return f"({channel} {lark.text('analysis')} {message} {body} {start} {lark.text('assistant')})?"

    def mixed(self, lark: Lark, schemas: Schemas, several: bool) -> str:
        calls = one_call(lark, self, schemas)
        start, channel, message, *_ = map(lark.tag, self.markers)
        kind = f"({lark.text('analysis')} | {lark.text('commentary')})"
        before = f"{channel} {kind} {message} {lark.before('<|end|>')} {start} {lark.text('assistant')}"
        return f"({before})* ({self.final(lark, '/(?s:.*)/')} | {calls})"

    def final(self, lark: Lark, body: str) -> str:
        """Grammar of an answer that is `body`."""
        _, channel, message, *_ = map(lark.tag, self.markers)
        return f"{channel} {lark.text('final')} {message} {body}"

    def new_id(self) -> str:
        return random_id()
