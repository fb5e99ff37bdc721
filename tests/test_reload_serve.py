"""`mer serve` under constant load through both APIs while its model is exchanged; what operators call."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import asynccontextmanager, suppress

import grpc
import httpx
import pytest
from grpc_client import GREEDY, connected, generate, text_of
from http_server import PATIENCE, SERVE, serving
from test_reload import CONFIG, ask, damaged

from mer.api.model import Model
from mer.api.models import Models
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


class Load:
    """Three clients that ask the same over and over, by both APIs, and an operator by both."""

    def __init__(self, http, stub, operator, admin):
        self.http, self.operator, self.admin = http, operator, admin
        self._stub = stub
        self._done = [0, 0, 0]
        self._clients = []
        self.expected = ""

    async def over_http(self):
        answer = await self.http.post("/v1/completions", json=BODY)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    async def over_grpc(self):
        return await text_of(self._stub.Generate(generate(PROMPT)))

    async def cached(self, prompt, tokens=1):
        """(tokens of the prompt that were found, the answer)"""
        body = BODY | {"prompt": prompt, "max_tokens": tokens}
        told = (await self.http.post("/v1/completions", json=body)).json()
        return told["usage"]["prompt_tokens_details"]["cached_tokens"], told["choices"][0]["text"]

    async def begin(self):
        self.expected = await self.over_http()

        async def client(n, ask):
            while True:
                assert await ask() == self.expected
                self._done[n] += 1

        asks = (self.over_http, self.over_grpc, self.over_grpc)
        self._clients = [asyncio.create_task(client(n, ask)) for n, ask in enumerate(asks)]

    async def answered(self):
        """Each client has begun and ended a request since."""
        aim = [each + 2 for each in self._done]
        while any(now < then for now, then in zip(self._done, aim, strict=True)):
            for each in self._clients:
                if each.done():
                    each.result()
            await asyncio.sleep(0.005)

    async def reload(self, **body):
        answer = await self.operator.post("/admin/reload", json=body)
        assert answer.status_code == 200, answer.text

    async def refused(self, body, said):
        refused = await self.operator.post("/admin/reload", json=body)
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "reload_refused"
        assert said in refused.json()["error"]["message"]

    async def end(self):
        """None of them has seen an error."""
        for each in self._clients:
            each.cancel()
        ended = await asyncio.gather(*self._clients, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended


@asynccontextmanager
async def loaded(server):
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http,
        httpx.AsyncClient(base_url=admin_url(server), timeout=PATIENCE) as operator,
        connected(server.grpc_port) as stub,
        grpc.aio.insecure_channel(admin_target(server)) as channel,
    ):
        load = Load(http, stub, operator, rpc.AdminStub(channel))
        await load.begin()
        yield load
        await load.end()


PORTS = ("--grpc-port", 0, "--admin-port", 0, "--admin-grpc-port", 0)


async def test_twenty_reloads_under_load_through_both_apis(tmp_path):
    """Every other one over gRPC, the eleventh to a store with a wrong byte; some with a draft model."""
    bad = str(damaged(tmp_path / "bad"))
    with serving("demo", "--context", 256, *PORTS) as server:
        async with loaded(server) as load:
            seen = []
            drafts = {"draft-model": "demo", "speculate": "draft"}
            settings = {4: drafts, 8: dict.fromkeys(drafts, "")}
            for number in range(20):
                if number == 10:
                    await load.refused({"path": bad}, "its checksum is")
                elif number % 2:
                    told = await load.admin.Reload(pb.ReloadRequest(model="demo"))
                    assert told.model.state == "ready"
                else:
                    await load.reload(settings=settings.get(number, {}))
                await load.answered()
                seen.append(held(server))
            await load.end()
            (model,) = (await load.admin.ListModels(pb.ListModelsRequest())).models
            assert (model.state, model.generation, model.path) == ("ready", 20, str(model_path()))
            # An engine takes more than 15 MiB and several descriptors; those that leave may still be there.
            least = [min(each) for each in zip(*seen[5:], strict=True)]
            deadline = time.monotonic() + PATIENCE
            while True:
                memory, files = held(server)
                if memory < least[0] + (64 << 20) and files < least[1] + 10:
                    break
                assert time.monotonic() < deadline, (memory, files, least)
                await asyncio.sleep(0.05)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await load.admin.Reload(pb.ReloadRequest(path=bad))
            assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "its checksum is" in error.value.details()
            assert await load.over_http() == await load.over_grpc() == load.expected


async def test_the_prefix_store_goes_from_hand_to_hand_under_load(tmp_path):
    """What was computed before a reload is read back after it; a model that is refused leaves it alone."""
    bad, store = damaged(tmp_path / "bad"), tmp_path / "store"
    prompts = [f"{n} " + "The old man looked at the sea and said nothing. " * 6 for n in range(3)]

    def has_store():
        places = f"/proc/{server.process.pid}/fd"
        for fd in os.listdir(places):
            with suppress(FileNotFoundError):  # one that was closed just now
                if os.readlink(f"{places}/{fd}") == f"{store}/prefix.index":
                    return True
        return False

    with serving("demo", "--context", 512, "--prefix-store", store, *PORTS) as server:
        async with loaded(server) as load:
            before = [await load.cached(prompt) for prompt in prompts]
            assert {cached for cached, _ in before} == {0}
            for prompt, (_, answer) in zip(prompts, before, strict=True):
                await load.reload()
                await asyncio.to_thread(server.wait_for, "model demo: has the prefix store")
                cached, now = await load.cached(prompt)
                assert (cached >= 32, now) == (True, answer)
                await load.answered()
            await load.refused({"path": str(bad)}, "its checksum is")
            assert has_store()
            # The same answers, and other files: nobody's prefixes but its own.
            shutil.copytree(model_path(), tmp_path / "other", copy_function=shutil.copyfile)
            await load.reload(path=str(tmp_path / "other"))
            await asyncio.to_thread(server.wait_for, "model demo: has the prefix store")
            assert await load.cached(prompts[0]) == before[0]


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
