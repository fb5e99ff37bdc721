"""Calls of earlier answers whose arguments are no JSON object, so that only their text can be shown.

Models write such when an answer is cut short, and clients send it back. A template gets a mark in place of
the text, and the mark is exchanged in what it made: so the model sees what it wrote, whether the template
writes a text as it is or as JSON.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final

from mer.errors import RequestError

# Templates that write arguments one by one have no place for a text: they get it as this one.
ARGUMENT: Final = "INVALID_JSON"

Messages = list[dict[str, Any]]
_Write = Callable[[str], Any]


def render(messages: Messages, template: Callable[[Messages], str]) -> str:
    """What `template` makes of them; raises what it raises."""
    mark, texts = secrets.token_hex(16), []

    def marked(text: str) -> str:
        texts.append(text)
        return f"{mark}.{len(texts) - 1}."

    messages_marked = _with_texts(messages, marked)
    if not texts:
        return template(messages)
    try:
        made = template(messages_marked)
    except RequestError:  # perhaps since a text has no names and values
        made = ""
    if mark not in made:
        return template(_with_texts(messages, lambda text: {ARGUMENT: text}))
    place = rf"{mark}\.(\d+)\."
    return re.sub(f'"{place}"|{place}', lambda found: texts[int(found[1] or found[2])], made)


def _with_texts(messages: Messages, write: _Write) -> Messages:
    """The same with `write(text)` for arguments that are a text."""
    return [
        {**message, "tool_calls": [_with_text(call, write) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _with_text(call: Any, write: _Write) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(text := function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": write(text)}}
