"""A routing trace holds the choices that transformers makes, and bench/policy.py reads it."""

from __future__ import annotations

import csv

import numpy as np
import torch
from harness import Runner
from make_checkpoints import make

from bench.policy import read_trace
from mer import Engine, SamplingParams

PROMPT = np.random.default_rng(3).integers(0, 211, 40).tolist()


async def test_the_trace_is_what_transformers_chooses(tmp_path):
    model = make(tmp_path / "model", "mixtral")
    async with Engine.open(tmp_path / "model", trace=tmp_path / "trace.csv", step_tokens=16) as engine:
        result = await engine.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0))
    tokens = PROMPT + list(result.token_ids[:-1])
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    with (tmp_path / "trace.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert len(rows) == len(tokens) * len(logits) * 2
    for layer, scores in enumerate(logits):
        best = scores.softmax(-1).topk(2, -1)
        mine = [row for row in rows if int(row["layer"]) == layer]
        mine.sort(key=lambda row: (int(row["step"]), int(row["slot"])))
        assert [int(row["expert"]) for row in mine] == best.indices.flatten().tolist()
        weights = (best.values / best.values.sum(-1, keepdim=True)).flatten().numpy()
        assert np.allclose([float(row["weight"]) for row in mine], weights, atol=2e-5)
        assert {int(row["step"]) for row in mine if row["phase"] == "1"} == set(range(40, len(tokens)))
    trace = read_trace(tmp_path / "trace.csv")
    assert (trace.n_layers, trace.n_experts) == (3, 4)


def test_a_prediction_from_the_right_state_is_right(tmp_path):
    """The control of reading ahead: with the state that the router itself sees, every guess is its choice."""
    for family in ("mixtral", "qwen3_moe", "deepseek_v3"):
        make(tmp_path / family, family)
        runner = Runner(tmp_path / family)
        runner.logits(PROMPT)
        decoder, buffers = runner.model._decoder, runner.model._buffers
        last = runner.spec.n_layers - 1
        decoder.route(last)
        decoder.predict(last)
        n = len(PROMPT)
        assert np.array_equal(buffers["ahead_ids"][:n], buffers["expert_ids"][:n])
        decoder.predict(last - 1)
        assert not np.array_equal(buffers["ahead_ids"][:n], buffers["expert_ids"][:n])
