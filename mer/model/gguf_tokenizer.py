"""The tokenizer of a GGUF file, written as the files that Hugging Face has for the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from mer.errors import CheckpointError, UnsupportedModelError
from mer.model.settings import Texts
from mer.weights.gguf import Metadata, read_gguf
from mer.weights.gguf_checkpoint import first_part

# tokenizer.ggml.token_type.
_CONTROL, _USER = 3, 4

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3: Final = [_CONTRACTIONS + "|" + _WORD + r"|\p{N}{1,3}" + _REST]
_LING: Final = [_CONTRACTIONS + "|" + _WORD + r"|\p{N}" + _REST.replace(r"\s*[\r\n]+|", r"\s*[\r\n]|")]
_QWEN2: Final = [_CONTRACTIONS + "|" + _WORD + r"|\p{N}" + _REST]


_DIGITS_THEN_GPT2: Final = (
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
)  # fmt: skip


def _cased(ending: str, digits: str) -> list[str]:
    start = r"[^\r\n\p{L}\p{N}]?"
    return [
        f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|{digits}{_REST_SLASH}",
    ]


def _kimi() -> str:
    """As `_cased`, but Chinese characters by themselves, and no slash behind punctuation."""
    ending, start = f"{_CONTRACTIONS}?", r"[^\r\n\p{L}\p{N}]?"
    upper, lower = (f"{kinds[:-1]}&&[^\\p{{Han}}]]" for kinds in (_UPPER, _LOWER))
    letters = f"{start}{upper}*{lower}+{ending}|{start}{upper}+{lower}*{ending}"
    return rf"[\p{{Han}}]+|{letters}|\p{{N}}{{1,3}}{_REST}"


# Letters of scripts that have cases, as the tokenizers of DeepSeek-LLM to -V2 list them.
_CASED_SCRIPTS: Final = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_CHINESE_KOREAN: Final = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


# How a text is cut before pairs are merged, by tokenizer.ggml.pre: patterns applied one after the other; None
# stands for GPT-2's, which the byte-level step brings.
CUTS: Final[dict[str, list[str] | None]] = {
    "default": None,
    "gpt-2": None,
    "olmo": None,
    **{pre: [r"\p{N}"] for pre in _DIGITS_THEN_GPT2},
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "glm4": _LLAMA3,
    "chatglm-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "hunyuan": _QWEN2,
    "bailingmoe": _LING,
    "bailingmoe2": _LING,
    "gpt-4o": _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),
    "minimax-m2": _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),
    "kimi-k2": [_kimi()],
    "tekken": _cased("", r"\p{N}"),
    "deepseek-llm": [
        r"[\r\n]",
        rf"\s?[{_CASED_SCRIPTS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CHINESE_KOREAN,
        r"\p{N}",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
}
# Besides the cuts, these split by GPT-2's pattern as well.
_ALSO_GPT2: Final = _DIGITS_THEN_GPT2
_NFC: Final = {"qwen2", "deepseek-r1-qwen"}
WHOLE_WORDS_FIRST: Final = {"llama-bpe", "llama3", "llama-v3", "tekken"}
_BYTES: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
_BEGINS: Final = {"llama-bpe", "llama3", "llama-v3", "tekken"}

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
    begin = _opening(metadata, tokens, default=model in ("llama", "gemma4") or _pre(metadata) in _BEGINS)
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
            "tokenizer.json": json.dumps(tokenizer),
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


def cuts_of(pre: str) -> dict[str, Any]:
    """What a tokenizer.json says about texts that are cut in the way that is called so in CUTS."""
    cuts = CUTS[pre]
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in cuts or []
    ]
    steps.append(_BYTES | {"use_regex": cuts is None or pre in _ALSO_GPT2})
    return {
        "normalizer": {"type": "NFC"} if pre in _NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
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
