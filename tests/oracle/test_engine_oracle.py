"""The whole engine against transformers' generate: tokens, log-probabilities, ends, text."""

from __future__ import annotations

import json
import subprocess
import sys

import evidence
import numpy as np
import pytest
import torch
import transformers
from engine_models import runnable
from make_checkpoints import FAMILY, edit_config, make
from make_tokenizer import write_tokenizer

from mer import Engine, SamplingParams
from mer.model.families import load
from mer.weights.checkpoint import open_checkpoint

LENGTHS = (1, 17, 300)
GREEDY = SamplingParams(temperature=0, max_tokens=64)


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Tensors are tiny: on a busy machine threads that wait for each other take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prompt(n: int, vocab: int = 211) -> list[int]:
    return np.random.default_rng(n).integers(1, vocab, n).tolist()


def generate(model: torch.nn.Module, ids: list[int], **settings: object) -> list[int]:
    """transformers' greedy answer."""
    evidence.asked("transformers")
    given = torch.tensor([ids])
    with torch.no_grad():
        found = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            **{"do_sample": False, "max_new_tokens": 64} | settings,
        )
    return found[0, len(ids) :].tolist()


def log_softmax(model: torch.nn.Module, ids: list[int], answer: list[int]) -> np.ndarray:
    """f32 [len(answer), vocab]: what the oracle thinks of every token at each place of the answer."""
    with torch.no_grad():
        logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    return torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize("family", FAMILY)
async def test_greedy_tokens_and_logprobs(family, tmp_path):
    model = make(tmp_path, family)
    params = SamplingParams(temperature=0, max_tokens=64, logprobs=5)
    path = runnable(tmp_path, family)
    checkpoint = open_checkpoint(path)
    evidence.opened(checkpoint, load(checkpoint))
    async with Engine.open(path) as engine:
        for n in LENGTHS:
            ids = prompt(n)
            result = await engine.generate(ids, params)
            assert result.finish_reason == "length"
            expected = log_softmax(model, ids, list(result.token_ids))
            # Its greedy answer: the likeliest token behind the prompt, and behind each that is the likeliest.
            evidence.asked("transformers")
            assert list(result.token_ids) == expected.argmax(-1).tolist(), f"{n} tokens of prompt"
            if n == 17:
                assert list(result.token_ids[:12]) == generate(model, ids, max_new_tokens=12)
            best = np.argsort(-expected, axis=-1)[:, :5]
            for at, each in enumerate(result.logprobs):
                assert each.token_id == result.token_ids[at]
                assert abs(each.logprob - expected[at, each.token_id]) < 1e-4
                assert [token for token, _, _ in each.top] == best[at].tolist()
                assert np.abs([p for _, _, p in each.top] - expected[at, best[at]]).max() < 1e-4


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A model with a tokenizer of two lines; the ids 300..310 have no text."""
    path = tmp_path_factory.mktemp("text")
    model = make(path, "qwen3_moe", vocab_size=311)
    write_tokenizer(path)
    return path, model


def ends(path, file: str, value: object) -> None:
    """Let `file` name the end tokens, and the other of the two files another one."""
    edit_config(path, eos_token_id=None)
    generation = path / "generation_config.json"
    generation.unlink(missing_ok=True)
    if file == "generation_config.json":
        edit_config(path, eos_token_id=7)
        generation.write_text(json.dumps({"eos_token_id": value}))
    else:
        edit_config(path, eos_token_id=value)


@pytest.mark.parametrize("tokenizer", [True, False], ids=["text", "ids"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "list"])
async def test_end_tokens(tokenizer, file, several, tmp_path):
    model = make(tmp_path, "mixtral", vocab_size=300)
    ids = prompt(20, 300)
    free = generate(model, ids)
    # One that comes first somewhere in the middle, so that the answer ends there.
    at = next(i for i in range(10, 64) if free[i] not in free[:i])
    end = [free[at], 299] if several else free[at]
    ends(tmp_path, file, end)
    if tokenizer:
        write_tokenizer(tmp_path)
    # As transformers reads the directory, which may differ from what it wrote.
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = generate(oracle, ids, pad_token_id=0)
    assert expected == free[: at + 1]
    async with Engine.open(tmp_path) as engine:
        result = await engine.generate(ids, GREEDY)
        assert (list(result.token_ids), result.finish_reason) == (expected, "stop")
        going_on = await engine.generate(ids, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
        assert (list(going_on.token_ids), going_on.finish_reason) == (free, "length")


async def test_text(text_model):
    """Prompt and answer through the tokenizer, as transformers' own class decodes them."""
    path, model = text_model
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), eos_token="</s>"
    )
    async with Engine.open(path, context=512) as engine:
        for text in ("The old man", "naïve Ελλη 你好 🙂", " ", "0 12 345\n\n"):
            ids = oracle.encode(text)
            expected = generate(model, ids, eos_token_id=0, pad_token_id=0)
            result = await engine.generate(text, GREEDY)
            assert list(result.token_ids) == expected
            assert result.usage.prompt_tokens == len(ids)
            whole = oracle.decode(ids + expected, skip_special_tokens=True)
            assert result.text == whole[len(oracle.decode(ids, skip_special_tokens=True)) :]


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The plain reference: the text before the stop string that ends first, and whether there is one."""
    for end in range(1, len(text) + 1):
        found = [text[:end].rfind(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)], True
    return text, False


async def test_stop_strings(text_model):
    path, _ = text_model
    async with Engine.open(path, context=512) as engine:
        for text in ("The old man", "naïve"):
            whole = (await engine.generate(text, GREEDY)).text
            cases = [(whole[i : i + n],) for i in (0, 5, 21, 40) for n in (1, 3, 9)]
            cases += [("never there",), (whole[30:34], whole[31:33]), (whole[-1],), (whole[-1] + "x", "q!")]
            for stops in cases:
                result = await engine.generate(text, SamplingParams(temperature=0, max_tokens=64, stop=stops))
                expected, stopped = cut(whole, stops)
                assert (result.text, result.finish_reason) == (expected, "stop" if stopped else "length"), (
                    stops
                )
                pieces = [
                    piece.text
                    async for piece in engine.stream(
                        text, SamplingParams(temperature=0, max_tokens=64, stop=stops)
                    )
                ]
                assert "".join(pieces) == expected
                assert stops[0] not in "".join(pieces)


def test_command_line(text_model):
    path, model = text_model
    ids = prompt(33)
    program = [sys.executable, "-c", "from mer.cli.main import main; main()"]
    done = subprocess.run(
        [*program, "run", str(path), "--ids", " ".join(map(str, ids)), "--json",
         "--temperature", "0", "-n", "64", "--ignore-eos", "--context", "512"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["token_ids"] == generate(model, ids)
