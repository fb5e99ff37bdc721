"""Errors as gRPC tells them: a status code, and google.rpc's details."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import grpc
from attrs import frozen
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

from mer.api.access import AuthenticationError, RateLimitError
from mer.api.model import LoadingError, ReloadError, UnknownModelError
from mer.errors import (
    BudgetError,
    ConfigError,
    DeviceReadError,
    EngineClosedError,
    EngineFailedError,
    FilesChangedError,
    MerError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
)
from mer.v1 import inference_pb2 as pb

# Clients take some 8 KiB of trailing metadata, in which the message stands twice, once percent-encoded.
_MOST_BYTES: Final = 1000


class RequestCancelledError(MerError):
    """A request of a session that its client has cancelled."""


_KINDS: Final[tuple[tuple[type[BaseException], grpc.StatusCode, str], ...]] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (AuthenticationError, grpc.StatusCode.UNAUTHENTICATED, "API_KEY_INVALID"),
    (RateLimitError, grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMIT_EXCEEDED"),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (RequestTimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED, "TIMEOUT"),
    (EngineFailedError, grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED"),
    (EngineClosedError, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN"),
    (LoadingError, grpc.StatusCode.UNAVAILABLE, "LOADING"),
    (FilesChangedError, grpc.StatusCode.UNAVAILABLE, "FILES_CHANGED"),
    (UnknownModelError, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    (ReloadError, grpc.StatusCode.FAILED_PRECONDITION, "RELOAD_REFUSED"),
    (BudgetError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (RequestCancelledError, grpc.StatusCode.CANCELLED, "CANCELLED"),
    (DeviceReadError, grpc.StatusCode.INTERNAL, "READ_ERROR"),
    (BaseException, grpc.StatusCode.INTERNAL, "INTERNAL_ERROR"),
)


_REFUSALS: Final = {
    "INVALID_REQUEST": "invalid",
    "ID_IN_USE": "invalid",
    "MODEL_NOT_FOUND": "invalid",
    "API_KEY_INVALID": "auth",
    "RATE_LIMIT_EXCEEDED": "rate_limit",
    "QUEUE_FULL": "queue_full",
    "LOADING": "loading",
    "SHUTTING_DOWN": "shutting_down",
    "ENGINE_FAILED": "engine_failed",
}


@frozen
class Failure:
    """What a client is told. field: the path of what is wrong in the request; retry_after: seconds."""

    code: grpc.StatusCode
    message: str
    reason: str
    field: str = ""
    retry_after: float | None = None

    @classmethod
    def of(cls, error: BaseException, path: Callable[[str], str] = str) -> Failure:
        """path: of a field of the request, for what the engine calls it."""
        code, reason = next((code, reason) for kind, code, reason in _KINDS if isinstance(error, kind))
        text = str(error) if isinstance(error, MerError) else "an error inside mer; its log says more"
        param = error.param if isinstance(error, RequestError) else None
        retry = error.retry_after if isinstance(error, QueueFullError | RateLimitError) else None
        return cls(code, _shortened(text), reason, path(param) if param else "", retry)

    @property
    def refusal(self) -> str:
        """Why the request was refused, see mer.api.access.REASONS; empty for one that was taken."""
        return _REFUSALS.get(self.reason, "")

    def metadata(self, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
        """Trailing metadata: the details, and when clients that retry by themselves shall do so."""
        details: list[Message] = [
            ErrorInfo(reason=self.reason, domain="mer"),
            RequestInfo(request_id=request_id),
        ]
        made: list[tuple[str, str | bytes]] = [("x-request-id", request_id)]
        if self.field:
            violation = BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(BadRequest(field_violations=[violation]))
        if self.retry_after is not None:
            milliseconds = max(1, math.ceil(self.retry_after * 1000))
            delay = Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)
            details.append(RetryInfo(retry_delay=delay))
            made.append(("grpc-retry-pushback-ms", str(milliseconds)))
        status = Status(code=self.code.value[0], message=self.message)
        for detail in details:
            status.details.add().Pack(detail)
        made.append(("grpc-status-details-bin", status.SerializeToString()))
        return tuple(made)

    def proto(self) -> pb.Error:
        """As a session tells it."""
        return pb.Error(
            code=self.code.value[0],
            message=self.message,
            reason=self.reason,
            field=self.field,
            retry_after=self.retry_after,
        )


def _shortened(text: str) -> str:
    data = text.encode(errors="replace")
    if len(data) <= _MOST_BYTES:
        return data.decode()
    return data[:_MOST_BYTES].decode(errors="ignore") + " ..."
