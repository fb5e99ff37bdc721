"""What a server says of itself: GET /v1/models, /health, /ready, /metrics, /version, /openapi.json."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from importlib.metadata import version

from quart import Blueprint, Response, request

from mer.api import model
from mer.api.http.answers import Model, Models, Status, Version
from mer.api.http.anthropic import AnthropicModel, AnthropicModels
from mer.api.http.errors import unavailable
from mer.api.http.openapi import document
from mer.api.http.service import Service, json_response


def blueprint(service: Service) -> Blueprint:
    """The endpoints."""
    made = Blueprint("info", __name__)
    described = document()

    def described_model(each: model.Model) -> Model:
        context = each.engine.context if each.engine else 0
        return Model(each.name, service.started, context, state=each.state)

    def for_anthropic(each: model.Model) -> AnthropicModel:
        since = datetime.fromtimestamp(service.started, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return AnthropicModel(each.name, each.name, since, each.engine.context if each.engine else 0)

    def anthropic() -> bool:
        """Where a client of Anthropic's API asks: both have the path."""
        return "anthropic-version" in request.headers

    @made.get("/v1/models")
    async def all_models() -> Response:
        found = list(service.models.all.values())
        if not service.models.ram:
            raise unavailable("the model is being loaded", 2, "loading")
        if anthropic():
            listed = [for_anthropic(each) for each in found]
            return json_response(AnthropicModels(listed, listed[0].id, listed[-1].id))
        return json_response(Models([described_model(each) for each in found]))

    @made.get("/v1/models/<path:name>")
    async def one_model(name: str) -> Response:
        found = service.find(name)
        if not service.models.ram:
            raise unavailable("the model is being loaded", 2, "loading")
        return json_response(for_anthropic(found) if anthropic() else described_model(found))

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
