"""Grammars of calls: they take what templates write, and what they take is read as a call."""

from __future__ import annotations

import re
from typing import Any

import llguidance
import numpy as np
import pytest
import tool_templates
from tool_answers import NOTE, TOOLS, WEATHER, accepts, answer, message, parse, said

from mer.errors import RequestError
from mer.model.output_parser import OutputFormat


@pytest.mark.parametrize("name", tool_templates.ALL)
def test_a_forced_call_is_what_the_template_writes(name: str) -> None:
    """The grammar takes the family's own text and no other: no prose, no other tool, no missing argument."""
    template = tool_templates.ALL[name]
    format, bytes_ = OutputFormat.of(template), llguidance.LLTokenizer("byte")
    calls = [("weather", {"city": "Zürich", "days": 3}), ("note", {"kind": "b c"})]
    given = message(name, calls) | {"content": None}
    prompt, text = answer(template, given)
    text = re.sub(r"</think>\n+", "</think>\n\n", text.lstrip("\n"))  # white space between the parts
    text = re.sub(r', "id": "idididid."', "", text)
    if name == "harmony":
        text = (
            text.replace(
                "<|start|>assistant to=functions.weather<|channel|>commentary json",
                "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json",
            )
            + "<|call|>"
        )
    special = lambda text: None  # noqa: E731
    grammar = format.forced_call(TOOLS, special, prompt=prompt, several=True)
    assert accepts(grammar, text, bytes_), (text, grammar)
    assert not accepts(grammar, "Hello", bytes_)
    assert not accepts(grammar, text.replace("weather", "whether"), bytes_)
    assert not accepts(grammar, text.replace("city", "town"), bytes_)
    one = format.forced_call([WEATHER], special, prompt=prompt)
    assert accepts(one, text, bytes_) == (len(given["tool_calls"]) == 1)


MEANT = {"city": "Zürich", "days": 3}
FORGETFUL = {"qwen_coder", "minimax", "deepseek_v32", "deepseek_v4"}


def test_a_strict_tool_of_a_format_that_is_not_known_is_refused() -> None:
    strict = {"function": {**WEATHER["function"], "strict": True}}
    format = OutputFormat.of("{{ tools | tojson }}{{ messages[0].content }}")
    with pytest.raises(RequestError, match="'strict' can't be obeyed") as caught:
        format.strict_calls([strict], lambda text: None)
    assert caught.value.param == "tools"
    format.check_strict(TOOLS)


@pytest.mark.parametrize("name", tool_templates.ALL)
def test_what_is_said_before_a_strict_call_is_free(name: str) -> None:
    """The family's own answer, prose and all; arguments of a strict tool are of its schema, others free."""
    format, bytes_ = OutputFormat.of(tool_templates.ALL[name]), llguidance.LLTokenizer("byte")
    closed = {**WEATHER["function"]["parameters"], "additionalProperties": False}
    strict = {"function": {**WEATHER["function"], "parameters": closed, "strict": True}}

    def written(arguments: dict[str, Any], tool: str = "weather") -> tuple[str, str]:
        prompt, text = answer(tool_templates.ALL[name], message(name, [(tool, arguments)]))
        text = re.sub(r"</think>\n+", "</think>\n\n", text.lstrip("\n"))
        text = re.sub(r', "id": "idididid."', "", text)
        if name == "harmony":
            for each in "weather", "note":
                text = text.replace(
                    f"<|start|>assistant to=functions.{each}<|channel|>commentary json",
                    f"<|start|>assistant<|channel|>commentary to=functions.{each} <|constrain|>json",
                )
            text += "<|call|>"
        return prompt, text

    prompt, good = written(MEANT)
    grammar = format.strict_calls([strict, NOTE], lambda text: None, prompt=prompt)
    assert grammar is not None

    def takes(text: str) -> bool:
        return accepts(grammar, text, bytes_)

    final = "<|channel|>final<|message|>" if name == "harmony" else ""
    thought = good.partition("</think>")[0] + "</think>\n\n" if "</think>" in good else ""
    for text in "Hello", 'Nothing <tool_ or [TOOL {"a": 1} |>', "":
        assert takes(thought + final + text), text
    assert takes(good), (good, grammar)
    for bad in (
        good.replace("days", "weeks"),
        good.replace("city", "town"),
        good.replace("weather", "whether"),
    ):
        assert bad != good
        assert not takes(bad), bad
    for free in {"kind": "x y"}, {"other": [1, {"a": None}]}, {}:
        text = written(free, "note")[1]
        assert takes(text), (text, grammar)
    if name in FORGETFUL:  # models may forget the outer tag, and the parser reads that, too
        tags = OutputFormat.of(tool_templates.ALL[name]).calls
        bare = thought + "So: " + good[good.index(tags.head) : good.index(tags.call_end)] + tags.call_end
        for text in bare, bare + "\n" + tags.end:
            assert takes(text), (text, grammar)
            assert said(parse(tool_templates.ALL[name], text, prompt=prompt))[2] == [("weather", MEANT)]
            assert not takes(text.replace("days", "weeks"))
            assert not takes(text.replace("weather", "whether"))


@pytest.mark.parametrize("name", sorted(set(tool_templates.ALL) - {"harmony"}))  # it may think for ever
def test_any_forced_call_is_read_as_one(name: str) -> None:
    """Random text within the grammar; no free text in it, which would hardly ever end."""
    random = np.random.default_rng(3)
    format, vocabulary = OutputFormat.of(tool_templates.ALL[name]), llguidance.LLTokenizer("byte")
    schema = {
        "type": "object",
        "properties": {
            "kind": {"type": "string", "enum": ["a", "b c"]},
            "on": {"type": "boolean"},
            "list": {"type": "array", "items": {"enum": [1, "x", None]}, "maxItems": 3},
        },
        "required": ["kind", "list"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("f", "g")]
    grammar = format.forced_call(
        tools, lambda text: None, prompt=format.thinking[1] if format.thinking else ""
    )
    for _ in range(4):
        matcher = llguidance.LLMatcher(vocabulary, llguidance.grammar_from("grammar", grammar))
        text = bytearray()
        while not matcher.is_stopped():
            mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = np.flatnonzero(mask[: vocabulary.vocab_size])
            token = int(random.choice(allowed))
            if token == vocabulary.eos_token:
                break
            assert matcher.consume_token(token)
            text.append(token)
        _, content, calls = said(parse(tool_templates.ALL[name], text.decode(), tools=tools))
        assert content == ""
        assert [call[0] for call in calls] in (["f"], ["g"])
        assert {"kind", "list"} <= set(calls[0][1]) <= {"kind", "list", "on"}
        assert calls[0][1]["kind"] in ("a", "b c")
        assert all(each in (1, "x", None) for each in calls[0][1]["list"])
