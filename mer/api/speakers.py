"""What a conversation has of tokens at the least, told by who speaks: before a message of it is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from attrs import frozen

from mer.engine.engine import Engine
from mer.errors import TooLongError
from mer.model.output_parser import OutputFormat
from mer.model.tool_formats import Harmony

# Other messages may be left out by templates, or become part of their neighbours.
_COUNTED: Final = frozenset(("user", "assistant"))


@frozen
class Speakers:
    """messages: of users and assistants. turns: of these, the first one and those behind the other's."""

    messages: int
    turns: int

    @classmethod
    def of(cls, roles: Iterable[str]) -> Speakers:
        """Of a conversation of messages with these roles."""
        messages = turns = 0
        before = ""
        for role in roles:
            if role in _COUNTED:
                messages += 1
                turns += role != before
                before = role
        return cls(messages, turns)

    def least(self, engine: Engine) -> int:
        """Tokens that such a conversation has at the least; 0 where the chat template leaves that open."""
        template = engine.tokenizer.chat_template if engine.tokenizer else None
        if engine.tokenizer is None or template is None:
            return 0
        shown = engine.tokenizer.shown_messages
        # What a user says in a row is one message to it, see mer.api.roles.
        if shown == "each" and not isinstance(OutputFormat.of(template.source).calls, Harmony):
            return self.messages
        return 0 if shown is None else max(0, self.turns - 1)

    def check(self, engine: Engine) -> None:
        """Raises TooLongError for more than can have room in the engine's context."""
        least = self.least(engine)
        if least > engine.context:
            raise TooLongError(
                f"the conversation has {self.messages} messages, at least {least} tokens; "
                f"{engine.context} is the most here",
                None,
            )
