"""`mer doctor`: what this machine allows, how fast it is, and what `mer` does because of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click
from attrs import asdict
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from mer._ext.cpus import usable_cpus
from mer._ext.kernels import Kernels, Pool, isas
from mer.cli import gpus
from mer.cli.common import at_least, device_options, messages, model_argument, output, rate, size, size_option
from mer.config import EngineConfig
from mer.errors import BudgetError, CheckpointError, UnsupportedModelError
from mer.streaming.advice import advice
from mer.streaming.machine import Machine, describe
from mer.streaming.probe import Device, probe, uring_refusal

# What a read takes where no experts say.
_BLOCK: Final = 1 << 20


@click.command()
@click.argument("path", callback=model_argument, default=".")
@click.option(
    "--block",
    callback=size_option,
    metavar="SIZE",
    help="Bytes per read; default: the size of the model's experts, else 1MiB.",
)
@click.option(
    "--ram", callback=size_option, metavar="SIZE", help="What MODEL may take; default: what is free."
)
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Routing that `mer run` or `mer serve --trace` recorded; default: MODEL runs for 15 seconds.",
)
@device_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(path: Path, block: int | None, trace: Path | None, as_json: bool, **settings: Any) -> None:
    """Show what this machine allows and how fast it is.

    PATH is where the weights lie. Of a MODEL the largest file (of experts) is read, in any other directory
    (default: this one) a temporary file of up to 1 GiB is written, read and removed. A file is read as it
    is. Of a MODEL it also says what of it would be on the GPU, and which share of its experts would be found
    in memory of other sizes.
    """
    config = EngineConfig(**settings)
    with messages().status("looking at this machine") as status:
        machine = describe()
        refusal = uring_refusal()
        model, weights = path, _weights_of(path)
        path, expert = weights or (path, _BLOCK)
        device = probe(path, block=block or expert, report=lambda text: status.update(text))
        status.update("reading memory")
        pool = Pool()
        memory_rate = pool.memory_bandwidth()
        status.update("looking for GPUs")
        gpu = gpus.survey(measure=True)
        facts = _facts(machine, refusal, device, pool.n_threads, memory_rate, gpu, config)
        facts["advice"] = advice(machine, device, refusal)
        if weights is not None or model.suffix == ".gguf":
            status.update("seeing what of the model a GPU would have")
            facts["on_gpu"] = _on_gpu(model, config)
            status.update("seeing which experts the model wants")
            facts["hit_rates"], facts["advice"] = _rates_of(
                model, config, trace, device.best, facts["advice"]
            )
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(output(), machine, device, facts)


def _on_gpu(model: Path, config: EngineConfig) -> dict[str, Any] | None:
    """What of the model would be on the GPU; None where there is none, or the model is one that can't run."""
    from mer.engine.placing import planned

    try:
        there = planned(model, config)
    except UnsupportedModelError:
        return None
    if there is None:
        return None
    names = ("device", "layers", "dense_bytes", "kv_bytes", "slots")
    return {name: getattr(there.vram, name) for name in names} | {
        "of_layers": there.layers, "of_experts": there.experts, "head": there.head, "told": there.told,
    }  # fmt: skip


def _rates_of(
    model: Path, config: EngineConfig, trace: Path | None, bandwidth: float, advised: list[str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Hit rates, None where there are none; what is advised then."""
    from mer.cli.hit_rates import hit_rates

    try:
        rates = hit_rates(model, config, trace, bandwidth)
    except (BudgetError, UnsupportedModelError) as error:
        return None, [*advised, str(error)]
    if rates is None:
        return None, advised
    return asdict(rates), [*filter(None, [rates.advice]), *advised]


def _weights_of(path: Path) -> tuple[Path, int] | None:
    """The largest file of experts and what the largest expert takes to read; None: no model that mer runs.

    Of a dense model: the largest file, and what a directory is read by.
    """
    if not (path / "config.json").is_file():
        return None
    # Here, because only a model needs them.
    from mer.model.families import load
    from mer.streaming.experts import slot_bytes
    from mer.weights.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(path)
        experts = [expert for layer in load(checkpoint).experts for expert in layer.experts]
    except CheckpointError:
        return None
    files = {checkpoint.files[piece.file] for expert in experts for piece in expert.pieces}
    nbytes, file = max((file.stat().st_size, file) for file in files or checkpoint.files)
    # The parts of an expert of a checkpoint lie apart; all together they may be more than one file of it.
    return file, min(max(map(slot_bytes, experts), default=_BLOCK), nbytes // 4096 * 4096)


def _facts(
    machine: Machine,
    refusal: str | None,
    device: Device,
    threads: int,
    memory_rate: float,
    gpu: dict[str, Any],
    config: EngineConfig,
) -> dict[str, Any]:
    return {
        "machine": asdict(machine),
        "io_uring": {"available": refusal is None, "refusal": refusal},
        "cpus": usable_cpus(),
        "instruction_sets": isas(),
        "device": asdict(device),
        "memory_bytes_per_second": memory_rate,
        "gpu": gpu,
        "uses": {
            "backend": device.backend,
            "why": device.why,
            "queue_depth": device.depth,
            "device_bytes_per_second": device.best,
            "kernels": Kernels().isa,
            "threads": threads,
            "gpu": gpus.used(gpu, config),
        },
    }


def _print(console: Console, machine: Machine, device: Device, facts: dict[str, Any]) -> None:
    table = Table(title="This machine", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _machine_rows(machine, device, facts):
        table.add_row(name, value)
    console.print(table)

    cached = " (not O_DIRECT: the page cache answers)" if not device.direct else ""
    # A title of the table's own would be folded to the table's width.
    console.print(f"Random reads of {size(device.block)} under {device.path}{cached}", soft_wrap=True)
    rates = Table()
    rates.add_column("at once", justify="right")
    rates.add_column("bandwidth", justify="right")
    rates.add_column("reads/s", justify="right")
    for each in device.rates:
        chosen = "bold green" if each.depth == device.depth else ""
        speed = each.bytes_per_second
        rates.add_row(str(each.depth), rate(speed), f"{speed / device.block:.0f}", style=chosen)
    console.print(rates)

    uses = facts["uses"]
    console.print("mer will use here", style="bold", highlight=False)
    used = Table.grid(padding=(0, 2, 0, 0))
    used.add_row("I/O", f"{uses['backend']}: {uses['why']}")
    bandwidth = rate(uses["device_bytes_per_second"])
    used.add_row("device", f"{bandwidth}, from {uses['queue_depth']} reads at once")
    used.add_row("memory", f"{rate(facts['memory_bytes_per_second'])} with {uses['threads']} threads")
    used.add_row("kernels", uses["kernels"])
    used.add_row("GPU", gpus.use(uses["gpu"]))
    if facts.get("on_gpu"):
        used.add_row("on it", facts["on_gpu"]["told"])
    console.print(Padding(used, (0, 0, 0, 2)), highlight=False)
    if facts.get("hit_rates"):
        _print_rates(console, facts["hit_rates"])
    console.print("What would be faster", style="bold", highlight=False)
    for line in facts["advice"] or ["nothing that can be told from here"]:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def _print_rates(console: Console, found: dict[str, Any]) -> None:
    console.print(f"Experts found in memory, of {found['tokens']} tokens (an LRU cache)", style="bold")
    table = Table()
    for name in ("ram", "experts in the cache", "hit rate", "read for a token"):
        table.add_column(name, justify="right")
    for each in found["rates"]:
        here = "bold green" if each["ram"] == found["ram"] else ""
        read = size(each["read_bytes"])
        cells = (at_least(each["ram"]), str(each["slots"]), f"{each['hit_rate']:.3f}", read)
        table.add_row(*cells, style=here)
    console.print(table)


def _machine_rows(machine: Machine, device: Device, facts: dict[str, Any]) -> list[tuple[str, str]]:
    memory = machine.memory
    limit = "no control group limits it"
    if memory.limit is not None:
        limit = f"limited to {size(memory.limit)} by {memory.limit_from}"
    memlock = "unlimited" if machine.memlock is None else size(machine.memlock)
    if machine.memlock is not None and machine.may_exceed_memlock:
        memlock += ", which this process may exceed (CAP_IPC_LOCK)"
    return [
        ("kernel", machine.kernel),
        ("io_uring", _uring_row(machine, facts["io_uring"]["refusal"])),
        ("file system", f"{device.file_system} ({device.path})"),
        ("O_DIRECT", _direct_row(device)),
        ("huge pages", f"transparent: {machine.huge_pages or 'none'}"),
        ("memlock limit", memlock),
        ("open files", "unlimited" if machine.open_files is None else f"{machine.open_files}"),
        ("CPU governor", machine.governor or "the kernel does not say"),
        ("processor", machine.cpu_model),
        ("instruction sets", ", ".join(facts["instruction_sets"])),
        ("usable CPUs", f"{facts['cpus']} (affinity and control groups)"),
        ("GPU", gpus.row(facts["gpu"])),
        ("memory", f"{size(memory.available)} of {size(memory.total)} available; {limit}"),
    ]


def _uring_row(machine: Machine, refusal: str | None) -> str:
    sysctl = {0: "allowed to all", 1: "allowed to one group", 2: "forbidden"}
    setting = ""
    if machine.io_uring_disabled is not None:
        said = sysctl.get(machine.io_uring_disabled, "?")
        setting = f" (kernel.io_uring_disabled={machine.io_uring_disabled}: {said})"
    return (refusal or "works") + setting


def _direct_row(device: Device) -> str:
    if not device.direct:
        return device.why
    if device.dio_alignment is None:
        return "works; the kernel does not say which alignment it needs, mer uses 4096"
    memory, offset = device.dio_alignment
    return f"works; asks for addresses aligned to {memory}, offsets to {offset}; mer uses 4096"
