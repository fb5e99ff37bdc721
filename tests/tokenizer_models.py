"""Small tokenizers of every kind, trained on a corpus of many scripts: what test_tokenizer.py reads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

CORPUS: Final = [
    "The quick brown fox jumps over the lazy dog. It's the fox's day, isn't it ?",
    "def main(argv: list[str]) -> int:\n    for i in range(10):\n\tprint(f'{i:>3}')\n    return 0\n",
    "多专家模型在每一步只激活少数专家。你好，世界！今日は良い天気ですね。",
    "Ünïcödé, naïve café; é (e + combining) ñ; Ελληνικά, русский язык, עברית, हिन्दी, ไทย",
    "🙂🙃 👩‍👩‍👧‍👦 🇩🇪🇯🇵 👍🏽 emojis\u200d and\u00a0spaces\u3000wide",
    "a  b   c\r\n\n\n  indented\t\ttabs   ",
    "0 12 345 6789 3.14159 -1e-9 {\"json\": [true, null]} <html>&amp;</html> \\n \u2581 underline",
]  # fmt: skip

# As Llama-3 and Qwen split text before byte-level BPE.
_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL: Final = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<｜User｜>"]


def byte_level() -> Tokenizer:
    """As Qwen3, DeepSeek, Llama-3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=_SPECIAL[1:], initial_alphabet=alphabet)
    )
    return tokenizer


def _byte_fallback(**options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    special = _SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    for name, value in options.items():
        setattr(tokenizer, name, value)
    tokenizer.train_from_iterator(
        CORPUS[:2], trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    # Bytes are ordinary tokens of the vocabulary, not added ones.
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [each for each in parts["added_tokens"] if each["content"] in _SPECIAL]
    return Tokenizer.from_str(json.dumps(parts))


def llama() -> Tokenizer:
    """As Mixtral and Llama-2 publish it."""
    return _byte_fallback(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )


def gemma() -> Tokenizer:
    """Byte fallback without the dummy space."""
    return _byte_fallback(
        normalizer=normalizers.Replace(" ", "▁"),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    return tokenizer


def words() -> Tokenizer:
    """No decoder: tokens are joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=_SPECIAL, show_progress=False)
    )
    return tokenizer


JSON_KINDS: Final[dict[str, Callable[[], Tokenizer]]] = {
    each.__name__: each for each in (byte_level, llama, gemma, unigram, words)
}


def write_json(kind: str, path: Path) -> Path:
    """A model directory with this kind of tokenizer.json: <s> before each text, two tokens added later."""
    tokenizer = JSON_KINDS[kind]()
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.add_tokens(
        [AddedToken("<tool call>", special=True, lstrip=True, rstrip=True, normalized=False)]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def write_sentencepiece(path: Path, model_type: str = "bpe", **settings: Any) -> Path:
    """A model directory with a tokenizer.model as Llama's and these settings in tokenizer_config.json."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type=model_type,
        vocab_size=480,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(model.getvalue())
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | settings))
    return path
