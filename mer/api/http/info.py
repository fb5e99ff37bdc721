"""What a server says of itself: GET /v1/models, /health, /ready, /metrics, /version, /openapi.json."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from importlib.metadata import version

from quart import Blueprint, Response, request

from mer.api.http.answers import Model, Models, Status, Version
from mer.api.http.anthropic import AnthropicModel, AnthropicModels
from mer.api.http.openapi import document
from mer.api.http.service import Service, json_response


def blueprint(service: Service) -> Blueprint:
    """The endpoints."""
    made = Blueprint("info", __name__)
    described = document()

    def model() -> Model:
        return Model(service.settings.model_name, service.started, service.context)

    def for_anthropic() -> AnthropicModel | None:
        """Where a client of Anthropic's API asks: both have the path."""
        if "anthropic-version" not in request.headers:
            return None
        name, since = service.settings.model_name, datetime.fromtimestamp(service.started, UTC)
        return AnthropicModel(name, name, since.strftime("%Y-%m-%dT%H:%M:%SZ"), service.context)

    @made.get("/v1/models")
    async def models() -> Response:
        found = for_anthropic()
        return json_response(AnthropicModels([found], found.id, found.id) if found else Models([model()]))

    @made.get("/v1/models/<path:name>")
    async def one_model(name: str) -> Response:
        service.check_model(name)
        return json_response(for_anthropic() or model())

    @made.get("/health")
    async def health() -> Response:
        failed = service.status == "failed"
        return json_response(Status("failed" if failed else "ok"), 503 if failed else 200)

    @made.get("/ready")
    async def ready() -> Response:
        status = service.status
        return json_response(Status(status), 200 if status == "ready" else 503)

    @made.get("/metrics")
    async def metrics() -> Response:
        accept = request.headers.get("Accept", "")
        text, content_type = await asyncio.to_thread(service.metrics.render, accept)
        return Response(text, content_type=content_type)

    @made.get("/version")
    async def version_of_mer() -> Response:
        return json_response(Version(version("mer")))

    @made.get("/openapi.json")
    async def openapi() -> Response:
        return json_response(described)

    return made
