"""The page that a person sees who opens the port: its files, which may reach nothing else."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Final

from quart import Blueprint, Response, abort

from mer.api.http.service import Service

_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_FILES: Final = {
    "/": "index.html",
    **{
        f"/page/{name}": name
        for name in ("page.css", "page.js", "chat.js", "live.js", "markdown.js", "server.js", "icon.svg")
    },
}
# Anybody may read these; what they ask for then needs the key.
PATHS: Final = frozenset(_FILES)
# Nothing is run or shown that did not come from here, and no text becomes code or HTML.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def blueprint(_: Service) -> Blueprint:
    """The endpoints."""
    made = Blueprint("pages", __name__)

    @made.get("/")
    async def index() -> Response:
        return _respond("/")

    @made.get("/page/<name>")
    async def file(name: str) -> Response:
        path = f"/page/{name}"
        if path not in _FILES:
            abort(404)
        return _respond(path)

    return made


def _respond(path: str) -> Response:
    kind = _TYPES[_FILES[path].rpartition(".")[2]]
    return Response(_contents(_FILES[path]), content_type=kind, headers=_HEADERS)


@cache
def _contents(name: str) -> bytes:
    return (files("mer.api.http") / "page" / name).read_bytes()
