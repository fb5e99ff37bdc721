"""Text to token ids and back, from the tokenizer files of a model directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import tokenizers
from tokenizers import AddedToken

from mer.errors import CheckpointError, RequestError
from mer.model import gguf_tokenizer, sentencepiece
from mer.model.chat import ChatTemplate
from mer.model.detokenizer import Detokenizer, Vocabulary, stages
from mer.model.settings import Folder, added_tokens, eos_ids, read_optional, special_tokens
from mer.weights.gguf_checkpoint import is_gguf

# Characters of a text from which on it is encoded as a batch: that does not hold the interpreter's lock.
_LONG: Final = 2000
# How often a conversation goes on where it is tried what the chat template makes of it.
_TIMES: Final = 16


class Tokenizer:
    """The tokenizer of one model.

    vocab_size: ids are below it; at least the vocab_size of config.json, since models pad their embedding
    (such an id has no text). eos_ids: tokens that end an answer, from the first of generation_config.json,
    config.json (both eos_token_id, as in transformers) and tokenizer_config.json (eos_token) that names
    any. chat_template: None when the model has none.
    """

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text, such as the end of an answer."""
        return self._vocabulary.special_ids

    @classmethod
    def open(cls, path: Path) -> Tokenizer | None:
        """From a GGUF file, tokenizer.json, or SentencePiece's tokenizer.model; None when there is none.

        Raises CheckpointError for a damaged file, ConfigError when the sentencepiece package is missing.
        """
        if is_gguf(path):
            files = gguf_tokenizer.open_files(path)
            return None if files is None else cls._from_json(files)
        if (path / "tokenizer.json").exists():
            return cls._from_json(path)
        config = read_optional(path / "tokenizer_config.json")
        if (path / "tokenizer.model").exists():
            special = special_tokens(path, config)
            vocabulary = sentencepiece.SentencePieceVocabulary(path, config, special)
            return cls(path, config, vocabulary.special_tokens, vocabulary)
        return None

    @classmethod
    def _from_json(cls, path: Folder) -> Tokenizer:
        config = read_optional(path / "tokenizer_config.json")
        special = special_tokens(path, config)
        return cls(path, config, special, JsonVocabulary(path, config, special))

    def __init__(
        self, path: Folder, config: Mapping[str, Any], special: Mapping[str, str], vocabulary: Vocabulary
    ) -> None:
        self._vocabulary = vocabulary
        self._stages = stages(vocabulary.decoder)
        # The strings of tokens seen so far; None for those that have no text.
        self._tokens: dict[int, str | None] = {}
        model_config = read_optional(path / "config.json")
        size = model_config.get("vocab_size")
        self.vocab_size: int = max(vocabulary.size, size if type(size) is int else 0)
        self.eos_ids: frozenset[int] = _eos_ids(path, model_config, special, vocabulary)
        self.chat_template: ChatTemplate | None = ChatTemplate.open(path, config, special)

    def at_least(self, text: str) -> int:
        """Tokens that `text` has at the least, told by its length alone."""
        # Normalising makes one character of four at the most.
        return len(text) // (4 * self._vocabulary.longest)

    @cached_property
    def shown_messages(self) -> Literal["each", "turns"] | None:
        """Which messages of users and assistants become a token or more, though they say nothing.

        each: whoever spoke before. turns: where the two take turns, a token a message on average. None: this
        can't be relied on. Found by trying the chat template.
        """
        if not self._shows("user", "assistant"):
            return None
        return "each" if self._shows("user") and self._shows("assistant", behind="user") else "turns"

    def _shows(self, *roles: str, behind: str | None = None) -> bool:
        """Whether a conversation has a token for each message more, where it goes on like this."""
        if self.chat_template is None:
            return False
        begin, tokens = [behind] if behind else [], []
        for times in (1, 1 + _TIMES):
            empty = [{"role": role, "content": ""} for role in (*begin, *roles * times)]
            try:
                text = self.chat_template.render(empty)
            except (RequestError, CheckpointError):
                return False
            tokens.append(len(self.encode(text, special=False)))
        return tokens[1] - tokens[0] >= _TIMES * len(roles)

    def encode(
        self, text: str, *, special: bool = True, fits: Callable[[int], object] | None = None
    ) -> list[int]:
        """Token ids of `text`.

        Special tokens that are written out in the text become those tokens, as in transformers. special: add
        what opens and closes every text (BOS ...); False for the output of a chat template, which has it.
        fits: told how many there are, before they become a list of Python's; raises where that is too many.
        Raises RequestError for text that is not Unicode (half a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt: {text[error.start]!r} at position {error.start} is half a surrogate pair, "
                "no character; is the input UTF-8?",
                "prompt",
            ) from None
        return self._vocabulary.encode(text, special, fits)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Spaces are never "cleaned up", whatever tokenizer_config.json says: that would destroy text
        (transformers 5 ignores the setting for BPE, too). Raises RequestError for an id outside
        0..vocab_size - 1.
        """
        piece = self._shown if skip_special else self._token
        stream = Detokenizer(piece, self._vocabulary.decoder, ())
        return "".join(map(stream.push, ids)) + stream.finish()

    def token_text(self, id: int) -> str:
        """Text of one token within a text; incomplete characters as U+FFFD. Raises RequestError."""
        return self.token_bytes(id).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of one token within a text; may be part of a character. Raises RequestError."""
        piece: bytes | str = self._token(id) or ""
        for stage in self._stages:
            piece = stage.alone(piece)
        return piece if isinstance(piece, bytes) else piece.encode()

    def all_token_bytes(self) -> list[bytes]:
        """`token_bytes` of every id. The strings are not kept, as they are for tokens that were met."""
        tokens = []
        for id in range(self.vocab_size):
            piece: bytes | str = self._vocabulary.token(id) or ""
            for stage in self._stages:
                piece = stage.alone(piece)
            tokens.append(piece if isinstance(piece, bytes) else piece.encode())
        return tokens

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written so, one that ends answers included; None for others."""
        id = self._vocabulary.id(text)
        return id if id in self._vocabulary.special_ids or id in self.eos_ids else None

    def detokenizer(self, prompt_ids: Sequence[int], show: Collection[str] = ()) -> Detokenizer:
        """For one answer to this prompt; of the special tokens only `show` are shown. Raises RequestError."""
        shown = {self._vocabulary.id(text) for text in show}
        piece = (lambda id: self._token(id) if id in shown else self._shown(id)) if shown else self._shown
        return Detokenizer(piece, self._vocabulary.decoder, prompt_ids)

    def first_difference(self, other: Tokenizer) -> int | None:
        """The lowest id that both have and that is not the same token to them; None: there is none."""
        here, there = self._vocabulary, other._vocabulary
        for id in range(min(here.size, there.size)):
            pair = here.token(id), there.token(id)
            if pair[0] != pair[1] and None not in pair:
                return id
        return None

    def _token(self, id: int) -> str | None:
        try:
            return self._tokens[id]
        except KeyError:
            pass
        if not 0 <= id < self.vocab_size:
            raise RequestError(f"token id {id} is outside 0..{self.vocab_size - 1}", "prompt")
        token = self._tokens[id] = self._vocabulary.token(id)
        return token

    def _shown(self, id: int) -> str | None:
        return None if id in self._vocabulary.special_ids else self._token(id)


class JsonVocabulary:
    """tokenizer.json, run by the `tokenizers` package."""

    def __init__(self, path: Folder, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
        file = path / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
        except Exception as error:  # the package raises bare Exception, too
            raise CheckpointError(f"{file}: can't be read as a tokenizer: {error}; fetch it again") from error
        # What the file says about batches for training is nothing to a prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        self._tokenizer.add_tokens(
            [t for _, t in added_tokens(path, config, special) if t.content not in known]
        )
        # Named in the settings only: special if in the vocabulary; the model has no weights for others.
        self._tokenizer.add_special_tokens(
            [
                AddedToken(t, special=True, normalized=False)
                for t in special.values()
                if t not in known and self.id(t) is not None
            ]
        )
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.added_ids = frozenset(added)
        vocabulary = self._tokenizer.get_vocab()
        self.size = 1 + max(vocabulary.values(), default=-1)
        self.longest = max(map(len, vocabulary), default=1)
        decoder = self._tokenizer.decoder
        self.decoder: dict[str, Any] | None = None if decoder is None else json.loads(decoder.__getstate__())

    def encode(self, text: str, special: bool, fits: Callable[[int], object] | None = None) -> list[int]:
        if len(text) > _LONG:
            encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0]
        else:
            encoding = self._tokenizer.encode(text, add_special_tokens=special)
        if fits is not None:  # the lock is held while ids are made, 20 ms for a million, and let go of
            fits(len(encoding))
        return encoding.ids

    def token(self, id: int) -> str | None:
        return self._tokenizer.id_to_token(id)

    def id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


def _eos_ids(
    path: Folder, config: Mapping[str, Any], special: Mapping[str, str], vocabulary: Vocabulary
) -> frozenset[int]:
    ids = eos_ids(path, config)
    if ids is not None:
        return ids
    id = vocabulary.id(special.get("eos_token", ""))
    return frozenset() if id is None else frozenset([id])
