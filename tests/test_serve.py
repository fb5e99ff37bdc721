"""`mer serve` as a program: how it ends, what it logs, TLS, settings that can't be."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import http_server
import httpx
import pytest
import trustme
from engine_models import write_text_model
from http_server import PATIENCE, SERVE, serving

from mer.api.http.app import create_app
from mer.api.http.server import HttpServer
from mer.api.http.service import Service
from mer.api.settings import ServerSettings, read_keys
from mer.errors import ConfigError

TEXT = "/v1/completions"
ENDLESS = {"prompt": "The", "max_tokens": 100_000, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "The old man", "max_tokens": 8, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "small"
    return write_text_model(path, chat=True, max_position_embeddings=1 << 17)


def stream(server, body, ready):
    """Its events; `ready` is set after the first."""
    with httpx.stream(
        "POST", f"{server.url}{TEXT}", json={**body, "stream": True}, timeout=PATIENCE
    ) as answer:
        events = []
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                ready.set()
        return events


STANDS_STILL = """
import os, time
from mer.cli.main import main
from mer.engine.runner import Runner

step = Runner.step

def still(self, chunks):
    while os.path.exists(os.environ["STILL"]) and any(len(chunk.sequence.tokens) > 20 for chunk in chunks):
        time.sleep(0.01)
    return step(self, chunks)

Runner.step = still
main()
"""


def test_sigterm_drains(model, tmp_path, monkeypatch):
    """What is running ends in order, nobody else is let in, and then the process is gone with status 0."""
    monkeypatch.setattr(http_server, "SERVE", [sys.executable, "-c", STANDS_STILL, "serve"])
    still = tmp_path / "still"  # while it is there no answer comes to its end
    still.touch()
    with (
        serving(model, "--drain-timeout", 1000, STILL=str(still)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        begun = threading.Event()
        running = pool.submit(stream, server, {**ENDLESS, "max_tokens": 100}, begun)
        assert begun.wait(PATIENCE)
        server.signal()
        server.wait_for("1 running; ending within 1000 s")
        late = httpx.post(f"{server.url}{TEXT}", json=SHORT, timeout=PATIENCE)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert httpx.get(f"{server.url}/ready", timeout=PATIENCE).json() == {"status": "draining"}
        assert httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
        still.unlink()
        events = running.result()
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert events[-1] == "[DONE]"
        assert server.ended() == 0


@pytest.mark.parametrize("hurry", ["second signal", "limit"])
def test_what_does_not_end_in_time_is_ended(model, hurry):
    """Its stream says why, and is not left hanging."""
    limit = 0.2 if hurry == "limit" else 60
    with (
        serving(model, "--context", 1 << 17, "--drain-timeout", limit) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        begun = threading.Event()
        running = pool.submit(stream, server, ENDLESS, begun)
        assert begun.wait(PATIENCE)
        server.signal(signal.SIGINT)
        if hurry == "second signal":
            server.wait_for("1 running")
            server.signal(signal.SIGTERM)
        events = running.result()
        assert json.loads(events[-1])["error"]["code"] == "shutting_down"
        server.wait_for("1 requests are ended unfinished")
        assert server.ended() == 0
        assert "Traceback" not in "".join(server.lines)


def test_log_in_json_says_who_asked_what_but_not_the_prompt(model):
    with serving(model, "--log-format", "json") as server:
        httpx.post(f"{server.url}{TEXT}", json=SHORT, headers={"X-Request-Id": "my-id"}, timeout=PATIENCE)
        line = json.loads(server.wait_for("my-id").string)
        assert line.pop("time")
        assert line.pop("seconds") > 0
        assert line == {
            "level": "info", "logger": "mer.access", "message": "request", "request_id": "my-id",
            "client": "127.0.0.1", "caller": "127.0.0.1", "method": "POST", "path": TEXT, "status": 200,
            "prompt_tokens": line["prompt_tokens"], "completion_tokens": 8,
        }  # fmt: skip
        httpx.get(f"{server.url}/health", timeout=PATIENCE)
        server.signal()
        server.ended()
        assert SHORT["prompt"] not in "".join(server.lines)
        assert "/health" not in "".join(server.lines)


def test_clients_that_die_are_one_line_each(model):
    """And no traceback, whatever they were about."""
    with serving(model, "--context", 1 << 15) as server:
        for part, wait in ((0.2, 0), (0.9, 0), (1, 0), (1, 0.05), (1, 0.3)):
            for stream in (False, True):
                body = json.dumps({**ENDLESS, "stream": stream}).encode()
                head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                sent = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
                with socket.create_connection(("127.0.0.1", server.port)) as client:
                    client.sendall(sent[: int(part * len(sent))])
                    time.sleep(wait)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        httpx.post(f"{server.url}{TEXT}", json=SHORT, timeout=PATIENCE)
        server.wait_for("completion_tokens=8")
        server.signal()
        assert server.ended() == 0
    begun = next(i for i, line in enumerate(server.lines) if TEXT in line and "curl" not in line)
    for line in server.lines[begun:]:
        if "running; ending within" in line:  # the last answer was there, but not yet counted as ended
            continue
        assert re.match(rf"\d\d:\d\d:\d\d 127.0.0.1 POST {TEXT} (200|-) ", line), line


LOADS_FOR_EVER = """
import time
from mer.cli.main import main
from mer.engine.engine import Engine

def load(*_, **__):
    print("loading", flush=True)
    time.sleep(1000)

Engine._load = load
main()
"""


def test_a_second_signal_ends_it_while_it_loads(model):
    command = [sys.executable, "-c", LOADS_FOR_EVER, "serve", str(model), "--port", "0", "--no-grpc"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout.readline() == "loading\n"
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):  # it ends when the load has
                process.wait(0.3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == -signal.SIGTERM
        finally:
            process.kill()


FAILS = """
from mer.cli.main import main
from mer.engine.scheduler import Scheduler

schedule = Scheduler.schedule

def failing(self, *args):
    if any(sequence.tokens[:3] == [5, 5, 5] for sequence in self.waiting):
        raise ZeroDivisionError("a bug")
    return schedule(self, *args)

Scheduler.schedule = failing
main()
"""
BAD = {"prompt": [5, 5, 5], "max_tokens": 4}


@pytest.fixture
def failing(monkeypatch):
    monkeypatch.setattr(http_server, "SERVE", [sys.executable, "-c", FAILS, "serve"])


def test_a_server_whose_only_engine_failed_ends(model, failing):
    """Who watches over it starts it anew; whoever was being served is told before."""
    with serving(model, "--context", 8192) as server, ThreadPoolExecutor(1) as pool:
        begun = threading.Event()
        running = pool.submit(stream, server, ENDLESS | {"max_tokens": 8000}, begun)
        assert begun.wait(PATIENCE)
        answer = httpx.post(f"{server.url}{TEXT}", json=BAD, timeout=PATIENCE)
        assert (answer.status_code, "a bug" in answer.json()["error"]["message"]) == (500, True)
        assert "a bug" in json.loads(running.result(PATIENCE)[-1])["error"]["message"]
        assert server.ended() == 1
        told = "".join(server.lines)
        assert told.count("the server ends, so that who watches over it starts it anew") == 1
        assert server.lines[-1].startswith("error: the engine stopped by an error inside mer: ZeroDivision")


def test_one_of_several_engines_that_failed_is_loaded_anew(model, failing):
    """The others go on, and the server is healthy."""
    with serving(model, f"other={model}", "--context", 8192) as server, ThreadPoolExecutor(1) as pool:

        def ask(body, name):
            return httpx.post(f"{server.url}{TEXT}", json={**body, "model": name}, timeout=PATIENCE)

        expected = ask(SHORT, "other").json()["choices"]
        begun = threading.Event()
        running = pool.submit(stream, server, ENDLESS | {"max_tokens": 3000}, begun)
        assert begun.wait(PATIENCE)
        for _ in range(2):
            assert ask(BAD, "other").status_code == 500
            server.wait_for("model other: .*a bug.*; the next request loads it anew")
            assert ask(SHORT, "other").json()["choices"] == expected
        assert httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
        assert json.loads(running.result(PATIENCE)[-2])["choices"][0]["finish_reason"] == "length"
        assert ask(BAD, "small").status_code == 500
        server.wait_for("model small: .*a bug.*; the next request loads it anew")
        assert ask(SHORT, "small").json()["choices"] == expected
        assert server.process.poll() is None


def test_log_for_people_with_prompts_where_asked(model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nann  secret\n\n")
    with serving(model, "--log-prompts", "--api-key-file", keys, MER_API_KEYS="other") as server:
        said = r"memory +up to ([\d.]+) MiB of the [\d.,]+ [MG]iB that it may take: 12 of 12 "
        taken = server.wait_for(said)
        resident = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
        assert int(resident) * 4096 <= float(taken[1]) * 1.01 * (1 << 20)
        for key in ("secret", "other"):
            answer = httpx.post(
                f"{server.url}{TEXT}",
                json=SHORT,
                headers={"Authorization": f"Bearer {key}"},
                timeout=PATIENCE,
            )
            assert answer.status_code == 200
        line = server.wait_for("ann").string
        assert re.search(rf"^\d\d:\d\d:\d\d 127.0.0.1 POST {TEXT} 200 [\d.]+ request_id=", line), line
        assert "The old man" in line
        assert "secret" not in "".join(server.lines)
        assert "key 1" in server.wait_for("key 1").string
        httpx.get(f"{server.url}/a%0Aforged%1Bb", timeout=PATIENCE)
        assert r"GET /a\nforged\x1bb 401" in server.wait_for("forged").string


def test_tls_with_certificates_of_both_sides(model, tmp_path):
    ca, other = trustme.CA(), trustme.CA()
    server_cert, client_cert = ca.issue_cert("127.0.0.1"), ca.issue_cert("client@example.org")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    server_cert.cert_chain_pems[0].write_to_path(cert)
    server_cert.private_key_pem.write_to_path(key)
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")

    def get(url, trusted, certificate=None):
        context = ssl.create_default_context()
        trusted.configure_trust(context)
        if certificate:
            certificate.configure_cert(context)
        with httpx.Client(verify=context, timeout=PATIENCE) as http:
            return http.get(f"{url}/v1/models").status_code

    with serving(model, "--tls-cert", cert, "--tls-key", key) as server:
        assert server.url.startswith("https://")
        assert get(server.url, ca) == 200
        context = ssl.create_default_context()
        ca.configure_trust(context)
        # HTTP/2 carries several requests at once; all end with the connection.
        with (
            httpx.Client(verify=context, http2=True, base_url=server.url, timeout=PATIENCE) as http,
            http.stream("POST", TEXT, json={**ENDLESS, "stream": True}) as endless,
        ):
            assert endless.http_version == "HTTP/2"
            next(endless.iter_bytes())
            assert http.post(TEXT, json=SHORT).json()["usage"]["completion_tokens"] == 8
        deadline = time.monotonic() + PATIENCE
        with httpx.Client(verify=context, base_url=server.url, timeout=PATIENCE) as http:
            while re.findall(r"mer_requests\{.*\} (\d)", http.get("/metrics").text) != ["0", "0"]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        with pytest.raises(httpx.ConnectError):
            get(server.url, other)
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http"), timeout=PATIENCE)
        assert get(server.url, ca) == 200
    options = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", tmp_path / "ca.pem"]
    with serving(model, *options) as server:
        assert get(server.url, ca, client_cert) == 200
        with pytest.raises(httpx.HTTPError):
            get(server.url, ca)


def listen_at(settings):
    told = ServerSettings(**{"model_name": "small", "port": 0} | settings)
    HttpServer(create_app(Service(told)), told)


async def test_settings_that_can_not_be(tmp_path):
    """Each is refused before the model is loaded, and names the option."""
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "odd").write_text("a b c\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for settings, message in (
            ({"tls_cert": tmp_path}, "--tls-cert and --tls-key belong together"),
            ({"tls_cert": tmp_path / "x", "tls_key": tmp_path / "x"}, "can't be used"),
            ({"tls_client_ca": tmp_path}, "--tls-client-ca needs"),
            ({"port": taken.getsockname()[1]}, "Address already in use"),
            ({"host": "203.0.113.1"}, "--host 203.0.113.1"),
            ({"host": "no.such.host.invalid"}, "--host no.such.host.invalid"),
        ):
            with pytest.raises(ConfigError, match=re.escape(message)):
                listen_at(settings)
    for name, message in (("none", "No such file"), ("empty", "no key is in there"), ("odd", "line 1")):
        with pytest.raises(ConfigError, match=message):
            read_keys(tmp_path / name, None)


def test_a_taken_port_is_one_line(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [*SERVE, model, "--no-grpc", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: --host 127.0.0.1, --port \d+: can't listen there: .*\n", done.stderr)
