"""Conversations that have no room, told by who speaks, against transformers."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import chat_templates
import pytest
import tool_templates
from oracle.make_tokenizer import CHAT_TEMPLATE, write_tokenizer
from transformers import PreTrainedTokenizerFast

from mer.api.http.large_bodies import decode_conversation
from mer.api.http.schemas import ChatCompletionRequest
from mer.api.large_json import PIECE
from mer.api.roles import folded
from mer.api.speakers import too_many
from mer.errors import RequestError
from mer.model.tokenizer import Tokenizer

# Templates for which the number of messages may say nothing.
OPEN = {
    "the last one alone": "{{ messages[-1].content }}",
    "those that say something": "{% for m in messages if m.content %}[x]{{ m.content }}{% endfor %}",
    "the user alone": "{% for m in messages if m.role == 'user' %}[U]{{ m.content }}{% endfor %}",
    "nothing between them": "{% for m in messages %}{{ m.content }}{% endfor %}",
}
# It asks for the reasoning of each answer.
TEMPLATES = {name: each for name, each in tool_templates.ALL.items() if name != "deepseek_r1"}
TEMPLATES |= {"own": CHAT_TEMPLATE, **chat_templates.ALL, **OPEN}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("speakers")
    write_tokenizer(path, chat=True)
    return path


def with_template(path, name):
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"chat_template": TEMPLATES[name], "bos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.open(path), PreTrainedTokenizerFast.from_pretrained(path)


def room_for(tokenizer, roles):
    """The most tokens for which such a conversation is too long for certain."""
    engines = [SimpleNamespace(tokenizer=tokenizer, context=n) for n in range(100)]
    return max((each.context for each in engines if too_many(each, roles)), default=-1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_never_what_has_room(directory, name):
    tokenizer, oracle = with_template(directory, name)
    draw = random.Random(name)
    most = 0.0
    for _ in range(40):
        roles = [draw.choice(["user", "assistant"]) for _ in range(draw.randint(1, 30))]
        if draw.random() < 0.4:
            roles = draw.choice([["user", "assistant"], ["user"], ["assistant"]]) * draw.randint(1, 15)
        messages = [{"role": role, "content": draw.choice(["", "x", "The sea."])} for role in roles]
        try:
            tokenizer.chat_template.render(messages)
        except RequestError:
            messages = folded(messages)
            try:
                tokenizer.chat_template.render(messages)
            except RequestError:
                continue
        tokens = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        refused_up_to = room_for(tokenizer, roles)
        assert refused_up_to < len(tokens)
        most = max(most, refused_up_to / len(roles))
    assert name in OPEN or most > 0.4, "nothing was found out"


MANY, SAME = ["user", "assistant"] * 40, ["user"] * 80
SOME = ["system", *MANY[:40], "tool", "tool", *MANY[40:]]


@pytest.mark.parametrize(
    ("name", "roles", "most"),
    [
        ("own", MANY, 79),
        ("own", SAME, 79),
        ("own", SOME, 79),
        ("mixtral", MANY, 78),
        ("mixtral", SAME, -1),
        ("harmony", MANY, 78),
        ("harmony", SAME, -1),
        ("the last one alone", MANY, -1),
    ],
)
def test_who_is_counted(directory, name, roles, most):
    tokenizer, _ = with_template(directory, name)
    assert room_for(tokenizer, roles) == most


def test_without_a_template_nothing_is_known():
    assert room_for(None, MANY) == -1


def test_in_a_body_of_json():
    """Counted are messages, wherever pieces of the body end, and nothing else that is called so."""
    seen = []

    def too_many(roles):
        seen.append(list(roles()))
        return False

    def body(text):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i in range(1000)]
        schema = {"properties": {"role": {"type": "string"}, "x": {"enum": ["role"] * 50}}}
        said = {"messages": [*messages, {"role": "user", "content": json.dumps(messages[:100])}]}
        return json.dumps({**said, "guided_json": schema}).encode()

    for size in (80, 81, 97):
        text = body("x" * size)
        assert len(text) > PIECE
        decode_conversation(text, ChatCompletionRequest, None, 512, too_many)
    assert seen == [[*["user", "assistant"] * 500, "user"]] * 3
    decode_conversation(body("x" * 80), ChatCompletionRequest, None, 2000, too_many)
    assert len(seen) == 3, "so few need not be looked at"
