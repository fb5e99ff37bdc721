"""`mer bundle`: what somebody who helps wants to know, in one file; nothing of what was asked or answered."""

from __future__ import annotations

import asyncio
import json
import platform
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import click
from attrs import asdict
from google.protobuf.json_format import MessageToDict

from mer._ext.cpus import numa_nodes, usable_cpus
from mer._ext.kernels import Kernels, isas
from mer.cli.gpus import survey
from mer.cli.remote import Remote, RemoteError, remote_options
from mer.errors import ConfigError
from mer.streaming.machine import describe
from mer.streaming.probe import uring_refusal
from mer.v1 import inference_pb2 as pb
from mer.v1.inference_pb2_grpc import InferenceStub

_README = """What `mer bundle` collected. There is no prompt, answer, key or host name in it.

packages.json  versions of Python and of what is installed beside mer
machine.json   processor, memory and limits, as `mer doctor` shows them
model.json     what the server serves, and what it uses for that
stats.json     its counters since it was started
watch.json     its requests (numbers and states), latencies and cache, now
errors.json    what could not be asked
"""


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@remote_options
def bundle(file: Path, **where: Any) -> None:
    """Write a support file (FILE.zip) about this machine and the server at ADDRESS.

    It has no prompt, answer, key or host name in it. Without a server the machine alone is described. An API
    key is taken from MER_API_KEY.
    """
    facts: dict[str, Any] = {"packages": _packages(), "machine": _machine()}
    server, errors = asyncio.run(_server(Remote(**where)))
    facts |= server
    facts["errors"] = errors
    try:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("README.txt", _README)
            for name, found in facts.items():
                archive.writestr(f"{name}.json", json.dumps(found, indent=1, default=str))
    except OSError as error:
        raise ConfigError(f"{file}: can't be written: {error.strerror or error}") from None
    for name, why in errors.items():
        click.echo(f"{name}: {why}", err=True)
    click.echo(f"{file}: {', '.join(name for name in facts if facts[name])}")


def _packages() -> dict[str, str]:
    found = {each.metadata["Name"]: each.version for each in distributions() if each.metadata["Name"]}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def _machine() -> dict[str, Any]:
    return {
        **asdict(describe()),
        "io_uring_refusal": uring_refusal(),
        "cpus": usable_cpus(),
        "numa_nodes": len(numa_nodes()),
        "instruction_sets": isas(),
        "kernels": Kernels().isa,
        "gpu": survey(measure=False),
        "libc": " ".join(platform.libc_ver()),
    }


async def _server(remote: Remote) -> tuple[dict[str, Any], dict[str, str]]:
    found: dict[str, Any] = {}
    async with remote.channel() as channel:
        stub = InferenceStub(channel)
        try:
            with remote.explained():
                model = await stub.GetModel(pb.GetModelRequest(), metadata=remote.metadata)
                found["model"] = MessageToDict(model, preserving_proto_field_name=True)
                stats = await stub.GetStats(pb.GetStatsRequest(), metadata=remote.metadata)
                found["stats"] = MessageToDict(stats, preserving_proto_field_name=True)
                async for now in stub.Watch(pb.WatchRequest(), metadata=remote.metadata):
                    found["watch"] = MessageToDict(now, preserving_proto_field_name=True)
                    break
        except RemoteError as error:
            return found, {"server": str(error)}
    return found, {}
