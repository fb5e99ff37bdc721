"""Which tokens a structure allows next: a grammar of llguidance over the bytes of the model's tokens."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from mer.engine.structure import Structure
from mer.errors import RequestError
from mer.model.output_parser import SPACE
from mer.model.tokenizer import Tokenizer
from mer.model.tool_formats.lark import Lark, with_members

if TYPE_CHECKING:
    import llguidance

# Between the parts of a JSON text. Bounded: a model may like nothing better than one more line break.
_WHITESPACE: Final = r" |\n[ \t]{0,24}"
_OPTIONS: Final = {"x-guidance": {"whitespace_pattern": _WHITESPACE}}
# Seconds of a mask up to which it is computed where it is wanted.
_QUICK: Final = 1e-4
# Tokens that the inside of a JSON string allows nearly always: which ones they are is worked out once.
_SLICES: Final = [r'[^"\\\x00-\x1F\x7F]{1,30}']
_NAMES: Final = {
    "json_object": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "grammar": "grammar",
    "choice": "list of choices",
}

Mask = NDArray[np.bool_]


def constraint_bytes(vocab: int) -> int:
    """Memory that `Constraints` takes for a vocabulary of this size, once a structure was asked for."""
    return 320 * vocab


class Constraints:
    """Compiles the structures that are asked of one model. Any thread may call its methods."""

    def __init__(
        self, tokenizer: Tokenizer | None, vocab: int, eos_ids: frozenset[int], threads: int
    ) -> None:
        """vocab: the length of the logits. threads: most masks that are computed at the same time."""
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._eos_ids = eos_ids
        self._pool = ThreadPoolExecutor(threads, "mer-mask")
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._making = threading.Lock()

    def compile(self, structure: Structure) -> Constraint:
        """For one answer. It takes milliseconds, and the first of an engine up to some seconds.

        Raises RequestError, saying what is wrong, for a structure that is no schema, pattern or grammar.
        """
        import llguidance

        with self._making:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
        try:
            grammar = self._grammar(structure)
        except ValueError as error:
            raise _refusal(structure, str(error)) from None
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise _refusal(structure, matcher.get_error())
        return Constraint(matcher, self._pool, self._vocab)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _grammar(self, structure: Structure) -> str:
        if not structure.behind:
            return _grammar(structure)
        assert self._tokenizer is not None
        lark = Lark(self._tokenizer.special_id)
        start = f"{lark.before(structure.behind)} {SPACE} {expression(structure, lark)}"
        from llguidance import LLMatcher

        return LLMatcher.grammar_from_lark(lark.grammar(start))

    def _make_vocabulary(self) -> llguidance.LLTokenizer:
        import llguidance

        if self._tokenizer is None:
            raise RequestError(
                "structure: this model came without a tokenizer, so nothing is known of the text of its "
                "tokens",
                "structure",
            )
        words = _Words(self._tokenizer, self._vocab, self._eos_ids)
        words.vocabulary = llguidance.LLTokenizer(words, slices=_SLICES)  # type: ignore[arg-type]
        return words.vocabulary


class Constraint:
    """Where one answer stands in its grammar. `allowed` and `accept` are called in turn, from one thread."""

    def __init__(self, matcher: llguidance.LLMatcher, pool: ThreadPoolExecutor, vocab: int) -> None:
        self._matcher = matcher
        self._pool = pool
        self._vocab = vocab
        self._seconds = 0.0  # that the last mask took
        # Here and now: this thread has time, and an engine that is being closed takes no more work.
        self._next: Future[tuple[Mask, bool]] | None = Future()
        self._next.set_result(self._compute())

    def allowed(self, ends: Collection[int]) -> Mask | None:
        """bool [vocab]: what may come next; None when the text is complete and nothing may.

        ends: tokens that end the answer, allowed where the text is complete. Computes a mask that was not
        begun, waits for one that was. Raises RequestError when the model has no token to go on with, or the
        structure turns out too large.
        """
        mask, complete = self._compute() if self._next is None else self._next.result()
        if complete:
            mask[[token for token in ends if token < self._vocab]] = True
        if mask.any():
            return mask
        if not complete:
            raise self._trouble()
        return None

    def accept(self, token: int) -> bool:
        """Take `token`, an allowed one; True when the text is complete and nothing can be added to it."""
        if not self._matcher.consume_token(token):
            raise self._trouble()
        self._next = None
        return bool(self._matcher.is_stopped() and self._matcher.is_accepting())

    def begin(self) -> None:
        """Have the next mask computed on another thread, beside the step that computes the logits.

        Not where masks are quick: to hand one over, and to wait for it, takes longer.
        """
        if self._next is None and self._seconds > _QUICK:
            self._next = self._pool.submit(self._compute)

    def _compute(self) -> tuple[Mask, bool]:
        began = time.perf_counter()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=self._vocab + 1, bitorder="little").view(np.bool_)
        self._seconds = time.perf_counter() - began
        return mask[:-1], bool(mask[-1]) and not self._matcher.is_error()

    def _trouble(self) -> RequestError:
        why = _clean(self._matcher.get_error()) or "this model has no token that may come next"
        return RequestError(f"structure: the answer can't go on: {why}", "structure")


class _Words:
    """The tokens as llguidance wants them, and one more behind them that means the end of the text.

    The model's own end tokens would not do: some models have none, and a request may have others.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_ids: frozenset[int]) -> None:
        special = tokenizer.special_ids | eos_ids
        known = tokenizer.all_token_bytes()[:vocab]
        self.tokens = known + [b""] * (vocab - len(known)) + [b"<end of text>"]
        self.eos_token_id = vocab
        self.special_token_ids = sorted({id for id in special if id < vocab} | {vocab})
        self.vocabulary: llguidance.LLTokenizer | None = None
        self._tokenizer = tokenizer
        self._special = special

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text within an answer that is the only one possible there.

        As the model's tokenizer cuts it, unless that would add a space in front or read a special token.
        """
        ids = self._tokenizer.encode(text, special=False)
        if self._special.isdisjoint(ids) and b"".join(self.tokens[id] for id in ids) == text.encode():
            return ids
        assert self.vocabulary is not None
        return self.vocabulary.greedy_tokenize(text)


def _grammar(structure: Structure) -> str:
    """As llguidance wants it. Raises ValueError for some errors; the rest it finds itself."""
    from llguidance import LLMatcher, grammar_from

    if structure.kind in ("json_object", "json_schema"):
        schema = structure.source or '{"type": "object"}'
        if '"x-guidance"' in schema:  # options of llguidance's own
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        # What that makes of it, with Python's lock held for 9 ms a MiB.
        return f'{{"grammars": [{{"json_schema": {with_members(schema, _OPTIONS)}}}]}}'
    if structure.kind == "regex":
        return LLMatcher.grammar_from_regex(structure.source)
    if structure.kind == "grammar":
        return grammar_from("grammar", structure.source)
    lark = Lark(lambda text: None)
    return LLMatcher.grammar_from_lark(lark.grammar(expression(structure, lark)))


def expression(structure: Structure, lark: Lark) -> str:
    """A structure as part of a grammar, whatever it is `behind`. Raises RequestError."""
    if structure.kind == "json_object":
        return lark.json({"type": "object"})
    if structure.kind == "json_schema":
        return lark.json_text(structure.source)
    if structure.kind == "choice":  # a terminal: as a rule, 100,000 texts are too many symbols
        return lark.terminal(" | ".join(map(lark.text, json.loads(structure.source))))
    if structure.kind == "grammar":
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return lark.nested(any_to_lark(structure.source))
        except Exception as error:  # its own class, which it does not export
            raise _refusal(structure, str(error)) from None
    # A regular expression stands between slashes, on one line.
    source = re.sub(r"\\.|/", lambda m: r"\/" if m[0] == "/" else m[0], structure.source, flags=re.DOTALL)
    return lark.rule("/" + source.replace("\n", r"\n") + "/")


def unusable(schema: str) -> str:
    """Why this JSON schema can't be enforced; empty if it can."""
    from llguidance import LLMatcher

    try:
        return _clean(LLMatcher.validate_grammar(_grammar(Structure("json_schema", schema))))
    except (ValueError, RecursionError) as error:
        return str(error)


def _refusal(structure: Structure, reason: str) -> RequestError:
    reason = _clean(reason)
    if structure.kind == "regex" and "error: " in reason:
        # What stands around it speaks of the grammar that the expression was made part of.
        reason = reason.split("error: ", 1)[1].splitlines()[0]
    return RequestError(f"structure: this {_NAMES[structure.kind]} can't be used: {reason}", "structure")


def _clean(text: str) -> str:
    """What an error of llguidance says, without its parser's state or a backtrace that it puts behind."""
    return re.split(r"\n<(?:state|backtrace)>", text)[0].strip()
