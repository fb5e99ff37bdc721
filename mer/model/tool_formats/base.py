"""What a format of tool calls is."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Protocol

from mer.model.tool_formats.lark import Lark
from mer.model.tool_formats.source import Source, Steps


class ToolFormat(Protocol):
    """How the models of some families write calls of tools.

    markers: the tags in it. Those that are special tokens of a model must be shown to the parser.
    """

    @property
    def markers(self) -> tuple[str, ...]: ...

    def read(self, source: Source) -> Steps[None]:
        """Read an answer (without its reasoning) to its end."""

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        """Grammar of one call of this tool."""

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        """Grammar of the calls of an answer. one: that of each."""

    def new_id(self) -> str:
        """An id for a call; templates of some families ask for a form of their own."""


def random_id() -> str:
    return "call_" + secrets.token_hex(12)


def object_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object whatever it says."""
    return {"type": "object", **schema}
