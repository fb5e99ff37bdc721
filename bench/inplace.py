"""What a GGUF file in place costs beside an expert store of the same weights: reads, and decode.

    python -m bench.make_model qwen3-30b-a3b /tmp/q.gguf --layers 8 --as gguf --experts q4_0
    python -m bench.inplace /tmp/q.gguf
    python -m bench.inplace --sizes /tmp

The store is made beside the file, with the formats that it has, and removed afterwards; or name one that is
there. Both are measured in turns, the page cache dropped before (as root). Reads: experts at random, as many
at a time as a layer chooses, with O_DIRECT; GB/s counts what an expert has, not what is read around it.
Decode: the cache holds a share of the experts.

`--sizes` says from which size on the three reads of an expert cost nothing: it makes models of experts of
several sizes in a folder, one after the other, and measures reads alone.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from attrs import asdict, frozen
from rich.console import Console
from rich.table import Table

from bench import engine
from bench.compare import drop_caches
from bench.gguf_writer import write_gguf
from bench.help import help_of
from bench.make_model import write_store
from bench.shapes import model_config
from bench.synthetic import Weights
from mer.model.families import load
from mer.streaming.experts import slot_bytes
from mer.streaming.reader import Reader, aligned_empty
from mer.weights import formats
from mer.weights.checkpoint import open_checkpoint
from mer.weights.extents import ExpertExtents

# Bytes read in one round: some hundred experts.
READ_BYTES = 1 << 30
# What --sizes makes: rows of gate in Q4_0, which are 1152 bytes each, and bytes of all experts.
WIDTHS = (32, 64, 96, 128, 160, 192, 224, 288, 448)
SIZES_BYTES = 1 << 30


@frozen
class Layout:
    """An expert on disk, means. pieces: reads. nbytes: its own. around: bytes read besides, as a part."""

    pieces: float
    nbytes: float
    around: float


class Model:
    """A container of experts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        checkpoint = open_checkpoint(path)
        architecture = load(checkpoint)
        self.files = [str(file) for file in checkpoint.files]
        self.ends = [file.stat().st_size for file in checkpoint.files]
        self.experts = [expert for layer in architecture.experts for expert in layer.experts]
        self.at_once = architecture.spec.top_k

    @property
    def layout(self) -> Layout:
        own = sum(m.nbytes for expert in self.experts for m in expert.matrices)
        read = sum(map(slot_bytes, self.experts))
        pieces = sum(len(expert.pieces) for expert in self.experts)
        return Layout(pieces / len(self.experts), own / len(self.experts), read / own - 1)

    def read_rate(self, seed: int) -> float:
        """Bytes of experts per second."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.experts)).tolist()
        done, own = 0.0, 0
        with Reader(self.files) as reader:
            largest = max(map(slot_bytes, self.experts))
            buffer = aligned_empty(self.at_once * largest)
            for first in range(0, len(order) - self.at_once + 1, self.at_once):
                batch = [self.experts[e] for e in order[first : first + self.at_once]]
                reads = [
                    read
                    for i, expert in enumerate(batch)
                    for read in self._reads(expert, buffer, i * largest)
                ]
                start = time.perf_counter()
                reader.read_into(reads)
                done += time.perf_counter() - start
                own += sum(m.nbytes for expert in batch for m in expert.matrices)
                if own > READ_BYTES:
                    break
        return own / done

    def _reads(self, expert: ExpertExtents, buffer: Any, at: int) -> Iterator[tuple[int, int, int, Any, int]]:
        """The aligned supersets of an expert's pieces, one behind the other, as the engine reads them."""
        for piece in expert.pieces:
            start = piece.offset // 4096 * 4096
            stop = -(-(piece.offset + piece.nbytes) // 4096) * 4096
            yield piece.file, start, min(stop, self.ends[piece.file]) - start, buffer, at
            at += stop - start


@contextmanager
def store_of(gguf: Path) -> Iterator[Path]:
    """The same weights as an expert store, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="mer-inplace-", dir=gguf.parent))
    try:
        command = [sys.executable, "-c", "from mer.cli.main import main; main()", "convert", str(gguf)]
        command += [str(folder / "store"), "--format", "same"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"mer convert failed: {done.stderr.strip()}")
        yield folder / "store"
    finally:
        shutil.rmtree(folder)


def sizes(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Of each width: bytes of a read, and GB/s of the GGUF file and of the store, a value a round."""
    found: list[dict[str, Any]] = []
    experts, dense = formats.Q4_0, formats.Q8_0
    for width in WIDTHS:
        config = model_config("qwen3-30b-a3b", moe_intermediate_size=width, vocab_size=1024)
        config["num_experts"] = 64
        layer = config["num_experts"] * 3 * width * experts.row_bytes(config["hidden_size"])
        config["num_hidden_layers"] = max(1, SIZES_BYTES // layer)
        with tempfile.TemporaryDirectory(prefix="mer-inplace-", dir=folder) as place:
            paths = {"GGUF": Path(place) / "model.gguf", "store": Path(place) / "store"}
            write_gguf(config, Weights(config, experts, dense), paths["GGUF"], lambda nbytes: None)
            write_store(config, Weights(config, experts, dense), paths["store"], lambda nbytes: None)
            os.sync()
            models = {name: Model(path) for name, path in paths.items()}
            rates: dict[str, list[float]] = {name: [] for name in models}
            for seed in range(rounds):
                for name, model in models.items():
                    rates[name].append(model.read_rate(seed))
            found.append({"read": models["GGUF"].layout.nbytes / 3, "rates": rates})
    return found


def show_sizes(found: list[dict[str, Any]]) -> None:
    """A row for each size."""
    table = Table("a read of the GGUF file", "GGUF GB/s", "store GB/s", "store / GGUF, each round")
    for each in found:
        ours, theirs = each["rates"]["store"], each["rates"]["GGUF"]
        ratios = " ".join(f"{a / b:.2f}" for a, b in zip(ours, theirs, strict=True))
        medians = [f"{statistics.median(values) / 1e9:.2f}" for values in (theirs, ours)]
        table.add_row(f"{each['read'] / 1024:.0f} KiB", *medians, ratios)
    Console(width=120).print(table)


def run(
    model: Model, seed: int, share: int, prompt: int, decode: int, threads: int | None
) -> dict[str, float]:
    drop_caches()
    rate = model.read_rate(seed)
    drop_caches()
    ids = list(range(100, 100 + prompt))
    found = engine.measure(
        model.path, ids, decode, cache_experts=f"{share}%", threads=threads, warmup="prompt"
    )
    timings = found["timings"]
    return {
        "read": rate,
        "prefill": timings["prefill_tokens_per_s"],
        "decode": timings["decode_tokens_per_s"],
        "bytes_per_token": timings["bytes_read"] / (prompt + decode),
    }


@click.command(help=help_of(__doc__))
@click.argument("gguf", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--sizes",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure experts of many sizes, made in this folder, in place of a file.",
)
@click.option("--store", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Made already.")
@click.option("--share", default=25, show_default=True, help="Percent of the experts in the cache.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--prompt", default=16, show_default=True, help="Tokens.")
@click.option("--decode", default=48, show_default=True, help="Tokens.")
@click.option("--threads", type=int)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    gguf: Path | None,
    folder: Path | None,
    store: Path | None,
    share: int,
    rounds: int,
    prompt: int,
    decode: int,
    threads: int | None,
    as_json: bool,
) -> None:
    if folder is not None:
        measured = sizes(folder, rounds)
        if as_json:
            click.echo(json.dumps(measured, indent=1))
        else:
            show_sizes(measured)
        return
    if gguf is None:
        raise click.UsageError("name a GGUF file, or a folder after --sizes")
    if store is None:
        with store_of(gguf) as made:
            found = compare(gguf, made, share, rounds, prompt, decode, threads)
    else:
        found = compare(gguf, store, share, rounds, prompt, decode, threads)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        show(found)


def compare(gguf: Path, store: Path, share: int, rounds: int, *sizes: Any) -> dict[str, Any]:
    models = {"GGUF": Model(gguf), "store": Model(store)}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for seed in range(rounds):
        for name, model in models.items():
            runs[name].append(run(model, seed, share, *sizes))
    return {name: {**asdict(models[name].layout), "runs": runs[name]} for name in models}


def show(found: dict[str, Any]) -> None:
    """A row each, and their ratio."""
    table = Table(
        "", "an expert", "reads of it", "read besides", "GB/s", "prefill tok/s", "decode tok/s", "MiB/token"
    )
    medians = {
        name: {key: statistics.median(run[key] for run in each["runs"]) for key in each["runs"][0]}
        for name, each in found.items()
    }
    for name, each in found.items():
        m = medians[name]
        table.add_row(
            *(name, f"{each['nbytes'] / 2**20:.2f} MiB", f"{each['pieces']:.1f}", f"{each['around']:.2%}"),
            *(f"{m['read'] / 1e9:.2f}", f"{m['prefill']:.2f}", f"{m['decode']:.2f}"),
            f"{m['bytes_per_token'] / 2**20:.1f}",
        )
    ratios = {key: medians["store"][key] / medians["GGUF"][key] for key in medians["store"]}
    keys = ("read", "prefill", "decode", "bytes_per_token")
    table.add_row("store / GGUF", "", "", "", *(f"{ratios[key]:.3f}" for key in keys))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
