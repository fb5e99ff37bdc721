"""`mer bundle`: what is in it, and what is not."""

from __future__ import annotations

import asyncio
import json
import platform
import zipfile

import pytest
from click.testing import CliRunner
from engine_models import write_text_model
from grpc_client import FOREVER, generate, served, slowed

from mer.cli.bundle import bundle
from mer.errors import ConfigError

SECRET = "the old man and the sea"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("bundle") / "tiny")


def read(path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


async def test_of_a_server(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MER_API_KEY", "sk-not-for-others")
    async with served(model, {}, cache_experts=4) as (stub, engine, server):
        with slowed(0.02):
            running = stub.Generate(generate(SECRET, FOREVER))
            await running.read()
            arguments = [str(tmp_path / "b.zip"), f"127.0.0.1:{server.port}"]
            done = await asyncio.to_thread(CliRunner().invoke, bundle, arguments)
            running.cancel()
        experts = engine.budget.experts
    assert done.exit_code == 0, done.output
    found = read(tmp_path / "b.zip")
    assert set(found) == {
        "README.txt", "packages.json", "machine.json", "model.json", "stats.json", "watch.json", "errors.json"
    }  # fmt: skip
    assert json.loads(found["stats.json"])["experts"] == experts
    assert len(json.loads(found["watch.json"])["requests"]) == 1
    assert json.loads(found["packages.json"])["python"] == platform.python_version()
    everything = "".join(found.values())
    for secret in (SECRET, "sk-not-for-others", platform.node()):
        assert secret not in everything


def test_without_a_server(tmp_path):
    done = CliRunner().invoke(bundle, [str(tmp_path / "b.zip"), "127.0.0.1:1"])
    assert done.exit_code == 0
    assert "no server answers there" in done.stderr
    found = read(tmp_path / "b.zip")
    assert "no server answers there" in json.loads(found["errors.json"])["server"]
    assert json.loads(found["machine.json"])["memory"]["total"] > 0


def test_where_it_cannot_be_written(tmp_path):
    done = CliRunner().invoke(bundle, [str(tmp_path / "nowhere/b.zip"), "127.0.0.1:1"])
    assert isinstance(done.exception, ConfigError)
    assert "nowhere" in str(done.exception)
