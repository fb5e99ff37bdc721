"""Measure the bundled model and write its card, from the Hugging Face export and the expert store made of it.

    PYTHONPATH=. python tools/demo_card.py /tmp/demo/hf mer/demo/model

transformers judges both: it runs the exported weights, and the store's, dequantised. Development only.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from string import Template
from typing import Any

import click
import demo_corpus
import torch
from demo_model import CONFIG, Mixtral
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)
from train_demo import SHORT, encode, evaluate, split
from transformers import MixtralForCausalLM

from mer.weights.checkpoint import open_checkpoint

AGREEMENT = 1e-3  # largest difference of a logit between the training model and transformers
PROMPTS = ("Emma was", "It is a truth", "Mr. Darcy", "Captain Wentworth")
TEMPLATE = Path(__file__).with_name("demo_card.md")


def dequantised(store: Path) -> dict[str, torch.Tensor]:
    """A store's weights as f32, under the names of the export."""
    checkpoint = open_checkpoint(store)
    named = {name: torch.from_numpy(checkpoint.numpy(name)) for name in checkpoint.tensors}
    for (layer, number), expert in checkpoint.experts.items():
        (piece,) = expert.extents.pieces
        data = checkpoint.read_bytes(piece.file, piece.offset, piece.nbytes, expert.name)
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{number}."
        for name, matrix in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            place = getattr(expert.extents, matrix)
            rows = data[place.offset : place.offset + place.nbytes].reshape(place.rows, -1)
            named[f"{prefix}{name}.weight"] = torch.from_numpy(place.format.dequantize(rows))
    return named


def in_transformers(export: Path, weights: dict[str, torch.Tensor]) -> MixtralForCausalLM:
    """The model of the export's config.json with these weights, opened as any published checkpoint is."""
    with tempfile.TemporaryDirectory() as directory:
        save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(export / "config.json", directory)
        return MixtralForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def perplexity(model: MixtralForCausalLM, ids: torch.Tensor, length: int) -> float:
    total, tokens = 0.0, 0
    for at in range(0, len(ids) - 1, length):
        window = ids[at : at + length + 1]
        logits = model(window[None, :-1]).logits[0].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        tokens += len(window) - 1
    return math.exp(total / tokens)


@torch.no_grad()
def sample(model: MixtralForCausalLM, tokenizer: Tokenizer, prompt: str, tokens: int = 120) -> str:
    torch.manual_seed(1)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=tokens
    )
    return tokenizer.decode(out[0].tolist())


def megabytes(directory: Path, names: str = "*.safetensors") -> float:
    return sum(f.stat().st_size for f in directory.glob(names)) / 1e6


def routing(shares: Any) -> str:
    """A table: the share of every expert, a row per layer."""
    head = "| layer | " + " | ".join(f"expert {e}" for e in range(shares.shape[1])) + " |"
    rows = [f"| {n} | " + " | ".join(f"{s:.1%}" for s in layer) + " |" for n, layer in enumerate(shares)]
    return "\n".join([head, "|" + "---|" * (shares.shape[1] + 1), *rows])


@click.command()
@click.argument("export", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.option("--note", default="", help="A sentence on this training that the tool cannot know.")
def main(export: Path, store: Path, note: str) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    _, held_text = split(demo_corpus.novels(export.parent / "corpus"))
    held = encode(tokenizer, held_text)
    weights = load_file(export / "model.safetensors")
    ours = Mixtral(CONFIG).eval()
    ours.load(weights)
    theirs = in_transformers(export, weights)
    with torch.no_grad():
        window = held[None, : CONFIG["max_position_embeddings"]]
        apart = (ours(window)[0] - theirs(window).logits).abs().max().item()
    if apart > AGREEMENT:
        raise click.ClickException(f"the export's logits differ by {apart} in transformers")
    stored = in_transformers(export, dequantised(store))
    own_perplexity, shares = evaluate(ours, held, SHORT)
    facts = {
        **json.loads((export / "training.json").read_text()),
        "note": note,
        "apart": f"{apart:.1e}",
        "perplexity": f"{own_perplexity:.2f}",
        "perplexity_transformers": f"{perplexity(theirs, held, SHORT):.2f}",
        "perplexity_store": f"{perplexity(stored, held, SHORT):.2f}",
        "window": SHORT,
        "least_share": f"{shares.min():.1%}",
        "most_share": f"{shares.max():.1%}",
        "routing": routing(shares),
        "megabytes": f"{megabytes(store):.1f}",
        "expert_megabytes": f"{megabytes(store, 'experts-*.safetensors'):.1f}",
        "samples": "\n\n".join("> " + sample(stored, tokenizer, p).replace("\n", "\n>\n> ") for p in PROMPTS),
    }
    card = Template(TEMPLATE.read_text()).substitute(facts)
    (store / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
