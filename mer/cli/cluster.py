"""`mer cluster`: shards and engines on the machines of a Ray cluster."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any, get_args

import attrs
import click
from rich.table import Table

from mer.api.settings import is_loopback, read_keys
from mer.cli.common import messages, output, seconds, size_option
from mer.config import ExpertWire
from mer.deploy.plan import Certificates, Plan
from mer.errors import ConfigError

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_ray = click.option(
    "--ray",
    "address",
    default="auto",
    show_default=True,
    metavar="ADDRESS",
    help="Of the Ray to use, HOST:PORT; auto: the one that this machine belongs to.",
)


class _OnRay(click.Command):
    """Without Ray no option is worth mending: it says so before what else may be wrong."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError:
            _require_ray()
            raise


@click.group()
def cluster() -> None:
    """Shards and engines on the machines of a Ray cluster, behind one address."""


cluster.command_class = _OnRay


def _require_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("a cluster needs Ray, which is not installed: pip install 'mer[ray]'")


def _connected(address: str) -> Any:
    """mer.deploy.ray_cluster, which imports Ray."""
    _require_ray()
    from mer.deploy import ray_cluster

    ray_cluster.connect(address)
    return ray_cluster


@cluster.command()
@click.argument("model")
@click.option("--shards", type=click.IntRange(0), default=0, show_default=True, help="How many.")
@click.option("--shard-ram", callback=size_option, help="Memory of each; default: as --ram.")
@click.option("--shard-cpus", type=click.IntRange(1), default=1, show_default=True, help="Threads of each.")
@click.option(
    "--shard-port",
    type=click.IntRange(0, 65535),
    default=9100,
    show_default=True,
    help="Of the first, the next one has the next; 0: free ones.",
)
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="Engines.")
@click.option("--max-replicas", type=click.IntRange(1), help="Most engines; default: no scaling.")
@click.option(
    "--queue-seconds",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="An engine is added where requests wait longer for their first step.",
)
@click.option("--ram", callback=size_option, required=True, help="Memory of each engine.")
@click.option("--cpus", type=click.IntRange(1), default=1, show_default=True, help="Threads of each engine.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--grpc-port", type=click.IntRange(1, 65535), default=50051, show_default=True)
@click.option("--no-grpc", is_flag=True, help="HTTP alone.")
@click.option("--served-model-name", "model_name", help="What clients call the model; default: MODEL.")
@click.option("--api-key-file", type=_FILE, help="Keys of which a client must send one, as of `mer serve`.")
@click.option("--tls-cert", type=_FILE, help="Certificate chain (PEM): HTTPS.")
@click.option("--tls-key", type=_FILE, help="Its private key (PEM).")
@click.option("--context", type=click.IntRange(16), help="As of `mer serve`.")
@click.option("--cache-experts", metavar="N|P%", help="As of `mer serve`.")
@click.option("--max-running", type=click.IntRange(1), metavar="N", help="As of `mer serve`.")
@click.option("--expert-wire", type=click.Choice(get_args(ExpertWire)), help="As of `mer serve`.")
@click.option("--peer-cert", "cert", type=_FILE, help="Certificate of shards and engines (PEM).")
@click.option("--peer-key", "key", type=_FILE, help="Its private key (PEM).")
@click.option("--peer-ca", "ca", type=_FILE, help="Who signed it (PEM).")
@click.option("--peer-token", "token", type=_FILE, help="A file with the join token.")
@_ray
def up(
    model: str,
    shard_ram: int | None,
    max_replicas: int | None,
    no_grpc: bool,
    model_name: str | None,
    api_key_file: Path | None,
    address: str,
    **options: Any,
) -> None:
    """Start shards and engines of MODEL, and wait until requests can come.

    MODEL is as in `mer serve`, the same on every node; so are files. Ray starts anew what ends by itself.
    """
    files = {name: options.pop(name) for name in ("cert", "key", "ca", "token")}
    given = {name: file.resolve() for name, file in files.items() if file is not None}
    if given and len(given) < len(files):
        raise ConfigError("--peer-cert, --peer-key, --peer-ca and --peer-token: give all four of them")
    engine = {name: options.pop(name) for name in ("context", "cache_experts", "max_running", "expert_wire")}
    plan = Plan(
        model=str(Path(model).resolve()) if Path(model).exists() else model,
        model_name=model_name or Path(model).name,
        shard_ram=shard_ram or options["ram"],
        most_replicas=max_replicas or options["replicas"],
        api_keys=read_keys(api_key_file, os.environ.get("MER_API_KEYS")),
        engine={name: value for name, value in engine.items() if value is not None},
        certificates=Certificates(**given) if given else None,
        **options | ({"grpc_port": None} if no_grpc else {}),
    )
    _connected(address).up(plan)
    scheme = "https" if plan.tls_cert else "http"
    console = messages()
    grpc = f", gRPC on port {plan.grpc_port}" if plan.grpc_port is not None else ""
    console.print(
        f"{plan.model_name} is served at {scheme}://{plan.host}:{plan.port}/v1{grpc}, by {plan.replicas} "
        f"engines and {plan.shards} shards; mer cluster status tells how they are",
        soft_wrap=True,
    )
    if not is_loopback(plan.host) and not plan.api_keys:
        console.print(f"whoever reaches {plan.host} may ask; --api-key-file asks for keys", soft_wrap=True)


@cluster.command()
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
@_ray
def status(as_json: bool, address: str) -> None:
    """Tell how shards and engines are."""
    found = _connected(address).state()
    if as_json:
        print(json.dumps(attrs.asdict(found)))
        return
    console = output()
    console.print(f"{found.nodes} nodes, application {found.status or 'not there'}")
    if found.shards:
        table = Table("shard", "address", "node", "experts held", "pid")
        for each in found.shards:
            if "pid" not in each:
                table.add_row(each["name"], "is being started", "", "", "")
                continue
            held = f"{each['held']} of {each['experts']}, room for {each['capacity']}"
            table.add_row(each["name"], each["address"], each["node"], held, str(each["pid"]))
        console.print(table)
    if found.engines:
        table = Table("engine", "node", "running", "waiting", "waited", "shards", "pid")
        for each in found.engines:
            counts = [str(each["running"]), str(each["waiting"]), seconds(each["queue_seconds"])]
            table.add_row(each["replica"], each["node"], *counts, str(each["peers"]), str(each["pid"]))
        console.print(table)
        for each in found.engines:
            watched = f"mer top {each['address']}, {each['url']}/metrics"
            console.print(f"{each['replica']} on {each['node']}: {watched}", soft_wrap=True)


@cluster.command()
@_ray
def down(address: str) -> None:
    """End shards and engines; Ray itself goes on."""
    if not _connected(address).down():
        messages().print("nothing was up")
