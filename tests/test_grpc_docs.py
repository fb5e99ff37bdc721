"""What docs/grpc.md shows is run here, against a server with the bundled model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from http_server import serving
from node_packages import NODE, needs_node, node_modules

from mer.api.grpc.errors import _KINDS
from mer.v1 import inference_pb2 as pb

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs/grpc.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


@pytest.fixture(scope="module")
def port():
    with serving("demo", "--grpc-port", 0) as server:
        yield server.grpc_port


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(port, program):
    assert len(run([sys.executable, "-c", program.replace("50051", str(port))]).split()) > 20


def test_it_begins_with_one():
    assert DOCS.index("```python") < DOCS.index("## ")


@needs_node
def test_program_for_node(port):
    [program] = re.findall(r"```js\n(.*?)```", DOCS, re.DOTALL)
    packages = node_modules(ROOT / "tests/grpc_node")
    text = run([str(NODE), "-e", program.replace("50051", str(port))], NODE_PATH=str(packages))
    assert len(text.split()) > 20


def test_every_call_and_reason_is_there():
    for method in pb.DESCRIPTOR.services_by_name["Inference"].methods:
        assert f"`{method.name}`" in DOCS
    for _, code, reason in _KINDS:
        assert re.search(rf"\b{code.name}\b", DOCS), code
        assert re.search(rf"\b{reason}\b", DOCS), reason
