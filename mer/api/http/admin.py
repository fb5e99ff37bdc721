"""The operator's port: POST /admin/reload, POST /admin/ram, GET /admin/models."""

from __future__ import annotations

import asyncio
from typing import Final

from hypercorn.typing import ASGIFramework
from msgspec import Struct
from quart import Quart, Response, request
from werkzeug.exceptions import HTTPException

from mer.api.access import Access
from mer.api.admin import Admin
from mer.api.http.errors import ApiError, api_error
from mer.api.http.hosts import Hosts
from mer.api.http.schemas import decode
from mer.api.http.service import json_response
from mer.api.model import ModelState, ReloadError, UnknownModelError
from mer.api.settings import ServerSettings
from mer.engine.budget import resident_bytes
from mer.errors import BudgetError, ConfigError

_MOST: Final = 1 << 16


class ReloadBody(Struct, forbid_unknown_fields=True):
    """See mer.v1.ReloadRequest."""

    model: str = ""
    path: str = ""
    settings: dict[str, str] = {}
    verify_all: bool = False


class RamBody(Struct, forbid_unknown_fields=True):
    """ram: '4GiB', '512MiB' or a number of bytes."""

    ram: str


class Reloaded(Struct):
    """See mer.v1.ReloadResponse."""

    model: ModelState
    seconds: float


class States(Struct):
    """See mer.v1.SetRamResponse."""

    ram_bytes: int
    asked_ram_bytes: int
    resident_bytes: int
    models: list[ModelState]


def create_admin(admin: Admin, settings: ServerSettings) -> ASGIFramework:
    """An ASGI application. Keys are those for operators, no others."""
    app = Quart("mer-admin", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = _MOST
    app.config["RESPONSE_TIMEOUT"] = None
    access = Access(settings.admin_keys)
    # As on the public port: no web page may ask unnoticed.
    hosts = Hosts(ServerSettings(model_name="", host=settings.admin_host))

    def states() -> States:
        return States(admin.models.ram, admin.models.asked, resident_bytes(), admin.models.states())

    @app.before_request
    async def check() -> None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        hosts.check(headers)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        access.caller(key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key"), "local")
        if request.method == "POST" and request.mimetype != "application/json":
            raise ApiError(415, "the body must be JSON (Content-Type: application/json)")

    @app.errorhandler(Exception)
    async def refuse(error: Exception) -> Response:
        told = _told(error)
        return Response(told.body, told.status, told.headers, content_type="application/json")

    @app.post("/admin/reload")
    async def reload() -> Response:
        body = decode(await _body() or b"{}", ReloadBody)
        # Whoever asked may go: what has begun is finished.
        work = asyncio.ensure_future(
            admin.reload(body.model, body.path, body.settings, whole=body.verify_all)
        )
        return json_response(Reloaded(*await asyncio.shield(work)))

    @app.post("/admin/ram")
    async def ram() -> Response:
        await admin.set_ram(decode(await _body(), RamBody).ram)
        return json_response(states())

    @app.get("/admin/models")
    async def models() -> Response:
        return json_response(states())

    return app


async def _body() -> bytes:
    data = await request.get_data(as_text=False)
    assert isinstance(data, bytes)
    return data


def _told(error: Exception) -> ApiError:
    if isinstance(error, HTTPException):
        return ApiError(error.code or 500, error.description or error.name, code="http_error")
    if isinstance(error, UnknownModelError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, ReloadError):
        return ApiError(409, f"not reloaded, the old model serves on: {error}", code="reload_refused")
    if isinstance(error, ConfigError | BudgetError):
        return ApiError(400, str(error), code="invalid_value")
    return api_error(error)
