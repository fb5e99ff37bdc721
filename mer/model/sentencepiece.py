"""SentencePiece's tokenizer.model, run by the `sentencepiece` package (an optional extra of mer)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken

from mer.errors import CheckpointError, ConfigError
from mer.model.settings import added_tokens

_SPACE: Final = "▁"
# ModelProto.normalizer_spec.add_dummy_prefix = false: protobuf merges what is appended to a message.
_NO_PREFIX: Final = b"\x1a\x02\x18\x00"


class SentencePieceVocabulary:
    """tokenizer.model, with the tokens that the settings beside it add.

    Control pieces such as <s> or [INST] that are written out in a text become those tokens, although
    SentencePiece itself would spell them. Text between special tokens goes to SentencePiece as it is. Its
    dummy space stands before a text, and before each part between special tokens if tokenizer_config.json
    says "legacy", as in transformers' LlamaTokenizer. special_tokens: by name ('bos_token', ...), the
    model's own where the settings name none.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
        file = path / "tokenizer.model"
        try:
            import sentencepiece
        except ImportError:
            raise ConfigError(
                f"{file} needs the sentencepiece package: pip install mer[sentencepiece]"
            ) from None
        try:
            model = file.read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._middle = self._model
            if config.get("legacy") is not True:
                self._middle = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_PREFIX)
        except OSError as error:
            raise CheckpointError(f"{file}: can't be read: {error.strerror}") from error
        except RuntimeError as error:
            raise CheckpointError(f"{file}: is no SentencePiece model: {error}; fetch it again") from error
        pieces = self._model.get_piece_size()
        self._pieces: dict[int, str] = dict(enumerate(self._model.id_to_piece(list(range(pieces)))))
        self.special_tokens = self._own_special() | dict(special)
        added = dict(added_tokens(path, config, special))
        self._pieces |= {id: token.content for id, token in added.items()}
        self._ids = {piece: id for id, piece in self._pieces.items()}
        control = [id for id in range(pieces) if self._model.is_control(id) or self._model.is_unknown(id)]
        named = [self._ids[token] for token in self.special_tokens.values() if token in self._ids]
        for id in control + named:
            added.setdefault(id, AddedToken(self._pieces[id], special=True, normalized=False))
        self.size = 1 + max(self._pieces, default=-1)
        self.longest = max(map(len, self._ids), default=1)
        self.special_ids = frozenset(control + [id for id, token in added.items() if token.special])
        self.added_ids = frozenset(added)
        self._added = {token.content: token for token in added.values()}
        longest = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._bos = self._fixed(config, "bos", default=True)
        self._eos = self._fixed(config, "eos", default=False)
        self.prefixed = self._model.normalize("a").startswith(_SPACE)
        self.decoder: dict[str, Any] | None = _decoder(strip=self.prefixed)

    def _own_special(self) -> dict[str, str]:
        ids = {"bos": self._model.bos_id(), "eos": self._model.eos_id(), "unk": self._model.unk_id()}
        return {f"{name}_token": self._pieces[id] for name, id in ids.items() if id >= 0}

    def _fixed(self, config: Mapping[str, Any], name: str, *, default: bool) -> list[int]:
        """Ids that stand at the beginning or the end of every text."""
        id = self._ids.get(self.special_tokens.get(f"{name}_token", ""))
        wanted = config.get(f"add_{name}_token", default)
        return [id] if wanted and id is not None else []

    def encode(self, text: str, special: bool, fits: Callable[[int], object] | None = None) -> list[int]:
        ids: list[int] = []
        done = 0
        for match in self._split.finditer(text):
            token = self._added[match[0]]
            start, end = match.span()
            before = text[done:start]
            self._encode_part(before.rstrip() if token.lstrip else before, ids, done == 0)
            ids.append(self._ids[token.content])
            if token.rstrip:
                end += len(text[end:]) - len(text[end:].lstrip())
            done = end
        self._encode_part(text[done:], ids, done == 0)
        ids = [*self._bos, *ids, *self._eos] if special else ids
        if fits is not None:
            fits(len(ids))
        return ids

    def _encode_part(self, text: str, ids: list[int], first: bool) -> None:
        if text:
            ids += (self._model if first else self._middle).encode(text)

    @property
    def is_bpe(self) -> bool:
        """Whether pieces are made by joining pairs, the one with the best score first."""
        from sentencepiece import sentencepiece_model_pb2

        protos: Any = sentencepiece_model_pb2
        model = protos.ModelProto.FromString(self._model.serialized_model_proto())
        return bool(model.trainer_spec.model_type == model.trainer_spec.BPE)

    def score(self, id: int) -> float:
        """What a piece counts; 0 for an added token."""
        return float(self._model.get_score(id)) if id < self._model.get_piece_size() else 0.0

    def token(self, id: int) -> str | None:
        return self._pieces.get(id)

    def id(self, token: str) -> int | None:
        return self._ids.get(token)


def _decoder(*, strip: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
