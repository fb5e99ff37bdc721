"""docs/http.md: its examples are run, and its tables are what the server takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from http_server import serving

from mer.api.http import errors, gate, schemas
from mer.cli.generation import engine_options
from mer.cli.serve import serve

TEXT = (Path(__file__).parent.parent / "docs/http.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def server():
    words = shlex.split(BLOCKS[0][1])
    assert words == ["mer", "serve", "demo"]
    with serving("demo") as server:
        yield server


@pytest.mark.parametrize(("language", "source"), BLOCKS[1:3])
def test_examples(server, language, source):
    source = source.replace("http://127.0.0.1:8000", server.url)
    command = ["bash", "-c", source] if language == "sh" else [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 15
    assert '"error":' not in done.stdout  # the model may write the word


def section(name):
    return TEXT.partition(f"## {name}\n")[2].partition("\n## ")[0]


def names(rows, cell):
    """What stands in backquotes in this column of a table's rows."""
    found = set()
    for row in rows.splitlines():
        if row.startswith("| ") and row.count("|") > cell:
            found |= set(re.findall(r"`([^`]+)`", row.split("|")[cell]))
    return found


def test_parameters():
    known = set()
    for kind in (schemas.ChatCompletionRequest, schemas.CompletionRequest):
        known |= {field.name for field in msgspec.structs.fields(kind)}
    told = {name.partition(".")[0] for name in names(section("Parameters"), 1)}
    assert told == known
    refused = set(
        re.findall(r"`(\w+)`", section("Parameters").partition("Not supported")[2].partition("\n\n")[0])
    )
    assert refused == set(schemas.UNSUPPORTED)


def test_options():
    shared = {param.name for param in engine_options(lambda: None).__click_params__} | {"model", "more"}
    known = {param.opts[-1] for param in serve.params if param.name not in shared}
    told = {name for name in names(section("Running a server"), 1) if name.startswith("--")}
    assert told == known


def test_codes():
    """Every code that an error may have stands in the table."""
    told = names(section("Errors"), 2)
    for module in (errors, gate, schemas):
        source = Path(module.__file__).read_text()
        assert set(re.findall(r'code="(\w+)"', source)) <= told | {"http_error"}
