"""A simulated GPU of its own for each test that asks for one, and the logits of answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_models import Logits
from gpu_simulator import Simulator


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    found = Simulator()
    monkeypatch.setenv("MER_CUDA_DRIVER", str(found.path))
    monkeypatch.setenv("MER_ISA", "avx2")
    yield found
    found.reset()


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> Logits:
    return Logits(monkeypatch)
