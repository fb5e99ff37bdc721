"""The engine as Python programs use it: open a model, await answers, iterate over streams."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence, Sized
from contextlib import ExitStack, aclosing
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import attrs
import numpy as np
from numpy.typing import NDArray

from mer._ext.lookup import NgramDrafter
from mer._ext.remote import NO_PEERS
from mer.config import EngineConfig, parse_size
from mer.engine import drafting
from mer.engine.budget import Budget, resident_bytes
from mer.engine.constraint import Constraints
from mer.engine.draft import DraftSource
from mer.engine.drafting import Drafting
from mer.engine.journey import told
from mer.engine.mailbox import Mailbox
from mer.engine.observer import Observer, ReadLatency, Snapshot
from mer.engine.opening import Opening
from mer.engine.outputs import Delta, FinishReason, Result, join
from mer.engine.params import SamplingParams
from mer.engine.prefix_store import PrefixStore
from mer.engine.prompts import Prompt, Prompts
from mer.engine.request import Embedding, Request
from mer.engine.routed import idle_in_dense
from mer.engine.runner import Runner
from mer.engine.sampling import Sampler
from mer.engine.scheduler import Scheduler
from mer.engine.stats import StepStats
from mer.engine.storing import Storing
from mer.engine.view import ExpertMap, Recent, View, requests
from mer.engine.worker import Worker
from mer.errors import ConfigError, EngineClosedError, RequestError
from mer.model.families import Architecture
from mer.model.settings import eos_ids
from mer.model.spec import ModelSpec
from mer.model.tokenizer import Tokenizer
from mer.streaming.profile import ProfileSummary
from mer.weights.checkpoint import Checkpoint
from mer.weights.hub import locate

_T = TypeVar("_T")

# Characters or ids of a prompt that would keep the event loop waiting for milliseconds.
_LONG: Final = 2000
# How often, and after how many seconds, slots are asked for again that somebody reads into.
_RESIZES: Final = 10
_RESIZE_PAUSE: Final = 0.02


class Engine:
    """A model that answers any number of requests at once.

    For example::

        async with Engine.open("path/to/model", ram="8GiB") as engine:
            result = await engine.generate("Once upon a time", SamplingParams(max_tokens=50))
            async for delta in engine.stream("Once upon a time"):
                print(delta.text, end="")
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        ends: frozenset[int],
        config: EngineConfig,
        storing: Storing | None,
        store: PrefixStore | None,
        drafting: Drafting | None,
    ) -> None:
        self._runner = runner
        self._storing = storing
        self._store: PrefixStore | None = None
        self._giving_back = threading.Lock()
        self._tokenizer = tokenizer
        self._eos_ids = ends
        self._closed = False
        budget = runner.budget
        self._prompts = Prompts(tokenizer, runner.spec, budget)
        self._scheduler = Scheduler(
            n_blocks=budget.kv_blocks,
            step_tokens=budget.step_tokens,
            max_running=budget.max_running,
            rows=budget.rows,
            n_images=budget.state_images,
            prefix_cache=config.prefix_cache,
            root=b"" if storing is None else storing.mark,
        )
        self._ids = itertools.count(1)
        self._idle = idle_in_dense(config)
        self._drafting = drafting
        self._speculate = config.speculate
        self._worker = Worker(runner, self._scheduler, config.max_waiting, drafting)
        if store is not None:
            self._keep_in(store)
        self._constraints = Constraints(tokenizer, runner.spec.vocab, ends, budget.threads)
        self._recent = Recent()
        self._worker.observe(self._recent)

    @classmethod
    def open(cls, path: str | PathLike[str], config: EngineConfig | None = None, **settings: Any) -> Opening:
        """Open a model; use with `async with` or `await`.

        path: a directory or a GGUF file, a hub's name that `mer pull` has fetched ("org/name",
        "org/name:Q4_K_M"), or "demo", the bundled one; a path that exists goes before a name.
        Settings are those of EngineConfig (`ram="8GiB"`, `context=4096`, ...). Raises ConfigError at once,
        and when awaited CheckpointError, UnsupportedModelError, BudgetError or DeviceReadError.
        """
        known = {field.name for field in attrs.fields(EngineConfig)}
        for name in settings:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}; known are {', '.join(sorted(known))}")
        config = attrs.evolve(config, **settings) if config else EngineConfig(**settings)
        return Opening(partial(cls._load, path, config, alone=True))

    @classmethod
    def beside(
        cls,
        path: str | PathLike[str],
        config: EngineConfig,
        process: int | None = None,
        *,
        storeless: bool = False,
        kv_tokens: int | None = None,
    ) -> Opening:
        """As `open`, in a process that has others, or will have.

        process: bytes that it holds without any engine; None: this is the first one. `config.ram` is this
        engine's share and those bytes; see mer.engine.sharing. storeless: another one has the prefix store
        still, and this one does without until `open_store`. kv_tokens: of the KV cache, where
        `config.context` is None; see mer.engine.budget.measure.
        """
        return Opening(partial(cls._load, path, config, process, storeless, kv_tokens=kv_tokens))

    @classmethod
    def _load(
        cls,
        path: str | PathLike[str],
        config: EngineConfig,
        process: int | None = None,
        storeless: bool = False,
        alone: bool = False,
        kv_tokens: int | None = None,
    ) -> Self:
        tokenizer: Tokenizer | None = None
        ends: frozenset[int] = frozenset()
        sources: list[DraftSource] = []

        def prepare(checkpoint: Checkpoint, architecture: Architecture) -> list[DraftSource]:
            nonlocal tokenizer, ends
            tokenizer = Tokenizer.open(checkpoint.path)
            # Known also for a model that came without a tokenizer.
            found = tokenizer.eos_ids if tokenizer else eos_ids(checkpoint.path, checkpoint.config)
            ends = found or frozenset()
            sources.extend(drafting.sources(checkpoint, architecture, tokenizer, config))
            return sources

        runner = Runner.open(locate(path), config, prepare, process, alone=alone, kv_tokens=kv_tokens)
        with ExitStack() as undo:
            undo.callback(runner.close)
            draft_engines = drafting.load(sources, runner, config)
            if draft_engines is not None:
                undo.callback(draft_engines.close)
            storing = Storing.of(runner, config)
            store = storing.open() if storing is not None and not storeless else None
            undo.pop_all()
        return cls(runner, tokenizer, ends, config, storing, store, draft_engines)

    async def close(self, *, drain: bool = True) -> None:
        """End all requests (drain) or drop them, then give everything back. Closing twice is allowed."""
        self._closed = True
        await asyncio.to_thread(self._close, drain)

    def _close(self, drain: bool) -> None:
        # All of it on one thread: who stops waiting for it does not stop it.
        self._worker.close(drain=drain)
        self._constraints.close()
        with self._giving_back:
            if self._store is not None:
                for key, block in self._scheduler.pool.kept():
                    self._store.spill(key, block, patient=True)
                self._store.close()
                self._store = None
            if self._drafting is not None:
                self._drafting.close()
            self._runner.close()

    async def open_store(self) -> None:
        """Have the prefix store from now on, where one is wanted and another engine had it until now.

        Raises ConfigError where the directory can't be used, EngineClosedError.
        """
        await asyncio.to_thread(self._open_store)

    def _open_store(self) -> None:
        if self._storing is None or self._store is not None:
            return
        store = self._storing.open()
        try:
            self._worker.call(lambda: self._keep_in(store)).result()
        except BaseException:
            store.close()
            raise

    def _keep_in(self, store: PrefixStore) -> None:
        self._store = self._worker.store = self._scheduler.store = store
        self._scheduler.pool.dropped = store.spill

    @property
    def store_directory(self) -> Path | None:
        """Of the prefix store that it has open."""
        return None if self._storing is None or self._store is None else self._storing.directory

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes."""
        return self._runner.spec

    @property
    def budget(self) -> Budget:
        """How memory was divided."""
        return self._runner.budget

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self._prompts.context

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a model that came without: prompts are token ids then, and texts empty."""
        return self._tokenizer

    async def set_ram(self, ram: str | int) -> Budget:
        """Keep to another `ram` ('4GiB'): the expert cache shrinks, or takes more, between two layers.

        Answers stay the same, and what is running goes on. Returns how memory is divided then; the cache
        may have more slots than fit, where experts are pinned. Raises ConfigError for what is no size,
        BudgetError for less than the model needs without its cache, EngineClosedError.
        """
        size = parse_size(ram)

        def ask() -> asyncio.Future[Budget]:
            return asyncio.wrap_future(self._worker.call(lambda: self._runner.resize(size), urgent=True))

        budget = await ask()
        for _ in range(_RESIZES):
            if budget.total <= size:
                break
            await asyncio.sleep(_RESIZE_PAUSE)
            budget = await ask()
        return budget

    def exchange_peers(self, addresses: Sequence[str]) -> None:
        """Ask the shards at these addresses from now on, in place of those whose addresses were in `peers`.

        Raises ConfigError for what is no address, another machine's without certificates, and where the
        engine was opened without peers.
        """
        experts = self._runner.experts
        if experts is None:
            raise ConfigError("a dense model has no experts that peers could hold")
        experts.exchange_peers(addresses)

    def observe(self, observer: Observer) -> None:
        """Tell `observer` what happens to requests that are asked for from now on."""
        self._worker.observe(observer)

    @property
    def failure(self) -> str:
        """Why the engine stopped by itself, for an error inside mer; empty while it has not."""
        return self._worker.failure

    def snapshot(self) -> Snapshot:
        """The engine's state now, and totals."""
        scheduler, budget, experts = self._scheduler, self._runner.budget, self._runner.experts
        cache = experts.cache.stats() if experts else dict.fromkeys(("resident", "evictions", "in_use"), 0)
        return Snapshot(
            waiting=len(scheduler.waiting) + len(scheduler.paused),
            running=len(scheduler.running),
            kv_blocks=scheduler.pool.n_blocks,
            kv_blocks_free=scheduler.pool.free,
            kv_blocks_cached=scheduler.pool.cached,
            prefix_hit_tokens=scheduler.hit_tokens,
            prefix_query_tokens=scheduler.query_tokens,
            preemptions=scheduler.preemptions,
            drafted=self._drafting.speculation.drafted if self._drafting else 0,
            accepted=self._drafting.speculation.accepted if self._drafting else 0,
            draft_experts=self._drafting.experts if self._drafting else 0,
            cache_slots=budget.slots,
            experts=budget.experts,
            resident=cache["resident"],
            evictions=cache["evictions"],
            pinned=cache["in_use"],
            read_latency=ReadLatency(*self._runner.reader.latency()),
            read_errors=self._runner.reader.stats()["errors"],
            ram_budget_bytes=budget.ram,
            resident_bytes=resident_bytes(),
            steps=self._runner.stats,
            vram=self._runner.vram,
            peers=experts.peers if experts else (),
            **{name: (experts.streamer.stats() if experts else NO_PEERS)[name] for name in NO_PEERS},
        )

    def view(self) -> View:
        """All that a person who watches wants to see; costs some milliseconds with very many experts."""
        recent, experts = self._recent, self._runner.experts
        first, further = recent.percentiles()
        return View(
            time=time.time(),
            now=self.snapshot(),
            paused=self._scheduler.hold,
            requests=requests(self._worker.jobs, self._scheduler),
            first_token=first,
            next_token=further,
            completion_tokens=recent.completion_tokens,
            steps=recent.steps,
            step_tokens=recent.step_tokens,
            reads=self._runner.reader.stats()["ops"],
            experts=ExpertMap.of(experts.cache, experts.pinned) if experts else None,
        )

    def pause(self) -> None:
        """Begin no further request until `resume`; those that have begun go on, new ones wait."""
        self._worker.hold(True)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._worker.hold(False)

    def pin(self, layer: int, expert: int | None = None, *, on: bool = True) -> int:
        """Never evict this expert of a layer, or all of the layer's, once in memory. on: or evict them again.

        layer: counted among those with experts. Returns how many are pinned now. Raises RequestError for what
        does not exist, and for more than the cache can spare.
        """
        if self._runner.experts is None:
            raise RequestError("this is a dense model: it has no experts", "layer")
        return self._runner.experts.pin(layer, expert, on=on)

    @property
    def stats(self) -> StepStats:
        """Seconds, bytes and counts of all steps since the engine was opened."""
        return self._runner.stats

    @property
    def profile(self) -> ProfileSummary | None:
        """What a profile says so far; None where none is written."""
        return self._runner.profile.summary if self._runner.profile else None

    def facts(self) -> Mapping[str, Any]:
        """What this engine uses: back end and why, instruction set, GPU, threads, slots; what is faster."""
        advice = self._runner.experts.advice if self._runner.experts else self._idle
        return self._runner.facts() | {"advice": advice}

    def chat_prompt(self, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation, by the model's chat template, up to where the answer begins.

        Raises RequestError when the model has no template or the template refuses the messages, TooLongError
        for more tokens than there is room for.
        """
        return self._prompts.of_chat(messages, variables)

    def check_length(self, prompt: str | Sized) -> None:
        """Refuse token ids, or a text that has too many by its length alone, before it is cut into them.

        Raises TooLongError.
        """
        self._prompts.check_length(prompt)

    def text_tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt. Raises RequestError, TooLongError for more than there is room for."""
        return self._prompts.of_text(prompt)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> Result:
        """The whole answer to a text or to token ids. Raises as `stream` does."""
        request = await self._request(prompt, params or SamplingParams())
        async with aclosing(self._follow(request)) as deltas:
            return join([delta async for delta in deltas], request.sampler.seed)

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncGenerator[Delta, None]:
        """The answer piece by piece, at least one piece a token; leaving the iterator early ends the request.

        A reader that is far behind gets no more computed until it has read on. Raises RequestError for a
        prompt or parameters that make no sense, QueueFullError when too many wait, RequestTimeoutError,
        DeviceReadError when an expert that the answer needs can't be read, EngineClosedError.
        """
        request = await self._request(prompt, params or SamplingParams())
        async with aclosing(self._follow(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def embed(self, prompt: Prompt) -> NDArray[np.float32]:
        """f32 [hidden]: the mean over the prompt's positions of the last hidden state, after the final norm.

        Raises as `stream` does.
        """
        tokens = await self._off_loop(prompt, lambda: self._prompts.tokens(prompt))
        job = Embedding(tokens=tokens, wants="hidden", id=next(self._ids), mailbox=Mailbox())
        self._worker.submit(job)
        mean: NDArray[np.float32] | None = None
        try:
            mean = await job.mailbox.get()
            return mean
        finally:
            if mean is None:
                self._worker.cancel(job)
            told(job, None if mean is None else "stop")

    async def _follow(self, request: Request) -> AsyncGenerator[Delta, None]:
        ended: FinishReason | None = None
        try:
            while ended is None:
                delta: Delta = await request.mailbox.get()
                ended = delta.finish_reason
                if request.mailbox.caught_up():
                    self._worker.resume(request)
                yield delta
        finally:
            if ended is None:
                self._worker.cancel(request)
            told(request, ended)

    async def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Submitted already."""
        asked_at, mailbox = time.perf_counter(), Mailbox[Delta]()
        beside = len(params.stop_token_ids) + sum(map(len, params.stop))
        request = await self._off_loop(prompt, lambda: self._make(prompt, params, mailbox, asked_at), beside)
        if params.structure is not None:
            request.constraint = await asyncio.to_thread(self._constraints.compile, params.structure)
        self._worker.submit(request)
        return request

    def _make(self, prompt: Prompt, params: SamplingParams, mailbox: Mailbox[Delta], at: float) -> Request:
        tokens = self._prompts.tokens(prompt)
        limit = self.context
        self._prompts.check(len(tokens), limit - (params.max_tokens != 0))  # an answer needs a place
        if params.max_tokens is not None:
            limit = min(limit, len(tokens) + params.max_tokens)
        return Request(
            tokens=tokens,
            wants="last" if params.prompt_logprobs is None else "all",
            priority=params.priority,
            id=next(self._ids),
            mailbox=mailbox,
            asked_at=at,
            timeout=params.timeout,
            params=params,
            sampler=Sampler(params, tokens, self.spec.vocab),
            tokenizer=self._tokenizer,
            eos_ids=self._eos_ids,
            limit=limit,
            drafter=NgramDrafter(tokens) if self._may_draft(params, "ngram") else None,
            engines=self._may_draft(params, "draft"),
        )

    def _may_draft(self, params: SamplingParams, how: str) -> bool:
        """As this request and the engine's settings say."""
        asked = {self._speculate, params.speculate}
        return self._drafting is not None and asked <= {"auto", how}

    async def _off_loop(self, prompt: Prompt, prepare: Callable[[], _T], beside: int = 0) -> _T:
        """What `prepare` makes of a prompt; of a long one, or of much beside it, on another thread."""
        if self._closed:
            raise EngineClosedError("the engine is closed and takes no more requests")
        if (isinstance(prompt, Sized) and len(prompt) > _LONG) or beside > _LONG:
            return await asyncio.to_thread(prepare)
        return prepare()
