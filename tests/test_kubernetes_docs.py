"""docs/kubernetes.md: its certificates let an engine in to a shard, and helm takes its command."""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from engine_models import opened, prompt, write_text_model
from shards import LONG, peers, settled, shard, until
from test_helm import helm, needs_node  # noqa: F401 (a fixture)

from mer import SamplingParams

PAGE = (Path(__file__).parent.parent / "docs/kubernetes.md").read_text()
CERTIFICATES, SECRETS, INSTALL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
async def test_certificates(tmp_path):
    """For the name of this machine, which has an address; the shard listens as in the chart."""
    commands, count = re.subn(r"^NAME=.*$", "NAME=localhost", CERTIFICATES, flags=re.MULTILINE)
    assert count == 1
    command = ["sh", "-ec", commands]
    await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, check=True, capture_output=True, timeout=LONG
    )
    made = [word.removeprefix("--from-file=") for word in shlex.split(SECRETS) if "--from-file" in word]
    ca, cert, key, token = (tmp_path / name for name in made)
    model = write_text_model(tmp_path / "tiny")
    options = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", ca, "--token-file", token)
    with shard(model, "--ram", "1GiB", *map(str, options)) as one:
        async with opened(
            model, peers=(f"dns:localhost:{one.port}",), peer_ca=ca, peer_cert=cert, peer_key=key,
            peer_token=token, cache_experts=4, prefetch=0,
        ) as engine:  # fmt: skip
            await until(lambda: settled(engine), "experts are held")
            found = (await engine.generate(prompt(20), PARAMS)).token_ids
            assert peers(engine)[0].failures == 0
    async with opened(model) as engine:
        assert (await engine.generate(prompt(20), PARAMS)).token_ids == found


@needs_node
def test_install(helm):  # noqa: F811
    """Its values are such as the chart takes, and the names in the page are those of its objects."""
    words = shlex.split(INSTALL.replace("\\\n", " "))
    assert words[:4] == ["helm", "install", "my", "deploy/helm/mer"]
    done = subprocess.run(
        [str(helm), "template", *words[2:]], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
        timeout=LONG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    objects = {
        (each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout) if each
    }
    for each in objects.values():
        kubernetes_validate.validate(each, "1.34", strict=True)
    (certificate,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    asked = yaml.safe_load(certificate)["spec"]
    assert f"NAME={asked['dnsNames'][0]}\n" in CERTIFICATES
    (container,) = objects["Deployment", "my-mer"]["spec"]["template"]["spec"]["containers"]
    assert f"--peer=dns:{asked['dnsNames'][0]}:9100" in container["args"]
    volumes = objects["StatefulSet", "my-mer-shards"]["spec"]["template"]["spec"]["volumes"]
    secrets = {each["secret"]["secretName"] for each in volumes if "secret" in each}
    assert secrets == {asked["secretName"], "mer-join"}
    assert all(f"secret generic {name} " in SECRETS for name in secrets)
