"""What a request may ask of the sampler, checked at once."""

from __future__ import annotations

import itertools
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Final, Self, TypeVar, get_args

import numpy as np
from attrs import Attribute, field, frozen
from numpy.typing import NDArray

from mer.config import Speculate
from mer.engine.structure import Structure
from mer.errors import RequestError

MAX_LOGPROBS = 20  # as OpenAI's API
# Each answer has a set of them.
MAX_STOP_IDS: Final = 4096
# Biases that are looked at in one go: numpy holds the interpreter's lock meanwhile.
_BIASES: Final = 4096

_INT64 = 2**63
_T = TypeVar("_T")
_Check = Callable[[Any, "Attribute[Any]", Any], None]


def _number(value: float) -> float:
    """An int where a float is meant becomes one, unless it's too large: then the check below refuses it."""
    return float(value) if type(value) is int and abs(value) <= sys.float_info.max else value


def _items(value: Iterable[_T]) -> tuple[_T, ...]:
    """A tuple of the items; what is no list of items stays as it is, for the check below to refuse."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else value  # type: ignore[return-value]


def _strings(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else _items(value)


def _tokens(value: Iterable[int]) -> tuple[int, ...]:
    return _items(value)


def _refuse(name: str, wanted: str, value: object) -> None:
    # Of very many only some: repr would hold the interpreter's lock for all of them.
    shown = reprlib.repr(value) if isinstance(value, Sized) and len(value) > 100 else repr(value)
    raise RequestError(f"{name} must be {wanted}, not {shown[:40]}{'...' if len(shown) > 40 else ''}", name)


def _real(low: float, high: float, wanted: str) -> _Check:
    """A check for a float in [low, high]; NaN lies in no interval."""

    def check(_: Any, attribute: Attribute[Any], value: Any) -> None:
        if type(value) is bool or not isinstance(value, int | float) or not low <= value <= high:
            _refuse(attribute.name, wanted, value)

    return check


def _whole(low: int, high: int, wanted: str, optional: bool = False) -> _Check:
    """A check for an int in [low, high], or None where that is allowed."""

    def check(_: Any, attribute: Attribute[Any], value: Any) -> None:
        if optional and value is None:
            return
        if type(value) is bool or not isinstance(value, int) or not low <= value <= high:
            _refuse(attribute.name, wanted, value)

    return check


def _check_strings(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
        _refuse(attribute.name, "a string or several, none of them empty", value)


def _check_tokens(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, tuple) or not all(
        isinstance(item, int) and type(item) is not bool and item >= 0 for item in value
    ):
        _refuse(attribute.name, "a list of token ids, integers of at least 0", value)
    if len(value) > MAX_STOP_IDS:
        raise RequestError(f"{attribute.name}: {len(value)} of them; at most {MAX_STOP_IDS}", attribute.name)


def _check_flag(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if type(value) is not bool:
        _refuse(attribute.name, "true or false", value)


def _check_speculative(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if type(value) is not bool and not (isinstance(value, str) and value in get_args(Speculate)):
        _refuse(attribute.name, f"true, false or one of {', '.join(get_args(Speculate))}", value)


class Biases(Mapping[int, float]):
    """Biases that were checked, in the order in which they came. tokens: i64 [n]; biases: f32 [n].

    There may be a hundred thousand, and many requests: as arrays they are let go of in no time.
    """

    def __init__(self, given: Mapping[int, float]) -> None:
        """Raises RequestError."""
        if not isinstance(given, Mapping) or not all(
            type(token) is int
            and 0 <= token < _INT64
            and isinstance(bias, int | float)
            and type(bias) is not bool
            and -100 <= bias <= 100
            for token, bias in given.items()
        ):
            _refuse("logit_bias", "a mapping of token ids to numbers from -100 to 100", given)
        items = iter(given.items())
        self._join(iter(lambda: dict(itertools.islice(items, _BIASES)), {}))

    @classmethod
    def of(cls, pieces: Iterable[Mapping[int, float]]) -> Self:
        """Of mappings that were checked, made one after the other."""
        made = cls.__new__(cls)
        made._join(pieces)
        return made

    def _join(self, pieces: Iterable[Mapping[int, float]]) -> None:
        tokens, biases = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for piece in pieces:
            tokens.append(np.fromiter(piece, np.int64, len(piece)))
            biases.append(np.fromiter(piece.values(), np.float32, len(piece)))
        self.tokens: NDArray[np.int64] = np.concatenate(tokens)
        self.biases: NDArray[np.float32] = np.concatenate(biases)

    def __getitem__(self, token: int) -> float:
        (found,) = np.nonzero(self.tokens == token)
        if not len(found):
            raise KeyError(token)
        return float(self.biases[found[-1]])

    def __iter__(self) -> Iterator[int]:
        return iter(self.tokens.tolist())

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"Biases({dict(zip(self.tokens.tolist(), self.biases.tolist(), strict=True))})"


def _biases(given: Mapping[int, float]) -> Biases:
    """Looked at once, not for every answer."""
    return given if isinstance(given, Biases) else Biases(given)


def _check_structure(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and not isinstance(value, Structure):
        _refuse(attribute.name, "a Structure, or left out", value)


def _check_timeout(_: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and (
        type(value) is bool or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max
    ):
        _refuse(attribute.name, "a number of seconds above 0, or left out", value)


_COUNT = _whole(0, _INT64 - 1, "a whole number of at least 1, or left out", optional=True)
_PRIORITY = _whole(-_INT64, _INT64 - 1, "a whole number that fits in 64 bits")
_TOP_K = _whole(0, _INT64 - 1, "a whole number of at least 0 (0 switches it off)")
_SEED = _whole(-_INT64, _INT64 - 1, "a whole number that fits in 64 bits, or left out", optional=True)
_LOGPROBS = _whole(0, MAX_LOGPROBS, f"a whole number from 0 to {MAX_LOGPROBS}, or left out", optional=True)
_TEMPERATURE = _real(0, sys.float_info.max, "a finite number of at least 0 (0 takes the likeliest token)")
_PROBABILITY = _real(0, 1, "a number from 0 to 1")
_REPETITION = _real(0.01, 100, "a number from 0.01 to 100 (1 switches it off)")
_PENALTY = _real(-2, 2, "a number from -2 to 2")


@frozen(kw_only=True)
class SamplingParams:
    """How an answer is drawn and when it ends.

    Raises RequestError, whose `param` is the field's name, for a value of the wrong type or out of range.
    `top_p` = 0 keeps the likeliest token alone. The limits of the presence and frequency penalties, of
    `logprobs` and of `seed` are those of OpenAI's API; those of the repetition penalty keep it computable
    in float32.
    """

    max_tokens: int | None = field(default=None, validator=_COUNT)
    """None: until the model's context (or the KV budget) is full. 0: nothing but `prompt_logprobs`."""
    temperature: float = field(default=1.0, converter=_number, validator=_TEMPERATURE)
    """0: greedy."""
    top_k: int = field(default=0, validator=_TOP_K)
    """0: off."""
    top_p: float = field(default=1.0, converter=_number, validator=_PROBABILITY)
    min_p: float = field(default=0.0, converter=_number, validator=_PROBABILITY)
    repetition_penalty: float = field(default=1.0, converter=_number, validator=_REPETITION)
    """transformers' definition, over prompt and answer."""
    presence_penalty: float = field(default=0.0, converter=_number, validator=_PENALTY)
    """OpenAI's definition, over the answer."""
    frequency_penalty: float = field(default=0.0, converter=_number, validator=_PENALTY)
    """OpenAI's definition, over the answer."""
    seed: int | None = field(default=None, validator=_SEED)
    """None: drawn from the operating system; `Sampler.seed` reports it."""
    stop: tuple[str, ...] = field(default=(), converter=_strings, validator=_check_strings)
    """The answer ends before the first of these."""
    stop_token_ids: tuple[int, ...] = field(default=(), converter=_tokens, validator=_check_tokens)
    show_special: tuple[str, ...] = field(default=(), converter=_strings, validator=_check_strings)
    """Special tokens that the text shows, e.g. those around a call of a tool; all others are left out."""
    ignore_eos: bool = field(default=False, validator=_check_flag)
    logprobs: int | None = field(default=None, validator=_LOGPROBS)
    """None: none; n: the log-probability of the chosen token and of the n likeliest."""
    prompt_logprobs: int | None = field(default=None, validator=_LOGPROBS)
    """The same of the prompt's tokens, each given those before it."""
    logit_bias: Biases = field(factory=lambda: Biases({}), converter=_biases, hash=False)
    """Token id -> -100..100, added to the model's logits before everything else."""
    structure: Structure | None = field(default=None, validator=_check_structure)
    """What the answer must look like; None: anything."""
    speculative: bool | Speculate = field(default=True, validator=_check_speculative)
    """Whether the engine may draft tokens of this answer, or how: EngineConfig.speculate's words.

    Nothing is drafted that the engine does not draft anyway; the answer is the same.
    """
    priority: int = field(default=0, validator=_PRIORITY)
    """Lower is served sooner; equal ones are served as they come."""
    timeout: float | None = field(default=None, validator=_check_timeout)
    """Seconds from submission to the answer's end; then RequestTimeoutError. None: no limit."""

    @property
    def speculate(self) -> Speculate:
        """`speculative`, as one of the words."""
        if isinstance(self.speculative, bool):
            return "auto" if self.speculative else "off"
        return self.speculative

    def __attrs_post_init__(self) -> None:
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            _refuse("max_tokens", "a whole number of at least 1, or left out", 0)
