"""One hierarchy of errors. Each message says what is wrong, where, and what to do."""

from __future__ import annotations


class MerError(Exception):
    """Whatever `mer` raises on purpose; the command line prints it without a traceback."""


class ConfigError(MerError):
    """A setting, a flag or an environment variable that can't be used."""


class CheckpointError(MerError):
    """A file of weights, or its config.json, that is missing, damaged or contradicts itself."""


class FilesChangedError(CheckpointError):
    """A model's files were written over in place while they were read."""


class UnsupportedModelError(CheckpointError):
    """An architecture or a weight format that `mer` does not know."""


class HubError(MerError):
    """A model that can't be fetched from a hub; what has come of it stays and is gone on with."""


class BudgetError(ConfigError):
    """A memory budget that can't hold what the model needs at the least."""


class DeviceReadError(MerError):
    """A read of weights that failed while running: the requests that needed it fail, no others."""


class GpuError(MerError):
    """A graphics device that is not there, can't be used, or was lost."""


class GpuMemoryError(GpuError):
    """The graphics device has not as much memory left."""


class EngineClosedError(MerError):
    """The engine was closed before it could answer."""


class EngineFailedError(EngineClosedError):
    """The engine stopped by an error inside `mer`; only a new one, or a restart, helps."""


class QueueFullError(MerError):
    """Too many requests wait already; `retry_after` seconds from now there will probably be room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestTimeoutError(MerError):
    """A request had not ended when its own `timeout` was over."""


class RequestError(MerError):
    """A request whose parameters make no sense; `param` names the first such parameter."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLongError(RequestError):
    """A prompt of more tokens than there is room for. tokens: how many; None where only its size is known."""

    def __init__(self, message: str, tokens: int | None, param: str = "prompt") -> None:
        super().__init__(message, param)
        self.tokens = tokens
