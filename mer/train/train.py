"""`mer draft train`, from the text to the directory of the head."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs
import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from safetensors.torch import save_file

from mer.config import EngineConfig
from mer.errors import ConfigError
from mer.model.dense import DenseWeights
from mer.model.draft_head import FORMAT, VERSION, fingerprint
from mer.model.spec import AttentionSpec, ModelSpec
from mer.train.fit import MainModel, Recorded, acceptance, fit, often
from mer.train.head import HeadSizes, TorchHead
from mer.train.record import continued, hidden_states

_HELD_OUT: Final = 0.03  # the end of the text, at least one window
_MOST_HELD: Final = 64  # windows
# What the model writes itself begins with so much of the text; half of it is greedy, half drawn.
_PROMPT: Final = 0.125
_TEMPERATURES: Final = (0.0, 0.7)


@frozen(kw_only=True)
class Training:
    """How to train. length: tokens of a window. own: the share of windows that the model goes on with itself.

    vocabulary: most tokens that the head can draft. inter: width of its feed-forward block; None: the model's
    hidden size.
    """

    length: int
    own: float
    passes: int
    steps: int
    batch: int
    rate: float
    window: int
    vocabulary: int
    inter: int | None
    seed: int


def train(
    model: Path,
    ids: list[int],
    held_ids: list[int] | None,
    out: Path,
    training: Training,
    config: EngineConfig,
    say: Callable[[str], None],
    bar: Callable[[str], Callable[[int, int], None]],
) -> list[float]:
    """Train a head on the text `ids` and write it to `out`: its acceptance by position on held-out text.

    held_ids: that text; None: the end of the other. say: gets lines for people. bar: makes what is told of
    the progress of something with that name. Raises ConfigError for a text that is too short, and as
    `Engine.open` does.
    """
    windows = _windows(ids, training.length)
    if held_ids is not None:
        held = _windows(held_ids, training.length)
    else:
        last = max(round(_HELD_OUT * len(windows)), 1)
        windows, held = windows[:-last], windows[-last:]
    if len(windows) == 0 or len(held) == 0:
        raise ConfigError(
            f"the text has {len(ids)} tokens, that held out {len(held_ids or [])}: too few for windows of "
            f"{training.length} tokens (--length)"
        )
    held = held[np.linspace(0, len(held) - 1, min(len(held), _MOST_HELD)).astype(int)]
    rng = np.random.default_rng(training.seed)
    prompt = max(1, round(_PROMPT * training.length))
    own = rng.random(len(windows)) < training.own
    temperatures = [_TEMPERATURES[i % len(_TEMPERATURES)] for i in range(int(own.sum()))]
    if own.any():
        windows[own] = continued(
            model, config, windows[own, :prompt], training.length, temperatures, bar("the model's own text")
        )
    answers = continued(
        model,
        config,
        held[:, : training.length // 2],
        training.length,
        [0.0] * len(held),
        bar("held-out answers"),
    )
    say(f"{len(windows)} windows of {training.length} tokens, {int(own.sum())} of them the model's own text")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="states-") as folder:
        place = Path(folder)
        states, spec, dense = hidden_states(model, config, windows, place / "train", bar("hidden states"))
        held_states, *_ = hidden_states(
            model, config, answers, place / "held", bar("hidden states of the answers")
        )
        recorded, held_out = Recorded(windows, states), Recorded(answers, held_states)
        main = MainModel(spec, dense, None)
        vocabulary = None
        if training.vocabulary < spec.vocab:
            vocabulary = often(main, recorded, training.vocabulary)
            main = MainModel(spec, dense, vocabulary)
        head = fit(
            _sizes(spec, training), main, recorded, steps=training.steps, batch=training.batch,
            passes=training.passes, rate=training.rate, seed=training.seed,
            progress=_losses(say, training.steps),
        )  # fmt: skip
        found = acceptance(head, main, held_out, training.length // 2, training.passes)
    _write(out, head, spec, dense, vocabulary, model.name, training, found)
    return found


def _windows(ids: list[int], length: int) -> NDArray[np.int32]:
    """i32 [N, length]; what is left over is left out."""
    return np.array(ids[: len(ids) // length * length], np.int32).reshape(-1, length)


def _sizes(spec: ModelSpec, training: Training) -> HeadSizes:
    """The main model's attention where it is grouped, else heads of 128; and a feed-forward block."""
    attention = spec.attention
    if isinstance(attention, AttentionSpec):
        heads, kv_heads, dim = attention.n_heads, attention.n_kv_heads, attention.head_dim
    else:
        dim = min(128, spec.hidden)
        heads = spec.hidden // dim
        kv_heads = heads // 4 if heads % 4 == 0 else heads
    return HeadSizes(
        hidden_size=spec.hidden,
        vocab_size=spec.vocab,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        intermediate_size=training.inter or spec.hidden,
        sliding_window=training.window,
        rope_theta=10000.0,
        rms_norm_eps=spec.norm_eps,
    )


def _losses(say: Callable[[str], None], steps: int) -> Callable[[int, float], None]:
    every = max(1, steps // 20)

    def progress(step: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            say(f"step {step} of {steps}: loss {loss:.3f}")

    return progress


def _write(
    out: Path,
    head: TorchHead,
    spec: ModelSpec,
    dense: DenseWeights,
    vocabulary: NDArray[np.int32] | None,
    model: str,
    training: Training,
    found: list[float],
) -> None:
    """Matrices in F16, norms in F32."""
    tensors = {
        name: value.detach().to(torch.float16 if value.dim() > 1 else torch.float32).contiguous()
        for name, value in head.named_parameters()
    }
    if vocabulary is not None:
        tensors["vocabulary"] = torch.from_numpy(vocabulary)
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "fingerprint": fingerprint(dense),
        **attrs.asdict(head.sizes),
        "training": attrs.asdict(training) | {"acceptance": [round(each, 4) for each in found]},
    }
    part = out / "model.safetensors.part"
    save_file(tensors, part)
    part.rename(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
