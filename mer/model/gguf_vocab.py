"""The tokenizer of a model directory as the metadata of a GGUF file: what `gguf_tokenizer` reads, written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import tokenizers

from mer.errors import CheckpointError, UnsupportedModelError
from mer.model.chat import ChatTemplate
from mer.model.gguf_cuts import CUTS, WHOLE_WORDS_FIRST, cuts_of
from mer.model.sentencepiece import SentencePieceVocabulary
from mer.model.settings import read_optional, special_tokens
from mer.model.tokenizer import JsonVocabulary, Tokenizer
from mer.weights.gguf import read_gguf
from mer.weights.gguf_checkpoint import first_part, is_gguf
from mer.weights.gguf_writer import Value

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # of tokenizer.ggml.token_type
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-F]{2}>")
_NAMED: Final = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding",
    "sep_token": "seperator", "cls_token": "cls", "mask_token": "mask",
}  # fmt: skip
# What tells ways to cut a text from each other: cases, runs of digits, contractions, spaces, line ends,
# punctuation with and without letters, other scripts.
_PROBES: Final = (
    "Hello hello HELLO HeLLo ÄÖü hEllo, world's I'VE we'll 'tis don'T",
    "1 12 123 1234 12345 3.14 x1y22z333 ٣٤٥ ½¾",
    "  two   three\t\ttabs \n\n\n lines\r\n\r\n end  ",
    "(a) [b] {c} a.b a..b -x --yy ***bold*** #tag @name $5 a/b //c\n/d ./e/\n",
    "多专家模型, 今日は良い天気 カタカナ 한국어 русский Ελληνικά हिन्दी ไทย",
    "🙂👩‍👩‍👧 e\u0301a \u200b\u00a0\u3000x _under_score_ <|tag|> a\u0300b",
)


def vocabulary(path: Path, n_tokens: int) -> dict[str, Value]:
    """Keys and values about the tokenizer of a model, a directory or a GGUF file. n_tokens: rows of its head.

    Raises UnsupportedModelError, naming the file, for a tokenizer of a kind that llama.cpp or `mer` does not
    read back, CheckpointError for one that is damaged.
    """
    if is_gguf(path):
        metadata = read_gguf(first_part(path)).metadata
        return {key: metadata.raw(key) for key in metadata if key.startswith("tokenizer.")}
    tokenizer = Tokenizer.open(path)
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    config = read_optional(path / "tokenizer_config.json")
    special = special_tokens(path, config)
    found: dict[str, Value]
    if (path / "tokenizer.json").exists():
        found = _json(path, JsonVocabulary(path, config, special), n_tokens)
    else:
        pieces = SentencePieceVocabulary(path, config, special)
        found, special = _sentencepiece(path, pieces, n_tokens), pieces.special_tokens
    ids = {name: tokenizer.special_id(token) for name, token in special.items()}
    for name, key in _NAMED.items():
        id = ids.get(name)
        if id is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = id
    found |= _ends(tokenizer, ids.get("eos_token"))
    around = tokenizer.encode("")  # what stands around every text
    begins = around[:1] == [ids.get("bos_token")]
    found["tokenizer.ggml.add_bos_token"] = begins
    found["tokenizer.ggml.add_eos_token"] = around[begins:] == [ids.get("eos_token")]
    return found | _templates(tokenizer.chat_template)


def _ends(tokenizer: Tokenizer, named: int | None) -> dict[str, Value]:
    """Tokens that end an answer: the settings' own first, up to three have a name."""
    ends = sorted(tokenizer.eos_ids, key=lambda id: (id != named, id))
    return {
        f"tokenizer.ggml.{key}_token_id": id for key, id in zip(("eos", "eot", "eom"), ends, strict=False)
    }


def _templates(template: ChatTemplate | None) -> dict[str, Value]:
    if template is None:
        return {}
    found: dict[str, Value] = {}
    more = sorted(name for name in template.sources if name != "default")
    if "default" in template.sources:
        found["tokenizer.chat_template"] = template.sources["default"]
    if more:
        found["tokenizer.chat_templates"] = more
    return found | {f"tokenizer.chat_template.{name}": template.sources[name] for name in more}


def _json(path: Path, vocabulary: JsonVocabulary, n_tokens: int) -> dict[str, Value]:
    file = path / "tokenizer.json"
    parts = read_optional(file)
    model = parts.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise UnsupportedModelError(f"{file}: is of the kind {kind!r}; only BPE can be written as GGUF")
    merges = [each if isinstance(each, str) else " ".join(each) for each in model.get("merges", [])]
    if model.get("byte_fallback"):
        return _with_scores(file, vocabulary, merges, n_tokens)
    tokens, kinds = _tokens(file, vocabulary, n_tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre(file, parts, bool(model.get("ignore_merges"))),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }


def _tokens(
    file: Path, vocabulary: JsonVocabulary | SentencePieceVocabulary, n_tokens: int
) -> tuple[list[str], list[int]]:
    """Every token's text and type; ids that have none are filled up."""
    if vocabulary.size > n_tokens:
        raise CheckpointError(
            f"{file}: has {vocabulary.size} tokens, the model {n_tokens}; the files are of different models"
        )
    tokens, kinds = [], []
    for id in range(n_tokens):
        token = vocabulary.token(id)
        tokens.append(f"[PAD{id}]" if token is None else token)
        if token is None:
            kinds.append(_UNUSED)
        elif id in vocabulary.special_ids:
            kinds.append(_CONTROL)
        else:
            kinds.append(_USER if id in vocabulary.added_ids else _NORMAL)
    return tokens, kinds


def _with_scores(
    file: Path, vocabulary: JsonVocabulary, merges: list[str], n_tokens: int
) -> dict[str, Value]:
    """SentencePiece's kind of BPE: what is joined first has the highest score."""
    tokens, kinds = _tokens(file, vocabulary, n_tokens)
    order: dict[str, int] = {}
    for place, merge in enumerate(merges):
        order.setdefault(merge.replace(" ", ""), place)
    scores = [-float(order.get(token, len(merges) + id)) for id, token in enumerate(tokens)]
    first = vocabulary.token(vocabulary.encode("a", special=False)[0]) or ""
    return _llama(tokens, kinds, scores, prefix=first.startswith("▁"))


def _sentencepiece(path: Path, vocabulary: SentencePieceVocabulary, n_tokens: int) -> dict[str, Value]:
    file = path / "tokenizer.model"
    if not vocabulary.is_bpe:
        raise UnsupportedModelError(f"{file}: is a unigram model; only BPE can be written as GGUF")
    tokens, kinds = _tokens(file, vocabulary, n_tokens)
    scores = [vocabulary.score(id) for id in range(n_tokens)]
    return _llama(tokens, kinds, scores, prefix=vocabulary.prefixed)


def _llama(tokens: list[str], kinds: list[int], scores: list[float], prefix: bool) -> dict[str, Value]:
    for id, token in enumerate(tokens):
        if _BYTE_TOKEN.fullmatch(token):
            kinds[id] = _BYTE
        elif token == "<unk>":
            kinds[id] = _UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _pre(file: Path, parts: Mapping[str, Any], ignore_merges: bool) -> str:
    """The name of the way in which a text is cut before pairs are merged, found by cutting some."""
    wanted = _cut(parts)
    for name in CUTS:
        if name == "default" or (name in WHOLE_WORDS_FIRST) != ignore_merges:
            continue
        if _cut(cuts_of(name)) == wanted:
            return name
    raise UnsupportedModelError(
        f"{file}: cuts a text in a way that has no name in GGUF among those that mer knows: "
        + ", ".join(sorted(CUTS))
    )


def _cut(parts: Mapping[str, Any]) -> list[list[str]]:
    """The pieces of the probes by the pre-tokenizer of a tokenizer.json."""
    empty = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "version": "1.0", "added_tokens": []}
    text = json.dumps({**empty, "pre_tokenizer": parts.get("pre_tokenizer")})
    cutter = tokenizers.Tokenizer.from_str(text).pre_tokenizer
    if cutter is None:
        return [[probe] for probe in _PROBES]
    return [[piece for piece, _ in cutter.pre_tokenize_str(probe)] for probe in _PROBES]
