"""All that is to be checked and measured on a GPU, one part after the other, within some minutes.

    python -m bench.gpu_check --json gpu.json              all parts, at most 9 minutes
    python -m bench.gpu_check --parts tests,mla --minutes 3
    MER_CUDA_DRIVER=... MER_FAKE_VRAM=0x60000000 python -m bench.gpu_check --small   a trial, simulated

Nothing is downloaded: models are made in --work (9 GB; what is in it already is used), which by default is a
directory for temporary files and goes at the end. Every part is a process with a limit of its own; where one
fails or takes too long, the next one begins, and FILE is written after each. The exit status is 1 where one
failed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from attrs import define, field, frozen
from rich.console import Console
from rich.table import Table

from bench.help import help_of
from mer.errors import GpuError
from mer.gpu.compile import cuda
from mer.gpu.probe import gpus

KEPT = 6000  # characters of what a part printed


@frozen
class Part:
    """command: a module and its arguments. seconds: its limit. needs: the part without which it is no use.

    told: one line of its JSON, which it writes to `report`; without one the last line that it printed counts.
    """

    name: str
    what: str
    command: Sequence[str]
    seconds: float
    needs: str | None = None
    report: Path | None = None
    told: Callable[[Any], str] = str
    env: Mapping[str, str] = field(factory=dict)


@define
class Outcome:
    """state: 'done', or what went wrong. told: one line. printed: the end of it. found: its JSON."""

    part: Part
    state: str
    seconds: float = 0.0
    told: str = ""
    printed: str = ""
    found: Any = None

    def as_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("state", "seconds", "told", "printed", "found")}
        return {"name": self.part.name, "command": list(self.part.command), **fields}


def parts(work: Path, small: bool) -> list[Part]:
    """All of them, what tells the most first. work: where models and reports are."""

    def report(name: str) -> Path:
        return work / f"{name}.json"

    tests = "tests/gpu/test_simulated_gpu.py" if small else "tests/gpu"
    kernels = ["--tokens", "1,64" if small else "1,16,512", "--json", str(report("kernels"))]
    if small:
        kernels += ["--formats", "q8_0", "--rows", "16", "--cols", "256", "--products", "8", "--mib", "1"]
    dense = ["--layers", "1", "--contexts", "16", "--tokens", "8"] if small else ["--contexts", "128,4096"]
    runs = ["--vram", "none,100MiB" if small else "none,8", "--experts", "25,100", "--seconds", "45"]
    runs += ["--prompt", "32", "--decode", "8", "--warm", "16", "--threads", "1"] if small else []
    store = ["--lengths", "16,32" if small else "64,512,2048", "--repeat", "1" if small else "3"]
    store += ["--context", "64"] if small else []
    found = [
        Part(
            "tests", "the tests that need no made-up fault",
            ["pytest", "-p", "no:cacheprovider", tests], 150, env={} if small else {"MER_TEST_GPU": "1"},
        ),
        Part(
            "kernels", "kernels of every format, beside the CPU's bytes and a copy",
            ["bench.gpu_kernels", *kernels], 100, report=report("kernels"), told=_kernels,
        ),
    ]  # fmt: skip
    shapes = ("tiny", "tiny-latent") if small else ("qwen3-30b-a3b", "deepseek-v2-lite")
    for name, shape in zip(("dense", "mla"), shapes, strict=True):
        command = ["bench.gpu_decoder", "--shape", shape, *dense, "--json", str(report(name))]
        found.append(Part(name, f"dense layers of {shape}", command, 70, report=report(name), told=_layers))
    models = (("qwen", "qwen3-30b-a3b", "12", "q4_0"), ("oss", "gpt-oss-20b", "8", "mxfp4"))
    for name, shape, layers, form in models:
        layers = "1" if small else layers
        command = ["bench.make_model", shape, str(work / name), "--layers", layers, "--experts", form]
        found.append(Part(name, f"{layers} layers of {shape}, written", command, 80))
        run = f"{name}-vram"
        command = ["bench.gpu", str(work / name), *runs, "--json", str(report(run))]
        found.append(Part(run, "with 8 GB and with the CPU alone", command, 150, name, report(run), _runs))
    command = ["bench.prefix", str(work / "qwen"), *store, "--device", "cuda", "--json", str(report("store"))]
    what = "a prefix read back into the GPU's memory"
    found.append(Part("store", what, command, 80, "qwen", report("store"), _prefixes))
    return found


def _kernels(found: Any) -> str:
    rates = {name: rate / 1e9 for name, rate in found["bytes_per_second"].items()}
    of_copy = " ".join(f"{r['format']} {r['of_copy']:.0%}" for r in found["results"] if r["tokens"] == 1)
    bus = f"GB/s: memory {rates['memory']:.0f}, bus {rates['to_device']:.1f}, back {rates['from_device']:.1f}"
    return f"{bus}; of a copy, one token: {of_copy}"


def _layers(found: Any) -> str:
    steps = ", ".join(f"{s['tokens']} behind {s['context']}: {s['us_a_layer']:.0f}" for s in found["steps"])
    return f"the CPU's bytes; us a layer, tokens {steps}"


def _runs(found: Any) -> str:
    (shape,) = found["shapes"]
    lines = []
    for run in shape["runs"]:
        name = f"{run['vram_gb']}, {run['experts']} %"
        if "found" not in run:
            lines.append(f"{name}: -")
            continue
        decode = run["found"]["decode"]["timings"]["decode_tokens_per_s"]
        prefill = run["found"]["prefill"]["timings"]["prefill_tokens_per_s"]
        lines.append(f"{name}: {decode:.0f} ({decode / run['ceiling']:.0%} of the ceiling), {prefill:.0f}")
    return "decode, prefill tok/s with vram, experts: " + "; ".join(lines)


def _prefixes(found: Any) -> str:
    rows = [
        f"{r['tokens']}: {r['computed_s'] * 1e3:.1f} and {r['read_s'] * 1e3:.1f}" for r in found["lengths"]
    ]
    return "ms computed and read, tokens " + ", ".join(rows)


def run(part: Part, seconds: float, log: Path) -> Outcome:
    """One part, for at most so many seconds; what it prints goes to `log`."""
    began = time.monotonic()
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *part.command], stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, env=os.environ | dict(part.env), start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
            state = "done" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            state = f"took longer than {seconds:.3g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.wait()
    outcome = Outcome(part, state, time.monotonic() - began)
    outcome.printed = log.read_text(errors="replace")[-KEPT:].strip()
    outcome.told = outcome.printed.rpartition("\n")[2]
    try:
        if part.report is not None:
            outcome.found = json.loads(part.report.read_text())
            outcome.told = part.told(outcome.found)
    except (OSError, ValueError, LookupError, TypeError) as error:  # half of it, where it failed
        outcome.told += f" ({part.report}: {error!r})" if state == "done" else ""
    return outcome


def run_all(
    wanted: Sequence[Part], seconds: float, work: Path, each: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """All parts within so many seconds; `each` is told after each of them."""
    end = time.monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    for part in wanted:
        left = end - time.monotonic()
        needed = outcomes.get(part.needs or "")
        if left <= 0:
            outcomes[part.name] = Outcome(part, "no time was left")
        elif needed is not None and needed.state != "done":
            outcomes[part.name] = Outcome(part, f"not tried, for want of {part.needs}")
        else:
            outcomes[part.name] = run(part, min(left, part.seconds), work / f"{part.name}.log")
        each(list(outcomes.values()))
    return list(outcomes.values())


def show(console: Console, outcomes: Sequence[Outcome]) -> None:
    table = Table("part", "", "s", "what it says")
    for outcome in outcomes:
        table.add_row(outcome.part.name, outcome.state, f"{outcome.seconds:.0f}", outcome.told)
    console.print(table)


@click.command(help=help_of(__doc__))
@click.option("--minutes", default=9.0, show_default=True, help="In all.")
@click.option("--parts", "names", help="Of all only these: their names, with commas.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--small", is_flag=True, help="Little of everything.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
def main(minutes: float, names: str | None, work: Path | None, small: bool, out: Path | None) -> None:
    console = Console(width=180)
    try:
        gpu = gpus()[0]
    except GpuError as error:
        raise click.ClickException(str(error)) from None
    device = f"{gpu.name}, driver of CUDA {cuda(gpu.driver)}, {os.cpu_count()} processors"
    console.print(device)
    with ExitStack() as undo:
        if work is None:
            work = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="mer-gpu-check-")))
        work.mkdir(parents=True, exist_ok=True)
        wanted = _chosen(parts(work, small), names)
        wanted = [part for part in wanted if not (work / part.name / "config.json").exists()]

        def each(outcomes: list[Outcome]) -> None:
            last = outcomes[-1]
            console.print(f"{last.part.name}, {last.part.what}: {last.state}, {last.seconds:.0f} s")
            if last.state.startswith(("failed", "took")):
                console.print(last.printed[-1500:], markup=False, highlight=False)
            if out is not None:
                report = {"device": device, "parts": [outcome.as_json() for outcome in outcomes]}
                out.write_text(json.dumps(report, indent=1) + "\n")

        outcomes = run_all(wanted, 60 * minutes, work, each)
    show(console, outcomes)
    if any(outcome.state != "done" for outcome in outcomes):
        raise click.ClickException("not all of it was done")


def _chosen(found: list[Part], names: str | None) -> list[Part]:
    """Those with these names, and what they need."""
    if names is None:
        return found
    wanted = set(names.split(","))
    if unknown := wanted - {part.name for part in found}:
        known = ", ".join(part.name for part in found)
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: known are {known}", param_hint="--parts")
    wanted |= {part.needs for part in found if part.name in wanted and part.needs is not None}
    return [part for part in found if part.name in wanted]


if __name__ == "__main__":
    main()
