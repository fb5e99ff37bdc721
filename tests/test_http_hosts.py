"""Names by which a server may be called, and requests that it counts as refused."""

from __future__ import annotations

import pytest
from engine_models import opened, write_text_model
from grpc_client import connected, generate, pieces, refused
from http_server import asking
from test_metrics import values

from mer.api.access import Access
from mer.api.grpc.server import serve_grpc
from mer.api.http.errors import ApiError
from mer.api.http.hosts import Hosts
from mer.api.settings import ServerSettings
from mer.v1 import inference_pb2 as pb

BODY = {"prompt": [5, 6], "max_tokens": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("hosts"), chat=True)


@pytest.mark.parametrize(
    ("settings", "good", "bad"),
    [
        (
            {},
            ["localhost", "LOCALHOST:80", "localhost.", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", ""],
            ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
             "10.0.0.1", "[::2]", "[::1", "0.0.0.0", "user@evil.example", "localhost@evil.example", "a b"],
        ),
        ({"host": "::1"}, ["[::1]:1", "localhost"], ["[::2]"]),
        ({"allowed_hosts": ("Box.Local", "proxy:443")}, ["box.local:1", "proxy", "localhost"], ["other"]),
        ({"allowed_hosts": ("*",)}, ["anything"], []),
        ({"host": "0.0.0.0"}, ["anything", "10.0.0.1"], []),
        ({"host": "0.0.0.0", "allowed_hosts": ("box",)}, ["box", "localhost"], ["anything"]),
        ({"host": "box.local"}, ["anything"], []),
    ],
)  # fmt: skip
def test_hosts(settings, good, bad):
    hosts = Hosts(ServerSettings(model_name="x", **settings))
    for name in good:
        hosts.check({"host": name})
    hosts.check({})
    for name in bad:
        with pytest.raises(ApiError) as caught:
            hosts.check({"host": name})
        assert (caught.value.status, caught.value.code) == (403, "host_not_allowed")
        assert "--allowed-host" in str(caught.value)


def test_origins():
    hosts = Hosts(ServerSettings(model_name="x", cors_origins=("https://app.example",)))
    for origin in "http://localhost:3000", "http://127.0.0.1", "https://app.example", "tauri://localhost":
        hosts.check({"host": "localhost", "origin": origin})
    for origin in "null", "https://evil.example", "http://app.example", "https://app.example.evil", "":
        with pytest.raises(ApiError, match="--cors-origin"):
            hosts.check({"host": "localhost", "origin": origin})
    Hosts(ServerSettings(model_name="x", cors_origins=("*",))).check({"origin": "null"})


async def test_web_pages_that_call_the_server_by_their_own_name(model):
    async with opened(model) as engine, asking(engine) as client:
        for headers in {"Host": "evil.example"}, {"Origin": "http://evil.example"}:
            for path, kind in (
                ("/v1/completions", "invalid_request_error"),
                ("/v1/messages", "permission_error"),
            ):
                answer = await client.post(path, json=BODY, headers=headers)
                assert answer.status_code == 403
                assert answer.json()["error"]["type"] == kind
            assert (await client.get("/v1/models", headers=headers)).status_code == 403
            assert (await client.get("/health", headers=headers)).status_code == 200
        assert (await client.post("/v1/completions", json=BODY, headers={"Host": "localhost"})).is_success


async def test_refusals_are_counted_by_reason(model):
    async with opened(model) as engine:
        settings = {"api_keys": {"secret": "me"}, "rate_limit": 5, "max_body": 1000}
        async with asking(engine, **settings) as client:
            key = {"Authorization": "Bearer secret"}
            await client.post("/v1/completions", json=BODY)
            await client.post("/v1/completions", json=BODY, headers=key | {"Host": "evil.example"})
            await client.post("/v1/completions", json=BODY | {"n": 0}, headers=key)
            await client.get("/v1/models/other", headers=key)
            await client.post("/v1/completions", content=b"x" * 1001, headers=key)
            await client.post("/v1/completions", json=BODY | {"timeout": 1e-9}, headers=key)
            for _ in range(5):
                last = await client.post("/v1/completions", json=BODY, headers=key)
            assert last.status_code == 429
            found = values((await client.get("/metrics", headers=key)).content)
    counts = {
        name.split()[1]: count
        for name, count in found.items()
        if name.startswith("mer_requests_refused_total")
    }
    assert counts == {"auth": 1, "host": 1, "invalid": 2, "too_large": 1, "rate_limit": 2, "queue_full": 0,
                      "loading": 0, "shutting_down": 0, "engine_failed": 0}  # fmt: skip


async def test_refused_calls_are_counted_as_well(model):
    access = Access({"secret": "me"}, rate_limit=3)
    key = (("x-api-key", "secret"),)
    async with opened(model) as engine:
        server = await serve_grpc(engine, ServerSettings(model_name="x", grpc_port=0), access)
        try:
            async with connected(server.port) as stub:
                await refused(stub.Generate(generate("x")))
                await refused(stub.Generate(generate("x", pb.SamplingParams(top_p=2)), metadata=key))
                wrong = pb.SessionRequest(id="a", generate=generate("x", pb.SamplingParams(top_p=2)))
                await pieces(stub.Session(iter([wrong, pb.SessionRequest(id="b")]), metadata=key))
                assert await pieces(stub.Generate(generate("x"), metadata=key))
                await refused(stub.Generate(generate("x"), metadata=key))
        finally:
            await server.stop(0)
    assert {name: count for name, count in access.refused.items() if count} == {
        "auth": 1, "invalid": 3, "rate_limit": 1,
    }  # fmt: skip
