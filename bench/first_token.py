"""From the command to the first token, mer beside llama.cpp, with the files in the page cache and without.

    python -m bench.first_token STORE GGUF --peer /tmp/peer/bin/python

Both are started anew each time and timed from outside until the first token is known: `mer run STORE` to its
first byte of output, bench/peer.py (llama.cpp by mmap, without and with repacking its weights) to its end
after the prompt. Cold: the page cache was dropped before (as root). Warm: the files were read through before.
Rounds alternate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench import peer
from bench.compare import drop_caches, spread
from bench.help import help_of

CHUNK = 1 << 24


def read_through(files: list[Path]) -> None:
    """Have the page cache hold them."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK):
                pass


def time_mer(store: Path, prompt: list[int], options: list[str]) -> float:
    """Seconds to the first byte of output."""
    words = " ".join(map(str, prompt))
    command = [
        sys.executable,
        "-c",
        "from mer.cli.main import main; main()",
        "run",
        str(store),
        words,
        "--ids",
    ]
    command += ["--max-tokens", "1", "--temperature", "0", "--quiet", *options]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        took = time.perf_counter() - start
        process.stdout.read()
        if process.wait() or not first:
            raise click.ClickException(f"mer failed: {process.stderr.read().decode()[-600:]}")
    return took


def time_peer(python: str, gguf: Path, prompt: list[int], repack: bool, threads: int) -> float:
    """Seconds to the end of a process that computes the prompt."""
    start = time.perf_counter()
    peer.measure(python, gguf, prompt, 0, threads=threads, extra_bufts=repack)
    return time.perf_counter() - start


@click.command(help=help_of(__doc__))
@click.argument("store", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--peer", "python", help="Interpreter that has llama-cpp-python.")
@click.option("--prompt", default=16, show_default=True, help="Tokens.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each.")
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--ram", help="As mer run --ram.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
def main(
    store: Path,
    gguf: Path,
    python: str | None,
    prompt: int,
    rounds: int,
    threads: int,
    ram: str | None,
    out: Path | None,
) -> None:
    ids = list(range(100, 100 + prompt))
    options = ["--threads", str(threads), *(["--ram", ram] if ram else [])]
    programs: dict[str, tuple[list[Path], Callable[[], float]]] = {
        "mer": (sorted(store.iterdir()), lambda: time_mer(store, ids, options))
    }
    if python is not None:
        interpreter = python
        for name, repack in (("llama.cpp, mmap", False), ("llama.cpp, repacked", True)):
            programs[name] = (
                [gguf],
                lambda repack=repack: time_peer(interpreter, gguf, ids, repack, threads),  # type: ignore[misc]
            )
    found: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in programs}
    for _ in range(rounds):
        for name, (files, run) in programs.items():
            drop_caches()
            found[name]["cold"].append(run())
            drop_caches()
            read_through([file for file in files if file.is_file()])
            found[name]["warm"].append(run())
    table = Table("program", "cold, s", "warm, s", title=f"to the first token behind {prompt}")
    for name, times in found.items():
        runs: list[dict[str, Any]] = [{"cold": c, "warm": w} for c, w in zip(*times.values(), strict=True)]
        table.add_row(name, spread(runs, "cold"), spread(runs, "warm"))
    Console().print(table)
    if out:
        out.write_text(json.dumps({"prompt": prompt, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
