"""Tools and reasoning in chat completions: a real `mer serve`, asked by the official `openai` client."""

from __future__ import annotations

import json
import re

import openai
import pytest
from engine_models import write_text_model
from http_server import serving
from tool_models import PARAMETERS, write_tool_model

ASK = [{"role": "user", "content": "What is the weather?"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": PARAMETERS}}
    for name in ("weather", "forecast")
]
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(write_tool_model(tmp_path_factory.mktemp("tools") / "small"), "--context", 2048) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, **more):
    return client.chat.completions.create(
        model="small", messages=ASK, **{"tools": TOOLS, "max_tokens": 400, "seed": 1} | more
    )


def check(arguments: str) -> dict:
    found = json.loads(arguments)
    assert {"city", "unit"} <= set(found) <= {"city", "unit", "wind"}
    assert found["city"] in PARAMETERS["properties"]["city"]["enum"]
    return found


def test_a_tool_is_called(client):
    answer = ask(client, tool_choice={"type": "function", "function": {"name": "forecast"}})
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "forecast")
    assert call.id.startswith("call_")
    check(call.function.arguments)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_streamed_deltas_are_the_whole_answer(client, seed):
    whole = ask(client, tool_choice="required", seed=seed, parallel_tool_calls=False).choices[0].message
    with client.chat.completions.stream(
        model="small", messages=ASK, tools=TOOLS, tool_choice="required", max_tokens=400, seed=seed,
        parallel_tool_calls=False,
    ) as stream:  # fmt: skip
        events = list(stream)
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    (call,), (expected,) = final.message.tool_calls, whole.tool_calls
    assert call.function.name == expected.function.name
    assert call.function.arguments == expected.function.arguments
    deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(deltas) > 3  # as they come, not in one piece
    assert "".join(e.arguments_delta for e in deltas) == call.function.arguments
    chunks = [e.chunk.choices[0].delta.tool_calls for e in events if e.type == "chunk" and e.chunk.choices]
    ids = [each.id for calls in chunks for each in calls or () if each.id]
    assert ids == [call.id]


def test_several_calls_and_several_answers(client):
    answer = ask(client, tool_choice="required", n=6, max_tokens=600)
    counts = []
    for choice in answer.choices:
        calls = choice.message.tool_calls or []
        counts.append(len(calls))
        assert len({call.id for call in calls}) == len(calls)
        if choice.finish_reason == "tool_calls":
            assert all(check(call.function.arguments) for call in calls)
    assert max(counts) > 1


def test_auto_without_a_call_is_content(client):
    answer = ask(client, max_tokens=8, extra_body={"ignore_eos": True})
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert ask(client, tool_choice="none", max_tokens=1).choices[0].message.tool_calls is None


def test_a_strict_tool_is_held_to_its_schema_where_the_model_decides(tmp_path):
    """A bias makes it begin a call; what this random model writes then without `strict` is none."""
    model = write_tool_model(tmp_path / "small", special=("<tool_call>", "</tool_call>"))
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    with serving(model, "--context", 2048) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        begins = {token(client, "<tool_call>"): 100}
        for seed in range(3):
            choice = ask(client, tools=strict, logit_bias=begins, seed=seed).choices[0]
            assert choice.finish_reason in ("tool_calls", "length")
            for call in choice.message.tool_calls[:-1] or choice.message.tool_calls:
                check(call.function.arguments)
            free = ask(client, logit_bias=begins, seed=seed, max_tokens=40).choices[0].message
            assert not free.tool_calls
        never = {token(client, "<tool_call>"): -100}
        said = ask(client, tools=strict, logit_bias=never, max_tokens=20, extra_body={"ignore_eos": True})
        assert said.choices[0].message.content, "it need not call"
        counts = {ask(client, tools=tools, max_tokens=1).usage.prompt_tokens for tools in (TOOLS, strict)}
        assert len(counts) == 1, "the model is not told of `strict`"
        bad = {
            "type": "function",
            "function": {"name": "f", "strict": True, "parameters": {"type": "whatever"}},
        }
        with pytest.raises(openai.BadRequestError, match="tools: the parameters of"):
            ask(client, tools=[bad])


def chosen(mode: str, *names: str) -> dict:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_only_some_tools_may_be_called(tmp_path):
    """All of them are in the prompt; a bias makes the model begin a call."""
    model = write_tool_model(tmp_path / "small", special=("<tool_call>", "</tool_call>"))
    with serving(model, "--context", 2048) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        choices = "auto", chosen("auto", "forecast"), chosen("required", "forecast")
        counts = {ask(client, tool_choice=each, max_tokens=1).usage.prompt_tokens for each in choices}
        assert len(counts) == 1
        tag = token(client, "<tool_call>")
        for mode, bias in (("required", 0), ("auto", 100)):
            names = set()
            for seed in range(6):
                choice = ask(client, tool_choice=chosen(mode, "forecast"), logit_bias={tag: bias}, seed=seed)
                names |= {call.function.name for call in choice.choices[0].message.tool_calls}
            assert names == {"forecast"}, mode
        free = {call.function.name for seed in range(6) for call in
                ask(client, tool_choice="required", seed=seed).choices[0].message.tool_calls}  # fmt: skip
        assert "weather" in free, "else the model would not need to be held"
        said = ask(client, tool_choice=chosen("auto", "forecast"), logit_bias={tag: -100}, max_tokens=9,
                   extra_body={"ignore_eos": True}).choices[0].message  # fmt: skip
        assert (said.tool_calls, bool(said.content)) == (None, True), "it need not call"

        flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
        names = [{"type": "function", "name": "forecast"}]
        picked = {"type": "allowed_tools", "mode": "required", "tools": names}
        for seed in range(6):
            response = client.responses.create(
                model="small", input=ASK, tools=flat, tool_choice=picked, max_output_tokens=300,
                extra_body={"seed": seed},
            )  # fmt: skip
            assert response.output
            assert {item.name for item in response.output} == {"forecast"}
        assert response.tool_choice.model_dump() == picked


def test_an_answer_of_a_schema_may_call_tools_instead(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    # The first token decides; it can be chosen by a bias.
    angle, brace = (token(client, text) for text in "<{")
    called = ask(client, response_format=form, logit_bias={angle: 100}, parallel_tool_calls=False)
    assert called.choices[0].message.tool_calls
    said = ask(client, response_format=form, logit_bias={brace: 100}).choices[0].message
    assert json.loads(said.content)["a"] in (1, 2)


def token(client, text: str) -> int:
    return client.post("/../tokenize", body={"prompt": text, "add_special_tokens": False}, cast_to=object)[
        "tokens"
    ][0]


def test_a_conversation_with_results_goes_on(client):
    called = ask(client, tool_choice="required", parallel_tool_calls=False).choices[0].message
    messages = [*ASK, called.model_dump(), {
        "role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "rain",
    }]  # fmt: skip
    first = client.chat.completions.create(model="small", messages=messages, tools=TOOLS, max_tokens=1)
    alone = client.chat.completions.create(model="small", messages=ASK, tools=TOOLS, max_tokens=1)
    assert first.usage.prompt_tokens > alone.usage.prompt_tokens + len("rain")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": chosen("auto", "forecast", "other")}, "tool_choice"),
        ({"tool_choice": chosen("auto")}, "tool_choice.allowed_tools.tools"),
        ({"tool_choice": chosen("none", "forecast")}, "tool_choice.allowed_tools.mode"),
        ({"tools": [], "tool_choice": chosen("auto", "forecast")}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
    ],
)
def test_refusals(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **more)
    assert caught.value.param == param


def test_a_schema_that_cannot_be_enforced_is_named(client):
    """And no grammar is shown that nobody has sent."""
    good, bad = ({"name": name, "parameters": PARAMETERS, "strict": True} for name in "fg")
    bad["parameters"] = {"type": "whatever"}
    tools = [{"type": "function", "function": function} for function in (good, bad)]
    for choice in "required", "auto":
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, tools=tools, tool_choice=choice)
        message = "tools: the parameters of 'g' can't be enforced: Invalid type: whatever"
        assert (caught.value.param, caught.value.body["message"]) == ("tools", message)
    schema = {"name": "x", "schema": bad["parameters"]}
    for given in tools[:1], []:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, tools=given, response_format={"type": "json_schema", "json_schema": schema})
        message = "response_format: this JSON schema can't be used: Invalid type: whatever"
        assert (caught.value.param, caught.value.body["message"]) == ("response_format", message)


def test_strict_where_the_format_is_not_known(tmp_path):
    """Refused, for it could not be obeyed; without it the tools are shown, and calls come as content."""
    model = write_text_model(tmp_path / "small", chat=True)
    (model / "chat_template.jinja").write_text("{{ tools | tojson }}{{ messages[0].content }}")
    with serving(model, "--context", 512) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        function = {"name": "f", "strict": True}
        for more in {}, {"response_format": {"type": "json_object"}}:
            with pytest.raises(openai.BadRequestError, match="'strict' can't be obeyed") as caught:
                ask(client, tools=[{"type": "function", "function": function}], **more)
            assert caught.value.param == "tools"
        two = [{"type": "function", "function": {"name": name}} for name in "fg"]
        with pytest.raises(openai.BadRequestError, match="can't be held to some") as caught:
            ask(client, tools=two, tool_choice=chosen("auto", "f"))
        assert caught.value.param == "tool_choice"
        assert ask(client, tools=two, tool_choice=chosen("auto", "f", "g"), max_tokens=1).choices
        loose = {"type": "function", "function": function | {"strict": False}}
        assert ask(client, tools=[loose], max_tokens=1).choices


def test_a_template_without_tools_is_said_to_have_none(tmp_path):
    model = write_text_model(tmp_path / "small", chat=True)
    with serving(model, "--context", 512) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="does not show tools") as caught:
            ask(client)
        assert caught.value.param == "tools"
        assert ask(client, tool_choice="none", max_tokens=1).choices


def test_harmony_with_its_special_tokens(tmp_path):
    """Markers that are special tokens: forced as such, read as such, and never shown."""
    model = write_tool_model(tmp_path / "small", "harmony", HARMONY)
    with serving(model, "--context", 2048) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        # Straight to the call, without thoughts, which would not end.
        more = {"tool_choice": "required", "logit_bias": {token(client, "c"): 50}}
        (call,) = ask(client, **more).choices[0].message.tool_calls
        check(call.function.arguments)
        more["logit_bias"] = {token(client, "a"): 50}
        thought = ask(client, **more, max_tokens=12).choices[0].message
        assert thought.reasoning_content
        assert thought.content == ""
        for text in thought.reasoning_content, thought.content:
            assert "<|" not in text


def test_gemma_with_its_special_tokens(tmp_path):
    """Strings stand between tokens of their own; what is read is JSON."""
    tags = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")
    model = write_tool_model(tmp_path / "small", "gemma", tags)
    with serving(model, "--context", 2048) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        more = {"tool_choice": "required", "logit_bias": {token(client, tags[0]): 50}}
        for seed in range(3):
            (call,) = ask(client, **more, seed=seed, parallel_tool_calls=False).choices[0].message.tool_calls
            check(call.function.arguments)
        anything = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
        ends = {token(client, text): 50 for text in (tags[0], "}", tags[1])}
        (call,) = ask(client, **more | {"logit_bias": ends}, tools=anything).choices[0].message.tool_calls[:1]
        assert call.function.arguments == "{}"
        more["logit_bias"] = {token(client, tags[3]): 50}
        thought = ask(client, **more, max_tokens=12).choices[0].message
        assert thought.reasoning_content
        assert "channel" not in thought.reasoning_content + thought.content


def test_reasoning_that_the_prompt_opened(tmp_path):
    model = write_tool_model(tmp_path / "small", "deepseek_r1")
    with serving(model, "--context", 2048) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        body = {"ignore_eos": True}
        message = ask(client, max_tokens=8, extra_body=body).choices[0].message
        assert (message.content, bool(message.reasoning_content)) == ("", True)
        stream = ask(client, max_tokens=8, stream=True, extra_body=body)
        deltas = [chunk.choices[0].delta for chunk in stream]
        assert "".join(d.reasoning_content for d in deltas if hasattr(d, "reasoning_content")) == (
            message.reasoning_content
        )
        # Of a structured answer the structure is what follows the thoughts; here they never end.
        form = {"type": "json_object"}
        assert ask(client, tools=[], max_tokens=8, response_format=form).choices[0].message.content == ""
        # The same for a prompt that a client rendered, by how it ends.
        for prompt, begins in {"So <think>\n": False, "So <think> yes </think>": True, "So": True}.items():
            raw = client.completions.create(
                model="small", prompt=prompt, max_tokens=40, seed=1,
                extra_body={"guided_choice": ["yes", "no"], "ignore_eos": True},
            )  # fmt: skip
            assert (raw.choices[0].text in ("yes", "no")) is begins


def test_structures_of_a_model_that_may_think_first(tmp_path):
    """The grammar of the answer is put behind that of the thoughts, which a bias leaves out here."""
    model = write_tool_model(tmp_path / "small", "kimi")
    with serving(model, "--context", 2048) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        bias = {token(client, "<"): -100}

        def answer(**body):
            message = ask(client, tools=[], logit_bias=bias, extra_body=body).choices[0].message
            assert not hasattr(message, "reasoning_content")
            return message.content

        assert re.fullmatch(r"\{[0-9]\}x", answer(guided_grammar='start: "{" /[0-9]/ "}x"'))
        assert re.fullmatch(r"a/b\n[0-9]{2}\\/", answer(guided_regex="a/b\n[0-9]{2}\\\\\\/"))
        assert answer(guided_choice=["yes", 'n"o']) in ("yes", 'n"o')
        assert json.loads(answer(guided_json={"enum": [1, [2]]})) in (1, [2])
        thought = ask(client, tools=[], logit_bias={token(client, "<"): 100}, max_tokens=12,
                      extra_body={"guided_choice": ["yes"]}).choices[0].message  # fmt: skip
        assert thought.content == ""
        assert thought.reasoning_content
