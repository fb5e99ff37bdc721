"""The reader beside fio: random O_DIRECT reads of one file, same block sizes and queue depths, in turns.

    python -m bench.io [DIRECTORY] [--seconds 1] [--rounds 3] [--backend uring] [--json]

Each figure is the median of the rounds; ratio = reader / fio. Needs fio (apt-get install fio).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer.errors import MerError
from mer.streaming.reader import Reader

BLOCKS = (128 << 10, 1 << 20, 4 << 20, 8 << 20)
DEPTHS = (1, 4, 16, 32, 64)
# How fio does what the back end does.
FIO_ENGINE = {
    "uring": ["--ioengine=io_uring", "--registerfiles=1", "--direct=1"],
    "preadv": ["--ioengine=psync", "--direct=1"],
    "buffered": ["--ioengine=psync", "--direct=0", "--invalidate=0"],
}


def run_fio(fio: str, path: Path, backend: str, block: int, depth: int, seconds: float) -> float:
    """Bytes per second that fio reads."""
    # psync has no queue: as many jobs instead, as the reader has threads
    queue = [f"--iodepth={depth}"] if backend == "uring" else [f"--numjobs={depth}", "--thread"]
    command = [
        *(fio, "--name=read", f"--filename={path}", "--rw=randread", "--readonly", f"--bs={block}"),
        # fio takes whole numbers only
        *("--time_based", f"--runtime={round(seconds * 1000)}ms", "--norandommap", "--randrepeat=0"),
        *("--group_reporting", "--output-format=json", *FIO_ENGINE[backend], *queue),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    # fio may print a note before the object
    return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["bw_bytes"])


def run_reader(path: Path, backend: str, block: int, depth: int, seconds: float) -> float:
    """Bytes per second that the reader reads."""
    with Reader([path], backend=backend, queue_depth=depth, threads=depth) as reader:
        done, elapsed = reader.measure(0, block, depth, seconds)
        return done / elapsed


@contextmanager
def file_of(size: int, directory: Path) -> Iterator[Path]:
    """A file of random bytes on the device, removed afterwards."""
    descriptor, name = tempfile.mkstemp(prefix="mer-bench-", dir=directory)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            chunk = random.randbytes(4 << 20)
            for _ in range(0, size, len(chunk)):
                file.write(chunk)
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        os.unlink(name)


def compare(
    fio: str, path: Path, backend: str, block: int, depth: int, seconds: float, rounds: int
) -> dict[str, float]:
    """One row: medians of alternating rounds, in bytes per second, and their ratio."""
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(run_fio(fio, path, backend, block, depth, seconds))
        ours.append(run_reader(path, backend, block, depth, seconds))
    reader, reference = statistics.median(ours), statistics.median(theirs)
    spread = max(max(x) / min(x) for x in (ours, theirs))
    return {
        "block": block,
        "depth": depth,
        "reader": reader,
        "fio": reference,
        "ratio": reader / reference,
        "spread": spread,
    }


@click.command(help=help_of(__doc__))
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".")
@click.option("--backend", type=click.Choice(list(FIO_ENGINE)), default="uring", show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Of each run.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--size", default=1 << 30, show_default=True, help="Bytes of the file.")
@click.option("--block", "blocks", multiple=True, type=int, default=BLOCKS, help="Bytes; may be repeated.")
@click.option("--depth", "depths", multiple=True, type=int, default=DEPTHS, help="May be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    directory: Path,
    backend: str,
    seconds: float,
    rounds: int,
    size: int,
    blocks: tuple[int, ...],
    depths: tuple[int, ...],
    as_json: bool,
) -> None:
    fio = shutil.which("fio")
    if fio is None:
        raise click.ClickException("fio was not found: apt-get install fio")
    rows = []
    try:
        with Console(stderr=True).status("writing the file") as status, file_of(size, directory) as path:
            for block in blocks:
                for depth in depths:
                    status.update(f"{block >> 10} KiB, {depth} at once")
                    rows.append(compare(fio, path, backend, block, depth, seconds, rounds))
    except (MerError, OSError) as e:
        raise click.ClickException(str(e)) from None
    median = statistics.median(row["ratio"] for row in rows)
    if as_json:
        version = subprocess.run([fio, "--version"], capture_output=True, text=True).stdout.strip()
        found = {"backend": backend, "fio": version, "seconds": seconds, "rounds": rounds}
        json.dump(found | {"median_ratio": median, "rows": rows}, sys.stdout, indent=2)
        print()
        return
    table = Table(title=f"random reads, {backend}: GB/s, median of {rounds}", title_justify="left")
    for name in ("block KiB", "at once", "reader", "fio", "ratio", "max/min"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            *(f"{row['block'] / 1024:.0f}", str(row["depth"])),
            *(f"{row['reader'] / 1e9:.2f}", f"{row['fio'] / 1e9:.2f}"),
            *(f"{row['ratio']:.2f}", f"{row['spread']:.1f}"),
        )
    Console().print(table)
    Console().print(f"median ratio {median:.2f}", highlight=False)


if __name__ == "__main__":
    main()
