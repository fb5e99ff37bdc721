"""How texts are cut by the names of tokenizer.ggml.pre: as llama.cpp does it, and Moonshot's own pattern."""

from __future__ import annotations

import random

import pytest
import regex
from gguf_models import write_gguf
from llama_cpp import LlamaCpp
from make_checkpoints import make
from test_gguf_tokenizer import TEXTS, bpe_settings
from tokenizer_models import CORPUS
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trained

from mer.model.gguf_cuts import CUTS
from mer.model.tokenizer import Tokenizer

MORE = [
    "HelloWorld XMLParser iPhone DON'T don't I'LL we'Ve a/b//c/ path/to\nfile !!!\n\n??\r\n",
    "  x1y22z333 4444 55555",
    "中文English中文123，。「引号」 한국어 문장 Русский Текст ქართული",
    "if (x==1) {\n\t\treturn y[2] += 3.14;  }\n   \n",
]
WORDS = " ".join([*CORPUS, *MORE]).split(" ")
# What is left out where llama.cpp says other things than the tokenizer.json of the models that have the name:
# combining marks, wide spaces, digits (of which no such model has pairs), capitals inside of words.
APPROXIMATE = {
    **dict.fromkeys(("gpt-4o", "kanana2", "minimax-m2", "tekken"), "[\u0900-\u097f]"),
    "deepseek-coder": "\u3000", "deepseek-llm": r"[0-9\u3000]", "kimi-k2": "[\u0900-\u097f]|[a-z][A-Z]",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Pairs merged across everything, so that every cut shows."""
    tokenizer = Trained(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rng = random.Random(5)
    texts = [" ".join(rng.choices(WORDS, k=12)) for _ in range(300)]
    texts += ["".join(rng.choices("0123456789", k=7)) for _ in range(60)]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=3000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return tokenizer


@pytest.mark.parametrize("pre", sorted(set(CUTS) - {"default"}))
def test_ids(pre, trained, tmp_path):
    settings = bpe_settings(trained, pre)
    size = len(settings["token_list"])
    model = make(tmp_path / "hf", "qwen3_moe", num_hidden_layers=1, vocab_size=size)

    def add(writer):
        for name, value in settings.items():
            getattr(writer, f"add_{name}")(value)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)

    path = write_gguf(model, tmp_path / "model.gguf", tokenizer=add)
    found, rng = Tokenizer.open(path), random.Random(7)
    texts = [*TEXTS, *MORE, *(" ".join(rng.choices(WORDS, k=9)) for _ in range(30))]
    with LlamaCpp(path) as peer:
        for text in texts:
            text = regex.sub(APPROXIMATE.get(pre, "$^"), "", text)
            assert found.encode(text, special=False) == peer.tokens(text, special=False), text


def test_kimi():
    """The pattern as Moonshot's tokenization_kimi.py lists its parts, by another engine."""
    letters = r"[\p{%s}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    upper, lower = letters % "Lu", (letters % "Ll").replace(r"\p{Lt}", "")
    parts = [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    ]  # fmt: skip
    oracle = regex.compile("|".join(parts), regex.VERSION1)
    (cut,) = CUTS["kimi-k2"]
    step = pre_tokenizers.Split(Regex(cut), "isolated")
    rng = random.Random(3)
    for text in [*TEXTS, *MORE, *(" ".join(rng.choices(WORDS, k=9)) for _ in range(100))]:
        assert [piece for piece, _ in step.pre_tokenize_str(text)] == oracle.findall(text), text
