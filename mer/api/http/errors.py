"""Errors as OpenAI's API gives them, and how those of `mer` become one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from mer.api.access import AuthenticationError, RateLimitError
from mer.api.model import LoadingError
from mer.errors import (
    DeviceReadError,
    EngineClosedError,
    EngineFailedError,
    FilesChangedError,
    MerError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    TooLongError,
)

INVALID: Final = "invalid_request_error"
# What counts as refused, by the code of the error; see mer.api.access.REASONS.
_REFUSALS: Final = {
    "invalid_api_key": "auth",
    "host_not_allowed": "host",
    "rate_limit_exceeded": "rate_limit",
    "overloaded": "queue_full",
    "body_too_large": "too_large",
    "loading": "loading",
    "shutting_down": "shutting_down",
    "engine_failed": "engine_failed",
}


class ApiError(MerError):
    """What a client is told. type, param, code: as in OpenAI's error object; headers: of the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def refusal(self) -> str:
        """Why the request was refused; empty for what went wrong with one that was taken."""
        taken = self.status >= 500 or self.status == 408
        return _REFUSALS.get(self.code or "", "" if taken else "invalid")

    @property
    def object(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(self.object)


def invalid(message: str, param: str, code: str = "invalid_value") -> ApiError:
    """A parameter that can't be used."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_after: float, code: str) -> ApiError:
    headers = {"Retry-After": str(max(1, math.ceil(retry_after)))}
    return ApiError(503, message, type="server_error", code=code, headers=headers)


def api_error(error: BaseException, names: Mapping[str, str] | None = None) -> ApiError:
    """What to tell the client of this error. names: of a SamplingParams field, what the client calls it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        param = (names or {}).get(error.param or "", error.param)
        code = "context_length_exceeded" if isinstance(error, TooLongError) else "invalid_value"
        text = str(error)
        if text.startswith(ours := f"{error.param}: "):
            text = f"{param}: {text[len(ours) :]}"
        return ApiError(400, text, param=param, code=code)
    if isinstance(error, AuthenticationError):
        return ApiError(
            401, str(error), code="invalid_api_key", headers={"WWW-Authenticate": 'Bearer realm="mer"'}
        )
    if isinstance(error, RateLimitError):
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(429, str(error), type="rate_limit_error", code="rate_limit_exceeded", headers=headers)
    if isinstance(error, QueueFullError):
        return unavailable(str(error), error.retry_after, "overloaded")
    if isinstance(error, RequestTimeoutError):
        # The client chose the limit; asking again by itself would not help it.
        return ApiError(
            408, str(error), type="timeout_error", code="timeout", headers={"X-Should-Retry": "false"}
        )
    if isinstance(error, LoadingError):
        return unavailable(str(error), 2, "loading")
    if isinstance(error, FilesChangedError):
        return unavailable(str(error), 2, "files_changed")
    if isinstance(error, EngineFailedError):
        return unavailable(str(error), 5, "engine_failed")
    if isinstance(error, EngineClosedError):
        return unavailable(str(error), 1, "shutting_down")
    code = "read_error" if isinstance(error, DeviceReadError) else "internal_error"
    text = str(error) if isinstance(error, MerError) else "an error inside mer; its log says more"
    return ApiError(500, text, type="server_error", code=code)
