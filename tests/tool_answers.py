"""Tools, answers that call them as templates write these, and what a parser makes of a text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import attrs
import llguidance
import tool_templates

from mer.model.chat import ChatTemplate
from mer.model.output_parser import Content, OutputFormat, Piece, Reasoning, ToolArguments, ToolCall

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "wind": {"type": "boolean"},
                "where": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "number"}}]},
            },
            "required": ["city"],
        },
    },
}
NOTE = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {"kind": {"type": "string", "enum": ["a", "b c"]}, "more": {"type": "object"}},
            "required": ["kind"],
        },
    },
}
TOOLS = [WEATHER, NOTE]
# Things that look like JSON, tags or the end of something, inside of arguments.
CITIES = ["Zürich", 'a "b" \\ {c} [d', "line\nbreak\n", "5", "true", "", " x ", "天気 🙂", "</tool", "<end>"]


def parse(
    template: str, text: str, cuts: list[int] | None = None, prompt: str = "", tools: Any = TOOLS
) -> list[Piece]:
    """The pieces of an answer that comes in these pieces, joined."""
    ids = itertools.count()
    parser = OutputFormat.of(template).parser(prompt, tools, lambda: f"id{next(ids)}")
    edges = [0, *sorted(cuts or []), len(text)]
    pieces = [piece for a, b in itertools.pairwise(edges) for piece in parser.push(text[a:b])]
    joined: list[Piece] = []
    for piece in pieces + parser.finish():
        last = joined[-1] if joined else None
        same = type(piece) is type(last) and not isinstance(piece, ToolCall)
        if same and getattr(piece, "index", 0) == getattr(last, "index", 0):
            joined[-1] = attrs.evolve(last, text=last.text + piece.text)
        else:
            joined.append(piece)
    return joined


def answer(template: str, message: dict[str, Any]) -> tuple[str, str]:
    """Prompt and text of this answer, as the template writes it."""
    render = ChatTemplate(Path("chat_template.jinja"), {"default": template}, {}).render
    question = {"role": "user", "content": "?"}
    prompt = render([question], tools=TOOLS, add_generation_prompt=True)
    whole = render([question, message], tools=TOOLS, add_generation_prompt=False)
    assert whole.startswith(prompt)
    text = whole.removeprefix(prompt)
    for end in (
        "<|im_end|>\n",
        "<|im_end|>",
        "<|eot_id|>",
        "<|call|>",
        "<|return|>",
        "<turn|>\n",
    ):  # the end token is not text
        text = text.removesuffix(end)
    return prompt, text


def message(name: str, calls: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """An answer with all that this family's template can say."""
    made: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": []}
    if name in tool_templates.ONE_CALL:
        calls = calls[:1]
    if name not in tool_templates.ONLY_CALLS:
        made["content"] = "I look it up."
    if name not in tool_templates.NO_REASONING:
        made["reasoning_content"] = "Rain? {\n  So <b>"
    for i, (function, arguments) in enumerate(calls):
        id = f"functions.{function}:{i}" if name == "kimi" else f"idididid{i}"
        function_call = {"name": function, "arguments": arguments}
        made["tool_calls"].append({"id": id, "type": "function", "function": function_call})
    return made


def said(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, Any]]]:
    """Reasoning, content and calls."""
    texts = {kind: "".join(p.text for p in pieces if isinstance(p, kind)) for kind in (Reasoning, Content)}
    calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
    assert [call.index for call in calls] == list(range(len(calls)))
    arguments = {
        i: "".join(p.text for p in pieces if isinstance(p, ToolArguments) and p.index == i)
        for i in range(len(calls))
    }
    return (
        texts[Reasoning],
        texts[Content],
        [(call.name, json.loads(arguments[call.index])) for call in calls],
    )


def accepts(grammar: str, text: str, vocabulary: llguidance.LLTokenizer) -> bool:
    matcher = llguidance.LLMatcher(vocabulary, llguidance.grammar_from("grammar", grammar))
    assert not matcher.is_error(), (matcher.get_error(), grammar)
    tokens = vocabulary.tokenize_str(text)
    return matcher.consume_tokens(tokens) and matcher.is_accepting() and not matcher.is_error()
