"""What is asked of a model as token ids: of a text, of a conversation, or as they were given."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from numbers import Integral
from typing import Any

from mer.engine.budget import Budget
from mer.errors import RequestError, TooLongError
from mer.model.spec import ModelSpec
from mer.model.tokenizer import Tokenizer

Prompt = str | list[int]


class Prompts:
    """Of one model, of which no prompt may have more tokens than `context`."""

    def __init__(self, tokenizer: Tokenizer | None, spec: ModelSpec, budget: Budget) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self.context = min(spec.max_positions, budget.longest)
        self._whence = f"the model's context is {spec.max_positions}, the KV cache holds {budget.context}"
        if self.context < min(spec.max_positions, budget.context):
            self._whence += ", of which a request has more where `context` is set"

    def tokens(self, prompt: Prompt) -> list[int]:
        """Raises RequestError for what is none, TooLongError."""
        if isinstance(prompt, str):
            tokens = self.of_text(prompt)
        elif isinstance(prompt, Iterable) and not isinstance(prompt, bytes):
            tokens = list(prompt)
            self.check(len(tokens))  # before each of them is looked at
        else:
            kind = type(prompt).__name__
            raise RequestError(f"the prompt must be text or a list of token ids, not {kind}", "prompt")
        if not tokens:
            raise RequestError("the prompt is empty", "prompt")
        vocab = self._spec.vocab
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= token < vocab:
                raise RequestError(f"token id {token!r} is not a whole number in 0..{vocab - 1}", "prompt")
        return [int(token) for token in tokens]

    def of_text(self, text: str) -> list[int]:
        """Raises RequestError for a model without a tokenizer, TooLongError."""
        if self._tokenizer is None:
            raise RequestError("this model came without a tokenizer; send token ids", "prompt")
        self.check_length(text)
        return self._tokenizer.encode(text, fits=self.check)

    def of_chat(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> list[int]:
        """See Engine.chat_prompt."""
        template = self._tokenizer.chat_template if self._tokenizer else None
        if self._tokenizer is None or template is None:
            told = "this model has no chat template; send a plain prompt (mer run, /v1/completions, Generate)"
            raise RequestError(told, "messages")
        text = template.render(messages, **variables)
        self.check_length(text)
        return self._tokenizer.encode(text, special=False, fits=self.check)

    def check_length(self, prompt: str | Sized) -> None:
        """See Engine.check_length."""
        if not isinstance(prompt, str):
            self.check(len(prompt))
        elif self._tokenizer is not None:
            self.check(self._tokenizer.at_least(prompt), exact=False)

    def check(self, tokens: int, most: int | None = None, *, exact: bool = True) -> None:
        """Raises TooLongError for more tokens than `most`, by default the context."""
        most = self.context if most is None else most
        if tokens > most:
            raise TooLongError(
                f"the prompt has {'' if exact else 'at least '}{tokens} tokens; {most} is the most here "
                f"({self._whence})",
                tokens if exact else None,
            )
