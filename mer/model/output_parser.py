"""The text of a chat answer as reasoning, content and calls of tools, in the format of the model's family.

What a model was taught to write around them shows in its chat template, so that is what `OutputFormat.of`
looks at. Nothing that may turn out to be the beginning of a tag is delivered, and however the text is cut the
pieces say the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from attrs import frozen

from mer.errors import RequestError
from mer.model.pieces import Content, Piece, Reasoning, ToolArguments, ToolCall
from mer.model.tool_formats import Harmony, Llama, ToolFormat, find
from mer.model.tool_formats.base import ANYTHING, one_call, random_id
from mer.model.tool_formats.lark import Lark
from mer.model.tool_formats.source import Schemas, Source, Steps

__all__ = ["Content", "OutputFormat", "OutputParser", "Piece", "Reasoning", "ToolArguments", "ToolCall"]

_THINKING: Final = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>", "<channel|>"),
)
_ANSWER: Final = ("<answer>", "</answer>")
_CHANNEL: Final = "thought\n"  # the name of Gemma-4's, behind the tag
_TOOLS: Final = re.compile(r"\btools\b")
SPACE: Final = r"/\n{0,2}/"  # between the end of the reasoning and the answer
_Thinking = tuple[str, str]


def _find_thinking(template: str) -> _Thinking | None:
    return next((tags for tags in _THINKING if tags[1] in template), None)


@frozen
class OutputFormat:
    """What a model's answers look like.

    calls: the format of calls of tools; None when it is not known. thinking: the tags around reasoning; None
    when there are none. takes_tools: the chat template shows tools to the model. answer: tags around what is
    not reasoning (Hunyuan); none or two.
    """

    calls: ToolFormat | None = None
    thinking: _Thinking | None = None
    takes_tools: bool = False
    answer: tuple[str, ...] = ()

    @classmethod
    def of(cls, template: str) -> OutputFormat:
        """By the source of a chat template."""
        calls = find(template)
        thinking = None if isinstance(calls, Harmony) else _find_thinking(template)
        answer = _ANSWER if thinking and all(tag in template for tag in _ANSWER) else ()
        return cls(calls, thinking, bool(_TOOLS.search(template)), answer)

    def parser(
        self,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> OutputParser:
        """For one answer.

        prompt: its prompt, or the end of it: templates may open the reasoning there. tools: those that may be
        called, as in OpenAI's API; None or none: what looks like a call is content. new_id: makes the ids of
        calls; default: random ones of the family's form.
        """
        return OutputParser(self, prompt, tools, new_id)

    def forced_call(
        self,
        tools: Sequence[Mapping[str, Any]],
        special: Callable[[str], int | None],
        *,
        prompt: str = "",
        several: bool = False,
    ) -> str:
        """A Lark grammar of answers that call these tools (and say nothing else): reasoning, then calls.

        special: the token id of a text that is one special token, else None. several: more than one call is
        allowed. Raises RequestError ("tool_choice") when the format is not known.
        """
        if self.calls is None:
            raise RequestError(
                "tool_choice: how this model writes calls of tools is not known (its chat template shows "
                "none of the known formats), so they can't be forced; use 'auto' or 'none'",
                "tool_choice",
            )
        lark = Lark(special)
        calls = self._calls(lark, self.calls, tools, several)
        return lark.grammar(f"{self._thought(lark, prompt)} {calls}")

    def strict_calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        special: Callable[[str], int | None],
        *,
        prompt: str = "",
        several: bool = False,
    ) -> str:
        """A Lark grammar of answers that say anything, but where a call that is begun is one of these tools,
        with arguments of its schema if it is strict. Raises RequestError as `check_strict` does, and
        ("tool_choice") where the format is not known.
        """
        self.check_strict(tools)
        if self.calls is None:
            raise RequestError(
                "tool_choice: how this model writes calls of tools is not known (its chat template shows "
                "none of the known formats), so that they can't be held to some tools; allow all of them",
                "tool_choice",
            )
        lark = Lark(special)
        held = [tool if is_strict(tool) else _free(tool) for tool in tools]
        answer = self.calls.mixed(lark, _schemas(held), several)
        thought = "" if isinstance(self.calls, Harmony) else self._thought(lark, prompt)
        return lark.grammar(f"{thought} {answer}")

    def check_strict(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Raises RequestError ("tools") where one of them is strict and the format of calls is not known."""
        if self.calls is None and any(map(is_strict, tools)):
            raise RequestError(
                "tools: how this model writes calls of tools is not known (its chat template shows none of "
                "the known formats), so that 'strict' can't be obeyed; leave it out",
                "tools",
            )

    def structured(
        self,
        body: Callable[[Lark], str],
        special: Callable[[str], int | None],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        prompt: str = "",
        several: bool = False,
    ) -> str:
        """A Lark grammar of answers whose content is `body`: reasoning, then that or calls of these tools.

        Raises RequestError ("tools") for a format in which a call could be either.
        """
        lark = Lark(special)
        expression = body(lark)
        if self.answer:
            begin, end = map(lark.tag, self.answer)
            expression = f"({begin} {SPACE})? {expression} ({SPACE} {end})?"
        if isinstance(self.calls, Harmony):
            expression = self.calls.final(lark, expression)
        if tools and isinstance(self.calls, Llama):
            raise RequestError(
                "tools: this model's calls are plain JSON, so that they can't be combined with an answer of "
                "a given form",
                "tools",
            )
        if tools and self.calls is not None:
            expression = f"({expression} | {self._calls(lark, self.calls, tools, several)})"
        return lark.grammar(f"{self._thought(lark, prompt)} {expression}")

    def shown(self, tools: bool) -> tuple[str, ...]:
        """Tags that the parser must see even where they are special tokens: `SamplingParams.show_special`."""
        calls = self.calls if tools or isinstance(self.calls, Harmony) else None
        return (*(calls.markers if calls else ()), *(self.thinking or ()), *self.answer)

    def plain(self, prompt: str = "") -> bool:
        """Whether an answer is content from its first character on, so that a structure needs no frame."""
        return not isinstance(self.calls, Harmony) and not self._may_think(prompt)

    def _calls(
        self, lark: Lark, format: ToolFormat, tools: Sequence[Mapping[str, Any]], several: bool
    ) -> str:
        calls = format.calls(lark, one_call(lark, format, _schemas(tools)), several)
        return f"{lark.tag(format.opener)} {calls}" if format.opener else calls

    def begins(self, prompt: str) -> bool:
        """The prompt opened the reasoning."""
        return self.thinking is not None and prompt.rstrip().endswith(self.thinking[0])

    def _may_think(self, prompt: str) -> bool:
        return self.thinking is not None and not prompt.rstrip().endswith(self.thinking[1])

    def _thought(self, lark: Lark, prompt: str) -> str:
        if isinstance(self.calls, Harmony):
            return self.calls.thought(lark)
        if self.thinking is None or not self._may_think(prompt):
            return ""
        begin, end = self.thinking
        rest = f"{lark.before(end)} {SPACE}"
        return rest if self.begins(prompt) else f"({lark.tag(begin)} {rest})?"


class OutputParser:
    """Reads one answer as it comes."""

    def __init__(
        self,
        format: OutputFormat,
        prompt: str,
        tools: Sequence[Mapping[str, Any]] | None,
        new_id: Callable[[], str] | None,
    ) -> None:
        """As `OutputFormat.parser`."""
        calls = format.calls
        self._source = Source(_schemas(tools or ()), new_id or (calls.new_id if calls else random_id))
        self._steps = _read(self._source, format, format.begins(prompt), bool(tools))

    def push(self, text: str) -> list[Piece]:
        """What is certain once this text is there."""
        return self._go(text, ended=False)

    def finish(self) -> list[Piece]:
        """The rest: the answer is complete."""
        return self._go("", ended=True)

    def _go(self, text: str, *, ended: bool) -> list[Piece]:
        self._source.feed(text, ended=ended)
        next(self._steps, None)
        return self._source.pieces()


def _schemas(tools: Iterable[Mapping[str, Any]]) -> Schemas:
    functions = [tool.get("function", tool) for tool in tools]
    return {each["name"]: each.get("parameters") or {} for each in functions}


def is_strict(tool: Mapping[str, Any]) -> bool:
    return tool.get("function", tool).get("strict") is True


def _free(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same tool with arguments that may be anything."""
    return {"name": tool.get("function", tool)["name"], "parameters": ANYTHING}


def _read(source: Source, format: OutputFormat, thinks: bool, tools: bool) -> Steps[None]:
    if isinstance(format.calls, Harmony):
        yield from format.calls.read(source)
        return
    if format.thinking is not None:
        begin, end = format.thinking
        if not thinks:
            thinks = yield from _opens(source, begin)
        if thinks:
            yield from source.space()
            if begin == "<|channel>":
                yield from source.starts(_CHANNEL)
                yield from source.space()
            if not (yield from source.until((end,), source.reasoning)):
                return
            yield from source.space()
    source.frame = format.answer
    if format.calls is not None and tools:
        yield from format.calls.read(source)
    elif source.frame:
        yield from source.until((), source.content)
    while source.text or (yield from source.more()):
        source.content(source.take(len(source.text)))


def _opens(source: Source, tag: str) -> Steps[bool]:
    """Whether the answer begins with this tag, perhaps behind white space; both are taken then."""
    while True:
        text = source.text.lstrip()
        if text.startswith(tag):
            source.text = text[len(tag) :]
            return True
        if not tag.startswith(text) or not (yield from source.more()):
            return False
