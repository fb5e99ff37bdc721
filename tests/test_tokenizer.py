"""Tokenizers against transformers, tokenizers and sentencepiece reading the same files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizer_models as made
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from mer.errors import CheckpointError, ConfigError, RequestError, UnsupportedModelError
from mer.model.tokenizer import Tokenizer

JSON = list(made.JSON_KINDS)
_SPOKEN = [
    "<s>",
    "</s>",
    "<|im_end|>",
    "<｜User｜>",
    "<think>",
    " <tool call> ",
    "<unk>",
    "<0x41>",
    "▁",
    " ",
    "\n",
]
TEXT = st.lists(
    st.sampled_from(made.CORPUS) | st.sampled_from(_SPOKEN) | st.text(max_size=8), max_size=8
).map("".join)


class Pair:
    """A tokenizer of ours, and somebody else's of the same directory."""

    def __init__(self, path: Path, oracle: Any) -> None:
        self.ours = Tokenizer.open(path)
        self.oracle = oracle.from_pretrained(path)
        # Bytes are rare in a vocabulary, and what goes wrong goes wrong with them.
        every = range(len(self.oracle))
        byte = [id for id in every if not self.ours.token_text(id).isascii()]
        self.ids = st.lists(st.sampled_from(every) | st.sampled_from(byte), max_size=24)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    def directory(name: str) -> Path:
        return tmp_path_factory.mktemp(name)

    found = {kind: Pair(made.write_json(kind, directory(kind)), PreTrainedTokenizerFast) for kind in JSON}
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name, legacy in ("spm", False), ("spm-legacy", True):
        path = made.write_sentencepiece(directory(name), legacy=legacy, **settings)
        found[name] = Pair(path, PreTrainedTokenizerFast if legacy else LlamaTokenizer)
    return found


KINDS = [*JSON, "spm", "spm-legacy"]


@pytest.mark.parametrize("kind", JSON)
@given(text=TEXT, special=st.booleans())
@example(text="a<think> <tool call> b</s>", special=True)
def test_encode_is_transformers(pairs: dict[str, Pair], kind: str, text: str, special: bool) -> None:
    pair = pairs[kind]
    assert pair.ours.encode(text, special=special) == pair.oracle.encode(text, add_special_tokens=special)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
def test_decode_is_transformers(pairs: dict[str, Pair], kind: str, data: st.DataObject, skip: bool) -> None:
    pair = pairs[kind]
    ids = data.draw(pair.ids)
    assert pair.ours.decode(ids, skip_special=skip) == pair.oracle.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_detokenizer_of_random_tokens(pairs: dict[str, Pair], kind: str, data: st.DataObject) -> None:
    pair = pairs[kind]
    ids = data.draw(pair.ids)
    stream = pair.ours.detokenizer([])
    whole = pair.oracle.decode(ids, skip_special_tokens=True)
    shown = ""
    for n, id in enumerate(ids, 1):
        shown += stream.push(id)
        assert whole.startswith(shown)
        sofar = pair.oracle.decode(ids[:n], skip_special_tokens=True)
        if "\ufffd" not in sofar and not any(
            "<0x" in token for token in pair.oracle.convert_ids_to_tokens(ids)
        ):
            # Nothing is held back without need.
            assert shown == sofar
    assert shown + stream.finish() == whole


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_detokenizer_goes_on_from_the_prompt(pairs: dict[str, Pair], kind: str, data: st.DataObject) -> None:
    pair = pairs[kind]
    prompt, answer = data.draw(pair.ids), data.draw(pair.ids)
    before = pair.oracle.decode(prompt, skip_special_tokens=True)
    whole = pair.oracle.decode(prompt + answer, skip_special_tokens=True)
    stream = pair.ours.detokenizer(prompt)
    text = "".join(map(stream.push, answer)) + stream.finish()
    if whole.startswith(before) and not before.endswith("\ufffd"):
        assert text == whole[len(before) :]
    else:
        # The prompt breaks off within a character, or its last bytes turn out to be none.
        assert whole.endswith(text)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "spm"])
def test_a_character_split_between_prompt_and_answer(pairs: dict[str, Pair], kind: str) -> None:
    ours = pairs[kind].ours
    ids = ours.encode("🦫", special=False)[-4:]
    assert b"".join(map(ours.token_bytes, ids)) == "🦫".encode()
    start = ours.encode("x")
    stream = ours.detokenizer(start + ids[:2])
    assert "".join(map(stream.push, ids[2:])) + stream.finish() == "🦫"
    # An answer that adds nothing shows nothing of the prompt.
    stream = ours.detokenizer(start + ids[:2])
    assert stream.push(next(iter(ours.eos_ids))) + stream.finish() == ""
    # All of the character is the prompt's.
    stream = ours.detokenizer(start + ids)
    assert "".join(map(stream.push, start[-1:])) == "x"
    # An answer of half a character.
    stream = ours.detokenizer(start)
    assert "".join(map(stream.push, ids[:2])) == ""
    assert set(stream.finish()) == {"\ufffd"}


@given(data=st.data())
def test_bytes_of_tokens_add_up(pairs: dict[str, Pair], data: st.DataObject) -> None:
    pair = pairs["byte_level"]
    ids = data.draw(pair.ids)
    text = b"".join(map(pair.ours.token_bytes, ids)).decode(errors="replace")
    assert text == pair.oracle.decode(ids)


def test_text_of_one_token(pairs: dict[str, Pair]) -> None:
    for kind in "llama", "spm":
        ours, oracle = pairs[kind].ours, pairs[kind].oracle
        for id in range(len(oracle)):
            token = oracle.convert_ids_to_tokens(id)
            if token.startswith("<0x"):
                assert ours.token_bytes(id) == bytes([int(token[3:5], 16)])
            else:
                # After another token, so that no space is taken for the dummy one.
                a = oracle.convert_tokens_to_ids("a")
                assert ours.token_text(id) == oracle.decode([a, id])[1:]


@given(text=st.lists(st.sampled_from(made.CORPUS) | st.text(max_size=12), max_size=4).map("".join))
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_text_is_encoded_as_sentencepiece_does(
    sentencepieces: dict[str, tuple[Tokenizer, Any]], model_type: str, text: str
) -> None:
    ours, oracle = sentencepieces[model_type]
    if not any(token in text for token in ("<s>", "</s>", "<unk>", "[INST]", "[/INST]")):
        assert ours.encode(text, special=False) == oracle.encode(text)
        assert ours.encode(text) == [oracle.bos_id(), *oracle.encode(text)]


@pytest.fixture(scope="module")
def sentencepieces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    found = {}
    for model_type in "bpe", "unigram":
        path = made.write_sentencepiece(tmp_path_factory.mktemp(model_type), model_type)
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        found[model_type] = Tokenizer.open(path), oracle
    return found


@pytest.mark.parametrize("kind", ["spm", "spm-legacy"])
@given(
    parts=st.lists(st.sampled_from(made.CORPUS[:2]) | st.sampled_from(["<s>", "</s>", "[INST]"]), max_size=6)
)
@example(parts=["<s>", "a", "</s>"])
@example(parts=["a", "<s>", "<s>", "b"])
@example(parts=["<s>", "[INST]", "a", "[/INST]"])
def test_special_tokens_in_text_for_sentencepiece(
    pairs: dict[str, Pair], kind: str, parts: list[str]
) -> None:
    pair = pairs[kind]
    text = "".join(parts)
    assert pair.ours.encode(text) == pair.oracle.encode(text)


def test_tokens_added_to_sentencepiece(tmp_path: Path) -> None:
    added = {
        "480": {"content": "<|im_start|>", "special": True, "normalized": False},
        "481": {
            "content": "<|im_end|>",
            "special": True,
            "normalized": False,
            "rstrip": True,
            "lstrip": True,
        },
        "482": {"content": "<think>", "special": False, "normalized": False},
    }
    full = [dict.fromkeys(("lstrip", "rstrip", "single_word"), False) | entry for entry in added.values()]
    settings: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "legacy": False,
    }
    made.write_sentencepiece(
        tmp_path, add_bos_token=True, added_tokens_decoder=dict(zip(added, full, strict=True)), **settings
    )
    ours, oracle = Tokenizer.open(tmp_path), LlamaTokenizer.from_pretrained(tmp_path)
    assert ours.eos_ids == {481} == {oracle.eos_token_id}
    assert ours.vocab_size == len(oracle) == 483
    text = "<|im_start|>user\nHi!  <|im_end|>\n<think>x</think> <|im_start|>you"
    ids = oracle.encode(text)
    assert ours.encode(text) == ids
    for skip in True, False:
        assert ours.decode(ids, skip_special=skip) == oracle.decode(ids, skip_special_tokens=skip)
    # The older files say the same, less how the tokens take spaces.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "legacy": False}))
    names = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "unk_token": "<unk>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "added_tokens.json").write_text('{"<think>": 482, "<|im_start|>": 480, "<|im_end|>": 481}')
    ours, oracle = Tokenizer.open(tmp_path), LlamaTokenizer.from_pretrained(tmp_path)
    assert ours.eos_ids == {481} == {oracle.eos_token_id}
    ids = oracle.encode(text)
    assert ours.encode(text) == ids
    for skip in True, False:
        assert ours.decode(ids, skip_special=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_tokens_added_in_settings_only(tmp_path: Path) -> None:
    tokenizer = made.byte_level()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    added = {
        str(size): {"content": "<tool>", "special": False, "normalized": False},
        str(size + 1): {"content": "<end>", "special": True, "normalized": False},
    }
    full = {
        id: dict.fromkeys(("lstrip", "rstrip", "single_word"), False) | each for id, each in added.items()
    }
    # An ordinary token, until it is named here.
    word = next(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 1)
    settings = {"added_tokens_decoder": full, "eos_token": "<end>", "sep_token": word}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, oracle = Tokenizer.open(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.vocab_size == len(oracle) == size + 2
    assert ours.eos_ids == {oracle.eos_token_id}
    text = f"over there<tool>{word}<end> x{word}"
    ids = oracle.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


def test_truncation_and_padding_of_the_file_are_for_training(tmp_path: Path) -> None:
    tokenizer = made.byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = made.CORPUS[0]
    ids = Tokenizer.open(tmp_path).encode(text)
    assert ids == PreTrainedTokenizerFast.from_pretrained(tmp_path).encode(text)
    assert 4 < len(ids) != 64


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, {1}),
        ({"config.json": {"eos_token_id": 7}}, {7}),
        ({"config.json": {"eos_token_id": [7, 8]}}, {7, 8}),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [3, 4]}}, {3, 4}),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": 3}}, {3}),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"temperature": 0.6}}, {7}),
        ({"config.json": {"eos_token_id": None}}, {1}),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, {3}),
        ({"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}}, {3}),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<|im_start|>"}}, {2}),
        (
            {
                "tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {}},
                "special_tokens_map.json": {"eos_token": "<|im_start|>"},
            },
            {1},
        ),
        ({"tokenizer_config.json": {}}, set()),
    ],
)
def test_eos(tmp_path: Path, files: dict[str, Any], eos: set[int]) -> None:
    made.write_json("byte_level", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.open(tmp_path).eos_ids == eos
    if "tokenizer_config.json" in files:
        # As transformers' tokenizer has it, which knows nothing of the model's other files.
        oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert {oracle.eos_token_id} - {None} == eos


def test_eos_must_be_ids(tmp_path: Path) -> None:
    made.write_json("byte_level", tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id is \['</s>'\]"):
        Tokenizer.open(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.open(tmp_path) is None


def test_ids_of_a_padded_embedding_have_no_text(tmp_path: Path) -> None:
    made.write_json("byte_level", tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 640}')
    ours, oracle = Tokenizer.open(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.vocab_size == 640
    ids = [*ours.encode("ab"), 639, *ours.encode("c", special=False)]
    assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True) == "abc"
    assert ours.token_bytes(639) == b""
    stream = ours.detokenizer([639])
    assert stream.push(639) == ""


@pytest.mark.parametrize("kind", ["byte_level", "spm"])
@pytest.mark.parametrize("id", [-1, -(2**40), 10_000, 2**40])
def test_impossible_ids(pairs: dict[str, Pair], kind: str, id: int) -> None:
    ours = pairs[kind].ours
    uses = [
        lambda: ours.decode([3, id]),
        lambda: ours.token_text(id),
        lambda: ours.token_bytes(id),
        lambda: ours.detokenizer([id]),
        lambda: ours.detokenizer([]).push(id),
    ]
    for use in uses:
        with pytest.raises(RequestError, match=f"token id {id} is outside 0") as caught:
            use()
        assert caught.value.param == "prompt"


@pytest.mark.parametrize("kind", ["byte_level", "spm"])
def test_text_that_is_no_unicode(pairs: dict[str, Pair], kind: str) -> None:
    with pytest.raises(RequestError, match="position 2 is half a surrogate pair") as caught:
        pairs[kind].ours.encode("ab\ud83d")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "", r"tokenizer\.json: can't be read as a tokenizer.*fetch it again"),
        ("tokenizer.json", "{}", r"tokenizer\.json: can't be read as a tokenizer"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "can't be read as a tokenizer"),
        ("tokenizer.model", "no model", r"tokenizer\.model: is no SentencePiece model.*fetch it again"),
        ("tokenizer.model", "", r"tokenizer\.model: is no SentencePiece model"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: is not valid JSON.*fetch it again"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: must be a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "must map ids to tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": "x"}}', "must map ids to tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "must map ids to tokens"),
        ("added_tokens.json", '{"<x>": "y"}', r"added_tokens\.json: the added tokens must map ids to tokens"),
        ("generation_config.json", "\ufffe", r"generation_config\.json: is not valid JSON"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    if name != "tokenizer.model":
        made.write_json("byte_level", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.open(tmp_path)


def test_sentencepiece_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.write_sentencepiece(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"tokenizer\.model needs .*: pip install mer\[sentencepiece\]"):
        Tokenizer.open(tmp_path)


def test_a_decoder_that_is_not_known(tmp_path: Path) -> None:
    tokenizer = made.words()
    tokenizer.decoder = tokenizers.decoders.CTC()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json: the decoder 'CTC' is not supported"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", JSON)
def test_long_texts_are_encoded_as_short_ones(pairs: dict[str, Pair], kind: str, special: bool) -> None:
    """They take another way through the package, which does not hold the interpreter's lock."""
    text = "".join(made.CORPUS) * 40 + "".join(_SPOKEN) * 40
    assert len(text) > 2000
    pair = pairs[kind]
    assert pair.ours.encode(text, special=special) == pair.oracle.encode(text, add_special_tokens=special)
