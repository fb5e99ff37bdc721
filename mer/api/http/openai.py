"""The parts of OpenAI's objects that several endpoints share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any, Final

from mer.engine.engine import Engine
from mer.engine.outputs import TokenLogprob, Usage

# JSON has no -inf; OpenAI writes this for what is next to impossible.
_LEAST: Final = -9999.0


def header(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """What every answer and every chunk of it begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(answers: Iterable[Usage]) -> dict[str, Any]:
    """OpenAI's usage object of several answers to one prompt, which counts once."""
    each = list(answers)
    completion = sum(one.completion_tokens for one in each)
    prompt = each[0].prompt_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": each[0].cached_tokens},
    }


def finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def token_logprobs(engine: Engine, logprobs: Iterable[TokenLogprob], top: bool) -> list[dict[str, Any]]:
    """Entries of `choices[].logprobs.content` of chat completions."""
    return [
        {
            **_entry(engine, each.token_id, each.text, each.logprob),
            "top_logprobs": [_entry(engine, *one) for one in each.top] if top else [],
        }
        for each in logprobs
    ]


def _entry(engine: Engine, token: int, text: str, logprob: float) -> dict[str, Any]:
    raw = engine.tokenizer.token_bytes(token) if engine.tokenizer else b""
    return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}
