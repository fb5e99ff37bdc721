"""`mer serve`: a model behind an OpenAI-compatible HTTP API and a gRPC API."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import attrs
import click

from mer.api.http import logs
from mer.api.serving import serve as run_server
from mer.api.settings import ServerSettings
from mer.cli.common import messages, model_argument
from mer.cli.generation import engine_options, split
from mer.engine.engine import Engine


@click.command()
@click.argument("model", callback=model_argument)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option(
    "--grpc-port", type=click.IntRange(0, 65535), default=50051, show_default=True, help="0: a free one."
)
@click.option("--no-grpc", is_flag=True, help="HTTP alone.")
@engine_options
def serve(model: Path, no_grpc: bool, **options: Any) -> None:
    """Serve MODEL over HTTP, by OpenAI's API, and over gRPC."""
    if no_grpc:
        options["grpc_port"] = None
    known = {field.name for field in attrs.fields(ServerSettings)}
    chosen = {name: options.pop(name) for name in list(options) if name in known}
    config, _ = split(options)
    settings = ServerSettings(model_name=model.resolve().name, **chosen)
    logs.configure(settings.log_format)

    def announce(engine: Engine, url: str, grpc_port: int | None) -> None:
        grpc = f", gRPC on port {grpc_port}" if grpc_port else ""
        messages().print(f"serving {settings.model_name} at {url}{grpc}", soft_wrap=True)

    asyncio.run(run_server(model, config, settings, announce))
