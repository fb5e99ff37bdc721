"""`mer convert`: a model written as an expert store, in formats of one's choice."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from mer.cli.common import messages, model_argument, output, progress_bar, size
from mer.cli.summary import Summary, summarise
from mer.model import families, gguf_export, gguf_tokenizer
from mer.model.families import Architecture
from mer.model.gguf_vocab import vocabulary
from mer.weights import convert as conversion
from mer.weights import formats
from mer.weights.checkpoint import Checkpoint, open_checkpoint
from mer.weights.extents import Matrix, SplitBlocks
from mer.weights.formats import MXFP4, WRITTEN, Format
from mer.weights.hub import title
from mer.weights.plan import Plan

_SAME: Final = "same"


def _format_option(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Format | None:
    """A weight format in any case; None for 'same', and for an option that is not given."""
    if value is None:
        return None
    known = {form.name: form for form in WRITTEN} | {_SAME: None}
    if value.lower() not in known:
        raise click.BadParameter(f"the format {value!r} is not known; known are {', '.join(known)}")
    return known[value.lower()]


@click.command()
@click.argument("src", callback=model_argument)
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "kind",
    type=click.Choice(["store", "gguf"]),
    default="store",
    show_default=True,
    help="An expert store, the directory that mer runs best, or one GGUF file, for llama.cpp.",
)
@click.option(
    "--format",
    "both",
    callback=_format_option,
    metavar="FORMAT",
    help="Format of all matrices: --experts and --dense in one.",
)
@click.option(
    "--experts",
    callback=_format_option,
    metavar="FORMAT",
    default="q4_k",
    show_default="q4_k; same, where they are published in four bits",
    help="Format of the routed experts.",
)
@click.option(
    "--dense",
    callback=_format_option,
    metavar="FORMAT",
    default="q8_0",
    show_default="q8_0; same, in a dense model that is quantised already",
    help="Format of all other matrices.",
)
@click.option("--restart", is_flag=True, help="Throw away what an interrupted conversion has done.")
def convert(
    src: Path,
    dst: Path,
    kind: str,
    both: Format | None,
    experts: Format | None,
    dense: Format | None,
    restart: bool,
) -> None:
    """Write the model SRC as an expert store to the new directory DST, or as a GGUF file.

    Of a dense model, which has no experts, --dense is the format of all matrices.

    Formats: f32, f16, bf16, q8_0 (8.5 bits a weight), q4_0 and q4_k (4.5 bits), mxfp4 (4.25 bits), as GGUF
    defines them, or same: as SRC has it, 8-bit floats as bf16. Norms, biases and routers are never changed.

    SRC may be a GGUF file or an expert store, too. What is quantised in it already is then rounded a second
    time, which loses more than converting the original model; mer says so.

    An interrupted conversion to a store leaves DST.partial; the same command goes on where it ended. A GGUF
    file is there as a whole or not at all.
    """
    _check_destination(dst, kind, restart)
    checkpoint = open_checkpoint(src)
    architecture = families.load(checkpoint)
    before = summarise(checkpoint, architecture)
    given = _given("experts") or _given("both")
    if _given("both"):
        experts, dense = (experts if _given("experts") else both), (dense if _given("dense") else both)
    if not architecture.experts:
        if _given("experts"):
            messages().print("note: this is a dense model: --experts changes nothing, --dense is for all")
        rounded = any(formats.by_name(each.format).block > 1 for each in before.stored)
        if rounded and not _given("dense") and not _given("both"):
            dense = None
    elif not given and _in_four_bits(architecture.experts[0].experts[0].gate):
        experts = None  # published in four bits: another four would only lose
    _warn(before, experts, dense)
    try:
        with progress_bar() as bar:
            task = bar.add_task("preparing", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, description="converting", completed=done, total=total)

            if kind == "gguf":
                report = _export(checkpoint, dst, architecture, experts, dense, progress)
            else:
                report = _convert(checkpoint, dst, architecture, experts, dense, restart, progress)
    except KeyboardInterrupt:
        if kind == "store":
            messages().print(f"{dst}.partial is kept: the same command goes on from there", soft_wrap=True)
        raise
    written = open_checkpoint(dst)
    _print(output(), before, summarise(written, families.load(written)), report, architecture.spec.n_layers)


def _texts(checkpoint: Checkpoint) -> dict[str, str]:
    """What a store needs besides weights, of a GGUF file, which has it all in itself."""
    if checkpoint.kind != "gguf":
        return {}
    tokenizer = gguf_tokenizer.open_files(checkpoint.path)
    return {"config.json": json.dumps(checkpoint.config, indent=2), **(tokenizer.texts if tokenizer else {})}


def _in_four_bits(matrix: Matrix) -> bool:
    return matrix.format is MXFP4 or isinstance(matrix.layout, SplitBlocks)


def _given(option: str) -> bool:
    return click.get_current_context().get_parameter_source(option) is not ParameterSource.DEFAULT


def _check_destination(dst: Path, kind: str, restart: bool) -> None:
    if kind == "gguf":
        if dst.suffix != ".gguf":
            raise click.UsageError(f"{dst}: the name of a GGUF file ends with .gguf")
        if restart:
            raise click.UsageError("--restart goes with --to store: of a GGUF file nothing is kept half-done")
    elif dst.suffix == ".gguf":
        raise click.UsageError(f"{dst}: an expert store is a directory; for a GGUF file add --to gguf")


def _convert(
    checkpoint: Checkpoint,
    dst: Path,
    architecture: Architecture,
    experts: Format | None,
    dense: Format | None,
    restart: bool,
    progress: conversion.Progress,
) -> conversion.Report:
    whole = families.with_head(checkpoint, architecture)
    plan = Plan(whole.experts, tuple(whole.dense.values()), whole.kept)
    return conversion.convert(
        checkpoint,
        dst,
        plan,
        experts=experts,
        dense=dense,
        restart=restart,
        progress=progress,
        texts=_texts(checkpoint),
    )


def _export(
    checkpoint: Checkpoint,
    dst: Path,
    architecture: Architecture,
    experts: Format | None,
    dense: Format | None,
    progress: conversion.Progress,
) -> conversion.Report:
    more = {"general.name": title(checkpoint.path), **vocabulary(checkpoint.path, architecture.spec.vocab)}
    return gguf_export.export(
        checkpoint, architecture, dst, experts=experts, dense=dense, more=more, progress=progress
    )


def _warn(before: Summary, experts: Format | None, dense: Format | None) -> None:
    """Say where weights that were rounded to blocks will be rounded again."""
    for each in before.stored:
        wanted = experts if each.kind == "experts" else dense
        if wanted is not None and formats.by_name(each.format).block > 1 and wanted.name != each.format:
            messages().print(
                f"note: {each.kind} in {each.format} are rounded a second time, to {wanted.name}; "
                "converting the original model loses less",
                soft_wrap=True,
            )


def _print(
    console: Console, before: Summary, after: Summary, report: conversion.Report, n_layers: int
) -> None:
    n_files = sum(1 for _ in report.path.iterdir()) if report.path.is_dir() else 1
    files = f"{n_files} {'file' if n_files == 1 else 'files'}"
    console.print(
        f"{report.path}: {files}, {size(report.nbytes)}, from {size(before.file_bytes)} of weights",
        soft_wrap=True,
    )
    if report.resumed:
        console.print(f"resumed: {report.resumed:,} tensors were there from an earlier run")
    table = Table()
    table.add_column("written")
    table.add_column("format")
    for name in ("matrices and vectors", "size"):
        table.add_column(name, justify="right")
    for each in after.stored:
        table.add_row(each.kind, each.format, f"{each.tensors:,}", size(each.nbytes))
    console.print(table)
    for s in report.substitutions:
        console.print(
            f"{s.what}: rows of {s.cols:,} do not fit {s.wanted.name}, stored as {s.got.name}, "
            f"{s.count:,} {'matrix' if s.count == 1 else 'matrices'}",
            soft_wrap=True,
        )
    for name, count in _grouped(report.left_out, n_layers):
        console.print(
            f"left out: {name}, {count:,} {'tensor' if count == 1 else 'tensors'} that mer does not use",
            soft_wrap=True,
        )


def _grouped(names: Iterable[str], n_layers: int) -> list[tuple[str, int]]:
    """Left-out tensors and their number: layers for multi-token prediction are one entry each."""
    found: Counter[str] = Counter()
    for name in names:
        layer = re.match(r"(.*\blayers\.(\d+))\.", name)
        if name.removeprefix("model.").startswith("mtp."):
            found["mtp.* (multi-token prediction)"] += 1
        elif layer and int(layer[2]) >= n_layers:
            found[f"{layer[1]}.* (multi-token prediction)"] += 1
        else:
            found[re.sub(r"\.\d+(?=\.|$)", ".*", name)] += 1
    return sorted(found.items())
