"""`mer cluster` as far as it needs no Ray: what it refuses, and that Ray is asked for by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from mer.cli import cluster
from mer.cli.top import top
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


def test_status_says_how_engines_are_watched(monkeypatch):
    """By a command that `mer top` takes, with the address of the gRPC API."""
    engine = {
        "replica": "one", "node": "10.0.0.1", "address": "127.0.0.1:7000", "url": "http://127.0.0.1:8000",
        "running": 0, "waiting": 0, "queue_seconds": 0.0, "peers": 0, "pid": 1,
    }  # fmt: skip
    found = SimpleNamespace(nodes=1, status="RUNNING", shards=[], engines=[engine])
    monkeypatch.setattr(cluster, "_connected", lambda _: SimpleNamespace(state=lambda: found))
    printed = CliRunner().invoke(cluster.cluster, ["status"]).output.splitlines()
    said = next(line for line in printed if "mer top" in line)
    command, metrics = said.partition("mer top ")[2].split(", ")
    assert top.make_context("top", command.split()).params["address"] == "127.0.0.1:7000"
    assert metrics == "http://127.0.0.1:8000/metrics"


GIVEN = {"model": "demo", "model_name": "demo", "shard_ram": 1, "ram": 1, "replicas": 1, "most_replicas": 1}


def test_between_machines_certificates_are_needed():
    files = Certificates(cert=Path("a"), key=Path("b"), ca=Path("c"), token=Path("d"))
    Plan(**GIVEN, shards=2).check_nodes(1)
    Plan(**GIVEN, shards=0).check_nodes(3)
    Plan(**GIVEN, shards=2, certificates=files).check_nodes(3)
    with pytest.raises(ConfigError, match=r"there are 3 nodes.*--peer-token"):
        Plan(**GIVEN, shards=2).check_nodes(3)


def test_room_for_all_of_it():
    """Of 3 shards and 2 engines, what all nodes have together."""
    plan = Plan(
        **GIVEN | {"shards": 3, "shard_ram": 5 << 20, "replicas": 2, "most_replicas": 9, "ram": 7 << 20}
    )
    plan.check_room({"CPU": 5.0, "memory": 29 << 20, "GPU": 1})
    for total in {"CPU": 4.0, "memory": 1 << 40}, {"CPU": 64.0, "memory": 28 << 20}, {}:
        with pytest.raises(
            ConfigError, match="3 shards and 2 engines need 5 CPUs and 29 MiB; Ray's nodes have"
        ):
            plan.check_room(total)
