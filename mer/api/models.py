"""The models of a server: loaded when asked for, exchanged while they serve, one memory budget over all.

Everything here happens on the event loop; what takes time is done on threads.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import attrs

from mer.api import files
from mer.api.model import Loaded, LoadingError, Model, ModelState, ReloadError, UnknownModelError
from mer.api.speakers import too_many
from mer.config import EngineConfig
from mer.engine.budget import Budget
from mer.engine.engine import Engine
from mer.engine.sharing import needed, shares, survey
from mer.errors import BudgetError, CheckpointError, ConfigError, EngineClosedError, MerError
from mer.weights.checkpoint import open_checkpoint
from mer.weights.hub import locate
from mer.weights.verify import verify

_log = logging.getLogger("mer.server")

# A model stays loaded beside others while each cache has room for so much of its experts.
_COMFORT: Final = 0.1
# Bytes of expert weights that are compared with their checksums before a model takes over, spread over all.
_SAMPLE: Final = 1 << 30
# Seconds that a request waits for its model.
LOAD_TIMEOUT: Final = 120.0
# Tokens that a model may take which is not loaded yet.
_SOME: Final = 1 << 20


class Models:
    """At least one. The first is loaded by `open_first` or given to `adopt`, others when a request asks.

    changed: called with a model and its engine whenever that is another one; None: it has none now.
    """

    def __init__(self, models: Sequence[Model], *, load_timeout: float = LOAD_TIMEOUT) -> None:
        self.all = {model.name: model for model in models}
        if len(self.all) < len(models):
            raise ConfigError("two models have the same name; give each a name of its own: NAME=MODEL")
        self.first = models[0]
        self.changed: list[Callable[[Model, Engine | None], object]] = []
        self.ram = 0  # bytes of the process that are kept to; 0 before the first model is there
        self.asked = 0  # what an operator wants; `ram` is less while memory is short
        self._timeout = load_timeout
        self._process = 0
        self._there: list[Loaded] = []  # all engines that are open, those that are leaving as well
        self._coming: Budget | None = None  # of an engine that is being opened
        # From the outer to the inner one: who waits for a lock holds none behind it.
        self._reloading = asyncio.Lock()
        self._changing = asyncio.Lock()  # loading, unloading, handing over: one at a time
        self._sharing = asyncio.Lock()  # who has which part of the memory
        self._leaving: set[asyncio.Task[None]] = set()
        self._handing: set[asyncio.Task[None]] = set()
        self._again: asyncio.Task[None] | None = None

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together, of the model that takes most."""
        found = [each.engine.context for each in self.all.values() if each.engine is not None]
        # Of a model that is not loaded it is not known.
        return max(found) if len(found) == len(self.all) else max(_SOME, *found, 0)

    def too_many(self, roles: Callable[[], Iterable[str]]) -> bool:
        """Whether a conversation of messages with these roles has no room, whichever model it is for."""
        engines = [each.engine for each in self.all.values()]
        return all(engine is not None and too_many(engine, roles()) for engine in engines)

    @property
    def failure(self) -> str:
        """Why an engine stopped by an error inside mer; empty while none has. Only a new one helps."""
        return next(
            (each.engine.failure for each in self.all.values() if each.engine and each.engine.failure), ""
        )

    def find(self, name: str | None) -> Model:
        """No name: the first. Raises UnknownModelError."""
        if not name:
            return self.first
        if name not in self.all:
            known = ", ".join(map(repr, self.all))
            raise UnknownModelError(f"the model {name!r} is not served here; this server has {known}")
        return self.all[name]

    @asynccontextmanager
    async def use(self, model: Model) -> AsyncIterator[Engine]:
        """Its engine, which stays open meanwhile. Raises LoadingError, or why it can't be loaded."""
        model.used = time.monotonic()
        if model._loaded is None:
            if not self.ram:
                raise LoadingError("the model is being loaded")
            try:
                async with asyncio.timeout(self._timeout):
                    while model._loaded is None:
                        await self._load(model)
            except TimeoutError:
                raise LoadingError(f"the model {model.name!r} is still being loaded") from None
        loaded = model._loaded
        loaded.begin()
        try:
            yield loaded.engine
        finally:
            loaded.end()

    def adopt(self, engine: Engine, mark: Mapping[Path, tuple[int, ...]] | None = None) -> None:
        """The first model is there."""
        self.ram = self.asked = engine.budget.ram
        self._process = engine.budget.interpreter
        self._there.append(loaded := Loaded(engine, mark or {}))
        self._take_over(self.first, loaded)

    async def open_first(self) -> Engine:
        """Raises what Engine.open raises."""
        model = self.first
        model.state = "loading"
        mark = await asyncio.to_thread(files.mark, model.path)
        opening = Engine.open if len(self.all) == 1 else Engine.beside
        engine = await opening(model.path, model.config)
        # What is there now stays; for the collector to look through it takes 20 ms of the event loop.
        gc.freeze()
        self.adopt(engine, mark)
        return engine

    async def reload(
        self,
        model: Model,
        path: Path | None = None,
        config: EngineConfig | None = None,
        *,
        verify_all: bool = False,
    ) -> None:
        """Serve it anew, from `path` and with `config` where they are given.

        Requests that run end on the old weights; those that come meanwhile, too. Waits for weights that are
        leaving since the last time. Raises ReloadError, after which the old one serves on as before.
        """
        path, config = path or model.path, config or model.config
        async with self._reloading:
            while self._leaving:
                await asyncio.wait(self._leaving)
            before, model.state = model.state, "reloading"
            try:
                mark = await asyncio.to_thread(files.mark, path)  # of the files that are verified
                await asyncio.to_thread(_verify, path, None if verify_all else _SAMPLE)
                async with self._changing:
                    loaded = await self._bring(path, _numbered(config, model), mark, but=model)
                    old, model.path, model.config = model._loaded, path, config
                    self._take_over(model, loaded)
            except Exception as error:
                if model.state == "reloading":  # and not unloaded or given up meanwhile
                    model.state = before
                model.error = str(error)
                raise ReloadError(f"{error}" if isinstance(error, MerError) else repr(error)) from error
            if old is not None:
                self._leave(model, old)

    async def set_ram(self, ram: int) -> None:
        """Keep to so many bytes of the process. Raises BudgetError."""
        before, self.asked = self.asked, ram
        try:
            await self.keep_to(ram)
        except BudgetError:
            self.asked = before
            raise

    async def keep_to(self, ram: int) -> None:
        """The same for a while: what was asked for remains known. Raises BudgetError."""
        async with self._sharing:
            before, self.ram = self.ram, ram
            try:
                await self._share_now()
            except BudgetError:
                self.ram = before
                await self._share_now()
                raise

    @property
    def floor(self) -> int:
        """The least `ram` that the models which are there can do with."""
        return needed(self.budgets, [each.least_slots for each in self.budgets])

    def filled(self) -> tuple[int, int]:
        """The `ram` that what is in their caches needs, and the bytes that they may take beyond."""
        budgets = self.budgets
        resident = [loaded.engine.snapshot().resident for loaded in self._there]
        resident += [0] * (len(budgets) - len(resident))
        more = [each.slot * max(0, each.slots - there) for each, there in zip(budgets, resident, strict=True)]
        return needed(budgets, resident), sum(more)

    def states(self) -> list[ModelState]:
        """Of all models."""
        return [ModelState.of(model) for model in self.all.values()]

    @property
    def budgets(self) -> list[Budget]:
        """Of all engines that are there, and of one that is being opened."""
        coming = [] if self._coming is None else [self._coming]
        return [loaded.engine.budget for loaded in self._there] + coming

    async def check_files(self) -> None:
        """Compare files with what they were when they were opened.

        Those that others have replaced are read on: the engine holds the old ones open. A model whose files
        were written over in place is given up, for what is read of them may be half of each.
        """
        for model in self.all.values():
            loaded = model._loaded
            if loaded is None or model.files_changed or not loaded.mark:
                continue
            now = await asyncio.to_thread(files.look, loaded.mark)
            if now == loaded.mark or loaded is not model._loaded:
                continue
            model.files_changed = True
            broken = [
                file for file, was in loaded.mark.items() if now[file][:2] == was[:2] and now[file] != was
            ]
            if not broken:
                _log.warning("model %s: its files were replaced; `mer reload` takes the new ones", model.name)
                continue
            model.error = f"{broken[0]} was written over while it was served; put it right, then `mer reload`"
            _log.error("model %s: %s", model.name, model.error)
            model.state, model._loaded = "failed", None
            self._tell(model)
            await self._leave(model, loaded, drain=False)
            if all(now[file][2:3] == loaded.mark[file][2:3] for file in broken):
                self._again = asyncio.create_task(self._touched(model))

    async def _touched(self, model: Model) -> None:
        """Its files may hold what they held: serve it again if every byte has a checksum, which is right."""
        error = model.error
        try:
            if await asyncio.to_thread(files.all_have_checksums, model.path):
                await self.reload(model, verify_all=True)
                _log.info("model %s: its files hold what they held; it is served again", model.name)
        except MerError as why:
            model.error = f"{error} ({why})"
            _log.error("model %s: %s", model.name, model.error)

    def drop_failed(self) -> str:
        """Take out models whose engine stopped by an error inside mer: their next request loads them anew.

        The only model of a server stays as it is: what else is in the process may be no better, and nobody
        else is served. Returns why its engine stopped, unless a reload is just bringing another one.
        """
        for model in self.all.values():
            loaded = model._loaded
            if loaded is None or not loaded.engine.failure or model.state == "reloading":
                continue
            if len(self.all) == 1:
                return loaded.engine.failure
            model.error = loaded.engine.failure
            _log.error("model %s: %s; the next request loads it anew", model.name, model.error)
            model.state, model._loaded = "unloaded", None
            self._tell(model)
            self._leave(model, loaded, drain=False)
        return ""

    async def close(self, *, drain: bool) -> None:
        """All engines."""
        loading = [model._task for model in self.all.values()]
        for task in filter(None, [self._again, *loading, *self._leaving, *self._handing]):
            task.cancel()
            with suppress(asyncio.CancelledError, MerError):
                await task
        for loaded in self._there:
            try:
                await loaded.engine.close(drain=drain)
            except MerError as error:  # of a file that it could not write to the end
                _log.error("%s", error)

    async def _load(self, model: Model) -> None:
        """Waits for it; a waiter that leaves ends nothing."""
        if model.state == "failed" and model.files_changed:
            raise LoadingError(model.error)
        if model.state == "reloading":  # what it reads is being verified: nobody loads it past that
            async with self._reloading:
                return
        if model._task is None:
            model._task = asyncio.create_task(self._load_now(model))
        await asyncio.shield(model._task)

    async def _load_now(self, model: Model) -> None:
        try:
            async with self._changing:
                if model._loaded is not None:
                    return
                model.state = "loading"
                try:
                    mark = await asyncio.to_thread(files.mark, model.path)
                    config = _numbered(model.config, model)
                    self._take_over(model, await self._bring(model.path, config, mark))
                except Exception as error:
                    model.state, model.error = "failed", str(error)
                    raise
        finally:
            model._task = None

    async def _bring(
        self, path: Path, config: EngineConfig, mark: Mapping[Path, tuple[int, ...]], but: Model | None = None
    ) -> Loaded:
        """A new engine beside those that are there, whose caches shrink first; `but` may not be unloaded.

        mark: of its files; when it is another one in the end, the engine does not count.
        """
        leaving = self.budgets if len(self.all) == 1 else None
        config = attrs.evolve(config, ram=self.ram)
        wanted = await asyncio.to_thread(survey, path, config, self._process, leaving)
        part = await self._make_room(wanted, but)
        try:
            engine = await Engine.beside(
                path,
                attrs.evolve(config, ram=part),
                self._process,
                storeless=any(each.engine.store_directory == config.prefix_store for each in self._there),
                kv_tokens=None if leaving is None else wanted.context,
            )
        except BaseException:
            self._coming = None
            await self._share()
            raise
        self._coming = None
        self._there.append(loaded := Loaded(engine, mark))
        if await asyncio.to_thread(files.look, mark) != mark:
            await self._end(loaded, drain=False)
            raise CheckpointError(f"{path}: its files changed while they were opened; try again")
        await self._share()  # `ram` may be another since
        return loaded

    async def _make_room(self, wanted: Budget, but: Model | None) -> int:
        """The `ram` of an engine with this budget, once it is there to be had. Raises BudgetError."""
        comfort = _COMFORT
        while True:
            async with self._sharing:
                try:
                    parts = shares(self.ram, [*self.budgets, wanted], comfort)
                    await self._give(parts[:-1])
                    self._coming = wanted
                    return parts[-1]
                except BudgetError as error:
                    why = error
            if await self._unload_one(but):
                continue
            if comfort:
                comfort = 0.0
            elif self._leaving:
                await asyncio.wait(self._leaving)
            else:
                raise why

    async def _unload_one(self, but: Model | None) -> bool:
        """The model that was asked for least recently. Whether there was one."""
        there = [model for model in self.all.values() if model._loaded and model is not but]
        if not there:
            return False
        model = min(there, key=lambda each: each.used)
        loaded, model._loaded, model.state = model._loaded, None, "unloaded"
        self._tell(model)
        assert loaded is not None
        _log.info("model %s: unloaded, its memory is needed", model.name)
        loaded.engine.resume()
        await loaded.until_idle()
        await self._end(loaded)
        return True

    def _take_over(self, model: Model, loaded: Loaded) -> None:
        model._loaded, model.state, model.error, model.files_changed = loaded, "ready", "", False
        model.generation += 1
        self._tell(model)

    def _tell(self, model: Model) -> None:
        for tell in self.changed:
            tell(model, model.engine)

    def _leave(self, model: Model, old: Loaded, *, drain: bool = True) -> asyncio.Task[None]:
        """Have an engine end, after its requests (drain), and others take what was its."""
        old.engine.resume()  # whom a pause holds up would keep it here

        async def leave() -> None:
            if drain:
                await old.until_idle()
            await self._end(old, drain=drain)
            handing = start(self._hand_over(model), f"model {model.name}: prefix store")
            self._handing.add(handing)
            handing.add_done_callback(self._handing.discard)

        task = start(leave(), f"model {model.name}: end of an engine")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return task

    async def _hand_over(self, model: Model) -> None:
        """The prefix store, if nobody has it now, to the engine that serves."""
        async with self._changing:
            if model.engine is not None:
                with suppress(EngineClosedError):
                    await model.engine.open_store()
                    if model.engine.store_directory is not None:
                        _log.info("model %s: has the prefix store", model.name)

    async def _end(self, loaded: Loaded, *, drain: bool = True) -> None:
        try:
            await loaded.engine.close(drain=drain)
        finally:
            self._there.remove(loaded)
            loaded.engine = None  # type: ignore[assignment]
            await asyncio.to_thread(_tidy)
            await self._share()

    async def _share(self) -> None:
        """Its part of the memory to each engine, as much as there is."""
        async with self._sharing:
            await self._share_now()

    async def _share_now(self) -> None:
        if self._there and self.ram:
            budgets = self.budgets
            await self._give([self.ram] if len(budgets) == 1 else shares(self.ram, budgets))

    async def _give(self, parts: Sequence[int]) -> None:
        """The `ram` of each engine that is there; those that shrink go first."""
        there = [each.engine for each in self._there]
        for engine, part in sorted(
            zip(there, parts, strict=False), key=lambda each: each[1] - each[0].budget.ram
        ):
            with suppress(EngineClosedError):
                await engine.set_ram(part)


def start(work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
    """A task of its own, whose errors are logged."""

    async def run() -> None:
        try:
            await work
        except MerError as error:
            _log.error("%s: %s", what, error)
        except Exception:
            _log.exception("%s", what)

    return asyncio.create_task(run())


def _numbered(config: EngineConfig, model: Model) -> EngineConfig:
    """Files that an engine writes get a number from the second one on: trace.csv, trace.2.csv."""
    number = model.generation + 1

    def name(file: Path | None) -> Path | None:
        return file if file is None or number == 1 else file.with_suffix(f".{number}{file.suffix}")

    return attrs.evolve(config, trace=name(config.trace), profile=name(config.profile))


def _verify(path: Path, sample: int | None) -> None:
    """Raises CheckpointError, or what opening it raises."""
    damaged = verify(open_checkpoint(locate(path)), most=sample)
    if damaged:
        more = f", and {len(damaged) - 1} tensors more" if len(damaged) > 1 else ""
        raise CheckpointError(f"{damaged[0].file}: {damaged[0].tensor}: {damaged[0].what}{more}")


def _tidy() -> None:
    """Memory of an engine that is gone goes back to the system."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    with suppress(AttributeError, OSError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)
