"""Run Mixture-of-Experts language models that are larger than memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mer.config import EngineConfig
    from mer.engine.engine import Engine
    from mer.engine.observer import Observer, Snapshot
    from mer.engine.outputs import Delta, Result, Timings, TokenLogprob, Usage
    from mer.engine.params import SamplingParams
    from mer.engine.structure import Structure
    from mer.errors import MerError, QueueFullError, RequestTimeoutError

# Where the public names live. They are imported when they are first used: `mer doctor` needs no tokenizer.
_HOMES = {
    "Delta": "mer.engine.outputs",
    "Engine": "mer.engine.engine",
    "EngineConfig": "mer.config",
    "MerError": "mer.errors",
    "Observer": "mer.engine.observer",
    "QueueFullError": "mer.errors",
    "RequestTimeoutError": "mer.errors",
    "Result": "mer.engine.outputs",
    "SamplingParams": "mer.engine.params",
    "Snapshot": "mer.engine.observer",
    "Structure": "mer.engine.structure",
    "Timings": "mer.engine.outputs",
    "TokenLogprob": "mer.engine.outputs",
    "Usage": "mer.engine.outputs",
}

__all__ = [
    "Delta",
    "Engine",
    "EngineConfig",
    "MerError",
    "Observer",
    "QueueFullError",
    "RequestTimeoutError",
    "Result",
    "SamplingParams",
    "Snapshot",
    "Structure",
    "Timings",
    "TokenLogprob",
    "Usage",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mer")
    if name not in _HOMES:
        raise AttributeError(f"module 'mer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
