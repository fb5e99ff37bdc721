"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Final

from attrs import frozen
from msgspec import UNSET
from quart import Blueprint, Response

from mer.api.conversation import behind_thoughts
from mer.api.generation import MAX_ANSWERS, Job, merged, off_loop, seeded, texts_tokens
from mer.api.http import sse
from mer.api.http.answers import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    UsageAnswer,
    finite,
    new_id,
    now,
)
from mer.api.http.call import Call, current_call
from mer.api.http.errors import api_error, invalid
from mer.api.http.schemas import CompletionRequest, prompts, sampling, structure_name
from mer.api.http.service import Service, body_as, json_response, translated
from mer.engine.engine import Engine
from mer.engine.outputs import Delta, TokenLogprob, Usage, join
from mer.errors import RequestError
from mer.model.tokenizer import Tokenizer

# As in OpenAI's API, where nothing is said.
_MAX_TOKENS: Final = 16
_NAMES: Final = {"prompt_logprobs": "logprobs"}
# The log-probabilities of a token take as long as so many characters of text.
_PER_TOKEN: Final = 100


def blueprint(service: Service) -> Blueprint:
    """The endpoint."""
    made = Blueprint("completions", __name__)

    @made.post("/v1/completions")
    async def completions() -> Response:
        body = await body_as(CompletionRequest, ids=("prompt", service.context))
        (model, engine), call = await service.use(body.model), current_call()
        if service.settings.log_prompts:
            call.log["prompt"] = body.prompt
        try:
            work = await _work(engine, body)
            batches = merged(engine, work.jobs, idle=service.settings.keep_alive)
            if body.stream:
                chunks = _chunks(work, body, model, batches, call)
                return await sse.respond(chunks, silence=service.settings.keep_alive)
            return json_response(await _whole(work, model, batches, call))
        except RequestError as error:
            raise api_error(error, _NAMES | structure_name(body)) from None

    return made


@frozen
class _Work:
    """jobs: n answers to each prompt, prompt by prompt. echoes: of each prompt, its text if asked for."""

    jobs: list[Job]
    n: int
    echoes: list[str]
    logprobs: bool
    tokenizer: Tokenizer | None

    def usage(self, used: Sequence[Usage], call: Call) -> UsageAnswer:
        """Of all answers; they are counted in the log as well."""
        by_prompt = [used[i : i + self.n] for i in range(0, len(used), self.n)]
        for answers in by_prompt:
            call.used(answers)
        return UsageAnswer.of(by_prompt)


async def _work(engine: Engine, body: CompletionRequest) -> _Work:
    """Raises ApiError and RequestError."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    given, n = await translated(lambda: prompts(body.prompt, "prompt", MAX_ANSWERS)), body.n or 1
    if len(given) * n > MAX_ANSWERS:
        raise invalid(f"{len(given)} prompts with n = {n}: at most {MAX_ANSWERS} answers at a time", "n")
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise invalid("max_tokens: 0 needs echo: true, for nothing else would come back", "max_tokens")
    asks_prompt = body.echo and (body.logprobs is not None or max_tokens == 0)
    params = await translated(
        lambda: sampling(
            body,
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=(body.logprobs or 0) if asks_prompt else None,
        )
    )
    tokenizer = engine.tokenizer
    jobs: list[Job] = []
    echoes: list[str] = []
    for prompt, tokens in zip(given, await texts_tokens(engine, given), strict=True):
        jobs += [(tokens, each) for each in seeded(behind_thoughts(engine, tokens, params), n)]
        if not body.echo:
            echoes.append("")
        elif isinstance(prompt, str):
            echoes.append(prompt)
        else:
            echoes.append(await off_loop(len(prompt), partial(tokenizer.decode, prompt)) if tokenizer else "")
    return _Work(jobs, n, echoes, body.logprobs is not None, tokenizer)


class _Answer:
    """One of the answers on its way: what to write of each piece, and where its tokens stand in the text."""

    def __init__(self, work: _Work, index: int) -> None:
        self._work = work
        self._index = index
        self._prompt = work.jobs[index][0]
        self._echo = work.echoes[index // work.n]
        self._offset = 0

    def choice(self, delta: Delta) -> CompletionChoice:
        """The first one begins with the prompt, where that was asked for."""
        text, self._echo = self._echo + delta.text, ""
        logprobs = None
        if self._work.logprobs:
            entries: list[tuple[int, TokenLogprob | None]] = []
            if delta.prompt_logprobs is not None:
                entries += zip(self._prompt, delta.prompt_logprobs, strict=True)
            entries += [(each.token_id, each) for each in delta.logprobs or ()]
            logprobs = self._logprobs(entries)
        return CompletionChoice(self._index, text, logprobs, delta.finish_reason)

    def _logprobs(self, entries: Iterable[tuple[int, TokenLogprob | None]]) -> CompletionLogprobs:
        made = CompletionLogprobs([], [], [], [])
        for token, each in entries:
            made.tokens.append(self._text(token))
            made.text_offset.append(self._offset)
            self._offset += self._length(token)
            made.token_logprobs.append(None if each is None else finite(each.logprob))
            top = None
            if each is not None:
                top = {self._text(one): finite(logprob) for one, _, logprob in each.top}
                top[self._text(token)] = finite(each.logprob)
            made.top_logprobs.append(top)
        return made

    def _text(self, token: int) -> str:
        """As OpenAI's API writes tokens: those that are part of a character as bytes."""
        if self._work.tokenizer is None:
            return f"token_id:{token}"
        raw = self._work.tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _length(self, token: int) -> int:
        """Characters that the token adds to the text: none if it is special."""
        tokenizer = self._work.tokenizer
        if tokenizer is None or (
            not tokenizer.decode([token]) and tokenizer.decode([token], skip_special=False)
        ):
            return 0
        return len(tokenizer.token_text(token))


async def _chosen(answer: _Answer, delta: Delta) -> CompletionChoice:
    """`answer.choice`; on a thread where there are log-probabilities of many tokens to be written."""
    size = len(delta.prompt_logprobs or ()) + len(delta.logprobs or ())
    return await off_loop(_PER_TOKEN * size, lambda: answer.choice(delta))


async def _whole(
    work: _Work, model: str, batches: AsyncGenerator[list[tuple[int, Delta]], None], call: Call
) -> Completion:
    deltas: list[list[Delta]] = [[] for _ in work.jobs]
    async with aclosing(batches):
        async for batch in batches:
            for i, delta in batch:
                deltas[i].append(delta)
    results, choices = [], []
    for i, each in enumerate(deltas):
        await asyncio.sleep(0)  # others come in between
        results.append(result := join(each, seed=0))
        whole = Delta(
            result.text,
            result.token_ids,
            result.logprobs,
            result.finish_reason,
            prompt_logprobs=result.prompt_logprobs,
        )
        choices.append(await _chosen(_Answer(work, i), whole))
    usage = work.usage([result.usage for result in results], call)
    return Completion(new_id("cmpl-"), now(), model, choices, usage)


async def _chunks(
    work: _Work,
    body: CompletionRequest,
    model: str,
    batches: AsyncGenerator[list[tuple[int, Delta]], None],
    call: Call,
) -> AsyncGenerator[bytes, None]:
    id, created = new_id("cmpl-"), now()
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    no_usage = None if wants_usage else UNSET
    answers = [_Answer(work, i) for i in range(len(work.jobs))]
    used: dict[int, Usage] = {}
    async with aclosing(batches):
        async for batch in batches:
            parts: list[bytes] = []
            for i, delta in batch:
                choice = await _chosen(answers[i], delta)
                if choice.text or choice.logprobs is not None or choice.finish_reason is not None:
                    parts.append(sse.data(Completion(id, created, model, [choice], no_usage)))
                if delta.usage is not None:
                    used[i] = delta.usage
            yield b"".join(parts) if batch else sse.KEEP_ALIVE
    usage = work.usage([used[i] for i in range(len(answers))], call)
    if wants_usage:
        yield sse.data(Completion(id, created, model, [], usage))
    yield sse.DONE
