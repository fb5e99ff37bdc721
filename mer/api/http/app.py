"""The HTTP application: the handlers, one blueprint each, behind the gate."""

from __future__ import annotations

from typing import Final

from hypercorn.typing import ASGIFramework
from quart import Quart, Response, request
from werkzeug.exceptions import HTTPException

from mer.api.http import chat, completions, embeddings, info, live, messages, pages, responses, texts
from mer.api.http.call import current_call
from mer.api.http.errors import ApiError, api_error
from mer.api.http.gate import Gate, error_body
from mer.api.http.service import Service

# Each has `blueprint(service)`.
_PARTS: Final = (chat, completions, responses, messages, embeddings, texts, info, live, pages)


def create_app(service: Service) -> ASGIFramework:
    """An ASGI application for this service."""
    app = Quart("mer", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = service.settings.max_body
    app.config["RESPONSE_TIMEOUT"] = None
    # Quart's own goes by asyncio.wait_for, which loses a cancellation that comes together with the end of the
    # body: the answer to a client that is gone would be computed to its end. See body_as.
    app.config["BODY_TIMEOUT"] = None
    for part in _PARTS:
        app.register_blueprint(part.blueprint(service))

    @app.errorhandler(Exception)
    async def refuse(error: Exception) -> Response:
        told = _http_error(error, service) if isinstance(error, HTTPException) else api_error(error)
        current_call().failed(error, told)
        return Response(
            error_body(request.path, told), told.status, told.headers, content_type="application/json"
        )

    return Gate(app, service)


def _http_error(error: HTTPException, service: Service) -> ApiError:
    code = error.code or 500
    if code == 404:
        return ApiError(404, f"no such path: {request.method} {request.path}", code="unknown_url")
    if code == 405:
        allowed = ", ".join(sorted(getattr(error, "valid_methods", None) or ()))
        message = f"{request.path} does not take {request.method}, only {allowed}"
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
    if code == 413:
        message = f"the body has more than the {service.settings.max_body:,} bytes that are taken"
        return ApiError(413, message, code="body_too_large")
    return ApiError(code, error.description or error.name, code="http_error")
