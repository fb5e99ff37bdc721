"""Is it worth reading a prompt's beginning back from disk? From how many tokens on?

    python -m bench.prefix MODEL --lengths 16,64,256,1024 --ram 3GiB --json prefix.json

Each prompt is random and asked twice, for one token: by an engine that has never seen it, which computes it,
and by one that was opened later on the same prefix store, which reads all full blocks of it. Both have
computed another prompt before, so that the cache of experts is as warm. Times are from asking to the token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.options import counts
from mer import Engine, EngineConfig, SamplingParams
from mer.model.kv import BLOCK

ONE = SamplingParams(max_tokens=1, temperature=0)


def prompts(vocab: int, lengths: list[int], repeat: int) -> dict[int, list[list[int]]]:
    """So many of each length, one token longer than full blocks, so that these can all be read."""
    random = np.random.default_rng(0)
    return {n: [random.integers(1, vocab, n + 1).tolist() for _ in range(repeat)] for n in lengths}


async def times(model: Path, config: EngineConfig, lengths: list[int], repeat: int) -> dict[int, list[Any]]:
    """Of each length: (seconds to the first token, tokens found, the token) of each prompt."""
    found: dict[int, list[Any]] = {n: [] for n in lengths}
    async with Engine.open(model, config) as engine:
        await engine.generate([2] * (engine.budget.step_tokens // 2), ONE)
        for n, asked in prompts(engine.spec.vocab, lengths, repeat).items():
            for prompt in asked:
                result = await engine.generate(prompt, ONE)
                seconds = result.timings.queue_s + result.timings.prefill_s
                found[n].append((seconds, result.usage.cached_tokens, result.token_ids))
    return found


async def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=args.store) as store:
        config = EngineConfig(
            ram=args.ram, threads=args.threads, context=args.context, prefix_store=Path(store),
            device=args.device,
        )  # fmt: skip
        computed = await times(args.model, config, args.lengths, args.repeat)
        size = (Path(store) / "prefix.blocks").stat().st_size
        blocks = sum(n // BLOCK for n in args.lengths) * args.repeat
        read = await times(args.model, config, args.lengths, args.repeat)
    rows = []
    for n in args.lengths:
        for (_, _, one), (_, cached, other) in zip(computed[n], read[n], strict=True):
            assert one == other, "the same token"
            assert cached == n, f"{cached} of {n} tokens were read"
        computing, reading = (statistics.median(each[0] for each in found[n]) for found in (computed, read))
        rows.append(
            {"tokens": n, "bytes": n // BLOCK * (size // blocks), "computed_s": computing, "read_s": reading}
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("tokens", "MiB", "computed ms", "read ms", "times faster")
    for row in rows:
        ratio = row["computed_s"] / row["read_s"]
        cells = row["bytes"] / 2**20, row["computed_s"] * 1e3, row["read_s"] * 1e3, ratio
        table.add_row(str(row["tokens"]), *(f"{cell:.2f}" for cell in cells))
    Console().print(table)
    pays = [row["tokens"] for row in rows if row["read_s"] < row["computed_s"]]
    print(f"reading pays from {pays[0]} tokens on" if pays else "reading never paid")


def _lengths(text: str) -> list[int]:
    return [max(each // BLOCK, 1) * BLOCK for each in counts(text)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=_lengths, default="16,32,64,128,256,512,1024", metavar="N,N")
    parser.add_argument("--repeat", type=int, default=5, help="prompts of each length")
    parser.add_argument("--ram")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--device", default="auto", help="as mer run --device")
    parser.add_argument("--store", type=Path, help="directory for the store; default: for temporary files")
    parser.add_argument("--json", type=Path, help="a file for the same as JSON")
    args = parser.parse_args()
    rows = asyncio.run(run(args))
    show(rows)
    if args.json:
        args.json.write_text(json.dumps({"model": args.model.name, "lengths": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
