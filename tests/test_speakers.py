"""Tokens that a conversation has at the least, told by who speaks, against transformers."""

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
from mer.api.speakers import Speakers
from mer.errors import RequestError, TooLongError
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


def speaking(tokenizer, context=1 << 30):
    return SimpleNamespace(tokenizer=tokenizer, context=context)


@pytest.mark.parametrize("name", TEMPLATES)
def test_never_more_than_there_are(directory, name):
    tokenizer, oracle = with_template(directory, name)
    draw = random.Random(name)
    most = -1.0
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
        least = Speakers.of(roles).least(speaking(tokenizer))
        assert least <= len(tokens)
        most = max(most, least / len(roles))
    assert most >= 0 if name in OPEN else most > 0.4, "nothing was found out"


@pytest.mark.parametrize(
    ("roles", "messages", "turns"),
    [
        ([], 0, 0),
        (["system", "user"], 1, 1),
        (["user", "user", "assistant", "tool", "assistant", "user"], 5, 3),
        (["user", "system", "user"], 2, 1),
    ],
)
def test_who_is_counted(roles, messages, turns):
    assert Speakers.of(roles) == Speakers(messages, turns)


def test_more_than_have_room(directory):
    many = Speakers.of(["user", "assistant"] * 50)
    same = Speakers.of(["user"] * 100)
    for name, speakers, least in (
        ("own", many, 100),
        ("own", same, 100),
        ("mixtral", many, 99),
        ("mixtral", same, 0),
        ("harmony", many, 99),
    ):
        tokenizer, _ = with_template(directory, name)
        assert speakers.least(speaking(tokenizer)) == least
        speakers.check(speaking(tokenizer, least))
        words = f"100 messages, at least {least} tokens; {least - 1} is the most here"
        with pytest.raises(TooLongError, match=words):
            speakers.check(speaking(tokenizer, least - 1))
    assert many.least(speaking(None)) == 0, "there is no tokenizer"


def test_in_a_body_of_json():
    """Counted are messages, wherever pieces of the body end, and nothing else that is called so."""
    seen = []

    def least(speakers):
        seen.append(speakers)
        return 0

    def body(text):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i in range(1000)]
        schema = {"properties": {"role": {"type": "string"}, "x": {"enum": ["role"] * 50}}}
        said = {"messages": [*messages, {"role": "user", "content": json.dumps(messages[:100])}]}
        return json.dumps({**said, "guided_json": schema}).encode()

    for size in (80, 81, 97):
        text = body("x" * size)
        assert len(text) > PIECE
        decode_conversation(text, ChatCompletionRequest, None, 512, least)
    assert seen == [Speakers(1001, 1001)] * 3
    decode_conversation(body("x" * 80), ChatCompletionRequest, None, 2000, least)
    assert len(seen) == 3, "so few need not be looked at"
