"""The chat template of a model: messages to the text of a prompt."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mer.errors import CheckpointError, RequestError
from mer.model import raw_arguments
from mer.model.settings import Folder, Text, read_optional, read_text

# Templates come with the weights, from strangers. One rendering may take this many turns of loops, and make
# no string or list longer than this by arithmetic.
MAX_STEPS: Final = 5_000_000
MAX_SIZE: Final = 50_000_000
# Names that a message's reasoning goes by; templates read the first, gpt-oss's the second.
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")

_steps: ContextVar[Iterator[int]] = ContextVar("steps")


class ChatTemplate:
    """The template(s) of one model, in the environment that transformers gives them, sandboxed."""

    @classmethod
    def open(cls, path: Folder, config: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
        """The template of the model in directory `path`; None when it has none.

        chat_template.jinja goes before tokenizer_config.json (`config`), that before chat_template.json.
        special: named special tokens, which templates may use. Raises CheckpointError.
        """
        jinja, config_file, older = (
            path / name for name in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
        )
        for file, template in (
            (jinja, read_text(jinja)),
            (config_file, config.get("chat_template")),
            (older, read_optional(older).get("chat_template")),
        ):
            if template is not None:
                return cls(file, _by_name(file, template), special)
        return None

    def __init__(self, file: Path | Text, templates: Mapping[str, str], special: Mapping[str, str]) -> None:
        """templates: source by name; 'tool_use' is taken when there are tools, else 'default'.

        `sources`: the same; `source`: the text of all of them.
        """
        self._file = file
        self.sources = templates
        self._special = special
        self.source = "\n".join(templates.values())
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in templates.items():
            try:
                self._templates[name] = environment.from_string(source)
            except Exception as error:  # jinja's own, or Python's about the code that jinja writes
                line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
                raise CheckpointError(
                    f"{file}: the chat template {name!r} is broken{line}: {error}; fetch the file again"
                ) from error

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt for these messages, special tokens written out: encode it with special=False.

        Arguments of calls are objects; a text is written as it stands, see `raw_arguments`. extra: further
        variables of the template. Raises RequestError ("messages") when the template refuses the messages, or
        does what the sandbox forbids.
        """
        if not messages:
            raise RequestError("messages: at least one message is needed", "messages")
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise CheckpointError(
                f"{self._file}: has no chat template 'default', only {', '.join(map(repr, self._templates))}"
            )
        variables = {
            **self._special,
            "documents": None,
            **extra,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        given = [_message(message) for message in messages]
        return raw_arguments.render(given, lambda each: _rendered(template, each, variables))


def _rendered(template: jinja2.Template, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    token = _steps.set(itertools.count(1))
    try:
        return template.render(variables, messages=messages)
    except SecurityError as error:
        raise RequestError(
            f"messages: the model's chat template does what is not allowed: {error}", "messages"
        ) from error
    except Exception as error:  # a template can raise whatever Python does
        raise RequestError(
            f"messages: the model's chat template refuses them: {error or type(error).__name__}",
            "messages",
        ) from error
    finally:
        _steps.reset(token)


def _by_name(file: Path | Text, given: Any) -> dict[str, str]:
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list) and all(
        isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("template"), str)
        for each in given
    ):
        return {each["name"]: each["template"] for each in given}
    raise CheckpointError(
        f"{file}: chat_template must be a string or a list of {{name, template}}; fetch the file again"
    )


def _message(message: Any) -> dict[str, Any]:
    """A message as templates expect it: no nulls (many print "None"), reasoning under its usual name."""
    if not isinstance(message, Mapping):
        raise RequestError(f"messages: each must be an object, not {type(message).__name__}", "messages")
    given = {key: value for key, value in message.items() if value is not None}
    for name in _REASONING:
        if name in given:
            return {"thinking": given[name], **given, "reasoning_content": given[name]}
    return given


def _steps_of(value: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, counted."""
    steps = _steps.get()
    for item in value:
        if next(steps) > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} turns of loops")
        yield item


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with bounds on what a rendering may take."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["tojson"] = _tojson
        self.filters["_steps"] = _steps_of
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            counted = nodes.Filter(loop.iter, "_steps", [], [], None, None)
            loop.iter = counted.set_lineno(loop.lineno)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                _bounded(len(left) + len(right))
        elif operator == "*":
            for sized, times in (left, right), (right, left):
                if isinstance(sized, str | list | tuple) and isinstance(times, int):
                    _bounded(len(sized) * times)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _bounded(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            # A width such as %999999999d.
            _bounded(max((int(digits) for digits in _numbers(left)), default=0))
        return super().call_binop(context, operator, left, right)


def _numbers(text: str) -> list[str]:
    return "".join(char if char in "0123456789" else " " for char in text).split()


def _bounded(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"a value of {size} characters or items")


class _Generation(Extension):
    """{% generation %} marks what the model wrote, for training: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """`dict` without its attributes, which would lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` without names that Python uses inside."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace can't hold the name {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a model to read: jinja's own would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
