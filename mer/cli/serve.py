"""`mer serve`: a model behind an OpenAI-compatible HTTP API."""

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
@engine_options
def serve(model: Path, **options: Any) -> None:
    """Serve MODEL over HTTP, by OpenAI's API."""
    known = {field.name for field in attrs.fields(ServerSettings)}
    chosen = {name: options.pop(name) for name in list(options) if name in known}
    config, _ = split(options)
    settings = ServerSettings(model_name=model.resolve().name, **chosen)
    logs.configure(settings.log_format)

    def announce(engine: Engine, url: str) -> None:
        messages().print(f"serving {settings.model_name} at {url}", soft_wrap=True)

    asyncio.run(run_server(model, config, settings, announce))
