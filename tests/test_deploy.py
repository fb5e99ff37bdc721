"""Container, dashboard, unit of systemd, manual pages and completion: checked by others' tools."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from packaging.requirements import Requirement

from mer.cli.cluster import cluster
from mer.cli.draft import draft
from mer.cli.main import COMMANDS
from mer.cli.serve import serve

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMES = set(re.findall(r"^\| `(mer_\w+)`", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)


# ---- container ----


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("requirements.txt", PROJECT["project"]["dependencies"]),
        ("build-requirements.txt", PROJECT["build-system"]["requires"]),
        ("requirements-cuda.txt", PROJECT["project"]["optional-dependencies"]["cuda"]),
        ("requirements-cuda12.txt", PROJECT["project"]["optional-dependencies"]["cuda12"]),
    ],
)
def test_what_is_pinned_is_what_is_wanted(file, wanted):
    """Otherwise: tools/lock.sh."""
    text = (DEPLOY / "docker" / file).read_text()
    pinned = dict(
        re.findall(r"^([\w.-]+)(?:\[\w+\])?==(\S+) \\\n +--hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    )
    assert len(pinned) == len(re.findall("==", text)), "each has a hash"
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_dockerfile():
    found = run(Path(sys.executable).parent / "hadolint", DEPLOY / "docker/Dockerfile")
    assert (found.returncode, found.stdout) == (0, "")


def test_compose():
    compose = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())
    mer = compose["services"]["mer"]
    assert (DEPLOY / "docker" / mer["build"]["context"]).resolve() == ROOT
    assert (ROOT / mer["build"]["dockerfile"]).is_file()
    known = {option for parameter in serve.params for option in parameter.opts}
    assert {word for word in mer["command"] if word.startswith("--")} <= known
    for service in compose["services"].values():
        for volume in service["volumes"]:
            here, _, _ = volume.partition(":")
            if here.startswith("."):
                assert (DEPLOY / "docker" / here).exists(), here
            else:
                assert here.startswith("${") or here in compose["volumes"], here
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


# ---- Prometheus and Grafana ----


def names(expression: str) -> set[str]:
    """The metrics of a query, without what a histogram adds to its name; fails if it can't be parsed."""
    text = expression.replace("$__rate_interval", "1m").replace("$instance", "a")
    promql_parser.parse(text)
    return {re.sub("_(bucket|sum|count)$", "", each) for each in re.findall(r"\bmer_\w+", text)}


def test_dashboard():
    board = json.loads((DEPLOY / "grafana/dashboards/mer.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    used: set[str] = set()
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        for target in panel["targets"]:
            used |= names(target["expr"])
    assert used <= NAMES
    shown_elsewhere = {"mer_engine_info", "mer_expert_cache_evictions_total"}  # a label; as many as misses
    assert NAMES - used <= shown_elsewhere, "a new metric wants a place in the dashboard"
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in board["panels"]}) == len(places)


def test_alerts_and_provisioning():
    alerts: dict[str, Any] = yaml.safe_load((DEPLOY / "grafana/alerts.yml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    assert rules
    for rule in rules:
        assert names(rule["expr"]) <= NAMES
        assert rule["annotations"]["summary"]
    scraped = yaml.safe_load((DEPLOY / "docker/prometheus.yml").read_text())
    assert scraped["scrape_configs"][0]["job_name"] == "mer"
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"


# ---- systemd, manual, completion ----


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_unit(tmp_path):
    text = (DEPLOY / "systemd/mer.service").read_text()
    program = tmp_path / "mer"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "mer.service"
    unit.write_text(
        text.replace("/opt/mer/bin/mer", str(program)).replace("man:mer(1)", "https://example.org")
    )
    found = run("systemd-analyze", "verify", unit)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_options_of_the_unit():
    (line,) = re.findall(r"^ExecStart=(.*)$", (DEPLOY / "systemd/mer.service").read_text(), re.MULTILINE)
    known = {option for parameter in serve.params for option in parameter.opts}
    assert {word for word in line.split() if word.startswith("--")} <= known


def test_manual_pages(tmp_path):
    made = run(sys.executable, ROOT / "tools/man.py", tmp_path)
    assert made.returncode == 0, made.stderr
    names = {"mer", *(f"mer-{name}" for name in COMMANDS)}
    names |= {f"mer-{group.name}-{name}" for group in (cluster, draft) for name in group.commands}
    assert {page.stem for page in tmp_path.iterdir()} == names
    page = (tmp_path / "mer-serve.1").read_text().replace("\\-", "-")
    for parameter in serve.params:
        assert all(option in page for option in parameter.opts if option.startswith("--"))
    whole = (tmp_path / "mer.1").read_text()
    assert all(line in whole for line in COMMANDS.values())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    mer = [sys.executable, "-c", "from mer.cli.main import main; main()"]
    script = run(*mer, "completion", shell)
    assert script.returncode == 0, script.stderr
    assert f"_MER_COMPLETE={shell}_complete" in script.stdout
    if shutil.which(shell) and shell != "zsh":
        assert run(shell, "-n", "-c", script.stdout).returncode == 0


def test_bash_completes(tmp_path):
    program = tmp_path / "mer"
    program.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from mer.cli.main import main; main()' \"$@\"\n"
    )
    program.chmod(0o755)
    asked = f"""
        eval "$({program} completion bash)"
        COMP_WORDS=(mer serve --grpc) COMP_CWORD=2
        _mer_completion {program}
        echo "${{COMPREPLY[@]}}"
    """
    assert run("bash", "-c", asked).stdout == "--grpc-port\n"
