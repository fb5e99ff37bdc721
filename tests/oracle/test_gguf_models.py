"""GGUF files in place, against transformers on the same weights."""

import numpy as np
import pytest
from gguf_models import write_gguf
from harness import Runner
from make_checkpoints import FAMILY, make
from test_families import error, oracle

from mer.weights.gguf import read_gguf

PROMPT = [int(token) for token in np.random.default_rng(3).integers(0, 211, 40)]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.mark.parametrize("family", sorted(FAMILY))
def test_logits(family, tmp_path):
    model = make(tmp_path / "hf", family)
    runner = Runner(write_gguf(model, tmp_path / "model.gguf"))
    assert runner.checkpoint.kind == "gguf"
    assert error(runner.logits(PROMPT), oracle(model, PROMPT)) < 1e-4


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"rope_parameters": YARN}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("qwen3_moe", {"tie_word_embeddings": True}),
        ("olmoe", {"clip_qkv": 0.7}),
        ("mixtral", {"num_key_value_heads": 4}),
    ],
)
def test_variants(family, changes, tmp_path):
    model = make(tmp_path / "hf", family, **changes)
    runner = Runner(write_gguf(model, tmp_path / "model.gguf"))
    assert error(runner.logits(PROMPT), oracle(model, PROMPT)) < 1e-4


def test_parts(tmp_path):
    model = make(tmp_path / "hf", "qwen3_moe")
    first = write_gguf(model, tmp_path / "model.gguf", shards=9)
    assert first.name.startswith("model-00001-of-")
    assert len(read_gguf(first).tensors) <= 9
    for path in first, sorted(tmp_path.glob("*.gguf"))[1], tmp_path:
        runner = Runner(path)
        assert error(runner.logits(PROMPT), oracle(model, PROMPT)) < 1e-4
