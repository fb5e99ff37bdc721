"""What coding agents send is served, and their streams are read by the official clients."""

from __future__ import annotations

import anthropic
import httpx
import openai
import pytest
from agent_requests import CLAUDE_CODE, CLAUDE_HEADERS, CODEX, OPENCODE, QWEN_CODE
from http_server import PATIENCE, serving
from tool_models import write_tool_model

from mer.api.roles import folded

# Refuses what many published ones refuse.
STRICT = """\
{%- for m in messages %}
{%- if m.role == 'system' and not loop.first %}{{ raise_exception('System must be first.') }}{% endif %}
{%- if m.role == 'user' and loop.index0 and messages[loop.index0 - 1].role == 'user' %}
{{- raise_exception('Roles must alternate.') }}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>\\n' }}
{%- endfor %}{{ '<|im_start|>assistant\\n' }}{# tools <tool_call> #}"""


@pytest.fixture(scope="module", params=["hermes", "strict"])
def server(tmp_path_factory, request):
    model = write_tool_model(tmp_path_factory.mktemp("agents") / "small")
    if request.param == "strict":
        (model / "chat_template.jinja").write_text(STRICT)
    with serving(model, "--context", 4096) as server:
        yield server


def test_claude_code(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        body = {**CLAUDE_CODE, "model": "small", "max_tokens": 6}
        output = {
            "output_config": body.pop("output_config"),
            "context_management": body.pop("context_management"),
        }
        events = list(client.messages.create(**body, extra_body=output, extra_headers=CLAUDE_HEADERS))
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")


def test_the_header_for_accounting_does_not_part_prompts(server):
    body = {key: CLAUDE_CODE[key] for key in ("system", "messages", "tools")} | {"model": "small"}
    counts = set()
    for text in (
        "x-anthropic-billing-header: cc_version=1.a;",
        "x-anthropic-billing-header: a longer one; x=y;",
        None,
    ):
        system = [{"type": "text", "text": text}] * (text is not None) + CLAUDE_CODE["system"][1:]
        answer = httpx.post(
            f"{server.url}/v1/messages/count_tokens", json={**body, "system": system}, timeout=PATIENCE
        )
        counts.add(answer.json()["input_tokens"])
    assert len(counts) == 1


def test_codex(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        extra = {"client_metadata": CODEX["client_metadata"], "max_output_tokens": 6}
        body = {key: value for key, value in CODEX.items() if key != "client_metadata"}
        events = list(client.responses.create(**body, model="small", extra_body=extra))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    kinds = [tool.type for tool in events[-1].response.tools]
    assert kinds == ["function", "namespace"], "as they were understood"


def test_a_function_in_a_namespace_is_called_by_both_its_names(server):
    body = {**CODEX, "model": "small", "stream": False, "tools": CODEX["tools"][1:]}
    body |= {"tool_choice": "required", "parallel_tool_calls": False}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=PATIENCE).json()
    (call,) = (item for item in answer["output"] if item["type"] == "function_call")
    assert (call["namespace"], call["name"]) == ("agents_v1", "close")
    twice = [*CODEX["tools"], {"type": "function", "name": "agents_v1__close"}]
    refused = httpx.post(f"{server.url}/v1/responses", json={**body, "tools": twice}, timeout=PATIENCE)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tools"


@pytest.mark.parametrize("given", [QWEN_CODE, OPENCODE])
def test_qwen_code_and_opencode(server, given):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(**{**given, "model": "small", "max_tokens": 6}))
    assert chunks[-1].usage.completion_tokens <= 6
    assert chunks[-2].choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_folded():
    def said(role, content):
        return {"role": role, "content": content}

    call = {"role": "assistant", "content": "", "tool_calls": []}
    assert folded([said("user", "a"), call]) == [said("user", "a"), call]
    assert folded([said("system", "a"), said("system", "b"), said("user", "c"), said("system", "d"), call,
                   said("system", "e"), said("user", "f"), said("user", "g")]) == [
        said("system", "a\n\nb"), said("user", "c\n\n<system>\nd\n</system>"), call,
        said("user", "<system>\ne\n</system>\n\nf\n\ng"),
    ]  # fmt: skip
