"""What the main model makes of a text: its hidden states, and texts that it writes itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from mer.config import EngineConfig
from mer.engine.engine import Engine
from mer.engine.params import SamplingParams
from mer.engine.runner import Runner
from mer.engine.scheduler import Chunk, Sequence
from mer.model.dense import DenseWeights
from mer.model.kv import BLOCK
from mer.model.spec import ModelSpec

# Told how many windows of how many are done.
Progress = Callable[[int, int], None]


def continued(
    model: Path,
    config: EngineConfig,
    prompts: NDArray[np.int32],
    length: int,
    temperatures: list[float],
    progress: Progress,
) -> NDArray[np.int32]:
    """i32 [N, length]: each prompt, i32 [N, shorter], and what the model says behind it.

    temperatures: of each prompt; 0: the likeliest token each time. Raises as `Engine.open` and `generate` do.
    """
    config = attrs.evolve(config, speculate="off", max_waiting=len(prompts), context=None)
    done = 0

    async def answer(engine: Engine, prompt: NDArray[np.int32], temperature: float, seed: int) -> list[int]:
        nonlocal done
        params = SamplingParams(
            temperature=temperature, max_tokens=length - len(prompt), ignore_eos=True, seed=seed
        )
        result = await engine.generate(prompt.tolist(), params)
        done += 1
        progress(done, len(prompts))
        return [*prompt.tolist(), *result.token_ids]

    async def all_of_them() -> list[list[int]]:
        async with Engine.open(model, config) as engine:
            asked = zip(prompts, temperatures, strict=True)
            return await asyncio.gather(*(answer(engine, *each, seed) for seed, each in enumerate(asked)))

    return np.array(asyncio.run(all_of_them()), np.int32)


def hidden_states(
    model: Path, config: EngineConfig, windows: NDArray[np.int32], out: Path, progress: Progress
) -> tuple[NDArray[np.float32], ModelSpec, DenseWeights]:
    """Compute i32 [N, L], each by itself: its hidden states behind the final norm, f32 [N, L, hidden].

    They are mapped from the file `out`, which is written. Also what the model is, and its dense weights.
    Raises as `Runner.open` and `step` do.
    """
    count, length = windows.shape
    config = attrs.evolve(config, speculate="off", context=length, max_running=1, step_tokens=length)
    runner = Runner.open(model, config)
    try:
        shape = (count, length, runner.spec.hidden)
        states = np.memmap(out, np.float32, "w+", shape=shape)
        for number, window in enumerate(windows):
            sequence = Sequence(
                tokens=window.tolist(), wants="hidden", blocks=list(range(-(-length // BLOCK)))
            )
            runner.step([Chunk(sequence, length)])
            states[number] = runner.hidden()
            progress(number + 1, count)
        return states, runner.spec, runner.dense
    finally:
        runner.close()
