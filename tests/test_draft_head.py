"""Draft heads: what they compute, by transformers' modules, and which are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from draft_models import WINDOW, main_weights, write_head
from engine_models import make

from mer._ext.kernels import Kernels, Pool
from mer._ext.uring import Reader
from mer.errors import CheckpointError, UnsupportedModelError
from mer.model.draft_forward import DraftForward
from mer.model.draft_head import open_head


def forward(path, model, *, tokens=80):
    spec, dense = main_weights(model)
    head = open_head(path, spec)
    reader = Reader(head.checkpoint.files)
    try:
        return DraftForward(
            head, dense, reader, None, Pool(2), Kernels(), n_blocks=16, max_tokens=tokens, max_rows=tokens
        )
    finally:
        reader.close()


def run(draft, tokens, states, start=0, table=None):
    """Logits and states behind every token of one sequence."""
    n = len(tokens)
    logits = draft.step(
        np.asarray(tokens, np.int32),
        np.ascontiguousarray(states, np.float32),
        np.arange(start, start + n, dtype=np.int32),
        np.array([0, n], np.int32),
        np.arange(16, dtype=np.int32)[None] if table is None else table,
        np.arange(n, dtype=np.int32),
    ).copy()
    return logits, draft.states().copy()


@pytest.mark.parametrize("vocabulary", [None, [3, 5, 77, 210]])
def test_logits_are_torchs(vocabulary, tmp_path):
    make(tmp_path / "model", "mixtral")
    reference = write_head(tmp_path / "head", tmp_path / "model", vocabulary=vocabulary)
    draft = forward(tmp_path / "head", tmp_path / "model")
    rng = np.random.default_rng(1)
    tokens, states = rng.integers(0, 211, 70), rng.standard_normal((70, 64), np.float32)
    with torch.no_grad():
        h, logits = reference(torch.from_numpy(tokens), torch.from_numpy(states), WINDOW)
    found, left = run(draft, tokens, states)
    np.testing.assert_allclose(left, h, atol=2e-5)
    np.testing.assert_allclose(found, logits, atol=1e-4)
    # By parts it is the same, and so are its own states in the place of the main model's.
    parts = [run(draft, tokens[a:b], states[a:b], a)[0] for a, b in ((0, 33), (33, 34), (34, 70))]
    np.testing.assert_array_equal(np.concatenate(parts), found)


def test_another_models_head_is_refused(tmp_path):
    make(tmp_path / "one", "mixtral")
    make(tmp_path / "other", "mixtral", seed=1)
    make(tmp_path / "wide", "mixtral", hidden_size=128)
    write_head(tmp_path / "head", tmp_path / "one")
    with pytest.raises(
        CheckpointError, match=r"head: this draft head was trained for another model \(a test\)"
    ):
        forward(tmp_path / "head", tmp_path / "other")
    with pytest.raises(
        CheckpointError, match="hidden_size is 64, the model has 128: this draft head was trained"
    ):
        forward(tmp_path / "head", tmp_path / "wide")


def test_what_is_no_head_is_refused(tmp_path):
    make(tmp_path / "model", "mixtral")
    spec, _ = main_weights(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is no draft head"):
        open_head(tmp_path / "model", spec)
    write_head(tmp_path / "later", tmp_path / "model", version=2)
    with pytest.raises(UnsupportedModelError, match="version is 2, this mer reads 1"):
        open_head(tmp_path / "later", spec)
    write_head(tmp_path / "odd", tmp_path / "model", vocabulary=[5, 3])
    with pytest.raises(CheckpointError, match="vocabulary must be ascending"):
        open_head(tmp_path / "odd", spec)
    write_head(tmp_path / "short", tmp_path / "model")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"intermediate_size": 47}))
    with pytest.raises(CheckpointError, match="shape"):
        open_head(tmp_path / "short", spec)
