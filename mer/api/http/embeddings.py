"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from quart import Blueprint, Response

from mer.api.generation import texts_tokens
from mer.api.http.answers import Embedding, Embeddings, PromptUsage
from mer.api.http.call import current_call
from mer.api.http.errors import api_error
from mer.api.http.schemas import MAX_TEXTS, EmbeddingsRequest, prompts
from mer.api.http.service import Service, body_as, json_response, translated
from mer.engine.engine import Engine
from mer.errors import RequestError

# Texts of one request that wait in the engine's queue at a time.
_AT_ONCE: Final = 16


def blueprint(service: Service) -> Blueprint:
    """The endpoint."""
    made = Blueprint("embeddings", __name__)

    @made.post("/v1/embeddings")
    async def embeddings() -> Response:
        body = await body_as(EmbeddingsRequest, ids=("input", service.context))
        model, engine = await service.use(body.model)
        if service.settings.log_prompts:
            current_call().log["input"] = body.input
        try:
            given = await translated(lambda: prompts(body.input, "input", MAX_TEXTS))
            tokens = await texts_tokens(engine, given)
            vectors = await _embedded(engine, tokens)
        except RequestError as error:
            raise api_error(error, {"prompt": "input"}) from None
        data = [Embedding(i, _written(vector, body.encoding_format)) for i, vector in enumerate(vectors)]
        used = sum(map(len, tokens))
        current_call().log["prompt_tokens"] = used
        return json_response(Embeddings(data, model, PromptUsage(used, used)))

    return made


async def _embedded(engine: Engine, prompts: list[list[int]]) -> list[NDArray[np.float32]]:
    """Of length 1, as OpenAI's: a scalar product is the cosine. The first error ends the others."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(tokens: list[int]) -> NDArray[np.float32]:
        async with room:
            vector = await engine.embed(tokens)
        length = float(np.linalg.norm(vector))
        return vector / np.float32(length) if length else vector

    tasks = [asyncio.create_task(one(tokens)) for tokens in prompts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _written(vector: NDArray[np.float32], form: Literal["float", "base64"] | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()  # type: ignore[no-any-return]
