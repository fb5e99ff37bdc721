"""The calls of mer.v1.Inference."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import Message

from mer.api import conversation as conversations
from mer.api import generation
from mer.api.conversation import ChatRequest
from mer.api.grpc import convert
from mer.api.grpc.gate import Call, Context, Gate, send
from mer.api.grpc.session import serve_session
from mer.api.model import LoadingError
from mer.api.models import Models
from mer.api.settings import ServerSettings
from mer.api.speakers import too_many
from mer.engine.engine import Engine
from mer.engine.outputs import PromptLogprobs
from mer.engine.params import SamplingParams
from mer.engine.view import View
from mer.errors import EngineClosedError, QueueFullError, RequestError, TooLongError
from mer.v1 import inference_pb2 as pb

_Q = TypeVar("_Q", bound=Message)

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Inference"].full_name
# Log-probabilities of a prompt in one message: with 20 likeliest tokens each it has a tenth of the 4 MiB that
# clients take.
_PROMPT_PIECE: Final = 512
# Token ids that are made Python's at once.
_IDS: Final = 4096
# Seconds between two answers of a Watch, and how many may watch.
_WATCH_S: Final = (0.1, 60.0)
_MOST_WATCHERS: Final = 64
_in_use: ContextVar[Engine | None] = ContextVar("engine", default=None)
# Silence is no event here: HTTP/2 has pings of its own.
_NEVER: Final = 1e9


class Inference:
    """What the calls do, each with the engine of the model that its request names.

    `generate` and `chat` write to who passes the pieces on: a call, or a session.
    """

    def __init__(self, models: Models, settings: ServerSettings, gate: Gate) -> None:
        self._models = models
        self._settings = settings
        self._gate = gate
        self._begun = time.monotonic()
        self._watchers = 0

    @property
    def _engine(self) -> Engine:
        """Of the call, or of the session's request, that this task serves; else the first model's."""
        engine = _in_use.get() or self._models.first.engine
        if engine is None:
            raise LoadingError("the model is being loaded")
        return engine

    @asynccontextmanager
    async def using(self, request: Message) -> AsyncIterator[None]:
        """While a request is served: its model's engine stays open. Raises as Models.use."""
        async with self._models.use(self._models.find(getattr(request, "model", ""))) as engine:
            before = _in_use.set(engine)
            try:
                yield
            finally:
                _in_use.reset(before)

    async def received(self, kind: type[_Q], data: bytes) -> _Q:
        """Raises RequestError for what is no such message, or too large for any model here."""
        most = self._settings.max_body if kind is pb.DetokenizeRequest else self._models.context
        return await convert.received(kind, data, most)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """By the name of the call."""

        async def run_session(requests: Any, context: Context) -> None:
            async with self._gate.call(context, "Session") as call:
                await serve_session(self, self._gate, call, requests, context)

        return {
            "Generate": self._streaming("Generate", pb.GenerateRequest, self.generate),
            "Chat": self._streaming("Chat", pb.ChatRequest, self.chat),
            "Session": grpc.stream_stream_rpc_method_handler(run_session),
            "Tokenize": self._unary("Tokenize", pb.TokenizeRequest, self.tokenize),
            "Detokenize": self._unary("Detokenize", pb.DetokenizeRequest, self.detokenize),
            "Embed": self._unary("Embed", pb.EmbedRequest, self.embed),
            # Asked for by what watches the server: no limit counts them, and a server that drains answers.
            "GetModel": self._unary("GetModel", pb.GetModelRequest, self.get_model, counted=False),
            "GetStats": self._unary("GetStats", pb.GetStatsRequest, self.get_stats, counted=False),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }

    def _unary(
        self, name: str, kind: type[_Q], method: Callable[[_Q], Awaitable[Message]], *, counted: bool = True
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(data: bytes, context: Context) -> bytes:
            async with self._gate.call(context, name) as call:
                with self._gate.admitted(call) if counted else nullcontext():
                    request = await self.received(kind, data)
                    call.path = convert.path_of(request)
                    async with self.using(request):
                        return (await method(request)).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(handle)

    def _streaming(
        self, name: str, kind: type[_Q], method: Callable[[Call, _Q, float | None, Any], Awaitable[None]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        async def handle(data: bytes, context: Context) -> None:
            async def write(message: Message) -> None:
                await send(context, message)

            async with self._gate.call(context, name) as call:
                with self._gate.admitted(call):
                    request = await self.received(kind, data)
                    call.size = len(data)
                    async with self.using(request):
                        await method(call, request, context.time_remaining(), write)

        return grpc.unary_stream_rpc_method_handler(handle)

    async def generate(
        self,
        call: Call,
        request: pb.GenerateRequest,
        remaining: float | None,
        write: Callable[[pb.GenerateResponse], Awaitable[None]],
    ) -> None:
        """Write the answer to a prompt. Raises RequestError and what `Engine.stream` raises."""
        call.path = convert.path_of(request)
        params = await generation.off_loop(call.size, lambda: convert.sampling(request.params, remaining))
        prompt = await self._prompt(request)
        if self._settings.log_prompts:
            call.log["prompt"] = request.text or list(request.token_ids.ids)
        seed, tokenizer = params.seed or 0, self._engine.tokenizer
        async with aclosing(self._engine.stream(prompt, params)) as deltas:
            async for delta in deltas:
                if delta.prompt_logprobs is not None:
                    for piece in self._of_prompt(prompt, delta.prompt_logprobs):
                        await write(pb.GenerateResponse(prompt_logprobs=piece))
                await write(convert.generated(delta, seed, tokenizer))
                call.used(delta.usage)

    async def chat(
        self,
        call: Call,
        request: pb.ChatRequest,
        remaining: float | None,
        write: Callable[[pb.ChatResponse], Awaitable[None]],
    ) -> None:
        """Write the answer in a conversation. Raises RequestError and what `Engine.stream` raises."""
        call.path = convert.path_of(request)
        engine = self._engine

        def asked() -> ChatRequest:
            _check_messages(engine, request.messages)
            return convert.conversation(request, convert.sampling(request.params, remaining))

        # Whatever its bytes are: many short messages take their time, too.
        conversation = await generation.off_loop(call.size, asked)
        if self._settings.log_prompts:
            call.log["messages"] = conversation.messages
        seed, tokenizer = conversation.params.seed or 0, engine.tokenizer
        prepared = await conversations.prepare(engine, conversation)
        async with aclosing(prepared.answers(engine, idle=_NEVER)) as batches:
            async for batch in batches:
                for event in batch:
                    if event.delta.prompt_logprobs is not None:
                        for piece in self._of_prompt(prepared.prompt, event.delta.prompt_logprobs):
                            await write(pb.ChatResponse(prompt_logprobs=piece))
                    await write(convert.chatted(event, seed, tokenizer))
                    call.used(event.delta.usage)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Raises RequestError."""
        if request.messages:
            if request.text:
                raise RequestError("text and messages: give one of them", "text")
            engine = self._engine

            def asked() -> ChatRequest:
                _check_messages(engine, request.messages)
                return convert.conversation(request, SamplingParams())

            conversation = await asyncio.to_thread(asked)
            return pb.TokenizeResponse(token_ids=await conversations.chat_tokens(engine, conversation))
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        ids = await generation.told_tokens(self._engine, request.text, "text", special=special)
        return pb.TokenizeResponse(token_ids=ids)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Raises RequestError."""
        tokenizer, given = self._engine.tokenizer, request.token_ids
        if tokenizer is None:
            raise RequestError("this model came without a tokenizer", "token_ids")

        def text() -> str:
            ids = [id for at in range(0, len(given), _IDS) for id in given[at : at + _IDS]]
            bad = next((i for i, token in enumerate(ids) if token >= tokenizer.vocab_size), None)
            if bad is not None:
                raise RequestError(
                    f"token_ids[{bad}] is {ids[bad]}; ids are below {tokenizer.vocab_size}",
                    f"token_ids[{bad}]",
                )
            return tokenizer.decode(ids, skip_special=not request.keep_special_tokens)

        return pb.DetokenizeResponse(text=await generation.off_loop(4 * len(given), text))

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Raises RequestError and what `Engine.embed` raises."""
        prompt = await self._prompt(request)
        values = await self._engine.embed(prompt)
        return pb.EmbedResponse(values=values, prompt_tokens=len(prompt))

    async def get_model(self, request: pb.GetModelRequest) -> pb.GetModelResponse:
        """What is served, and how."""
        engine = self._engine
        spec, tokenizer = engine.spec, engine.tokenizer
        return pb.GetModelResponse(
            name=self._models.find(request.model).name,
            server_version=version("mer"),
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
            max_tokens=engine.context,
            vocab_size=spec.vocab,
            eos_token_ids=sorted(tokenizer.eos_ids) if tokenizer else (),
            layers=spec.n_layers,
            hidden_size=spec.hidden,
            experts_per_layer=spec.n_experts,
            experts_per_token=spec.top_k,
            facts={name: str(value) for name, value in engine.facts().items() if value is not None},
        )

    async def get_stats(self, request: pb.GetStatsRequest) -> pb.GetStatsResponse:
        """The engine now."""
        return convert.stats(self._engine.snapshot(), time.monotonic() - self._begun)

    async def _watch(self, data: bytes, context: Context) -> None:
        async with self._gate.call(context, "Watch") as call:
            request = await self.received(pb.WatchRequest, data)
            call.path = convert.path_of(request)
            interval = request.interval if request.HasField("interval") else 1.0
            if not _WATCH_S[0] <= interval <= _WATCH_S[1]:
                raise RequestError(
                    f"interval {interval:g}: must be {_WATCH_S[0]} to {_WATCH_S[1]} seconds", "interval"
                )
            with self._watching():
                while not self._gate.draining.is_set():
                    name, engine = self._loaded(request.model)
                    view = await asyncio.to_thread(engine.view)
                    await send(context, self._watched(view, name, request))
                    with suppress(TimeoutError):
                        async with asyncio.timeout(interval):
                            await self._gate.draining.wait()
            raise EngineClosedError("the server is shutting down")

    def _loaded(self, name: str) -> tuple[str, Engine]:
        model = self._models.find(name)
        if model.engine is None:
            raise LoadingError(f"the model {model.name!r} is not loaded")
        return model.name, model.engine

    def _watched(self, view: View, name: str, request: pb.WatchRequest) -> pb.WatchResponse:
        uptime = time.monotonic() - self._begun
        return convert.watched(view, name, uptime, experts=not request.without_experts)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        if self._watchers == _MOST_WATCHERS:
            raise QueueFullError(f"{_MOST_WATCHERS} are watching this server; try again later", 5.0)
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    async def _prompt(self, request: pb.GenerateRequest | pb.EmbedRequest) -> list[int]:
        match request.WhichOneof("prompt"):
            case "text":
                return await generation.text_tokens(self._engine, request.text)
            case "token_ids":
                self._engine.check_length(request.token_ids.ids)
                return list(request.token_ids.ids)
        raise RequestError("the prompt is missing: set text or token_ids", "prompt")

    def _of_prompt(self, prompt: list[int], given: PromptLogprobs) -> list[list[pb.TokenLogprob]]:
        return [
            convert.logprobs(
                given[i : i + _PROMPT_PIECE], self._engine.tokenizer, prompt[i : i + _PROMPT_PIECE]
            )
            for i in range(0, len(given), _PROMPT_PIECE)
        ]


def _check_messages(engine: Engine, messages: Sequence[pb.Message]) -> None:
    if len(messages) > engine.context and too_many(engine, (message.role for message in messages)):
        text = f"the conversation has {len(messages)} messages; {engine.context} tokens is the most here"
        raise TooLongError(text, None)
