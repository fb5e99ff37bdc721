"""The tokenizer of a GGUF file, written as the files that Hugging Face has for the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import msgspec

from mer.errors import CheckpointError, UnsupportedModelError
from mer.model.gguf_cuts import BEGINS, CUTS, WHOLE_WORDS_FIRST, cuts_of
from mer.model.settings import Texts
from mer.weights.gguf import Metadata, read_gguf
from mer.weights.gguf_checkpoint import first_part

# tokenizer.ggml.token_type.
_CONTROL, _USER = 3, 4

_BYTES: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}

# Control tokens that end an answer, also where the file names only one of several.
_ENDS: Final = {
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>",
    "<|return|>", "<|call|>", "<|user|>", "<|observation|>", "<turn|>",
    "<|tool_response>", "</s>", "<｜end▁of▁sentence｜>",
}  # fmt: skip


def open_files(path: Path) -> Texts | None:
    """What Hugging Face's directory of the GGUF model at `path` would say; None when it has no tokenizer.

    Raises CheckpointError for what is damaged, UnsupportedModelError for a kind that `mer` does not know.
    """
    path = first_part(path)
    metadata = read_gguf(path).metadata
    model = metadata.get("tokenizer.ggml.model", "none")
    if model == "none":
        return None
    make = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _characters}.get(model)
    if make is None:
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.model is {model!r}; gpt2 (byte-level BPE), llama (SentencePiece's BPE) "
            "and gemma4 (BPE of characters) are supported"
        )
    tokens = _list(metadata, "tokens", str)
    kinds = _list(metadata, "token_type", int) if "tokenizer.ggml.token_type" in metadata else []
    kinds += [1] * (len(tokens) - len(kinds))
    tokenizer = make(metadata, tokens)
    tokenizer |= {
        "version": "1.0",
        "added_tokens": [
            _added(id, tokens[id], kind == _CONTROL)
            for id, kind in enumerate(kinds)
            if kind in (_CONTROL, _USER)
        ],
    }
    begin = _opening(metadata, tokens, default=model in ("llama", "gemma4") or _pre(metadata) in BEGINS)
    if begin is not None:
        tokenizer["post_processor"] = begin
    settings = {f"{name}_token": token for name in _NAMED if (token := _named(metadata, tokens, name))}
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    ends = {id for id, kind in enumerate(kinds) if kind == _CONTROL and tokens[id] in _ENDS}
    for name in ("eos", "eot", "eom"):
        id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if id is not None:
            ends.add(id)
    return Texts(
        path,
        {
            # Of a large vocabulary ten times as fast as json.
            "tokenizer.json": msgspec.json.encode(tokenizer).decode(),
            "tokenizer_config.json": json.dumps(settings),
            "generation_config.json": json.dumps({"eos_token_id": sorted(ends)}),
        },
    )


_NAMED: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _list(metadata: Metadata, name: str, kind: type) -> list[Any]:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise CheckpointError(
            f"{metadata.path}: {key} must be a list of {kind.__name__}; fetch the file again"
        )
    return value


def _named(metadata: Metadata, tokens: list[str], name: str) -> str | None:
    id = metadata.get(f"tokenizer.ggml.{_NAMED[name]}_token_id")
    if id is None:
        return None
    if type(id) is not int or not 0 <= id < len(tokens):
        key = f"tokenizer.ggml.{_NAMED[name]}_token_id"
        raise CheckpointError(
            f"{metadata.path}: {key} is {id!r}, there are {len(tokens)} tokens; fetch the file again"
        )
    return tokens[id]


def _pre(metadata: Metadata) -> str:
    return str(metadata.get("tokenizer.ggml.pre", "default"))


def _added(id: int, content: str, special: bool) -> dict[str, Any]:
    return {
        "id": id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _opening(metadata: Metadata, tokens: list[str], default: bool) -> dict[str, Any] | None:
    """The step that puts what begins and ends every text around it; None when nothing does."""
    bos, eos = _named(metadata, tokens, "bos"), _named(metadata, tokens, "eos")
    first = bos if metadata.get("tokenizer.ggml.add_bos_token", default) else None
    last = eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    used = [token for token in (first, last) if token is not None]
    if not used:
        return None
    text: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    if first is not None:
        text.insert(0, {"SpecialToken": {"id": first, "type_id": 0}})
    if last is not None:
        text.append({"SpecialToken": {"id": last, "type_id": 0}})
    return {
        "type": "TemplateProcessing",
        "single": text,
        "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in used
        },
    }


def _byte_level(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    pre = _pre(metadata)
    if pre not in CUTS:
        raise UnsupportedModelError(
            f"{metadata.path}: tokenizer.ggml.pre is {pre!r}; known are {', '.join(sorted(CUTS))}"
        )
    return {
        **cuts_of(pre),
        "decoder": _BYTES | {"use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": _ids(metadata, tokens),
            "merges": _list(metadata, "merges", str),
            "ignore_merges": pre in WHOLE_WORDS_FIRST,
        },
    }


def _characters(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    """Gemma-4's: pairs of characters are merged over the whole text, a space being one of them."""
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": _ids(metadata, tokens),
            "merges": _list(metadata, "merges", str),
            "unk_token": _named(metadata, tokens, "unk"),
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _sentencepiece(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    scores = _list(metadata, "scores", float)
    ids = _ids(metadata, tokens)
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    after: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": after},
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": _merges(tokens, scores, ids),
            "unk_token": _named(metadata, tokens, "unk"),
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _ids(metadata: Metadata, tokens: list[str]) -> dict[str, int]:
    ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for id, token in enumerate(tokens) if ids[token] != id)
        raise CheckpointError(f"{metadata.path}: the token {twice!r} is there twice; fetch the file again")
    return ids


def _merges(tokens: list[str], scores: list[float], ids: dict[str, int]) -> list[list[str]]:
    """Pairs in the order in which SentencePiece joins them: the best whole first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=False):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        found += [
            (score, len(left), len(right), left, right)
            for left, right in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        ]
    found.sort(key=lambda each: each[:3], reverse=True)
    return [[left, right] for *_, left, right in found]
