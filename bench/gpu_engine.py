"""mer with a part of the experts on a GPU, in a process of its own, as one JSON object; see bench/gpu.py.

    python -m bench.gpu_engine MODEL --device auto --vram 4GiB --cache-experts 25%

First other text is read and continued, so that each tier holds what a running engine would hold. Then: 16
tokens with what they were drawn from (`drawn`: to be compared, bit for bit, between settings), decode behind
a short prompt, and a prompt by itself. Each is text that was not seen before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs

from mer import Engine, EngineConfig, SamplingParams
from mer.cli.generation import describe

GREEDY = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
# Where in the vocabulary, which is the text, each begins.
WARM, DRAWN, DECODE, PREFILL = 0.1, 0.4, 0.5, 0.7
SHORT = 16  # tokens


class GpuRunError(Exception):
    """mer could not do it: what it said last."""


def measure(model: Path, seconds: float, **options: Any) -> dict[str, Any]:
    """Run this module in a new process; returns what it prints. Raises GpuRunError, also after `seconds`.

    options: the flags of the command by name (device="cpu", vram="4GiB", cache_experts="25%", prompt=512).
    """
    command = [sys.executable, "-m", "bench.gpu_engine", str(model)]
    for name, value in options.items():
        if value is not None:
            command += ["--" + name.replace("_", "-"), str(value)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise GpuRunError(f"took longer than {seconds:.0f} s") from None
    if done.returncode:
        raise GpuRunError(f"failed ({done.returncode}): {done.stderr.strip()[-600:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


async def run(args: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "vram", "cache_experts", "threads")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = EngineConfig(**settings, context=args.warm + args.prompt + 1024, speculate="off")
    more = attrs.evolve(GREEDY, max_tokens=args.decode + 1)
    async with Engine.open(args.model, config) as engine:

        def text(part: float, tokens: int) -> list[int]:
            start = int(part * engine.spec.vocab)
            return list(range(start, start + tokens))

        await engine.generate(text(WARM, args.warm), more)
        params = attrs.evolve(GREEDY, max_tokens=SHORT, logprobs=5)
        drawn = await engine.generate(text(DRAWN, 2 * SHORT), params)
        found = {"decode": await engine.generate(text(DECODE, SHORT), more)}
        found["prefill"] = await engine.generate(text(PREFILL, args.prompt), GREEDY)
        vram = engine.snapshot().vram
        placement = engine._runner.placement  # the engine tells nobody yet
        logprobs = [[each.logprob, [p for *_, p in each.top]] for each in drawn.logprobs or ()]
        return {
            "drawn": [list(drawn.token_ids), logprobs],
            "dense_share": (placement.layers + placement.head) / (engine.spec.n_layers + 1),
            "vram": attrs.asdict(vram) if vram else None,
            **{name: describe(engine, r.usage, r.timings) for name, r in found.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--vram")
    parser.add_argument("--cache-experts")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--warm", type=int, default=1024, help="tokens of the text that is read first")
    parser.add_argument("--decode", type=int, default=128, help="tokens, greedily")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is timed")
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
