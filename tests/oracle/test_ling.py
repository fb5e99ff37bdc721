"""Ling and Ring (`bailing_moe`): transformers has no class of theirs, but others with the same mathematics.

Of 2.0 it is GLM-4-MoE with normed heads, of 1 Granite-MoE with a shared expert and multipliers of one; that
it is, llama.cpp says, which has both.
"""

from __future__ import annotations

import pytest
from cli_models import mer
from gguf_models import write_gguf
from harness import Runner
from ling_models import write_ling
from make_checkpoints import make
from test_families import PROMPT, error, oracle
from test_llama_cpp import EXACT, VOCAB, add_words, deviations, export, write_words

from mer import Engine, SamplingParams
from mer.errors import UnsupportedModelError
from mer.model.families import load
from mer.weights.checkpoint import open_checkpoint

FIRST = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "shared_intermediate_size": 64,
}
CASES = {
    "2.0": ("glm4_moe", {"routed_scaling_factor": 2.5, "topk_group": 1, "num_key_value_heads": 2}),
    "2.0-other": ("glm4_moe", {"n_group": 1, "num_key_value_heads": 4, "n_shared_experts": 2}),
    "1": ("granitemoeshared", FIRST),
}


def ling(path, case, **changes):
    family, more = CASES[case]
    model = make(path / "theirs", family, vocab_size=VOCAB, **more)
    return write_ling(path / "hf", model, **changes)


@pytest.mark.parametrize("case", CASES)
def test_logits(case, tmp_path):
    model = ling(tmp_path, case)
    assert error(Runner(tmp_path / "hf").logits(PROMPT), oracle(model, PROMPT)) < 1e-4


async def test_streamed_is_resident(tmp_path):
    """From a directory and from its store, with two experts in memory and with all."""
    model = ling(tmp_path, "2.0")
    done = mer("convert", str(tmp_path / "hf"), str(tmp_path / "store"), "--format", "same")
    assert done.returncode == 0, done.stderr
    answers = set()
    for path, cache in ("hf", 2), ("hf", "100%"), ("store", 2):
        async with Engine.open(tmp_path / path, context=128, cache_experts=cache) as engine:
            params = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
            result = await engine.generate(PROMPT[:40], params)
            answers.add((result.token_ids, result.logprobs))
    assert len(answers) == 1
    tokens = [*PROMPT[:40], *answers.pop()[0]]
    assert oracle(model, tokens[:-1])[39:].argmax(1).tolist() == tokens[40:]


@pytest.mark.parametrize("case", CASES)
def test_gguf(case, tmp_path):
    """As llama.cpp's converter writes it, and as `mer convert` does."""
    model = ling(tmp_path, case)
    write_words(tmp_path / "hf")
    written = write_gguf(model, tmp_path / "model.gguf", tokenizer=add_words)
    for path in written, export(tmp_path / "hf", "--format", "f32"):
        theirs, ours, preferred = deviations(path, model)
        assert max(theirs, ours, preferred) < EXACT


def test_a_head_that_is_the_embedding(tmp_path):
    """llama.cpp knows none."""
    family, more = CASES["2.0"]
    model = make(tmp_path / "theirs", family, vocab_size=VOCAB, **more, tie_word_embeddings=True)
    write_ling(tmp_path / "hf", model)
    assert error(Runner(tmp_path / "hf").logits(PROMPT), oracle(model, PROMPT)) < 1e-4
    done = mer("convert", str(tmp_path / "hf"), str(tmp_path / "x.gguf"), "--to", "gguf")
    assert done.returncode == 1
    assert "bailingmoe2 has a head that is not the embedding" in done.stderr


def test_a_head_that_is_normed_when_it_is_loaded(tmp_path):
    ling(tmp_path, "1", norm_head=True)
    with pytest.raises(UnsupportedModelError, match="norm_head is True"):
        load(open_checkpoint(tmp_path / "hf"))
