"""Byte identity: a token's logits depend on no cut of its prompt, no other sequence, no thread."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Runner
from make_checkpoints import FAMILY, make

RANDOM = np.random.default_rng(11)
PROMPTS = [RANDOM.integers(0, 211, n).tolist() for n in (150, 33, 97)]


@pytest.fixture(scope="module", params=FAMILY)
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    more = {"sliding_window": 45} if request.param in ("mixtral", "mistral") else {}
    make(path, request.param, num_hidden_layers=2, **more)
    return path


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "q8_0"])
def test_logits_are_the_same_bytes(checkpoint, kv_dtype):
    runner = Runner(checkpoint, kv_dtype=kv_dtype)
    alone = [runner.logits(prompt, sequence=i) for i, prompt in enumerate(PROMPTS)]
    for chunks in ([1], [17], [16, 5, 64], [149, 1]):
        found = runner.logits(PROMPTS[0], chunks, sequence=10)
        assert found.tobytes() == alone[0].tobytes(), f"chunks of {chunks}"

    # All three at once, each in chunks of its own: prefill and decode in one step.
    together: list[list[np.ndarray]] = [[], [], []]
    at = [0, 0, 0]
    while any(a < len(p) for a, p in zip(at, PROMPTS, strict=True)):
        work = {}
        for i, size in enumerate((40, 1, 13)):
            if at[i] < len(PROMPTS[i]):
                work[20 + i] = PROMPTS[i][at[i] : at[i] + size]
                at[i] += len(work[20 + i])
        for sequence, logits in runner.step(work).items():
            together[sequence - 20].append(logits)
    for i in range(3):
        assert np.concatenate(together[i]).tobytes() == alone[i].tobytes(), f"sequence {i} in a batch"

    for threads in (1, 3, 8) if kv_dtype == "f32" else (3,):
        other = Runner(checkpoint, threads=threads, kv_dtype=kv_dtype)
        assert other.logits(PROMPTS[2]).tobytes() == alone[2].tobytes(), f"{threads} threads"
        assert other.logits(PROMPTS[2], [1], sequence=1).tobytes() == alone[2].tobytes()


def test_unasked_logits_are_not_needed(checkpoint):
    """Asking for the logits of some tokens gives the same as asking for all."""
    runner = Runner(checkpoint)
    expected = runner.logits(PROMPTS[1])
    asked = runner.step({1: PROMPTS[1]}, rows=[30, 2])[1]
    assert asked.tobytes() == expected[[30, 2]].tobytes()
    assert runner.step({2: PROMPTS[1]}, rows=[])[2].shape == (0, runner.spec.vocab)
