"""How a text is cut before pairs of bytes are merged, by the names that GGUF files have for it."""

from __future__ import annotations

from typing import Any, Final

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3: Final = [_CONTRACTIONS + "|" + _WORD + r"|\p{N}{1,3}" + _REST]
_QWEN2: Final = [_CONTRACTIONS + "|" + _WORD + r"|\p{N}" + _REST]
_QWEN35: Final = [
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    + _REST.replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
]
_LING: Final = [_QWEN2[0].replace(r"\s*[\r\n]+|", r"\s*[\r\n]|")]
_SEED: Final = [_QWEN2[0].replace(r"\p{N}]+[\r\n]*|", r"\p{N}\r\n]+|")]


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


_DEEPSEEK3: Final = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
_GPT_4O: Final = _cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")

# By these names a whole word of the vocabulary is taken as it is, also where no merges lead to it, and a text
# begins with BOS unless the file says otherwise.
_LLAMA3_NAMES: Final = ("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "midm-2.0", "pixtral")
WHOLE_WORDS_FIRST: Final = {*_LLAMA3_NAMES, "tekken"}
BEGINS: Final = WHOLE_WORDS_FIRST
_QWEN2_NAMES: Final = ("qwen2", "deepseek-r1-qwen", "kormo", "megrez")
_NFC: Final = {*_QWEN2_NAMES, "qwen35"}
# Besides their cut, these split by GPT-2's pattern as well.
_DIGITS_THEN_GPT2: Final = (
    "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
)  # fmt: skip

_DIGITS: Final = [r"\p{N}"]

# By tokenizer.ggml.pre: patterns applied one after the other; None stands for GPT-2's, which the byte-level
# step brings.
CUTS: Final[dict[str, list[str] | None]] = {
    **dict.fromkeys(("default", "gpt-2", "olmo", "a.x-4.0", "exaone4", "gigachat", "mellum", "trillion")),
    **dict.fromkeys(_DIGITS_THEN_GPT2, _DIGITS),
    **dict.fromkeys(_LLAMA3_NAMES, _LLAMA3),
    **dict.fromkeys(("glm4", "chatglm-bpe", "glm5", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys((*_QWEN2_NAMES, "hunyuan", "solar-open"), _QWEN2),
    "qwen35": _QWEN35,
    "seed-coder": _SEED,
    **dict.fromkeys(("bailingmoe", "bailingmoe2"), _LING),
    **dict.fromkeys(("gpt-4o", "kanana2", "minimax-m2"), _GPT_4O),
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
    **dict.fromkeys(("deepseek-v3", "joyai-llm"), _DEEPSEEK3),
}
_BYTES: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}


def cuts_of(pre: str) -> dict[str, Any]:
    """What a tokenizer.json says about texts that are cut in the way that is called so in CUTS."""
    cuts = CUTS[pre]
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in cuts or []
    ]
    steps.append(_BYTES | {"use_regex": cuts is None or pre in _DIGITS_THEN_GPT2})
    return {
        "normalizer": {"type": "NFC"} if pre in _NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    }
