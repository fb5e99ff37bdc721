"""Write a synthetic model with a real one's shapes: an expert store, a GGUF file or a Hugging Face directory.

    python -m bench.make_model qwen3-30b-a3b /tmp/qwen3-12l --layers 12 --as store
    python -m bench.make_model qwen3-30b-a3b /tmp/qwen3-12l.gguf --layers 12 --as gguf
    python -m bench.make_model qwen3-30b-a3b /tmp/sparse --layers 8 --as hf --sparse

Store and GGUF of the same shape, layers, formats and seed hold the same numbers; the directory is all BF16.
There is no tokenizer: prompts are token ids, and greedy decoding counts upward (bench/synthetic.py says why).
`--sparse` leaves the experts of the directory as holes in the files (they read as zeros): no disk space, no
time, for tests of memory and of I/O sizes, where the values do not matter. Memory use is flat.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.progress import Progress

from bench.gguf_writer import write_gguf
from bench.help import help_of
from bench.shapes import SHAPES, Tensor, model_config, tensors
from bench.synthetic import Weights
from mer.weights import formats
from mer.weights.store_layout import (
    FileLayout,
    MatrixPlace,
    expert_name,
    lay_out_dense,
    lay_out_experts,
    new_checksum,
    place_matrices,
)

SHARD_BYTES = 4 << 30
# q4_k_m: gate and up in q4_k, down in q6_k, as llama.cpp's mixes have it in half of the layers.
EXPERT_FORMATS = ("q4_0", "q8_0", "q4_k", "q4_k_m", "mxfp4", "f16", "bf16")
DENSE_FORMATS = ("q8_0", "f16", "bf16")

Done = Callable[[int], None]


def write_store(config: dict[str, Any], weights: Weights, out: Path, done: Done) -> int:
    """Write the directory; returns the bytes of its tensors."""
    out.mkdir(parents=True)
    dense: dict[str, Tensor] = {}
    layers: dict[int, dict[int, list[Tensor]]] = {}
    for tensor in tensors(config):
        if tensor.expert:
            layers.setdefault(tensor.expert[0], {}).setdefault(tensor.expert[1], []).append(tensor)
        else:
            dense[tensor.name] = tensor
    places = {
        number: place_matrices([(weights.format(t), t.shape[0], t.cols) for t in experts[0]])
        for number, experts in layers.items()
    }
    experts = {
        expert_name(number, e): list(zip(places[number], matrices, strict=True))
        for number, of_layer in layers.items()
        for e, matrices in of_layer.items()
    }
    layouts = [
        lay_out_dense({name: (weights.format(t), t.shape) for name, t in dense.items()}),
        *lay_out_experts([(number, len(layers[number]), places[number]) for number in layers]),
    ]
    start = MatrixPlace(formats.F32, 0, 1, 0)
    for layout in layouts:
        parts = {t.name: experts.get(t.name) or [(start, dense[t.name])] for t in layout.tensors}
        _write_layout(out / layout.name, layout, parts, weights, done)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return sum(layout.data_bytes for layout in layouts)


def _write_layout(
    path: Path,
    layout: FileLayout,
    parts: dict[str, list[tuple[MatrixPlace, Tensor]]],
    weights: Weights,
    done: Done,
) -> None:
    checksums: dict[str, str] = {}
    with path.open("wb") as out:
        out.seek(layout.data_start)
        for place in layout.tensors:
            checksum, written = new_checksum(), 0
            for matrix, tensor in parts[place.name]:
                pieces = [np.zeros(matrix.offset - written, np.uint8)], weights.pieces(tensor)
                for piece in (each for source in pieces for each in source):
                    out.write(piece.data)
                    checksum.update(piece.data)
                    written += piece.nbytes
            padding = bytes(place.nbytes - written)
            out.write(padding)
            checksum.update(padding)
            checksums[place.name] = checksum.hexdigest()
            done(place.nbytes)
        out.seek(0)
        out.write(layout.header(checksums))


def write_hf(config: dict[str, Any], weights: Weights, out: Path, done: Done, sparse: bool = False) -> int:
    """Write the directory; returns the bytes of its tensors."""
    out.mkdir(parents=True)
    parts: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors(config):
        if size + 2 * tensor.elements > SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += 2 * tensor.elements
    weight_map, total = {}, 0
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        total += _write_shard(out / name, part, weights, sparse, done)
        weight_map.update({tensor.name: name for tensor in part})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return total


def _write_shard(path: Path, part: list[Tensor], weights: Weights, sparse: bool, done: Done) -> int:
    header: dict[str, Any] = {}
    offset = 0
    for tensor in part:
        end = offset + 2 * tensor.elements
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in part:
            if sparse and tensor.expert:
                out.seek(2 * tensor.elements, 1)
            else:
                for piece in weights.pieces(tensor):
                    out.write(piece.data)
            done(2 * tensor.elements)
        out.truncate(8 + len(text) + offset)
    return offset


@click.command(help=help_of(__doc__))
@click.argument("shape", type=click.Choice(sorted(SHAPES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--as", "kind", type=click.Choice(["store", "gguf", "hf"]), default="store", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Other than the real model has.")
@click.option("--experts", type=click.Choice(EXPERT_FORMATS), default="q4_0", show_default=True)
@click.option("--dense", type=click.Choice(DENSE_FORMATS), default="q8_0", show_default=True)
@click.option("--sparse", is_flag=True, help="With --as hf: leave the experts as holes in the files.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(
    shape: str, out: Path, kind: str, layers: int | None, experts: str, dense: str, sparse: bool, seed: int
) -> None:
    if out.exists():
        raise click.ClickException(f"{out} exists already; name a new one, or remove it first")
    if sparse and kind != "hf":
        raise click.ClickException("--sparse goes with --as hf only")
    config = model_config(shape, layers)
    if kind == "hf" and config["model_type"] == "gpt_oss":
        raise click.ClickException("experts of gpt_oss lie by columns there: take --as store or gguf")
    if kind == "gguf" and config["model_type"] == "qwen3_next":
        raise click.ClickException("this shape is not written as GGUF: take --as store or hf")
    if experts.startswith("q4_k") and config["hidden_size"] % 256:
        raise click.ClickException("rows of this shape do not fit q4_k: take --experts mxfp4, q4_0 or q8_0")
    start = time.perf_counter()
    with Progress(transient=True) as progress:
        task = progress.add_task(str(out), total=None)

        def done(nbytes: int) -> None:
            progress.advance(task, nbytes)

        try:
            if kind == "hf":
                weights = Weights(config, formats.BF16, formats.BF16, seed, plain=formats.BF16)
                total = write_hf(config, weights, out, done, sparse)
            else:
                mixed = experts == "q4_k_m"
                form, down = ("q4_k", formats.Q6_K) if mixed else (experts, None)
                weights = Weights(config, formats.by_name(form), formats.by_name(dense), seed, down=down)
                write = write_gguf if kind == "gguf" else write_store
                total = write(config, weights, out, done)
        except OSError as error:
            raise click.ClickException(f"{error.filename or out}: {error.strerror}") from None
    seconds = time.perf_counter() - start
    click.echo(
        f"{out}: {total / 1e9:.2f} GB of tensors in {seconds:.0f} s ({total / seconds / 1e6:.0f} MB/s)"
    )


if __name__ == "__main__":
    main()
