"""Chat templates against transformers' apply_chat_template; templates that attack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_templates
import pytest
import tokenizer_models as made
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mer.errors import CheckpointError, RequestError
from mer.model.chat import ChatTemplate
from mer.model.tokenizer import Tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Today\'s weather <here> & "there": 天気 🙂',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
HELLO = {"role": "user", "content": "Hello\n  <|im_end|> there "}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [HELLO],
    "system": [{"role": "system", "content": "Be brief. "}, HELLO],
    "turns": [
        HELLO,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi."},
        {"role": "user", "content": "Weather?"},
    ],
    "nulls": [HELLO, {"role": "assistant", "content": "Hi.", "tool_calls": None, "name": None}],
    "reasoning": [HELLO, {"role": "assistant", "content": "Hi.", "reasoning": "because"}],
    "tool": [
        HELLO,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "wet\n"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}],
    "wrong order": [HELLO, HELLO],
    "two calls": [HELLO, {"role": "assistant", "tool_calls": [CALL, CALL]}],
}


class Pair:
    def __init__(self, path: Path) -> None:
        self.ours = Tokenizer.open(path)
        self.oracle = PreTrainedTokenizerFast.from_pretrained(path)

    def check(self, messages: list[dict[str, Any]], **options: Any) -> str | None:
        """Render with both; None when both refuse."""
        try:
            expected = self.oracle.apply_chat_template(messages, tokenize=False, **options)
        except Exception:
            with pytest.raises(RequestError, match=r"^messages: ") as caught:
                self.ours.chat_template.render(messages, **options)
            assert caught.value.param == "messages"
            return None
        text = self.ours.chat_template.render(messages, **options)
        assert text == expected
        ids = self.oracle.apply_chat_template(messages, return_dict=False, **options)
        assert self.ours.encode(text, special=False) == ids
        return text


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    found = {}
    for name, template in chat_templates.ALL.items():
        path = made.write_json("byte_level", tmp_path_factory.mktemp(name))
        (path / "chat_template.jinja").write_text(template)
        found[name] = Pair(path)
    return found


@pytest.mark.parametrize("name", chat_templates.ALL)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, [], [TOOL, TOOL]], ids=["none", "empty", "tools"])
def test_rendered_as_transformers_does(
    pairs: dict[str, Pair], name: str, chat: str, tools: list[dict[str, Any]] | None
) -> None:
    for prompt in True, False:
        pairs[name].check(CHATS[chat], tools=tools, add_generation_prompt=prompt)


def test_the_comparison_is_of_texts(pairs: dict[str, Pair]) -> None:
    """Which of these chats each template takes, so that not all are compared by their refusal."""
    taken = {
        name: [chat for chat, messages in CHATS.items() if pair.check(messages, add_generation_prompt=True)]
        for name, pair in pairs.items()
    }
    assert {name: len(chats) for name, chats in taken.items()} == {
        "mixtral": 5, "qwen": 9, "deepseek": 8, "llama": 8, "plain": 9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("qwen", {"enable_thinking": False}),
        ("llama", {"date_string": "26 Jul 2024"}),
        ("llama", {"custom_tools": [TOOL]}),
        ("mixtral", {"bos_token": "<begin>"}),
        ("plain", {"documents": [{"title": "a", "text": "b"}]}),
    ],
)
def test_extra_variables(pairs: dict[str, Pair], name: str, extra: dict[str, Any]) -> None:
    pair = pairs[name]
    assert pair.check([HELLO], add_generation_prompt=True, **extra) != pair.check(
        [HELLO], add_generation_prompt=True
    )


_TEXT = st.text(max_size=12)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": _TEXT},
    optional={"reasoning_content": _TEXT | st.none(), "tool_calls": st.lists(st.just(CALL), max_size=2)},
)


@pytest.mark.parametrize("name", chat_templates.ALL)
@given(messages=st.lists(_MESSAGE, min_size=1, max_size=5), prompt=st.booleans())
def test_any_messages(
    pairs: dict[str, Pair], name: str, messages: list[dict[str, Any]], prompt: bool
) -> None:
    pairs[name].check(messages, add_generation_prompt=prompt)


def test_the_template_says_why_it_refuses(pairs: dict[str, Pair]) -> None:
    with pytest.raises(RequestError, match="Roles must alternate user/assistant"):
        pairs["mixtral"].ours.chat_template.render([HELLO, HELLO])


@pytest.mark.parametrize("messages", [[], ["hello"], [None]])
def test_messages_that_are_none(pairs: dict[str, Pair], messages: list[Any]) -> None:
    with pytest.raises(RequestError, match=r"^messages: ") as caught:
        pairs["plain"].ours.chat_template.render(messages)
    assert caught.value.param == "messages"


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]


@pytest.mark.parametrize(
    ("files", "plain", "tools"),
    [
        ({"tokenizer_config.json": "config"}, "config", "config"),
        ({"tokenizer_config.json": NAMED}, "plain", "with tools"),
        ({"tokenizer_config.json": NAMED[:1]}, "plain", "plain"),
        ({"chat_template.jinja": "jinja", "tokenizer_config.json": "config"}, "jinja", "jinja"),
        ({"chat_template.jinja": "jinja", "tokenizer_config.json": NAMED}, "jinja", "jinja"),
    ],
)
def test_where_the_template_stands(tmp_path: Path, files: dict[str, Any], plain: str, tools: str) -> None:
    made.write_json("byte_level", tmp_path)
    for name, template in files.items():
        (tmp_path / name).write_text(
            template if name.endswith(".jinja") else json.dumps({"chat_template": template})
        )
    pair = Pair(tmp_path)
    assert pair.check([HELLO]) == plain
    assert pair.check([HELLO], tools=[TOOL]) == tools


def test_the_older_file_of_a_processor_comes_last(tmp_path: Path) -> None:
    # transformers reads it with the processor of a multimodal model, not with the tokenizer.
    made.write_json("byte_level", tmp_path)
    assert Tokenizer.open(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ bos_token }} older"}')
    assert Tokenizer.open(tmp_path).chat_template.render([HELLO]) == "<s> older"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config"}')
    assert Tokenizer.open(tmp_path).chat_template.render([HELLO]) == "config"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "a\n{% for x %}", r"chat_template\.jinja: .*is broken, line 2.*fetch"),
        ("chat_template.jinja", "{% nonsense %}", r"chat_template\.jinja: .*unknown tag 'nonsense'"),
        ("chat_template.jinja", "{{ 1 | nonsense }}", r"chat_template\.jinja: .*No filter named 'nonsense'"),
        ("chat_template.jinja", "{% for a in b %}" * 30 + "{% endfor %}" * 30, "too many statically nested"),
        ("chat_template.jinja", "{% generation %}", r"chat_template\.jinja: .*is broken"),
        ("chat_template.jinja", "(" * 3 + "{{" + "(" * 5000, r"chat_template\.jinja: .*is broken"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', r"tokenizer_config\.json: .*is broken"),
        ("tokenizer_config.json", '{"chat_template": 3}', "must be a string or a list"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "must be a string or a list"),
        ("chat_template.json", "nothing", r"chat_template\.json: is not valid JSON"),
    ],
)
def test_a_broken_template(tmp_path: Path, name: str, content: str, message: str) -> None:
    made.write_json("byte_level", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.open(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    made.write_json("byte_level", tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ '\xff' }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is not UTF-8"):
        Tokenizer.open(tmp_path)


def test_no_default_template(tmp_path: Path) -> None:
    made.write_json("byte_level", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": NAMED[1:]}))
    template = Tokenizer.open(tmp_path).chat_template
    assert template.render([HELLO], tools=[TOOL]) == "with tools"
    with pytest.raises(CheckpointError, match="no chat template 'default', only 'tool_use'"):
        template.render([HELLO])


def render(template: str) -> str:
    return ChatTemplate(Path("chat_template.jinja"), {"default": template}, {}).render([HELLO])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ (messages|first).__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ dict.__init__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{m.__class__}'.format_map({'m': messages}) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ dict.update(messages[0], role='x') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ range(100001) | list }}",
        "{% for x in range(1000000000) %}{% endfor %}",
        "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}",
        "{% for x in range(99999) %}{% for y in range(99999) if y < 0 %}{% endfor %}{% endfor %}",
        "{% set s = 'a' * 99999 %}{% for x in s %}{% for y in s %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(a='a') %}{% for x in range(40) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * [0] }}",
        "{{ 10 ** 1000000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ missing.attribute }}",
        "{{ 1 / 0 }}",
    ],
)
def test_attacks_are_refused(template: str) -> None:
    # jinja's sandbox makes some forbidden attributes undefined, which prints as nothing.
    if refusal(template) is None:
        assert render(template) == ""


def refusal(template: str) -> RequestError | None:
    try:
        render(template)
    except RequestError as error:
        return error
    return None


def test_a_refusal_says_what_is_not_allowed() -> None:
    for template, why in {
        "{{ ''.__class__.__mro__ }}": "access to attribute '__class__'",
        "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}": "turns of loops",
        "{{ 'a' * 1000000000 }}": "a value of 1000000000",
        "{{ range(100001) | list }}": "Range too big",
    }.items():
        error = refusal(template)
        assert error is not None
        assert error.param == "messages"
        assert str(error).startswith("messages: the model's chat template ")
        assert why in str(error)


def test_forbidden_attributes_give_nothing_away() -> None:
    assert render("{{ ''.__class__ is defined }}") == "False"
    assert render("{{ dict.__class__ is defined or strftime_now.__globals__ is defined }}") == "False"


def test_loops_within_the_bounds() -> None:
    assert render("{% for x in range(300) %}{% for y in range(300) %}{% endfor %}{% endfor %}done") == "done"
    template = "{% for a in [[1, [2]], 3] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}"
    assert render(template) == "123"


def test_rendering_leaves_the_messages_alone(pairs: dict[str, Pair]) -> None:
    messages = [dict(HELLO, name=None, reasoning="x")]
    before = json.dumps(messages)
    pairs["qwen"].ours.chat_template.render(messages)
    assert json.dumps(messages) == before
