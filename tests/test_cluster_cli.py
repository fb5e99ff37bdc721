"""`mer cluster` as far as it needs no Ray: what it refuses, and that Ray is asked for by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mer.deploy.plan import Certificates, Plan
from mer.errors import ConfigError

MER = [sys.executable, "-c", "from mer.cli.main import main; main()", "cluster"]
# Also where Ray is installed.
WITHOUT_RAY = [sys.executable, "-c", "import sys; sys.modules['ray'] = None; " + MER[2], "cluster"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MER, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "command", [("up", "demo", "--ram", "1GiB"), ("up", "demo"), ("up", "--wat"), ("status",), ("down",)]
)
def test_ray_is_missing(command):
    done = subprocess.run([*WITHOUT_RAY, *command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "needs Ray, which is not installed: pip install 'mer[ray]'" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--replicas", 3, "--max-replicas", 2), "--max-replicas 2 is less than --replicas 3"),
        (("--tls-cert", __file__), "--tls-cert and --tls-key belong together"),
        (("--peer-cert", __file__, "--peer-key", __file__), "give all four of them"),
    ],
)
def test_what_can_not_be(options, words):
    done = run("up", "demo", "--ram", "1GiB", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr


def test_between_machines_certificates_are_needed():
    given = {
        "model": "demo", "model_name": "demo", "shard_ram": 1, "ram": 1, "replicas": 1, "most_replicas": 1,
    }  # fmt: skip
    files = Certificates(cert=Path("a"), key=Path("b"), ca=Path("c"), token=Path("d"))
    Plan(**given, shards=2).check_nodes(1)
    Plan(**given, shards=0).check_nodes(3)
    Plan(**given, shards=2, certificates=files).check_nodes(3)
    with pytest.raises(ConfigError, match=r"there are 3 nodes.*--peer-token"):
        Plan(**given, shards=2).check_nodes(3)
