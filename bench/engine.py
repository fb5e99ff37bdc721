"""mer on a model: prefill and decode tokens/s in a process of its own, as one JSON object; see bench/peer.py.

python -m bench.engine MODEL --prompt 0-511 --decode 64 --ram 3GiB

`--steady 64`: then as many tokens again once the expert cache is full, of a longer answer. Before that a new
expert takes memory that nobody has touched.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import attrs

from bench.peer import token_ids
from mer import Engine, EngineConfig, SamplingParams
from mer.cli.generation import describe

# The cache is full when all but so many slots are taken: some are always being read into.
NEARLY = 0.98
# Tokens after which it is not waited for any more.
LONGEST = 512


class EngineError(Exception):
    """mer could not do it: what it said last."""


def measure(model: Path, prompt: list[int], decode: int, **options: Any) -> dict[str, Any]:
    """Run this module in a new process; returns what it prints. Raises EngineError.

    options: the flags of the command by name (ram="3GiB", threads=2, cache_experts="25%", prefetch=0,
    warmup="prompt", steady=64, group=Path("/sys/fs/cgroup/memory/bench")).
    """
    command = [sys.executable, "-m", "bench.engine", str(model), "--decode", str(decode)]
    command += ["--prompt", ",".join(map(str, prompt))]
    for name, value in options.items():
        if value is not None:
            command += ["--" + name.replace("_", "-"), str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"{model}: mer failed ({done.returncode}): {done.stderr.strip()[-600:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


async def steady(engine: Engine, prompt: list[int], count: int) -> dict[str, Any] | None:
    """Tokens/s and bytes read per token with a full expert cache; None where it does not fill."""
    params = SamplingParams(max_tokens=LONGEST + count, temperature=0, ignore_eos=True)
    made, begun = 0, None
    async with aclosing(engine.stream(prompt, params)) as deltas:
        async for delta in deltas:
            made += len(delta.token_ids)
            now = engine.snapshot()
            if begun is None and now.resident >= NEARLY * now.cache_slots:
                begun = made, time.perf_counter(), now.steps.bytes_read
            elif begun is not None and made - begun[0] >= count:
                done, took = made - begun[0], time.perf_counter() - begun[1]
                return {
                    "filled_after": begun[0],
                    "decode_tokens_per_s": done / took,
                    "read_per_token": (now.steps.bytes_read - begun[2]) / done,
                }
    return None


async def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = {
        name: getattr(args, name)
        for name in (
            "ram",
            "threads",
            "cache_experts",
            "cache_policy",
            "prefetch",
            "io_backend",
            "profile",
            "warm_start",
        )
        if getattr(args, name) is not None
    }
    params = SamplingParams(max_tokens=args.decode + 1, temperature=0, ignore_eos=True)
    # Or else the second time the prompt would be found, not computed.
    config = EngineConfig(**settings, prefix_cache=False, speculate="off")
    async with Engine.open(args.model, config) as engine:
        if args.warmup:
            first = params if args.warmup == "all" else attrs.evolve(params, max_tokens=2)
            await engine.generate(args.prompt, first)
        tokens: list[int] = []
        before = engine.snapshot().steps
        async with aclosing(engine.stream(args.prompt, params)) as deltas:
            async for delta in deltas:
                if not tokens:
                    prefill = engine.snapshot().steps
                tokens += delta.token_ids
        decode = engine.snapshot().steps - prefill
        assert delta.usage is not None
        assert delta.timings is not None
        following = (args.prompt + tokens)[-len(args.prompt) :]  # whose experts were not all there already
        full = await steady(engine, following, args.steady) if args.steady else None
        return {
            "program": "mer",
            "steady": full,
            "prefill_read_bytes": prefill.bytes_read - before.bytes_read,
            "tokens": tokens,
            # What the steps behind the first token read; more or less one of them.
            "decode": {"read_bytes": decode.bytes_read, "hits": decode.hits, "misses": decode.misses},
            **describe(engine, delta.usage, delta.timings),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=token_ids, default="0-63", metavar="IDS", help="as 3,7,10-12")
    parser.add_argument("--decode", type=int, default=32, metavar="N", help="tokens, greedily")
    parser.add_argument("--ram")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache-experts")
    parser.add_argument("--cache-policy")
    parser.add_argument("--prefetch", type=int)
    parser.add_argument("--io-backend")
    parser.add_argument("--warm-start", action="store_true", help="as mer run --warm-start")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="a Chrome trace, and the share of Python"
    )
    parser.add_argument("--warmup", choices=["prompt", "all"], help="run it once before")
    parser.add_argument("--steady", type=int, metavar="N", help="then N tokens once the expert cache is full")
    parser.add_argument("--group", type=Path, help="directory of a memory control group")
    args = parser.parse_args()
    if args.group:
        (args.group / "cgroup.procs").write_text("0")
    print(json.dumps(asyncio.run(run(args))))


if __name__ == "__main__":
    main()
