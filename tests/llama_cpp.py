"""llama.cpp, as the wheel xllamacpp brings it: its server, asked for tokens, chats and probabilities."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import xllamacpp
from attrs import frozen


@frozen
class Drawn:
    """A token and the likeliest at its place, by id: natural logarithms of their probabilities."""

    id: int
    top: dict[int, float]


class LlamaCpp:
    """One model, to be used with `with`."""

    def __init__(self, path: Path, *, context: int = 512) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup = context, 1, False
        # Threads of its that wait for each other do so on the processor.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.use_jinja = True
        # Keys and values as exact as mer's.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.hostnames, params.port = ["127.0.0.1"], 0
        self._server = xllamacpp.Server(params)
        self._client = httpx.Client(base_url=self._server.listening_address, timeout=300)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()
        del self._server

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        response = self._client.post(path, json=body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`; special: with what opens and closes every text."""
        found = self._ask("/tokenize", content=text, add_special=special, parse_special=True)
        tokens: list[int] = found["tokens"]
        return tokens

    def chat(self, messages: list[dict[str, Any]]) -> str:
        """The conversation by the model's template, up to where the answer begins."""
        return str(self._ask("/apply-template", messages=messages)["prompt"])

    def greedy(self, prompt: list[int], count: int, top: int, *, endless: bool = False) -> list[Drawn]:
        """The likeliest token, `count` times or up to the one that ends the answer; endless: none does."""
        answer = self._ask(
            "/completion",
            **{"prompt": prompt, "n_predict": count, "temperature": 0, "n_probs": top, "ignore_eos": endless},
        )
        return [
            Drawn(each["id"], {other["id"]: other["logprob"] for other in each["top_logprobs"]})
            for each in answer["completion_probabilities"]
        ]
