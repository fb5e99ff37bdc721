"""`mer inspect`: what a model is, and what it needs of memory."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click
from attrs import asdict, frozen
from rich.console import Console
from rich.table import Table

from mer.cli import summary
from mer.cli.common import at_least, model_argument, output, parameters, size, size_option
from mer.cli.summary import Summary, summarise
from mer.config import EngineConfig
from mer.engine.budget import Budget, resident_bytes
from mer.engine.sharing import survey
from mer.errors import MerError
from mer.model import families
from mer.model.families import Architecture
from mer.model.spec import ModelSpec
from mer.model.tokenizer import Tokenizer
from mer.streaming.experts import advice, expert_tables
from mer.weights.checkpoint import Checkpoint, open_checkpoint, require_streamable

# More than any machine has.
_PLENTY: Final = 1 << 62


@frozen
class _Row:
    """One budget: what it is, whether it is enough, how many experts it caches."""

    what: str
    ram: int
    runs: bool
    slots: int
    share: float


@click.command()
@click.argument("model", callback=model_argument)
@click.option(
    "--ram", callback=size_option, metavar="SIZE", help="Also show what this much memory would hold."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(model: Path, ram: int | None, as_json: bool) -> None:
    """Show what MODEL is and what memory it needs. No weights are read.

    Parameters are counted as model cards do: embedding and head in full, in both numbers. Active are those
    that a token meets: all but the routed experts, and of these the chosen ones of each layer.

    Memory is counted as `mer run` does: the program, the weights that every token needs, keys and values of
    the context, the buffers of a step; the rest of --ram is slots of the expert cache.
    """
    checkpoint = open_checkpoint(model)
    architecture = families.load(checkpoint)
    facts = summarise(checkpoint, architecture)
    full: Budget | None = None
    rows: list[_Row] = []
    refusal = hint = None
    try:
        require_streamable(checkpoint)
        hint = advice(expert_tables(architecture.experts, model))
        # What `mer run` holds by itself when it divides memory must be held here, too: it is measured.
        held = import_module("mer.cli.run"), Tokenizer.open(model)
        # With all experts in memory; the other parts are the same in any budget.
        process = resident_bytes()
        del held
        full = survey(model, EngineConfig(ram=_PLENTY, max_running=1), process)
        given = survey(model, EngineConfig(ram=ram, max_running=1), process) if ram else None
        rows = _rows(full, given)
    except MerError as error:
        refusal = str(error)
    if as_json:
        click.echo(json.dumps(_json(checkpoint, architecture, facts, full, rows, refusal, hint), indent=2))
        return
    console = output()
    _print_model(console, checkpoint, architecture, facts)
    if full is not None:
        _print_memory(console, full, rows)
        if hint is not None:
            console.print(f"advice: {hint}", soft_wrap=True)
    else:
        console.print(f"It does not run as it is: {refusal}", soft_wrap=True)


def _rows(full: Budget, given: Budget | None) -> list[_Row]:
    def share(slots: int) -> float:
        return slots / full.experts if full.experts else 1.0

    def with_slots(what: str, slots: int) -> _Row:
        return _Row(what, full.enough_for(slots), True, slots, share(slots))

    rows = [with_slots("the least that works", full.least_slots)]
    if given is None:
        shares = [with_slots(f"{percent} %", full.experts * percent // 100) for percent in (25, 50)]
        rows += [row for row in shares if row.slots > full.least_slots]
    else:
        rows.append(_Row("as given", given.ram, given.fits, given.slots, share(given.slots)))
    if full.experts:
        rows.append(with_slots("all", full.experts))
    return sorted(rows, key=lambda row: row.ram)


def _json(
    checkpoint: Checkpoint,
    architecture: Architecture,
    facts: Summary,
    full: Budget | None,
    rows: list[_Row],
    refusal: str | None,
    hint: str | None,
) -> dict[str, Any]:
    spec = asdict(architecture.spec)
    del spec["rope"]["inv_freq"]
    memory = None
    if full is not None:
        names = (
            "interpreter", "dense", "kv", "kv_dtype", "states", "buffers", "drafting", "context", "slot",
            "experts",
        )  # fmt: skip
        memory = {name: getattr(full, name) for name in names} | {"budgets": [asdict(row) for row in rows]}
    return {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "spec": spec,
        **asdict(facts),
        "memory": memory,
        "refusal": refusal,
        "advice": hint,
    }


def _print_model(
    console: Console, checkpoint: Checkpoint, architecture: Architecture, facts: Summary
) -> None:
    spec = architecture.spec
    console.print(str(checkpoint.path), soft_wrap=True)
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    store = "expert store" if spec.router else "store"
    kind = {"store": store, "gguf": "GGUF", "hf": "Hugging Face safetensors"}[checkpoint.kind]
    count = parameters(facts.parameters)
    if spec.router is not None:
        count += f", {parameters(facts.active_parameters)} active per token"
    n_files = len(checkpoint.files)
    for name, value in (
        ("family", spec.family),
        ("files", f"{kind}, {n_files} {'file' if n_files == 1 else 'files'}, {size(facts.file_bytes)}"),
        ("parameters", count),
        ("layers", summary.layers(spec)),
        ("hidden size", f"{spec.hidden:,}"),
        ("vocabulary", f"{spec.vocab:,}" + (", head and embedding are one" if spec.tied_embeddings else "")),
        ("context", f"{spec.max_positions:,} tokens"),
        ("attention", summary.attention(spec)),
        ("recurrent layers", summary.recurrent(spec)),
        ("KV per token", f"{size(facts.kv_bytes_per_token)} in {facts.kv_dtype}"),
        *_expert_rows(spec, facts),
        ("other weights" if spec.router else "weights", _stored(facts, "dense")),
    ):
        if value is not None:
            table.add_row(name, value)
    console.print(table)


def _expert_rows(spec: ModelSpec, facts: Summary) -> list[tuple[str, str]]:
    if spec.router is None:
        return []
    n_experts = spec.n_moe_layers * spec.n_experts
    return [
        ("experts", summary.experts(spec, spec.router)),
        ("shared expert", summary.shared_expert(spec)),
        ("expert weights", _stored(facts, "experts")),
        ("an expert", f"{size(facts.expert_bytes)}; all {n_experts:,}: {size(facts.experts_bytes)}"),
    ]


def _stored(facts: Summary, kind: str) -> str:
    return ", ".join(f"{each.format} {size(each.nbytes)}" for each in facts.stored if each.kind == kind)


def _print_memory(console: Console, full: Budget, rows: list[_Row]) -> None:
    fixed = (
        ("weights that every token needs", full.dense),
        (f"keys and values of {full.context:,} tokens in {full.kv_dtype}", full.kv),
        *([("recurrent states of a request", full.states)] if full.states else []),
        ("buffers of a step", full.buffers),
        *([("the head that drafts tokens", full.drafting)] if full.drafting else []),
        ("the program itself, about", full.interpreter),
    )
    console.print()
    table = Table(title="Memory that is always needed", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, nbytes in fixed:
        table.add_row(name, size(nbytes))
    console.print(table)
    if not full.experts:
        console.print("A dense model: all of its weights stay in memory, as every token needs them.")
        for row in rows:
            verdict = "" if row.what != "as given" else ": enough" if row.runs else ": too little"
            console.print(f"  --ram {at_least(row.ram)}, {row.what}{verdict}")
        return
    table = Table(title="Memory for experts", title_justify="left")
    table.add_column("experts cached")
    for name in ("--ram", "slots", "of all", "cache"):
        table.add_column(name, justify="right")
    for row in rows:
        share = f"{100 * row.share:.1f} %" if row.runs else "too little"
        table.add_row(
            row.what,
            at_least(row.ram),
            f"{row.slots:,}",
            share,
            size(row.slots * full.slot),
            style="bold" if row.what == "as given" else "",
        )
    console.print(table)
