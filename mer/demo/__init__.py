"""The bundled model: a small Mixture-of-Experts, trained by tools/train_demo.py, as an expert store."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"


def model_path() -> Path:
    """Directory of the bundled expert store, for `Engine.open`."""
    return MODEL_DIR
