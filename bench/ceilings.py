"""What this machine allows: bytes per second that all cores read from memory, and fio from the device.

    python -m bench.ceilings FILE [--block 2654208] [--depth 64] [--json]

FILE is read at random places with O_DIRECT, a block at a time, as experts are: give a file of the model and
the bytes of one expert. Decode can't be faster than `decode_ceiling` says. Needs fio (apt-get install fio).
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import click
from attrs import asdict, frozen

from bench.help import help_of
from bench.io import run_fio
from mer._ext.kernels import Pool

# Bytes swept for the memory's figure: beyond every cache.
SWEEP_MIB = 512


@frozen
class Ceilings:
    """Bytes per second, medians; spread: the largest over the smallest."""

    threads: int
    memory: float
    memory_spread: float
    block: int
    depth: int
    device: float
    device_spread: float


def measure(
    file: Path,
    block: int,
    depth: int = 64,
    *,
    threads: int | None = None,
    rounds: int = 3,
    seconds: float = 2.0,
) -> Ceilings:
    """Memory and device in turns. Raises click.ClickException when fio is missing or fails."""
    fio = shutil.which("fio")
    if fio is None:
        raise click.ClickException("fio was not found: apt-get install fio")
    if file.stat().st_size < block:
        raise click.ClickException(f"{file} is smaller than one block of {block} bytes")
    pool = Pool(threads)
    memory, device = [], []
    for _ in range(rounds):
        memory.append(pool.memory_bandwidth(SWEEP_MIB))
        device.append(run_fio(fio, file, "uring", block, depth, seconds))
    return Ceilings(
        threads=pool.n_threads,
        memory=statistics.median(memory),
        memory_spread=max(memory) / min(memory),
        block=block,
        depth=depth,
        device=statistics.median(device),
        device_spread=max(device) / min(device),
    )


def decode_ceiling(ceilings: Ceilings, compute_bytes: float, missed_bytes: float) -> float:
    """Tokens/s when a token multiplies `compute_bytes` of weights and reads `missed_bytes`, both at once."""
    return 1 / max(compute_bytes / ceilings.memory, missed_bytes / ceilings.device)


@click.command(help=help_of(__doc__))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--block", type=click.IntRange(4096), default=2 << 20, show_default=True, help="Of 4096 bytes each."
)
@click.option("--depth", type=click.IntRange(1), default=64, show_default=True, help="Reads at once.")
@click.option("--threads", type=click.IntRange(1), help="All that this process may use.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(file: Path, block: int, depth: int, threads: int | None, rounds: int, as_json: bool) -> None:
    if block % 4096:
        raise click.BadParameter("O_DIRECT needs a multiple of 4096", param_hint="--block")
    found = measure(file, block, depth, threads=threads, rounds=rounds)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    click.echo(
        f"memory  {found.memory / 1e9:6.2f} GB/s on {found.threads} threads, "
        f"max/min {found.memory_spread:.2f}"
    )
    click.echo(
        f"device  {found.device / 1e9:6.2f} GB/s in blocks of {block >> 10} KiB, {depth} at once, "
        f"max/min {found.device_spread:.2f}"
    )


if __name__ == "__main__":
    main()
