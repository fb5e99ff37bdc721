"""`mer serve`: a model behind an OpenAI-compatible HTTP API and a gRPC API."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import attrs
import click

from mer.api.admin import model_of
from mer.api.http import logs
from mer.api.model import Model
from mer.api.models import LOAD_TIMEOUT, Models
from mer.api.serving import serve as run_server
from mer.api.settings import ServerSettings, read_keys
from mer.cli.common import messages, model_argument, size, size_option
from mer.cli.generation import engine_options, trace_option
from mer.config import EngineConfig
from mer.engine.engine import Engine
from mer.weights.hub import title

_PATH: Final = click.Path(path_type=Path)
_KEYS: Final = "MER_API_KEYS"


@click.command()
@click.argument("model", callback=model_argument)
@click.argument("more", nargs=-1, metavar="[NAME=MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option(
    "--grpc-port", type=click.IntRange(0, 65535), default=50051, show_default=True, help="0: a free one."
)
@click.option("--no-grpc", is_flag=True, help="HTTP alone.")
@click.option("--served-model-name", "model_name", help="What clients call the model; default: its name.")
@click.option(
    "--api-key-file",
    type=_PATH,
    help=f"Keys of which a client must send one, a line each: KEY or NAME KEY. Also: {_KEYS}, with commas.",
)
@click.option(
    "--admin-port",
    type=click.IntRange(0, 65535),
    help="Of /admin/reload, /admin/ram and /admin/models (`mer reload`, `mer set`); default: none.",
)
@click.option("--admin-grpc-port", type=click.IntRange(0, 65535), help="The same over gRPC; default: none.")
@click.option(
    "--admin-host", default="127.0.0.1", show_default=True, help="Where operators reach it; others need keys."
)
@click.option("--admin-key-file", type=_PATH, help="Keys of operators, as in --api-key-file.")
@click.option(
    "--load-timeout",
    type=click.FloatRange(0),
    default=LOAD_TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="How long a request waits for a model that it asks for first.",
)
@click.option(
    "--rate-limit", type=click.IntRange(1), metavar="N", help="Requests a minute of a key, or of an address."
)
@click.option("--max-concurrent", type=click.IntRange(1), metavar="N", help="Requests at a time, likewise.")
@click.option("--max-running", type=int, metavar="N", help="Requests computed at a time; default: 16.")
@click.option("--max-waiting", type=int, metavar="N", help="Requests that may wait; default: 256.")
@click.option("--max-body", callback=size_option, default="16MiB", show_default=True, help="Of a request.")
@click.option(
    "--cors-origin", "cors_origins", multiple=True, metavar="URL", help="A web page that may ask; *: all."
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A further name by which clients may call a server on the loopback address; *: any.",
)
@click.option("--tls-cert", type=_PATH, help="Certificate chain (PEM): HTTPS.")
@click.option("--tls-key", type=_PATH, help="Its private key (PEM).")
@click.option("--tls-client-ca", type=_PATH, help="Clients need a certificate signed by this one (PEM).")
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="How long requests may go on after SIGTERM; a second one ends them at once.",
)
@click.option(
    "--fixed-ram",
    is_flag=True,
    help="Keep to --ram also while others need the memory; default: expert caches shrink and grow again.",
)
@click.option(
    "--otel",
    is_flag=True,
    help="Trace requests by OpenTelemetry (pip install 'mer[otel]'), to OTEL_EXPORTER_OTLP_ENDPOINT.",
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Of the log."
)
@click.option("--log-prompts", is_flag=True, help="Write what is asked into the log.")
@trace_option
@engine_options
def serve(
    model: Path,
    more: tuple[str, ...],
    api_key_file: Path | None,
    admin_key_file: Path | None,
    load_timeout: float,
    no_grpc: bool,
    **options: Any,
) -> None:
    """Serve MODEL over HTTP, by OpenAI's API, and over gRPC.

    Further models are loaded when a request names them, and share the memory.
    """
    admin_keys = read_keys(admin_key_file, None, "--admin-key-file") if admin_key_file else {}
    name = title(model)
    known = {field.name for field in attrs.fields(ServerSettings)}
    chosen = {name: value for name, value in options.items() if name in known and value is not None}
    if no_grpc:
        chosen["grpc_port"] = None
    # What was not given keeps the engine's own default.
    engine = {name: value for name, value in options.items() if name not in known and value is not None}

    def keys() -> dict[str, str]:
        return read_keys(api_key_file, os.environ.get(_KEYS))

    settings = ServerSettings(**{"model_name": name, "api_keys": keys(), "admin_keys": admin_keys} | chosen)
    logs.configure(settings.log_format)
    config = EngineConfig(**engine)
    served = [Model(settings.model_name, model, config), *(model_of(each, config, title) for each in more)]
    models = Models(served, load_timeout=load_timeout)
    asyncio.run(run_server(models, settings, lambda *found: _announce(settings, *found), keys))


def _announce(settings: ServerSettings, engine: Engine, url: str, grpc_port: int | None) -> None:
    budget, console = engine.budget, messages()
    weights = f"{budget.slots} of {budget.experts} experts in the cache" if budget.experts else "all weights"
    kv = f"keys and values of {budget.context:,} tokens"
    if engine.context < budget.context:
        kv += f", {engine.context:,} in a request"
    lines = {
        "memory": f"up to {size(budget.total)} of the {size(budget.ram)} that it may take: {weights}, {kv}",
        "keys": f"{len(settings.api_keys)}" if settings.api_keys else "none asked for",
        "try": _example(settings, engine, url),
    }
    if advice := engine.facts()["advice"]:
        lines["advice"] = advice
    grpc = f", gRPC on port {grpc_port}" if grpc_port else ""
    console.print(f"mer {version('mer')} serves {settings.model_name} at {url}{grpc}", soft_wrap=True)
    for name, text in lines.items():
        console.print(f"  {name:8} {text}", soft_wrap=True)
    if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.api_keys:
        console.print(
            f"warning: whoever reaches {settings.host} may ask; --api-key-file asks for keys", soft_wrap=True
        )


def _example(settings: ServerSettings, engine: Engine, url: str) -> str:
    chat = engine.tokenizer is not None and engine.tokenizer.chat_template is not None
    body: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 50}
    if chat:
        body = {"messages": [{"role": "user", "content": "Hello!"}]}
    elif engine.tokenizer is None:
        body["prompt"] = [1, 2, 3]
    words = ["curl", f"{url}/v1/{'chat/' if chat else ''}completions", "-H", "Content-Type: application/json"]
    if settings.api_keys:
        words += ["-H", "Authorization: Bearer KEY"]
    if settings.tls_client_ca:
        words += ["--cert", "CERT", "--key", "KEY"]
    return shlex.join([*words, "-d", json.dumps(body)])
