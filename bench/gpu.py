"""Tokens per second with a little VRAM, beside the ceiling that this machine's bandwidths give.

    python -m bench.make_model qwen3-30b-a3b /tmp/qwen --layers 12
    python -m bench.make_model gpt-oss-20b /tmp/oss --layers 8 --experts mxfp4
    python -m bench.gpu /tmp/qwen /tmp/oss [--vram none,4,8,16] [--experts 25,100] [--json FILE]

    python -m bench.make_model qwen3-30b-a3b /tmp/qwen.gguf --layers 12 --as gguf
    python -m bench.gpu /tmp/qwen --llama-bench /tmp/llama.cpp/bin/llama-bench

--vram, in GB or with a unit (4GiB), is for the whole model: one with a quarter of the layers gets a quarter,
but for the head, which is not of a layer. --experts: percent of them that memory has room for. Every run is a
process of its own (bench/gpu_engine.py), warmed with other text.

Ceiling of decode, tokens/s, by what the run itself counted per token, each byte moved once:

    1 / max(dense there / G + dense here / M + max(vram / G, memory / M), bus / B, missed / S)

dense: bytes of attention, router and head, computed by the GPU and by the CPU; vram, memory: bytes of the
experts computed by the GPU and by the CPU, at the same time but after what chooses them; bus: experts copied
to the GPU; missed: experts read from disk. G, M, B, S: bandwidth of the GPU's memory (a copy
inside it, bytes read and written), of memory (all threads reading), of the bus (pinned memory to the GPU), of
the disk (reads of one expert, 32 at once), measured here before the runs.

--llama-bench: llama.cpp's CUDA build beside it (bench/gpu_peer.py), on the same weights in STORE.gguf, with
as much of the GPU and all of memory.

What is drawn, with its log-probabilities, must be the same bits in every run; if not, the exit status is 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from attrs import asdict, frozen
from rich.console import Console
from rich.table import Table

from bench import gpu_engine, gpu_peer
from bench.gpu_kernels import bandwidths
from bench.help import help_of
from bench.io import run_reader
from bench.model import Model
from bench.shapes import SHAPES
from mer._ext.kernels import Pool
from mer.config import EngineConfig, parse_size
from mer.errors import MerError
from mer.gpu.opening import open_device

MIB = 1 << 20
DEPTH = 32  # reads at once
COPIED = 512 * MIB  # beyond every cache


@frozen
class Bandwidths:
    """Bytes per second. The first three are 0 where there is no GPU."""

    gpu: float
    to_gpu: float
    from_gpu: float
    memory: float
    disk: float


def card(device: str) -> tuple[str, dict[str, float]]:
    """Name and bandwidths of the GPU of that setting; it is left alone afterwards."""
    try:
        opened = open_device(EngineConfig(device=device))
        return (opened.name, bandwidths(opened, COPIED)) if opened else ("no GPU", {})
    except MerError as error:
        raise click.ClickException(str(error)) from None


def measure(gpu: dict[str, float], model: Model, threads: int | None) -> Bandwidths:
    pool = Pool(threads)
    memory = max(pool.memory_bandwidth(2048) for _ in range(3))
    block = -(-model.expert // 4096) * 4096
    disk = max(run_reader(model.file, "uring", block, DEPTH, 0.5) for _ in range(2))
    return Bandwidths(
        gpu=gpu.get("memory", 0.0),
        to_gpu=gpu.get("to_device", 0.0),
        from_gpu=gpu.get("from_device", 0.0),
        memory=memory,
        disk=disk,
    )


class Shape:
    """A store on disk, and how much smaller it is than the model of that shape."""

    def __init__(self, store: Path) -> None:
        self.store, self.model = store, Model(store)
        config = json.loads((store / "config.json").read_text())
        layers = int(config["num_hidden_layers"])
        same = ("model_type", "hidden_size")
        found = [n for n, shape in SHAPES.items() if all(shape[key] == config[key] for key in same)]
        self.name = found[0] if found else store.name
        self.of = SHAPES[self.name]["num_hidden_layers"] if found else layers
        self.layers, self.share = layers, layers / self.of
        spec = self.model.spec
        self.experts_bytes = spec.n_moe_layers * spec.top_k * self.model.expert
        self.layer_bytes = self.model.budget.experts // spec.n_moe_layers * self.model.expert
        self.dense_bytes = self.model.token_bytes - self.experts_bytes

    def vram(self, size: str) -> int:
        """Bytes that stand for so many GB, or a size with a unit, beside the whole model."""
        head = self.model.head
        nbytes = parse_size(size) if size[-1:].isalpha() else float(size) * 1e9
        return int(head + (nbytes - head) * self.share)


def per_token(found: dict[str, Any], decode: int) -> dict[str, float]:
    """Of a run's decode request: bytes and shares per token."""
    timings = found["decode"]["timings"]
    tokens = decode + gpu_engine.SHORT
    wanted = max(1, timings["hits"] + timings["misses"] + timings["vram_hits"])
    return {
        "vram_share": timings["vram_hits"] / wanted,
        "memory_share": timings["hits"] / wanted,
        "disk_share": timings["misses"] / wanted,
        "bus": timings["bus_bytes"] / tokens,
        "missed": timings["bytes_read"] / tokens,
    }


def ceiling(shape: Shape, found: dict[str, Any], per: dict[str, float], have: Bandwidths) -> float:
    """Tokens/s; see above."""
    on_gpu = per["vram_share"] * shape.experts_bytes
    there = found.get("dense_share", 0.0) * shape.dense_bytes
    dense = (shape.dense_bytes - there) / have.memory + (there / have.gpu if there else 0.0)
    experts = (shape.experts_bytes - on_gpu) / have.memory
    if on_gpu:
        experts = max(experts, on_gpu / have.gpu)
    bus = per["bus"] / have.to_gpu if per["bus"] else 0.0
    return 1 / max(dense + experts, bus, per["missed"] / have.disk)


@frozen
class Wanted:
    """Which runs: of each share of the experts (percent that memory holds) one with each `vram`.

    vram: 'none' (the CPU alone), GB beside the whole model ('4'), or a size ('4GiB'). prompt, decode, warm:
    tokens. seconds: a run that takes longer is given up.
    """

    device: str
    vram: tuple[str, ...]
    experts: tuple[str, ...]
    prompt: int = 512
    decode: int = 128
    warm: int = 1024
    threads: int | None = None
    seconds: float = 60.0


def rows(
    console: Console,
    store: Path,
    wanted: Wanted,
    found_card: tuple[str, dict[str, float]],
    peer: Path | None,
    gguf: Path,
) -> dict[str, Any]:
    """Measure all of a store's runs and show them. peer: llama.cpp's llama-bench, for `gguf`."""
    shape, (name, gpu) = Shape(store), found_card
    have = measure(gpu, shape.model, wanted.threads)
    console.print(
        f"{shape.name}, {shape.layers} of {shape.of} layers; {name}: memory {have.gpu / 1e9:.0f} GB/s, "
        f"bus {have.to_gpu / 1e9:.1f}, back {have.from_gpu / 1e9:.1f}; CPU memory {have.memory / 1e9:.1f}"
        f"; disk {have.disk / 1e9:.2f}; a token: {shape.dense_bytes / MIB:.0f} MiB dense, "
        f"{shape.experts_bytes / MIB:.0f} MiB of experts"
    )
    runs: list[dict[str, Any]] = []
    for share in wanted.experts:
        for budget in wanted.vram:
            where: dict[str, Any] = {"device": "cpu"}
            if budget != "none":
                where = {"device": wanted.device, "vram": shape.vram(budget)}
            run: dict[str, Any] = {"vram_gb": budget, "experts": share, **where}
            runs.append(run)
            settings = {name: getattr(wanted, name) for name in ("prompt", "decode", "warm", "threads")}
            try:
                found = gpu_engine.measure(
                    store, wanted.seconds, cache_experts=f"{share}%", **where, **settings
                )
            except gpu_engine.GpuRunError as error:
                run["error"] = str(error)
                console.print(f"vram {budget}, experts {share} %: {error}")
                continue
            per = per_token(found, wanted.decode)
            run |= {"found": found, "per_token": per, "ceiling": ceiling(shape, found, per, have)}
            run["same"] = found["drawn"] == next(r["found"]["drawn"] for r in runs if "found" in r)
    theirs = peer_runs(console, peer, gguf, shape, wanted) if peer else []
    show(console, runs, theirs)
    return {
        "name": shape.name,
        "device": name,
        "layers": [shape.layers, shape.of],
        "bandwidths": asdict(have),
        "dense_bytes": shape.dense_bytes,
        "experts_bytes": shape.experts_bytes,
        "runs": runs,
        "llama.cpp": theirs,
    }


DIFFER = "what was drawn differs between runs of one model"


def differ(found: dict[str, Any]) -> bool:
    """Whether something else was drawn in one of the runs that `rows` returned."""
    return any(not run.get("same", True) for run in found["runs"])


@click.command(help=help_of(__doc__))
@click.argument(
    "stores", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--device", default="auto", show_default=True, help="As mer run --device.")
@click.option(
    "--vram", default="none,4,8,16", show_default=True, help="GB, or sizes (4GiB); none: the CPU alone."
)
@click.option("--experts", default="25,100", show_default=True, help="Percent of them that memory holds.")
@click.option("--prompt", default=512, show_default=True, help="Tokens of the prompt that is timed.")
@click.option("--decode", default=128, show_default=True, help="Tokens.")
@click.option("--warm", default=1024, show_default=True, help="Tokens of the text before.")
@click.option("--threads", type=int)
@click.option("--seconds", default=60.0, show_default=True, help="A run that takes longer is given up.")
@click.option("--llama-bench", "peer", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write everything there, too.")
def main(
    stores: tuple[Path, ...],
    device: str,
    vram: str,
    experts: str,
    prompt: int,
    decode: int,
    warm: int,
    threads: int | None,
    seconds: float,
    peer: Path | None,
    out: Path | None,
) -> None:
    console, found = Console(width=150), card(device)
    wanted = Wanted(
        device, tuple(vram.split(",")), tuple(experts.split(",")), prompt, decode, warm, threads, seconds
    )
    report: dict[str, Any] = {"device": found[0], "shapes": []}
    for store in stores:
        report["shapes"].append(rows(console, store, wanted, found, peer, Path(f"{store}.gguf")))
        if out:  # what there is, should the next be stopped
            out.write_text(json.dumps(report, indent=1) + "\n")
    if any(map(differ, report["shapes"])):
        raise click.ClickException(DIFFER)


COLUMNS = (
    *("VRAM", "experts in memory", "decode tok/s", "of ceiling", "prefill tok/s", "vram / memory / disk"),
    *("bus a token", "read a token", "GPU holds", "same"),
)


def peer_runs(
    console: Console, bench: Path, gguf: Path, shape: Shape, wanted: Wanted
) -> list[dict[str, Any]]:
    """llama.cpp with each of the budgets."""
    runs = []
    for budget in wanted.vram:
        left = None
        if budget != "none":
            left = gpu_peer.cpu_layers(shape.layers, shape.dense_bytes, shape.layer_bytes, shape.vram(budget))
        run: dict[str, Any] = {"vram_gb": budget, "cpu_layers": left}
        runs.append(run)
        try:
            run["found"] = gpu_peer.measure(
                bench, gguf, wanted.seconds, prompt=wanted.prompt, decode=wanted.decode,
                threads=wanted.threads, left=left,
            )  # fmt: skip
        except gpu_peer.GpuPeerError as error:
            run["error"] = str(error)
            console.print(f"llama.cpp, vram {budget}: {error}")
    return runs


def named(budget: str) -> str:
    """For people."""
    return f"{budget} GB" if budget.replace(".", "", 1).isdigit() else budget


def show(console: Console, runs: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    table = Table(*COLUMNS)
    for run in runs:
        budget = named(run["vram_gb"])
        if "found" not in run:
            table.add_row(budget, f"{run['experts']} %", "-")
            continue
        found, per, vram = run["found"], run["per_token"], run["found"]["vram"]
        decode = found["decode"]["timings"]["decode_tokens_per_s"]
        table.add_row(
            budget,
            f"{run['experts']} %",
            f"{decode:.1f}",
            f"{decode / run['ceiling']:.0%} of {run['ceiling']:.0f}",
            f"{found['prefill']['timings']['prefill_tokens_per_s']:.0f}",
            " / ".join(f"{per[name + '_share']:.1%}" for name in ("vram", "memory", "disk")),
            f"{per['bus'] / MIB:.2f} MiB",
            f"{per['missed'] / MIB:.2f} MiB",
            f"{vram['resident']} of {vram['slots']}" + (", lost" if vram["lost"] else "") if vram else "",
            "yes" if run["same"] else "NO",
        )
    for run in theirs:
        if "found" in run:
            left, found = run["cpu_layers"], run["found"]
            where = "no GPU" if left is None else f"{left} layers' experts on the CPU"
            budget = named(run["vram_gb"])
            table.add_row(budget, "llama.cpp", f"{found['decode']:.1f}", "", f"{found['prefill']:.0f}", where)
    console.print(table)


if __name__ == "__main__":
    main()
