"""Requests that make no sense, of every kind: each gets OpenAI's error object that names the parameter."""

from __future__ import annotations

import asyncio
import codecs
import gc
import json
import threading
import weakref
from contextlib import aclosing

import pytest
from engine_models import opened, write_text_model
from http_server import asking

from mer import Engine, SamplingParams
from mer.api.generation import merged, texts_tokens
from mer.engine.outputs import Delta
from mer.errors import RequestTimeoutError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("requests"), chat=True, max_position_embeddings=512)


# What is sent beside what is right -> the parameter, the code, a part of the message.
BAD_CHATS = [
    ({"max_token": 5}, "max_token", "unknown_parameter", "unknown parameter: 'max_token'"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter", "don't fill gaps"),
    ({"functions": []}, "functions", "unsupported_parameter", "'tools'"),
    ({"best_of": 2}, "best_of", "unsupported_parameter", "'n'"),
    ({"store": True}, "store", "unsupported_parameter", "stores no answers"),
    ({"model": "gpt-5"}, "model", "model_not_found", "this server has 'small'"),
    ({"messages": []}, "messages", "invalid_value", "length >= 1"),
    ({"messages": "hi"}, "messages", "invalid_value", "expected array, got str"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "missing"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter", "missing"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value", "'wizard'"),
    ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content", "invalid_value", "int"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type", "invalid_value", "text only"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages", "invalid_value",
     "no such role: tool"),
    ({"temperature": -1}, "temperature", "invalid_value", ">= 0"),
    ({"temperature": "hot"}, "temperature", "invalid_value", "got str"),
    ({"top_p": 1.5}, "top_p", "invalid_value", "<= 1"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value", ">= 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "invalid_value", "differ"),
    ({"n": 0}, "n", "invalid_value", ">= 1"),
    ({"n": 1000}, "n", "invalid_value", "<= 128"),
    ({"seed": 2**63}, "seed", "invalid_value", "<="),
    ({"stop": [""]}, "stop[0]", "invalid_value", "length >= 1"),
    ({"stream": "yes"}, "stream", "invalid_value", "got str"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "stream: true"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter", "unknown"),
    ({"top_logprobs": 3}, "top_logprobs", "invalid_value", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", "<= 20"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value", "got str"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value", "<= 100"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "invalid_value", "9999"),
    ({"timeout": 0}, "timeout", "invalid_value", "> 0"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value", "'xml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema",
     "missing_required_parameter", "missing"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a+"}, "guided_regex", "invalid_value",
     "can't be combined"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "invalid_value", "no such thing"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking",
     "invalid_value", "does not use it"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "invalid_value",
     "no variable"),
    ({"guided_json": "{"}, "guided_json", "invalid_value", "no JSON"),
    ({"guided_choice": []}, "guided_choice", "invalid_value", "length >= 1"),
    ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages", "context_length_exceeded",
     "is the most here"),
]  # fmt: skip
BAD_TEXTS = [
    ({"prompt": []}, "prompt", "invalid_value", "a text"),
    ({"prompt": ["a", 1]}, "prompt", "invalid_value", "a text"),
    ({"prompt": [[1], [2.5]]}, "prompt[1][0]", "invalid_value", "float"),
    ({"prompt": [300]}, "prompt", "invalid_value", "0..299"),
    ({"prompt": [-1]}, "prompt[0]", "invalid_value", ">= 0"),
    ({"prompt": ""}, "prompt", "invalid_value", "empty"),
    ({"prompt": ["a"] * 10, "n": 20}, "n", "invalid_value", "128 answers"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value", "echo: true"),
    ({"logprobs": True}, "logprobs", "invalid_value", "got bool"),
    ({"prompt": "word " * 600}, "prompt", "context_length_exceeded", "is the most here"),
]


async def test_parameters(model):
    async with opened(model) as engine, asking(engine) as http:
        cases = [(CHAT, {"messages": HELLO, "max_tokens": 3}, *case) for case in BAD_CHATS]
        cases += [(TEXT, {"prompt": "Hello", "max_tokens": 3}, *case) for case in BAD_TEXTS]
        for stream in (False, True):
            for path, right, wrong, param, code, message in cases:
                body = right | ({"stream": True} if stream else {}) | wrong
                if stream and (param == "stream_options" or "max_completion_tokens" in wrong):
                    continue
                answer = await http.post(path, json=body)
                assert answer.status_code == (404 if code == "model_not_found" else 400), (wrong, answer.text)
                assert answer.headers["content-type"] == "application/json"
                error = answer.json()["error"]
                assert (error["param"], error["code"]) == (param, code), (wrong, error)
                assert error["type"] == "invalid_request_error"
                assert message in error["message"], (wrong, error)


async def test_names_of_python_are_no_variables_of_a_template(model):
    async with opened(model) as engine, asking(engine) as http:
        body = {"messages": HELLO, "chat_template_kwargs": {"self": 1}}
        for path in CHAT, "/tokenize":
            answer = await http.post(path, json=body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] == "chat_template_kwargs.self"


async def test_what_asks_for_nothing_is_taken(model):
    """Clients send defaults and nulls of what is not supported here, too."""
    nothing = {
        "suffix": None, "best_of": 1, "store": False, "metadata": {}, "modalities": ["text"], "audio": None,
        "service_tier": "auto", "parallel_tool_calls": True, "tools": None, "logit_bias": None, "stop": None,
        "response_format": {"type": "text"}, "n": 1, "user": "me", "safety_identifier": "x", "top_k": -1,
        "stream": True, "stream_options": {"include_obfuscation": False},
    }  # fmt: skip
    async with opened(model) as engine, asking(engine) as http:
        answer = await http.post(CHAT, json={"messages": HELLO, "max_tokens": 2, **nothing})
        assert answer.status_code == 200, answer.text


async def test_a_mark_before_utf8_is_no_json(model):
    async with opened(model) as engine, asking(engine) as http:
        body = codecs.BOM_UTF8 + json.dumps({"messages": HELLO, "max_tokens": 2}).encode()
        assert (await http.post(CHAT, content=body, headers=JSON)).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"messages": NaN}', "not valid JSON"),
        (b'{"messages": "\xff"}', "not valid JSON"),
        (b'{"messages": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"x":' * 100_000, "nested too deeply"),
        (b"[]", "expected object, got array"),
        (b"null", "expected object, got null"),
    ],
)
async def test_bodies(model, body, message):
    async with opened(model) as engine, asking(engine) as http:
        for path in (CHAT, TEXT, "/v1/embeddings", "/tokenize", "/detokenize"):
            answer = await http.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400
            assert message in answer.json()["error"]["message"]


async def test_requests_that_are_not_for_us(model):
    async with opened(model) as engine, asking(engine) as http:
        for method, path, status, code in (
            ("GET", "/v1/nothing", 404, "unknown_url"),
            ("GET", CHAT, 405, "method_not_allowed"),
            ("DELETE", "/v1/models", 405, "method_not_allowed"),
            ("POST", CHAT, 415, "unsupported_media_type"),
        ):
            answer = await http.request(method, path, content=b'{"a": 1}' if method == "POST" else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert "POST" in (await http.get(CHAT)).headers["allow"]


async def send(http, data: bytes) -> bytes:
    """What comes back for these bytes, until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
    writer.write(data)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    return answer


async def test_a_web_socket(model, caplog):
    """There are none: the client is told, and the log does not fill with tracebacks."""
    lines = ["GET /v1/completions HTTP/1.1", "Host: localhost", "Connection: Upgrade", "Upgrade: websocket",
             "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", ""]  # fmt: skip
    async with opened(model) as engine, asking(engine) as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
        writer.write("\r\n".join(lines).encode())
        assert (await reader.readline()).split()[1] == b"405"
        writer.close()
    assert "Exception" not in caplog.text


async def test_structures_are_named_as_they_were_sent(model):
    async with opened(model) as engine, asking(engine) as http:
        bad = {"guided_regex": "((", "guided_grammar": "(", "guided_json": {"type": "objct"}}
        for param, value in bad.items():
            for path, asked in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": HELLO})):
                answer = await http.post(path, json={**asked, param: value})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, param)
                assert error["message"].startswith(f"{param}: ")
        schema = {"name": "x", "schema": {"$ref": "#/$defs/none"}, "strict": True}
        for path, asked, param in (
            (CHAT, {"response_format": {"type": "json_schema", "json_schema": schema}}, "response_format"),
            ("/v1/responses", {"text": {"format": {"type": "json_schema", **schema}}}, "text.format"),
        ):
            said = {"input": HELLO} if path == "/v1/responses" else {"messages": HELLO}
            error = (await http.post(path, json=said | asked)).json()["error"]
            assert (error["param"], error["message"].startswith(f"{param}: this JSON")) == (param, True)


async def test_much_that_is_short_is_tokenized_without_holding_up_others(model, monkeypatch):
    """A list of texts lets others in between; a prompt that is long for its tools is made on a thread."""
    async with opened(model) as engine, asking(engine) as http:
        others = 0

        async def other():
            nonlocal others
            while True:
                others += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        found = await texts_tokens(engine, ["The sea", [1, 2], *["The old man"] * 48])
        task.cancel()
        assert found[:2] == [engine.tokenizer.encode("The sea"), [1, 2]]
        assert (len(found), others >= 50) == (50, True)

        threads, make = [], Engine.chat_prompt

        def chat_prompt(self, *args, **more):
            threads.append(threading.current_thread())
            return make(self, *args, **more)

        monkeypatch.setattr(Engine, "chat_prompt", chat_prompt)
        tool = {"type": "function", "function": {"name": "f", "description": "x" * 10_000}}
        for tools in ([], [tool]):
            answer = await http.post("/tokenize", json={"messages": HELLO, "tools": tools})
            assert answer.status_code == 200
        assert [thread is threading.main_thread() for thread in threads] == [True, False]


async def test_what_came_before_an_error_is_delivered():
    class Failing:
        async def stream(self, prompt, params):
            yield Delta("a", (1,))
            raise RequestTimeoutError("late")

    batches = merged(Failing(), [([1], SamplingParams())], idle=9)
    assert [delta.text for _, delta in await anext(batches)] == ["a"]
    with pytest.raises(RequestTimeoutError):
        await anext(batches)


async def test_nothing_of_a_refused_request_waits_for_the_garbage_collector():
    """A cycle of an error and frames would hold its prompt, until a collection frees many of them at once."""

    class Refusing:
        async def stream(self, prompt, params):
            raise RequestTimeoutError("late")
            yield

    class Tokens(list):
        """What a weak reference can be made of."""

    prompt = Tokens([1, 2])
    left = weakref.ref(prompt)

    async def ask(prompt):
        try:
            async with aclosing(merged(Refusing(), [(prompt, SamplingParams())], idle=9)) as batches:
                await anext(batches)
        except RequestTimeoutError:
            return

    gc.disable()
    try:
        await ask(prompt)
        del prompt
        assert left() is None
    finally:
        gc.enable()


async def test_no_http(model):
    async with opened(model) as engine, asking(engine) as http:
        for data in (b"nonsense\r\n\r\n", b"GET /\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
                     b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
                     b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000 + b"\r\n\r\n"):  # fmt: skip
            assert (await send(http, data)).split(b"\r\n")[0].split()[1] in (b"400", b"404", b"431")
        assert (await http.get("/health")).status_code == 200


async def test_bodies_that_are_too_large(model):
    async with opened(model) as engine, asking(engine, max_body=10_000) as http:
        large = json.dumps({"prompt": "x" * 3_000_000}).encode()
        answer = await http.post(TEXT, content=large, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

        async def pieces():
            for _ in range(20):
                yield b"x" * 1000

        answer = await http.post(TEXT, content=pieces(), headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        answer = await http.post(TEXT, json={"prompt": "x" * 300, "max_tokens": 1})
        assert answer.status_code == 200


async def test_model_without_template_or_tokenizer(model, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "tokenizer_config.json").unlink()
    async with opened(tmp_path) as engine, asking(engine) as http:
        answer = await http.post(CHAT, json={"messages": HELLO})
        assert "no chat template; send a plain prompt (mer run, /v1/comp" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "messages"
    (tmp_path / "tokenizer.json").unlink()
    async with opened(tmp_path) as engine, asking(engine) as http:
        answer = await http.post(TEXT, json={"prompt": "a"})
        assert "token ids" in answer.json()["error"]["message"]
        asked = {"prompt": [5, 6], "max_tokens": 3, "logprobs": 1, "echo": True, "ignore_eos": True}
        answer = await http.post(TEXT, json=asked)
        assert answer.json()["usage"]["completion_tokens"] == 3
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            assert (await http.post(path, json=body)).status_code == 400


async def test_variables_of_the_chat_template(model, tmp_path):
    """How much a model shall think, in the words that its template knows."""
    for file in model.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages[0].content }} {{ enable_thinking is defined and enable_thinking }} {{ mood }}"
    )
    async with opened(tmp_path) as engine, asking(engine) as http:
        for asked, said in (
            ({"reasoning_effort": "none", "chat_template_kwargs": {"mood": "good"}}, "Hello False good"),
            ({"reasoning_effort": "high"}, "Hello True "),
            ({"chat_template_kwargs": {"enable_thinking": True}}, "Hello True "),
        ):
            answer = await http.post(CHAT, json={"messages": HELLO, "max_tokens": 1, **asked})
            assert answer.json()["usage"]["prompt_tokens"] == len(engine.tokenizer.encode(said))
