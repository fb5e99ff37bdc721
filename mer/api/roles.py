"""Conversations whose system messages stand where a model's chat template knows none.

Coding agents send several of them, also behind the first answer. Some templates refuse that, GPT-OSS's leaves
them out without a word.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

Message = dict[str, Any]


def folded(messages: list[Message]) -> list[Message]:
    """The system messages at the beginning as one; later ones as the user's, in tags that say what they are.

    What the user says in a row is one message then: some templates insist that user and assistant alternate.
    """
    made: list[Message] = []
    for role, group in groupby(messages, key=lambda message: message.get("role")):
        several = list(group)
        if role == "system" and made:
            role, several = "user", [_told(message) for message in several]
        if role not in ("system", "user"):
            made += several
        elif made and made[-1].get("role") == role:
            made[-1] = _joined([made[-1], *several])
        else:
            made.append(_joined(several))
    return made


def _told(message: Message) -> Message:
    return {"role": "user", "content": f"<system>\n{message['content']}\n</system>"}


def _joined(messages: list[Message]) -> Message:
    if len(messages) == 1:
        return messages[0]
    return {**messages[0], "content": "\n\n".join(str(message["content"]) for message in messages)}
