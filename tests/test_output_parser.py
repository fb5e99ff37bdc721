"""Answers as reasoning, content and calls: every format, however the text is cut, and what is no call."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import llguidance
import pytest
import tokenizer_models as made
import tool_templates
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_answers import CITIES, TOOLS, accepts, answer, message, parse, said
from transformers import PreTrainedTokenizerFast

from mer.engine.params import SamplingParams
from mer.errors import RequestError
from mer.model.output_parser import Content, OutputFormat, Reasoning, ToolArguments, ToolCall
from mer.model.tokenizer import Tokenizer


@pytest.mark.parametrize("name", tool_templates.ALL)
def test_what_a_template_writes_is_read_back(name: str) -> None:
    template = tool_templates.ALL[name]
    for city in CITIES:
        arguments = {"city": city, "days": 3, "wind": True, "where": [1.5, None] if city else None}
        calls = [("weather", arguments), ("note", {"kind": "b c", "more": {"x": ["</y>", {}]}})]
        given = message(name, calls)
        prompt, text = answer(template, given)
        found = parse(template, text, prompt=prompt)
        expected = [(c["function"]["name"], c["function"]["arguments"]) for c in given["tool_calls"]]
        assert said(found) == (given.get("reasoning_content", ""), given["content"] or "", expected)
        ids = [piece.id for piece in found if isinstance(piece, ToolCall)]
        if name == "kimi":
            assert ids == [call["id"] for call in given["tool_calls"]]
        for cut in range(1, len(text)) if city == CITIES[1] else range(1, len(text), 17):
            assert parse(template, text, [cut], prompt) == found, (cut, text)
        assert parse(template, text, list(range(1, len(text))), prompt) == found


@pytest.mark.parametrize("name", tool_templates.ALL)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_text_cut_anywhere_says_the_same(name: str, data: st.DataObject) -> None:
    """Text made of the format's own tags and pieces of calls, mostly no calls at all."""
    template = tool_templates.ALL[name]
    parts = [
        *OutputFormat.of(template).shown(True),
        '{"name": "note", "arguments": {"kind": "a"}}',
        "note",
        "{",
        "}",
    ]
    parts += [
        "<function=",
        "<parameter=",
        ">",
        '<invoke name="',
        '">',
        '{"a": 1}',
        "[",
        "]",
        ",",
        " ",
        "\n",
        "x",
    ]
    parts += ["functions.note:0", "analysis", "final", " to=functions.note", "```json\n", '"', "\\", "<"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=14)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert parse(template, text, cuts) == parse(template, text)
    tokens = list(itertools.accumulate(map(len, parts)))
    assert parse(template, text, [cut for cut in tokens if cut < len(text)]) == parse(template, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "so <tool_call> not json </tool_call> there"),
        ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": 7, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"nam'),
        ("hermes", "a < b, <tool"),
        ("hermes", '<tool_call>{"name": "weather", "arguments": '),
        ("qwen_coder", "<tool_call>\n<function=we ather>\n</function>\n</tool_call>"),
        ("qwen_coder", "<tool_call>\n<function=weather"),
        ("qwen_coder", '<tool_call>\n{"name": "weather"}\n</tool_call>'),
        ("glm", '<tool_call>{"name": "weather"}</tool_call>'),
        ("minimax", "x\n<minimax:tool_call>\n<foo>\n</minimax:tool_call>"),
        ("mistral", '[TOOL_CALLS] [{"name": "weather"'),
        ("mistral", "[TOOL_CALLS] [7]"),
        ("mistral", "[TOOL_CALLS] weather, please"),
        ("mistral_named", "[TOOL_CALLS]weather[ARGS]now"),
        ("granite", "<|tool_call|>weather"),
        ("gemma", "<|tool_call>weather{}<tool_call|>"),
        ("gemma", '<|tool_call>call:weather{city:<|"|>Bern<|"|>'),
        ("gemma", "<|tool_call>call:weather{city:Bern}<tool_call|>"),
        ("gemma", "<|tool_call>call:weather{city:1}}<tool_call|>"),
        ("gemma", "<|tool_call>call:weather[1]<tool_call|>"),
        ("deepseek_r1", "<｜tool▁calls▁begin｜>weather"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>[1]"),
        ("kimi", "<|tool_calls_section_begin|><|tool_call_begin|>weather<|tool_call_argument_begin|>{}"),
        ("llama", '{"name": "other", "parameters": {}}'),
        ("llama", '{"x": {"y": "}"}} and more'),
        ("llama", "<|python_tag|>print(1)"),
    ],
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    assert parse(tool_templates.ALL[name], text) == [Content(text)]


@pytest.mark.parametrize("name", tool_templates.ALL)
def test_text_without_tags_is_content_at_once(name: str) -> None:
    format = OutputFormat.of(tool_templates.ALL[name])
    parser = format.parser(tools=TOOLS)
    assert parser.push("Hello, ") == [Content("Hello,")]  # white space may belong to a tag
    assert parser.push("world") == [Content(" world")]
    assert parser.finish() == []


def test_without_tools_a_call_is_content() -> None:
    text = "<think>\nx\n</think>\n\n<tool_call>\n{}\n</tool_call>"
    assert parse(tool_templates.HERMES, text, tools=None) == [
        Reasoning("x"),
        Content("<tool_call>\n{}\n</tool_call>"),
    ]


def test_reasoning_ends_with_the_answer_at_the_latest() -> None:
    assert parse(tool_templates.HERMES, "<think>\nso it", tools=None) == [Reasoning("so it")]
    assert parse(tool_templates.DEEPSEEK_R1, "so it", prompt="<｜Assistant｜><think>\n") == [
        Reasoning("so it")
    ]
    # A tag within a text about tags begins nothing.
    assert parse(tool_templates.HERMES, "The tag <think>") == [Content("The tag <think>")]


def test_arguments_are_delivered_as_they_come() -> None:
    parser = OutputFormat.of(tool_templates.HERMES).parser(tools=TOOLS, new_id=lambda: "id")
    assert parser.push('<tool_call>\n{"name": "weather", "arguments": {"city": "Z') == [
        ToolCall(0, "id", "weather"),
        ToolArguments(0, '{"city": "Z'),
    ]
    assert parser.push("ür") == [ToolArguments(0, "ür")]
    parser = OutputFormat.of(tool_templates.QWEN_CODER).parser(tools=TOOLS, new_id=lambda: "id")
    parser.push("<tool_call>\n<function=weather>\n<parameter=city>\n")
    assert parser.push('Zür"') == [ToolArguments(0, 'Zür\\"')]


def test_calls_that_models_write_a_little_differently() -> None:
    calls = [("weather", {"city": "Bern"})]
    body = '{"city": "Bern"}'
    for name, text in [
        ("hermes", '<tool_call>{"arguments": {"city": "Bern"}, "name": "weather"}</tool_call>'),
        (
            "hermes",
            '<tool_call>{"type": "function", "function": {"name": "weather", "arguments": ' + body + "}}",
        ),
        ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Bern\\"}"}</tool_call>'),
        ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {body}\n</tool_call>'),
        ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {body}}}}}\n</tool_call>\n'),
        ("qwen_coder", "<function=weather>\n<parameter=city>\nBern\n</parameter>\n</function>\n</tool_call>"),
        ("glm", "<tool_call>weather<arg_key>city</arg_key><arg_value>Bern</arg_value></tool_call>"),
        ("mistral", f"[TOOL_CALLS]weather{body}"),
        ("mistral", f'[TOOL_CALLS] {{"name": "weather", "arguments": {body}}}'),
        ("mistral_named", f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{body}"),
        ("gemma", '<|tool_call>call:weather {city: <|"|>Bern<|"|>}<tool_call|>'),
        ("gemma", '<|tool_call>call:weather{<|"|>city<|"|>:<|"|>Bern<|"|>}<tool_call|>\n'),
        ("granite", f'<|tool_call|> {{"name": "weather", "arguments": {body}}}<|/tool_call|>'),
        ("llama", f'<|python_tag|>{{"name": "weather", "parameters": {body}}}'),
        ("harmony", f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{body}"),
        ("harmony", f"<|channel|>analysis to=functions.weather code<|message|>{body}<|call|>"),
    ]:
        assert said(parse(tool_templates.ALL[name], text)) == ("", "", calls), text


def test_a_call_without_its_end_before_another() -> None:
    text = '<tool_call>\n{"name": "note", "arguments": {"kind": "a"}}\n'
    calls = [("note", {"kind": "a"})] * 2
    assert said(parse(tool_templates.HERMES, text + text)) == ("", "", calls)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("days", "3", 3),
        ("days", "three", "three"),
        ("days", "true", "true"),  # no integer, so it can only be meant as text
        ("wind", "True", True),  # as templates in Python write it
        ("where", "None", None),
        ("where", "[1, 2.5]", [1, 2.5]),
        ("city", "3", "3"),
        ("other", "3", 3),  # nothing is known of it
        ("other", "x", "x"),
    ],
)
def test_types_of_arguments_between_tags(key: str, text: str, value: Any) -> None:
    for name, call in [
        (
            "qwen_coder",
            f"<tool_call>\n<function=weather>\n<parameter={key}>\n{text}\n</parameter>\n</function>",
        ),
        ("glm", f"<tool_call>weather\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"),
    ]:
        assert said(parse(tool_templates.ALL[name], call)) == ("", "", [("weather", {key: value})])


def test_formats_are_told_apart_and_others_are_refused() -> None:
    found = {name: OutputFormat.of(template).calls for name, template in tool_templates.ALL.items()}
    assert len(set(map(repr, found.values()))) == len(found)
    plain = OutputFormat.of("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert plain == OutputFormat(None, None, False)
    assert parse("", "<think>x</think><tool_call>") == [Content("<think>x</think><tool_call>")]
    with pytest.raises(RequestError, match=r"^tool_choice: ") as caught:
        plain.forced_call(TOOLS, lambda text: None)
    assert caught.value.param == "tool_choice"


def test_tags_around_the_answer_are_none_of_it() -> None:
    """As Hunyuan writes it, however the text is cut; a structure may stand between them."""
    template = tool_templates.HUNYUAN + "{# <answer> </answer> #}"
    thought = "<think>\nSo <answer>\n</think>\n"
    call = '<tool_calls>[{"name": "note", "arguments": {"kind": "</answer>"}}]</tool_calls>'
    for text, content, calls in [
        ("<answer>\nIt rains. a < b\n</answer>", "It rains. a < b", []),
        ("It rains.", "It rains.", []),
        ("<answer>\nLook: " + call + "\n</answer>", "Look:", [("note", {"kind": "</answer>"})]),
    ]:
        for tools in (TOOLS, None) if not calls else (TOOLS,):
            whole = parse(template, thought + text, tools=tools)
            assert said(whole) == ("So <answer>", content, calls)
            for cut in range(1, len(thought + text)):
                assert parse(template, thought + text, [cut], tools=tools) == whole
    grammar = OutputFormat.of(template).structured(lambda lark: lark.text("yes"), lambda text: None)
    for text, right in {
        "yes": 1,
        "<answer>\nyes\n</answer>": 1,
        "<answer>\nno\n</answer>": 0,
        "<answer>": 0,
    }.items():
        assert accepts(grammar, thought.strip() + "\n" + text, llguidance.LLTokenizer("byte")) == bool(
            right
        ), text


def test_special_tokens_of_a_format_reach_the_parser(tmp_path: Path) -> None:
    made.write_json("byte_level", tmp_path)
    tokenizer, oracle = Tokenizer.open(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = oracle.encode("a <|im_start|> b <|im_end|> c", add_special_tokens=False)
    stream = tokenizer.detokenizer([], ("<|im_start|>", "no token"))
    text = "".join(map(stream.push, ids)) + stream.finish()
    assert text == oracle.decode(ids).replace("<|im_end|>", "")
    assert tokenizer.special_id("<|im_end|>") == oracle.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.special_id("<think>") is None  # a token, but an ordinary one
    assert tokenizer.special_id("nothing") is None
    assert SamplingParams(show_special=["<x>"]).show_special == ("<x>",)
    with pytest.raises(RequestError, match="show_special"):
        SamplingParams(show_special=3)
