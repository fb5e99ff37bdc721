"""Calls in a conversation whose arguments are no JSON object, since an answer was cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chat_templates
import httpx
import openai
import pytest
import tool_templates
from grpc_client import connected, pieces
from http_server import serving
from tool_models import PARAMETERS, write_tool_model

from mer.api.conversation import template_messages
from mer.errors import RequestError
from mer.model.chat import ChatTemplate
from mer.v1 import inference_pb2 as pb

CUT = '{"city": "Zür\\n"ich"<|im_end|>'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
# How the mapping looks that stands for the text in templates that write arguments one by one.
PARTS = {
    "qwen_coder": "<function=weather>\n<parameter=INVALID_JSON>\nRAW\n</parameter>\n</function>",
    "glm": "<tool_call>weather\n<arg_key>INVALID_JSON</arg_key>\n<arg_value>RAW</arg_value>\n</tool_call>",
    "minimax": '<invoke name="weather">\n<parameter name="INVALID_JSON">RAW</parameter>\n</invoke>',
    "deepseek_v32": '<｜DSML｜parameter name="INVALID_JSON" string="true">RAW</｜DSML｜parameter>',
    "deepseek_v4": '<｜DSML｜parameter name="INVALID_JSON" string="true">RAW</｜DSML｜parameter>',
}
# How the others write it: as the model did.
WHOLE = {
    "gemma": 'call:weather<|"|>RAW<|"|><tool_call|>',
    "hermes": '{"name": "weather", "arguments": RAW}\n</tool_call>',
    "granite": '<|tool_call|>[{"name": "weather", "arguments": RAW}]',
    "hunyuan": '<tool_calls>[{"name": "weather", "arguments": RAW}]</tool_calls>',
    "mistral": '[{"name": "weather", "arguments": RAW, "id": "1"}]',
    "mistral_named": "[TOOL_CALLS]weather[ARGS]RAW",
    "deepseek_r1": "weather\n```json\nRAW\n```",
    "deepseek_v31": "weather<｜tool▁sep｜>RAW<｜tool▁call▁end｜>",
    "kimi": "<|tool_call_begin|>1<|tool_call_argument_begin|>RAW<|tool_call_end|>",
    "llama": '{"name": "weather", "parameters": RAW}',
    "harmony": "<|channel|>commentary json<|message|>RAW<|call|>",
}


def conversation(*arguments: str) -> list[dict[str, Any]]:
    calls = [
        {"id": str(i), "type": "function", "function": {"name": "weather", "arguments": text}}
        for i, text in enumerate(arguments, 1)
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "invalid JSON"} for call in calls]
    user = {"role": "user", "content": "Weather?"}
    return [user, {"role": "assistant", "content": None, "tool_calls": calls}, *results]


def rendered(source: str, *arguments: str) -> str:
    template = ChatTemplate(Path("x"), {"default": source}, {})
    return template.render(template_messages(conversation(*arguments)), tools=TOOLS)


@pytest.mark.parametrize("name", tool_templates.ALL)
@pytest.mark.parametrize("raw", [CUT, "[1, 2]", '"Bern"', "[" * 5000])
def test_the_model_sees_what_it_wrote(name: str, raw: str) -> None:
    source = tool_templates.ALL[name].replace("m.reasoning_content + '", "(m.reasoning_content or '') + '")
    assert (PARTS | WHOLE)[name].replace("RAW", raw) in rendered(source, raw)


def test_by_published_templates() -> None:
    """One writes texts as they are, one as JSON, one argument by argument."""
    qwen, deepseek, llama = (
        rendered(chat_templates.ALL[name], CUT) for name in ("qwen", "deepseek", "llama")
    )
    assert f'"arguments": {CUT}}}\n</tool_call>' in qwen
    assert f"```json\n{CUT}\n```" in deepseek
    assert f'INVALID_JSON="{CUT}"' in llama


def test_each_call_has_its_own() -> None:
    made = rendered(tool_templates.HERMES, *(f'{{"n": {i}' for i in range(12)), '{"n": 12}')
    places = [made.index(f'"arguments": {{"n": {i}}}') for i in range(13)]
    assert places == sorted(places)
    assert rendered(tool_templates.HERMES, '{"n": 1') == rendered(tool_templates.HERMES, '{"n": 1')


def test_none_at_all_is_an_empty_object() -> None:
    for text in "", " ", "null", "{}":
        assert '"arguments": {}}' in rendered(tool_templates.HERMES, text)


def test_a_template_that_refuses_still_says_why() -> None:
    with pytest.raises(RequestError, match="only supports single tool-calls at once"):
        rendered(chat_templates.ALL["llama"], CUT, CUT)


def test_a_template_that_shows_no_calls() -> None:
    assert rendered("{% for m in messages %}{{ m.content }}.{% endfor %}", CUT) == "Weather?..invalid JSON."


def test_arguments_of_too_many_values_are_refused() -> None:
    with pytest.raises(RequestError, match="20,000 values") as caught:
        template_messages(conversation(json.dumps({"a": [1] * 40_000})))
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"
    long = '{"a": "' + "x" * 100_000
    assert template_messages(conversation(long))[1]["tool_calls"][0]["function"]["arguments"] == long


@pytest.mark.parametrize("family", ["hermes", "qwen_coder"])
async def test_every_face_takes_them(tmp_path: Path, family: str) -> None:
    """And makes the same prompt."""
    model = write_tool_model(tmp_path / "small", family)
    with serving(model, "--grpc-port", 0, "--context", 2048) as server:
        messages = conversation(CUT)
        asked = {"messages": messages, "tools": TOOLS}
        async with httpx.AsyncClient(base_url=server.url) as http:
            ids = (await http.post("/tokenize", json=asked)).json()["tokens"]
            prompt = (await http.post("/detokenize", json={"tokens": ids})).json()["prompt"]
        assert (PARTS | WHOLE)[family].replace("RAW", CUT) in prompt
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            chat = client.chat.completions.create(model="small", **asked, max_tokens=1)
            call = {"type": "function_call", "call_id": "1", "name": "weather", "arguments": CUT}
            output = {"type": "function_call_output", "call_id": "1", "output": "invalid JSON"}
            response = client.responses.create(
                model="small", input=[messages[0], call, output], max_output_tokens=1,
                tools=[{"type": "function", **TOOLS[0]["function"]}],
            )  # fmt: skip
        request = pb.ChatRequest(
            messages=[
                pb.Message(role="user", content="Weather?"),
                pb.Message(role="assistant", tool_calls=[pb.ToolCall(id="1", name="weather", arguments=CUT)]),
                pb.Message(role="tool", tool_call_id="1", content="invalid JSON"),
            ],
            tools=[pb.Tool(name="weather", parameters=json.dumps(PARAMETERS))],
            params=pb.SamplingParams(max_tokens=1),
        )
        async with connected(server.grpc_port) as stub:
            [piece] = await pieces(stub.Chat(request))
        counts = (chat.usage.prompt_tokens, response.usage.input_tokens, piece.final.usage.prompt_tokens)
        assert counts == (len(ids),) * 3
