"""What a format of tool calls is."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final, Protocol

from mer.model.tool_formats.lark import Lark
from mer.model.tool_formats.source import Schemas, Source, Steps


class ToolFormat(Protocol):
    """How the models of some families write calls of tools.

    markers: the tags in it. Those that are special tokens of a model must be shown to the parser.
    opener: the tag that the first call begins with, and nothing else does; empty where there is none.
    """

    @property
    def markers(self) -> tuple[str, ...]: ...

    @property
    def opener(self) -> str: ...

    def read(self, source: Source) -> Steps[None]:
        """Read an answer (without its reasoning) to its end."""

    def call(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        """Grammar of one call of this tool; without the opener, where each call has its own."""

    def calls(self, lark: Lark, one: str, several: bool) -> str:
        """Grammar of the calls of an answer, behind the opener. one: that of each."""

    def mixed(self, lark: Lark, schemas: Schemas, several: bool) -> str:
        """Grammar of an answer that may say anything, but whose calls, once begun, are of these tools."""

    def new_id(self) -> str:
        """An id for a call; templates of some families ask for a form of their own."""


class Opened:
    """What the formats have in common whose calls begin with a tag."""

    def mixed(self: ToolFormat, lark: Lark, schemas: Schemas, several: bool) -> str:
        calls = self.calls(lark, one_call(lark, self, schemas), several)
        return f"({lark.before(self.opener)} {calls} | {lark.without(self.opener)})"


def one_call(lark: Lark, format: ToolFormat, schemas: Schemas) -> str:
    """Grammar of one call of any of these tools."""
    each = [format.call(lark, name, schema) for name, schema in schemas.items()]
    return lark.rule(" | ".join(lark.rule(call) for call in each))


def random_id() -> str:
    return "call_" + secrets.token_hex(12)


# Of arguments that are not held to their schema.
ANYTHING: Final[Mapping[str, Any]] = {"type": "object", "additionalProperties": True}


def object_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object whatever it says."""
    return {"type": "object", **schema}
