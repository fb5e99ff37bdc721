"""`mer serve` under constant load through both APIs while its model is exchanged; what operators call."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import time

import grpc
import httpx
import pytest
from grpc_client import GREEDY, connected, generate, text_of
from http_server import PATIENCE, SERVE, serving
from test_reload import CONFIG, ask, damaged

from mer.api.models import Model, Models
from mer.demo import model_path
from mer.engine.sharing import shares
from mer.errors import BudgetError
from mer.v1 import admin_pb2 as pb
from mer.v1 import admin_pb2_grpc as rpc

PROMPT = "Once upon a time"
BODY = {"prompt": PROMPT, "max_tokens": GREEDY.max_tokens, "temperature": 0, "ignore_eos": True}
RELOADED = "model demo: reloaded from"


def admin_url(server):
    return re.search(r"admin endpoints at (\S+)", "".join(server.lines))[1]


def admin_target(server):
    return "127.0.0.1:" + re.search(r"admin service on port (\d+)", "".join(server.lines))[1]


def held(server):
    """(resident bytes, file descriptors) of the server's process."""
    status = f"/proc/{server.process.pid}/status"
    with open(status) as file:
        rss = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    return rss << 10, len(os.listdir(f"/proc/{server.process.pid}/fd"))


async def test_twenty_reloads_under_load_through_both_apis(tmp_path):
    """Every other one over gRPC, the eleventh to a store with a wrong byte."""
    ports = ("--grpc-port", 0, "--admin-port", 0, "--admin-grpc-port", 0)
    bad = str(damaged(tmp_path / "bad"))
    with serving("demo", "--context", 256, *ports) as server:
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http,
            httpx.AsyncClient(base_url=admin_url(server), timeout=PATIENCE) as operator,
            connected(server.grpc_port) as stub,
            grpc.aio.insecure_channel(admin_target(server)) as channel,
        ):
            admin = rpc.AdminStub(channel)

            async def over_http():
                answer = await http.post("/v1/completions", json=BODY)
                assert answer.status_code == 200, answer.text
                return answer.json()["choices"][0]["text"]

            async def over_grpc():
                return await text_of(stub.Generate(generate(PROMPT)))

            expected = await over_http()
            done = [0, 0, 0]

            async def client(n, ask):
                while True:
                    assert await ask() == expected
                    done[n] += 1

            clients = [
                asyncio.create_task(client(n, ask)) for n, ask in enumerate((over_http, over_grpc, over_grpc))
            ]

            async def answered():
                """Each has begun and ended a request since."""
                aim = [each + 2 for each in done]
                while any(now < then for now, then in zip(done, aim, strict=True)):
                    for each in clients:
                        if each.done():
                            each.result()
                    await asyncio.sleep(0.005)

            seen = []
            for number in range(20):
                if number == 10:
                    refused = await operator.post("/admin/reload", json={"path": bad})
                    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_refused")
                elif number % 2:
                    told = await admin.Reload(pb.ReloadRequest(model="demo"))
                    assert told.model.state == "ready"
                else:
                    assert (await operator.post("/admin/reload", json={})).status_code == 200
                await answered()
                seen.append(held(server))
            for each in clients:
                each.cancel()
            ended = await asyncio.gather(*clients, return_exceptions=True)
            assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended
            (model,) = (await admin.ListModels(pb.ListModelsRequest())).models
            assert (model.state, model.generation, model.path) == ("ready", 20, str(model_path()))
            memory, files = zip(*seen[5:], strict=True)
            # An engine takes more than 15 MiB and several descriptors; one that leaves may still be there.
            assert max(memory) < min(memory) + (64 << 20)
            assert max(files) < min(files) + 10
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await admin.Reload(pb.ReloadRequest(path=bad))
            assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "its checksum is" in error.value.details()
            assert await over_http() == await over_grpc() == expected


def test_hang_up_reloads_models_and_keys_and_none_is_lost(tmp_path):
    keys, path = tmp_path / "keys", tmp_path / "demo"
    keys.write_text("ann first\n")
    shutil.copytree(model_path(), path)
    with serving(path, "--context", 256, "--api-key-file", keys) as server:

        def complete(key):
            headers = {"X-Api-Key": key}
            return httpx.post(f"{server.url}/v1/completions", json=BODY, headers=headers, timeout=PATIENCE)

        expected = complete("first").json()["choices"]
        keys.write_text("ann second\n")
        server.signal(signal.SIGHUP)
        server.wait_for(RELOADED)
        assert [complete(key).status_code for key in ("first", "second")] == [401, 200]
        # One may come while another goes on: what changed meanwhile counts.
        server.signal(signal.SIGHUP)
        keys.write_text("ann third\n")
        server.signal(signal.SIGHUP)
        deadline = time.monotonic() + PATIENCE
        while complete("third").status_code != 200:
            assert time.monotonic() < deadline, "a signal was lost"
            time.sleep(0.02)
        assert complete("third").json()["choices"] == expected
        os.replace(
            damaged(tmp_path / "bad") / "experts-00001.safetensors", path / "experts-00001.safetensors"
        )
        server.signal(signal.SIGHUP)
        server.wait_for("not reloaded, the old one serves on: .*its checksum is")
        assert complete("third").json()["choices"] == expected


def test_commands_of_operators(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("operator secret\n")
    options = ("--context", 256, "--admin-port", 0, "--admin-key-file", keys)
    with serving("demo", *options) as server:

        def mer(*arguments, key="secret"):
            command = [*SERVE[:-1], *arguments, "--server", admin_url(server)]
            told = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE,
                env={**os.environ, "MER_ADMIN_KEY": key},
            )  # fmt: skip
            return told.returncode, told.stdout, told.stderr

        status, out, _ = mer("reload", "demo", "--set", "cache-policy=lru")
        assert (status, out.startswith(f"demo serves {model_path()} after")) == (0, True)
        status, out, _ = mer("set", "ram", "2GiB")
        assert (status, out.startswith("2.0 GiB from now on")) == (0, True), out
        for arguments, said in (
            (("reload", "other"), "'other' is not served here"),
            (("reload", "--path", str(damaged(tmp_path / "bad"))), "its checksum is"),
            (("reload", "--set", "port=1"), "port: no setting that can be changed"),
            (("set", "ram", "1KiB"), "too little"),
        ):
            status, _, error = mer(*arguments)
            assert status, arguments
            assert said in error
            assert "Traceback" not in error
        status, _, error = mer("reload", key="wrong")
        assert (status, "MER_ADMIN_KEY" in error) == (1, True)
        answer = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=PATIENCE)
        assert answer.status_code == 200


async def test_the_model_that_was_asked_for_least_recently_is_unloaded():
    models = Models([Model(name, model_path(), CONFIG) for name in ("one", "two", "three")])
    await models.open_first()

    def states():
        return [each.state for each in models.states()]

    def least():
        """MiB that do for two of them with comfort, and so not for three."""
        return next(mib for mib in range(1, 1 << 20) if fits(mib << 20))

    def fits(ram):
        try:
            return shares(ram, models.budgets, 0.1)
        except BudgetError:
            return False

    expected = await ask(models, "one")
    assert await ask(models, "two") == expected
    await models.set_ram((least() + 1) << 20)
    assert states() == ["ready", "ready", "unloaded"]
    await ask(models, "one")
    assert await ask(models, "three") == expected
    assert states() == ["ready", "unloaded", "ready"]
    assert await ask(models, "two") == expected
    assert states() == ["unloaded", "ready", "ready"]
    await models.close(drain=True)
