"""Whether a conversation can have room at all, told by who speaks: before a message of it is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mer.engine.engine import Engine
from mer.model.output_parser import OutputFormat
from mer.model.tool_formats import Harmony

# Other messages may be left out by templates, or become part of their neighbours.
_COUNTED: Final = frozenset(("user", "assistant"))


def too_many(engine: Engine, roles: Iterable[str]) -> bool:
    """Whether a conversation of messages with these roles has more tokens than the context for certain.

    That goes by what the chat template makes of messages that say nothing. Looks at no more than it must.
    """
    tokenizer = engine.tokenizer
    template = tokenizer.chat_template if tokenizer else None
    if tokenizer is None or template is None or tokenizer.shown_messages is None:
        return False
    # What a user says in a row is one message to Harmony, see mer.api.roles.
    in_a_row = tokenizer.shown_messages == "each"
    in_a_row = in_a_row and not isinstance(OutputFormat.of(template.source).calls, Harmony)
    # Of turns the last may be no token: it is on average that they are.
    room = engine.context if in_a_row else engine.context + 1
    count, before = 0, ""
    for role in roles:
        if role in _COUNTED and (in_a_row or role != before):
            count += 1
            before = role
            if count > room:
                return True
    return False
