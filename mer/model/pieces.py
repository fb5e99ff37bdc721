"""What an answer is made of: text, reasoning and calls of tools, each as it comes."""

from __future__ import annotations

from attrs import frozen


@frozen
class Content:
    """Text for the reader."""

    text: str


@frozen
class Reasoning:
    """What the model thought before it answered."""

    text: str


@frozen
class ToolCall:
    """A call begins: the index-th of the answer, from 0."""

    index: int
    id: str
    name: str


@frozen
class ToolArguments:
    """More of the arguments of call `index`: together they are one JSON object, if the model wrote one."""

    index: int
    text: str


Piece = Content | Reasoning | ToolCall | ToolArguments
