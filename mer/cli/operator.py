"""How commands reach the admin port of a server."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final

import click

from mer.errors import MerError

KEY: Final = "MER_ADMIN_KEY"

server_option: Callable[[Any], Any] = click.option(
    "--server",
    default="http://127.0.0.1:8001",
    show_default=True,
    metavar="URL",
    help=f"The admin port of `mer serve --admin-port`; its key is taken from {KEY}.",
)


class OperatorError(MerError):
    """What the server said, or that none did."""


def ask(server: str, path: str, body: dict[str, Any]) -> Any:
    """The server's answer. Raises OperatorError."""
    url = (server if "://" in server else f"http://{server}").rstrip("/") + path
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        # A reload takes as long as reading the dense weights does. No proxy is for a server of one's own.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise OperatorError(_message(error)) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise OperatorError(
            f"{server}: no server answers there ({why}); start one with --admin-port, or give --server"
        ) from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        text = str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = f"the server answered {error.code} {error.reason}"
    return f"{text}; put the operator's key into {KEY}" if error.code == 401 else text
