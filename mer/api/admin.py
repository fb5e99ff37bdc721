"""What an operator asks of a running server: the same over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import attrs

from mer.api.access import Access
from mer.api.model import Model, ModelState
from mer.api.models import Models
from mer.config import EngineConfig, parse_size
from mer.errors import ConfigError
from mer.weights.hub import locate

_log = logging.getLogger("mer.server")

# What `mer serve` calls settings, where that is not their name with dashes.
_NAMES: Final = {"kv": "kv_dtype", "io": "io_backend"}
_NUMBERS: Final = frozenset(
    ("context", "threads", "step_tokens", "max_running", "max_waiting", "queue_depth", "prefetch")
)
_FLAGS: Final = frozenset(("prefix_cache", "warm_start"))
_DEFAULTS: Final = {each.name: each.default for each in attrs.fields(EngineConfig)}
# What an engine writes to stays the same as long as the server runs.
_FIXED: Final = frozenset(("prefix_store", "prefix_store_size", "trace", "profile"))


class Admin:
    """keys: reads the API keys anew; None where there is no file of them."""

    def __init__(
        self, models: Models, access: Access, keys: Callable[[], Mapping[str, str]] | None = None
    ) -> None:
        self.models = models
        self._access = access
        self._keys = keys

    async def reload(
        self,
        name: str = "",
        path: str = "",
        settings: Mapping[str, str] | None = None,
        *,
        whole: bool = False,
    ) -> tuple[ModelState, float]:
        """The model as it is then, and how many seconds it took; API keys are read anew as well.

        settings: see mer.v1.ReloadRequest. Raises UnknownModelError, ConfigError for a setting that can't be,
        ReloadError; nothing has changed then, but for the API keys.
        """
        begun = time.monotonic()
        model = self.models.find(name)
        given = dict(settings or {})
        ram = parse_size(given.pop("ram")) if "ram" in given else None
        config = changed(model.config, given)
        self.read_keys()
        if ram is not None:
            await self.models.set_ram(ram)
        await self.models.reload(model, locate(path) if path else None, config, verify_all=whole)
        took = time.monotonic() - begun
        _log.info("model %s: reloaded from %s in %.2f s", model.name, model.path, took)
        return ModelState.of(model), took

    def read_keys(self) -> None:
        """Raises ConfigError; the old ones count then."""
        if self._keys is not None:
            self._access.replace(self._keys())

    async def reload_all(self) -> None:
        """Every model that is loaded, from where it was; an error of one is logged and keeps none."""
        for model in [each for each in self.models.all.values() if each.engine or each.state == "failed"]:
            try:
                await self.reload(model.name)
            except Exception as error:
                _log.error("model %s: not reloaded, the old one serves on: %s", model.name, error)

    async def set_ram(self, ram: str) -> int:
        """Bytes that the server keeps to from now on. Raises ConfigError, BudgetError."""
        size = parse_size(ram)
        await self.models.set_ram(size)
        _log.info("ram is %d bytes now", size)
        return size


def changed(config: EngineConfig, settings: Mapping[str, str]) -> EngineConfig:
    """With these settings of `mer serve`; an empty one takes its default. Raises ConfigError."""
    values: dict[str, Any] = {}
    for given, text in settings.items():
        name = _NAMES.get(given, given.replace("-", "_"))
        if name not in _DEFAULTS or name in _FIXED or name == "ram":
            known = sorted(set(_DEFAULTS) - _FIXED)
            raise ConfigError(f"{given}: no setting that can be changed; those are {', '.join(known)}")
        if not text:
            values[name] = _DEFAULTS[name]
        elif name in _NUMBERS:
            if not text.isdecimal():
                raise ConfigError(f"{given} {text!r}: must be a whole number")
            values[name] = int(text)
        elif name in _FLAGS:
            if text not in ("true", "false"):
                raise ConfigError(f"{given} {text!r}: must be true or false")
            values[name] = text == "true"
        else:
            values[name] = text
    return attrs.evolve(config, **values)


def model_of(spec: str, config: EngineConfig, name_of: Callable[[Path], str]) -> Model:
    """A further model as it is given on the command line: MODEL, or NAME=MODEL. Raises CheckpointError."""
    name, separator, given = spec.partition("=")
    path = Path(locate(given if separator else spec))
    name = name if separator else name_of(path)
    return Model(name, path, _of_its_own(config, name))


def _of_its_own(config: EngineConfig, name: str) -> EngineConfig:
    """What an engine writes has the name of a further model in it: trace.NAME.csv, and DIR/model-NAME."""
    label, trace, store = quote(name, safe=""), config.trace, config.prefix_store
    return attrs.evolve(
        config,
        trace=trace and trace.with_name(f"{trace.stem}.{label}{trace.suffix}"),
        prefix_store=store and store / f"model-{label}",
    )


async def watch_files(models: Models, every: float = 1.0) -> None:
    """For ever."""
    while True:
        await asyncio.sleep(every)
        await models.check_files()
