"""One model of a server: where it is, how it is opened, whether it is there; what goes wrong with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from attrs import define, field, frozen

from mer.config import EngineConfig
from mer.engine.engine import Engine
from mer.errors import MerError

State = Literal["unloaded", "loading", "ready", "reloading", "failed"]


class LoadingError(MerError):
    """The model is not there yet; asking again later helps."""


class UnknownModelError(MerError):
    """No model of that name is served here."""


class ReloadError(MerError):
    """The new model can't be served; the old one goes on."""


@define(eq=False)
class Loaded:
    """An engine, and who uses it; it is closed when nobody does. mark: of its files as they were opened."""

    engine: Engine
    mark: Mapping[Path, tuple[int, ...]]
    users: int = 0
    idle: asyncio.Event = field(factory=asyncio.Event)

    def begin(self) -> None:
        self.users += 1
        self.idle.clear()

    def end(self) -> None:
        self.users -= 1
        if not self.users:
            self.idle.set()

    async def until_idle(self) -> None:
        if self.users:
            await self.idle.wait()


@define(eq=False)
class Model:
    """One of the models. Only `Models` changes it."""

    name: str
    path: Path
    config: EngineConfig
    state: State = "unloaded"
    generation: int = 0
    error: str = ""
    files_changed: bool = False
    used: float = 0.0  # when it was asked for last
    created: int = field(factory=lambda: int(time.time()))
    _loaded: Loaded | None = None
    _task: asyncio.Task[None] | None = None

    @property
    def engine(self) -> Engine | None:
        return self._loaded.engine if self._loaded else None

    @property
    def running(self) -> int:
        """Requests that use it."""
        return self._loaded.users if self._loaded else 0


@frozen
class ModelState:
    """What an operator is told of a model; the fields of mer.v1.ModelState."""

    name: str
    path: str
    state: State
    generation: int
    running: int
    cache_slots: int
    experts: int
    ram_bytes: int
    files_changed: bool
    error: str

    @classmethod
    def of(cls, model: Model) -> ModelState:
        budget = model.engine.budget if model.engine else None
        return cls(
            name=model.name,
            path=str(model.path),
            state=model.state,
            generation=model.generation,
            running=model.running,
            cache_slots=budget.slots if budget else 0,
            experts=budget.experts if budget else 0,
            ram_bytes=budget.total - budget.interpreter if budget else 0,
            files_changed=model.files_changed,
            error=model.error,
        )
