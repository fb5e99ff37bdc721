"""The reader beside fio: random O_DIRECT reads of one file, same block sizes and queue depths, in turns.

    python -m bench.io [PATH] [--block 2654208] [--seconds 0.5] [--rounds 6] [--backend uring] [--json]

PATH is a file, which is read as it is, or a directory, in which a temporary one is written, read and removed.
A block is an expert of Qwen3-30B-A3B in Q4_0 unless others are named. Both read into memory that was touched
before, on huge pages, as the expert cache is: on pages of 4 KiB a read is several requests. Each figure is
the median of the rounds; who comes first alternates, as a device may owe what it gave a moment ago. ratio:
the geometric mean of the rounds' reader / fio, and two standard errors of it. fio is the one that the shell
finds (apt-get install fio, which `make bench` does); without it the reader is measured alone.
"""

from __future__ import annotations

import json
import math
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
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer.errors import MerError
from mer.streaming.probe import DepthRate, enough
from mer.streaming.reader import Reader

BLOCKS = (2654208,)
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
# Beyond the seconds that it is to read, which it needs to start and to end.
FIO_PATIENCE_S = 30
# Seconds before the others, in which both read uncounted. It is then that fio touches its memory, for which a
# virtual machine whose host has to find the pages takes up to half a second where 64 blocks are read at once.
RAMP_S = 0.6
HUGE_PAGE = 2 << 20
# glibc's malloc, which gives fio its memory, then asks for huge pages.
FIO_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# How fio does what the back end does.
FIO_ENGINE = {
    "uring": ["--ioengine=io_uring", "--registerfiles=1", "--direct=1"],
    "preadv": ["--ioengine=psync", "--direct=1"],
    "buffered": ["--ioengine=psync", "--direct=0", "--invalidate=0"],
}


def run_fio(fio: str, path: Path, backend: str, block: int, depth: int, seconds: float) -> float:
    """Bytes per second that fio reads."""
    # psync has no queue: as many jobs instead, as the reader has threads
    queue = [f"--iodepth={depth}"] if backend == "uring" else [f"--numjobs={depth}"]
    command = [
        *(fio, "--name=read", f"--filename={path}", "--rw=randread", "--readonly"),
        # a block of none makes room for one: so each begins on a huge page, and no part lies beside one
        *(f"--bssplit={block}/100:{-(-block // HUGE_PAGE) * HUGE_PAGE}/0", f"--iomem_align={HUGE_PAGE}"),
        # fio takes whole numbers only
        *("--time_based", f"--runtime={round(seconds * 1000)}ms", f"--ramp_time={round(RAMP_S * 1000)}ms"),
        *("--norandommap", "--randrepeat=0"),
        *("--thread", "--group_reporting", "--output-format=json", *FIO_ENGINE[backend], *queue),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + FIO_PATIENCE_S,
            env=os.environ | FIO_ENVIRONMENT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise click.ClickException(
            f"fio did not end within {FIO_PATIENCE_S} s: {' '.join(command)}"
        ) from None
    if done.returncode:
        raise click.ClickException(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    # fio may print a note before the object
    return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["bw_bytes"])


def run_reader(path: Path, backend: str, block: int, depth: int, seconds: float) -> float:
    """Bytes per second that the reader reads."""
    with Reader([path], backend=backend, queue_depth=depth, threads=depth) as reader:
        done, elapsed = reader.measure(0, block, depth, seconds, ramp=RAMP_S)
        return done / elapsed


@contextmanager
def file_of(size: int, path: Path) -> Iterator[Path]:
    """A file: the one that is named, or one of random bytes in a directory, removed afterwards."""
    if not path.is_dir():
        yield path
        return
    descriptor, name = tempfile.mkstemp(prefix="mer-bench-", dir=path)
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
    fio: str | None, path: Path, backend: str, block: int, depth: int, seconds: float, rounds: int
) -> dict[str, Any]:
    """One row: medians of the rounds, in bytes per second; spread: max / min; ratio: of mean_ratio()."""
    ours, theirs = [], []
    for round_ in range(rounds):
        if fio is not None and round_ % 2 == 0:
            theirs.append(run_fio(fio, path, backend, block, depth, seconds))
        ours.append(run_reader(path, backend, block, depth, seconds))
        if fio is not None and round_ % 2:
            theirs.append(run_fio(fio, path, backend, block, depth, seconds))
    ratio, error = mean_ratio(ours, theirs) if theirs else (None, None)
    return {
        "block": block,
        "depth": depth,
        "reader": statistics.median(ours),
        "fio": statistics.median(theirs) if theirs else None,
        "ratio": ratio,
        "ratio_error": error,
        "spread": max(max(x) / min(x) for x in (ours, theirs) if x),
    }


def mean_ratio(ours: list[float], theirs: list[float]) -> tuple[float, float | None]:
    """The geometric mean of ours / theirs, and two standard errors of it (one round: None)."""
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    ratio = math.exp(statistics.fmean(logs))
    return ratio, ratio * 2 * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None


@click.command(help=help_of(__doc__))
@click.argument("path", type=click.Path(exists=True, path_type=Path), default=".")
@click.option("--backend", type=click.Choice(list(FIO_ENGINE)), default="uring", show_default=True)
@click.option("--seconds", type=click.FloatRange(0.01), default=0.5, show_default=True, help="Of each run.")
@click.option(
    "--rounds", type=click.IntRange(1), default=6, show_default=True, help="An even number is fair."
)
@click.option("--size", type=click.IntRange(1), default=1 << 30, show_default=True, help="Bytes of the file.")
@click.option(
    "--block",
    "blocks",
    multiple=True,
    type=click.IntRange(4096),
    default=BLOCKS,
    help="Bytes; may be repeated.",
)
@click.option(
    "--depth", "depths", multiple=True, type=click.IntRange(1, 256), default=DEPTHS, help="May be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    path: Path,
    backend: str,
    seconds: float,
    rounds: int,
    size: int,
    blocks: tuple[int, ...],
    depths: tuple[int, ...],
    as_json: bool,
) -> None:
    fio = shutil.which("fio")
    rows = []
    try:
        with Console(stderr=True).status("writing the file") as status, file_of(size, path) as file:
            for block in blocks:
                for depth in depths:
                    status.update(f"{block >> 10} KiB, {depth} at once")
                    rows.append(compare(fio, file, backend, block, depth, seconds, rounds))
    except (MerError, OSError) as e:
        raise click.ClickException(str(e)) from None
    found: dict[str, Any] = {"backend": backend, "fio": None, "seconds": seconds, "rounds": rounds}
    if fio is not None:
        found["fio"] = subprocess.run([fio, "--version"], capture_output=True, text=True).stdout.strip()
        found["median_ratio"] = statistics.median(row["ratio"] for row in rows)
        found["least_ratio"] = min(row["ratio"] for row in rows)
    found["uses"] = {block: _used([row for row in rows if row["block"] == block]) for block in blocks}
    if as_json:
        json.dump(found | {"rows": rows}, sys.stdout, indent=2)
        print()
    else:
        _print(Console(highlight=False), found, rows)


def _used(rows: list[dict[str, Any]]) -> int:
    """The queue depth that an engine takes where these are the rates."""
    rates = [DepthRate(row["depth"], row["reader"]) for row in rows]
    return enough(rates, rows[0]["block"], rows[0]["block"])


def _print(console: Console, found: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    title = f"random reads, {found['backend']}: GB/s, median of {found['rounds']}"
    table = Table(title=title, title_justify="left")
    for name in ("block KiB", "at once", "reader", "fio", "ratio", "max/min"):
        table.add_column(name, justify="right")
    for row in rows:
        theirs = ("-", "-")
        if row["fio"] is not None:
            error = "" if row["ratio_error"] is None else f" ± {row['ratio_error']:.2f}"
            theirs = (f"{row['fio'] / 1e9:.2f}", f"{row['ratio']:.2f}{error}")
        table.add_row(
            *(f"{row['block'] / 1024:.0f}", str(row["depth"]), f"{row['reader'] / 1e9:.2f}"),
            *(*theirs, f"{row['spread']:.1f}"),
        )
    console.print(table)
    if found["fio"] is None:
        console.print("fio was not found, so the reader stands alone: apt-get install fio")
    else:
        console.print(f"ratio: median {found['median_ratio']:.2f}, least {found['least_ratio']:.2f}")
    for block, depth in found["uses"].items():
        console.print(f"of blocks of {block >> 10} KiB an engine would have {depth} read at once here")


if __name__ == "__main__":
    main()
