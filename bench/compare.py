"""mer beside llama.cpp: the same weights, the same memory control group, in turns, with this run's ceilings.

    python -m bench.make_model qwen3-30b-a3b /tmp/q.store --as store --layers 12
    python -m bench.make_model qwen3-30b-a3b /tmp/q.gguf --as gguf --layers 12
    python -m bench.compare /tmp/q.store /tmp/q.gguf --peer /tmp/peer/bin/python --plot q.png

STORE may be GGUF once more: mer reads it in place, and a large model is on the disk only once.
A budget is what mer needs besides the expert cache plus a share of all experts; both programs run under a
control group of that limit (as root), the page cache dropped before each. `--peer`: the interpreter that has
llama-cpp-python, see bench/peer.py; without it mer is measured alone. Below the whole model llama.cpp maps
the file and does not repack; where all fits it repacks as it likes. Both run the prompt once before what is
timed; where all fits mer runs everything once, since it reads an expert when it is first wanted. Below that
`once full` is mer's decode of as many tokens once its expert cache is full; at first it is filling.

    python -m bench.compare ... --vram none,4GiB,8GiB,16GiB [--llama-bench /tmp/llama.cpp/bin/llama-bench]

--vram: behind it the same shares of the experts with so much of a GPU's memory, and llama.cpp's CUDA build on
the same GGUF; these are runs of bench.gpu, which says how they are measured: no control group limits them.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import click
from attrs import asdict
from rich.console import Console
from rich.table import Table

from bench import ceilings, engine, gpu, options, peer
from bench.cgroups import MemoryGroup
from bench.help import help_of
from bench.model import Model


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run_mer(
    store: Path, prompt: list[int], decode: int, ram: int, threads: int, fits: bool
) -> dict[str, Any]:
    drop_caches()
    warmup = "all" if fits else "prompt"
    with MemoryGroup(ram) as group:
        found = engine.measure(
            store, prompt, decode, ram=str(ram), threads=threads, warmup=warmup, group=group.path,
            steady=None if fits else decode,
        )  # fmt: skip
    timings, decoded = found["timings"], found["decode"]
    return {
        "prefill": timings["prefill_tokens_per_s"],
        "decode": timings["decode_tokens_per_s"],
        "read_per_token": decoded["read_bytes"] / decode,
        "hit_rate": decoded["hits"] / max(decoded["hits"] + decoded["misses"], 1),
        "peak": found["engine"]["peak_bytes"],
        "tokens": found["tokens"],
        "steady": found["steady"],
        "prefill_read": found["prefill_read_bytes"] / timings["prefill_s"],
    }


def run_peer(
    python: str, gguf: Path, prompt: list[int], decode: int, ram: int, threads: int, fits: bool
) -> dict[str, Any]:
    drop_caches()
    with MemoryGroup(ram) as group:
        found = peer.measure(
            python, gguf, prompt, decode, threads=threads, extra_bufts=fits, warmup=True, group=group.path
        )
        peak = group.peak
    return {
        "prefill": found["prefill_tokens_per_s"],
        "decode": found["decode_tokens_per_s"],
        "read_per_token": found["read_bytes"]["decode"] / decode,
        "peak": peak,
        "tokens": found["tokens"],
    }


def spread(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def median(runs: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


@click.command(help=help_of(__doc__))
@click.argument("store", type=click.Path(exists=True, path_type=Path))
@click.argument("gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--peer", "python", help="Interpreter that has llama-cpp-python.")
@click.option(
    "--shares",
    default="10,25,50,100",
    show_default=True,
    callback=options.shares,
    help="Percent of the experts that fit.",
)
@click.option("--rounds", default=3, show_default=True, help="Runs of each program for each budget.")
@click.option("--prompt", default=64, show_default=True, help="Tokens.")
@click.option("--decode", default=64, show_default=True, help="Tokens.")
@click.option(
    "--peer-decode", default=16, show_default=True, help="Tokens of llama.cpp where the model does not fit."
)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--vram", help="Rows with a GPU, as bench.gpu has them: none,4GiB,8GiB,16GiB.")
@click.option("--device", default="auto", show_default=True, help="Of those, as mer run --device.")
@click.option("--llama-bench", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG (needs matplotlib).")
def main(
    store: Path,
    gguf: Path,
    python: str | None,
    shares: list[float],
    rounds: int,
    prompt: int,
    decode: int,
    peer_decode: int,
    threads: int,
    vram: str | None,
    device: str,
    llama_bench: Path | None,
    out: Path | None,
    plot: Path | None,
) -> None:
    model, card = Model(store), gpu.card(device) if vram else ("", {})
    if vram and not card[1]:
        raise click.ClickException("--vram: there is no GPU that can be used, mer doctor says why")
    ids = list(range(100, 100 + prompt))
    rows = []
    for share in [part / 100 for part in shares]:
        ram, fits = model.ram(share), share >= 1
        # What repacks has its weights twice for a while: it gets the room where everything fits.
        limit = 2 * ram + (1 << 30) if fits else ram
        mine, theirs, found = [], [], []
        for _ in range(rounds):
            # Before and after: neither memory nor device of a shared machine gives the same all the time.
            found.append(ceilings.measure(model.file, model.expert, threads=threads, rounds=1))
            mine.append(run_mer(store, ids, decode, ram, threads, fits))
            if python:
                count = decode if fits else peer_decode
                theirs.append(run_peer(python, gguf, ids, count, limit, threads, fits))
            found.append(ceilings.measure(model.file, model.expert, threads=threads, rounds=1))
        memory = statistics.median(each.memory for each in found)
        disk = statistics.median(each.device for each in found)
        missed = median(mine, "read_per_token")
        rows.append(
            {
                "share": share,
                "ram": ram,
                "memory": memory,
                "device": disk,
                "ceiling": ceiling(model.token_bytes / memory, missed / disk),
                "compute_s": model.token_bytes / memory,
                "mer": mine,
                "peer": theirs,
                "ceilings": [asdict(each) for each in found],
            }
        )
        show(rows)
    report: dict[str, Any] = {"token_bytes": model.token_bytes, "rows": rows}
    if vram:
        budgets, parts = tuple(vram.split(",")), tuple(f"{part:g}" for part in shares)
        wanted = gpu.Wanted(device, budgets, parts, prompt, decode, threads=threads)
        report["gpu"] = gpu.rows(Console(width=150), store, wanted, card, llama_bench, gguf)
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if plot:
        draw(rows, plot)
    if vram and gpu.differ(report["gpu"]):
        raise click.ClickException(gpu.DIFFER)


def ceiling(compute_s: float, read_s: float) -> float:
    """Tokens/s where a token computes and reads at the same time."""
    return 1 / max(compute_s, read_s)


COLUMNS = ("experts that fit", "program", "prefill tok/s", "decode tok/s", "of ceiling", "read/token", "peak")


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*COLUMNS)
    for row in rows:
        for name, runs in (("mer", row["mer"]), ("llama.cpp", row["peer"])):
            if runs:
                table.add_row(
                    f"{row['share']:.0%}, {row['ram'] / 2**30:.2f} GiB",
                    name,
                    spread(runs, "prefill"),
                    spread(runs, "decode"),
                    f"{median(runs, 'decode') / row['ceiling']:.0%}",
                    f"{median(runs, 'read_per_token') / 2**20:.1f} MiB",
                    f"{median(runs, 'peak') / 2**30:.2f} GiB",
                )
        full = [run["steady"] for run in row["mer"] if run["steady"]]
        if full:
            missed = median(full, "read_per_token")
            speed = median(full, "decode_tokens_per_s")
            table.add_row(
                *("", "mer, once full", "", spread(full, "decode_tokens_per_s")),
                f"{speed / ceiling(row['compute_s'], missed / row['device']):.0%}",
                f"{missed / 2**20:.1f} MiB",
            )
        ratios = ["", ""]
        if row["peer"]:
            ratios = [
                f"{median(row['mer'], key) / median(row['peer'], key):.2f}" for key in ("prefill", "decode")
            ]
            table.add_row("", "mer / llama.cpp", *ratios)
        speeds = f"memory {row['memory'] / 1e9:.1f}, device {row['device'] / 1e9:.2f} GB/s"
        hits = f"hit rate {median(row['mer'], 'hit_rate'):.3f}"
        speeds += f", prefill read {median(row['mer'], 'prefill_read') / 1e9:.2f}"
        table.add_row(hits, "ceiling", speeds, f"{row['ceiling']:.2f}", end_section=True)
    Console(width=140).print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Decode tokens/s against the share of the experts that fits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    x = [100 * row["share"] for row in rows]
    axes.plot(x, [row["ceiling"] for row in rows], "k--", label="ceiling of this machine")
    axes.plot(x, [median(row["mer"], "decode") for row in rows], "o-", label="mer")
    if rows[0]["peer"]:
        axes.plot(x, [median(row["peer"], "decode") for row in rows], "s-", label="llama.cpp, mmap")
    axes.set(xlabel="experts that fit in memory, %", ylabel="decode, tokens/s", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
