"""Tools, reasoning and structured answers by gRPC: the same as HTTP gives, read there by OpenAI's client."""

from __future__ import annotations

import json

import openai
import pytest
from grpc_client import connected, pieces, refused
from http_server import serving
from tool_models import PARAMETERS, write_tool_model

from mer.v1 import inference_pb2 as pb

ASK = [pb.Message(role="user", content="What is the weather?")]
TOOLS = [pb.Tool(name=n, description="d", parameters=json.dumps(PARAMETERS)) for n in ("weather", "forecast")]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
Choice, Structure = pb.ToolChoice, pb.Structure


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_tool_model(tmp_path_factory.mktemp("tools") / "small")
    with serving(model, "--grpc-port", 0, "--context", 2048) as server:
        yield server


@pytest.fixture
async def stub(server):
    async with connected(server.grpc_port) as stub:
        yield stub


def by_http(server, **more) -> dict:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        tools = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": "d", "parameters": PARAMETERS},
            }
            for tool in TOOLS
        ]
        asked = {"messages": [{"role": "user", "content": ASK[0].content}], "tools": tools}
        answer = client.chat.completions.create(model="small", **asked, **more)
        return answer.choices[0].model_dump()


def ask(params: dict, **more) -> pb.ChatRequest:
    return pb.ChatRequest(**{"messages": ASK, "tools": TOOLS, "params": pb.SamplingParams(**params)} | more)


def whole(answer: list[pb.ChatResponse]) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, and the calls as (name, arguments)."""
    calls: dict[int, list[str]] = {}
    for delta in (delta for piece in answer for delta in piece.tool_calls):
        if delta.id:
            assert delta.index == len(calls)
            calls[delta.index] = [delta.name, ""]
        calls[delta.index][1] += delta.arguments
    text, thoughts = ("".join(getattr(piece, name) for piece in answer) for name in ("content", "reasoning"))
    return text, thoughts, [(name, arguments) for name, arguments in calls.values()]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("named", [False, True])
async def test_calls_are_those_of_http(server, stub, seed, named):
    params = {"max_tokens": 400, "seed": seed}
    choice = Choice(name="forecast") if named else Choice(mode=Choice.MODE_REQUIRED)
    answer = await pieces(stub.Chat(ask(params, tool_choice=choice, parallel_tool_calls=False)))
    wanted = {"type": "function", "function": {"name": "forecast"}} if named else "required"
    expected = by_http(server, **params, tool_choice=wanted, parallel_tool_calls=False)
    text, _, [(name, arguments)] = whole(answer)
    [call] = expected["message"]["tool_calls"]
    assert (name, arguments) == (call["function"]["name"], call["function"]["arguments"])
    assert json.loads(arguments)["city"] in PARAMETERS["properties"]["city"]["enum"]
    assert text == ""
    assert answer[-1].final.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert sum(bool(piece.tool_calls) for piece in answer) > 3, "as they come, not in one piece"


async def test_only_some_tools_may_be_called(stub):
    for seed in range(6):
        choice = Choice(mode=Choice.MODE_REQUIRED, allowed=["forecast"])
        answer = await pieces(stub.Chat(ask({"max_tokens": 400, "seed": seed}, tool_choice=choice)))
        assert {name for name, _ in whole(answer)[2]} == {"forecast"}


async def test_results_go_back(stub):
    answer = await pieces(
        stub.Chat(ask({"max_tokens": 400, "seed": 1}, tool_choice=Choice(mode=Choice.MODE_REQUIRED)))
    )
    [(name, arguments), *_] = whole(answer)[2]
    messages = [
        *ASK,
        pb.Message(role="assistant", tool_calls=[pb.ToolCall(id="1", name=name, arguments=arguments)]),
        pb.Message(role="tool", tool_call_id="1", content="rain"),
    ]
    [first] = await pieces(stub.Chat(ask({"max_tokens": 1}, messages=messages)))
    assert first.final.usage.prompt_tokens > answer[-1].final.usage.prompt_tokens + len("rain")


@pytest.mark.parametrize(
    ("structure", "check"),
    [
        (Structure(json_schema=json.dumps(SCHEMA)), lambda text: json.loads(text)["a"] in (1, 2)),
        (Structure(regex="(ab|cd){3}"), lambda text: set(text) <= set("abcd") and len(text) == 6),
        (Structure(choice=pb.Choices(texts=["yes", "no"])), lambda text: text in ("yes", "no")),
        (Structure(grammar='start: "x" "y"'), lambda text: text == "xy"),
    ],
)
async def test_structured_answers(stub, structure, check):
    params = {"max_tokens": 200, "structure": structure, "seed": 3}
    answer = await pieces(stub.Chat(ask(params, tools=[])))
    assert check(whole(answer)[0])
    assert answer[-1].final.finish_reason == pb.FINISH_REASON_STOP
    request = pb.GenerateRequest(text="x", params=pb.SamplingParams(**params))
    assert check("".join(piece.text for piece in await pieces(stub.Generate(request))))


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"tools": [], "tool_choice": Choice(mode=Choice.MODE_REQUIRED)}, "tool_choice"),
        ({"tool_choice": Choice(name="other")}, "tool_choice"),
        ({"tool_choice": Choice(mode=9)}, "tool_choice.mode"),
        ({"tool_choice": Choice(mode=Choice.MODE_AUTO, allowed=["other"])}, "tool_choice"),
        ({"tool_choice": Choice(name="forecast", allowed=["forecast"])}, "tool_choice.allowed"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"structure": Structure(regex="(")}, "params.structure"),
    ],
)
async def test_refusals(stub, more, field):
    params = {"structure": more.pop("structure")} if "structure" in more else {}
    assert (await refused(stub.Chat(ask(params, **more)))).fields == [field]


async def test_reasoning(tmp_path):
    model = write_tool_model(tmp_path / "small", "deepseek_r1")
    with serving(model, "--grpc-port", 0, "--context", 2048) as server:
        async with connected(server.grpc_port) as stub:
            answer = await pieces(stub.Chat(ask({"max_tokens": 8, "seed": 1, "ignore_eos": True})))
        expected = by_http(server, max_tokens=8, seed=1, extra_body={"ignore_eos": True})["message"]
    text, thoughts, calls = whole(answer)
    assert (text, calls) == ("", [])
    assert thoughts == expected["reasoning_content"] != ""


async def test_structures_with_a_trigger(tmp_path):
    """Behind a tag, and where a strict tool is begun to be called; biases see to it that both come."""
    model = write_tool_model(tmp_path / "small", special=("<tool_call>", "</tool_call>"))
    with serving(model, "--grpc-port", 0, "--context", 2048) as server:
        async with connected(server.grpc_port) as stub:
            tag = pb.TokenizeRequest(text="<tool_call>", add_special_tokens=False)
            (begins,) = (await stub.Tokenize(tag)).token_ids
            params = pb.SamplingParams(seed=1, max_tokens=300, logit_bias={begins: 100})
            strict = [pb.Tool(name=each.name, parameters=each.parameters, strict=True) for each in TOOLS]
            request = pb.ChatRequest(messages=ASK, params=params, tools=strict, parallel_tool_calls=False)
            _, _, calls = whole(await pieces(stub.Chat(request)))
            assert calls[0][0] in ("weather", "forecast")
            assert set(json.loads(calls[0][1])) >= {"city", "unit"}
            form = Structure(choice=pb.Choices(texts=["yes"]), after="<tool_call>")
            params = pb.SamplingParams(seed=1, max_tokens=20, logit_bias={begins: 100}, structure=form)
            answer = await pieces(stub.Generate(pb.GenerateRequest(text="Emma", params=params)))
            assert "".join(piece.text for piece in answer).replace("\n", "") == "<tool_call>yes"
            empty = pb.SamplingParams(structure=Structure(regex="a", after=""))
            error = await refused(stub.Generate(pb.GenerateRequest(text="Emma", params=empty)))
            assert error.fields == ["params.structure"]
