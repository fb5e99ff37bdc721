"""Train the bundled model: a small Mixtral on Jane Austen's novels. Development only; needs torch.

    python tools/train_demo.py --out /tmp/demo --minutes 80

Everything is made here: the corpus (a Debian package), the tokenizer, the weights, the figures of the model
card. The learning rate falls to zero at the given wall-clock time; a Hugging Face directory is exported
every few minutes and at the end. `mer convert` then makes the store that ships.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import click
import demo_corpus
import numpy as np
import torch
from demo_model import CONFIG, Mixtral
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)

HELD_OUT = 0.03  # the end of each novel


def split(novels: list[list[str]]) -> tuple[list[str], list[str]]:
    train, held = [], []
    for paragraphs in novels:
        cut = int(len(paragraphs) * (1 - HELD_OUT))
        train.append("\n".join(paragraphs[:cut]))
        held.append("\n".join(paragraphs[cut:]))
    return train, held


def train_tokenizer(texts: list[str], out: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Each novel as <s> ... </s>, one after the other."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text).ids, CONFIG["eos_token_id"]]
    return torch.tensor(ids, dtype=torch.long)


@torch.no_grad()
def evaluate(model: Mixtral, ids: torch.Tensor, length: int) -> tuple[float, np.ndarray]:
    """Perplexity over consecutive windows, and the share of every expert per layer [layers, experts]."""
    model.eval()
    losses, shares = [], []
    for at in range(0, len(ids) - 1, length):
        window = ids[at : at + length + 1]
        if len(window) < 2:
            break
        logits, _, share = model(window[None, :-1])
        losses.append(
            (F.cross_entropy(logits[0].float(), window[1:], reduction="sum").item(), len(window) - 1)
        )
        shares.append(share)
    model.train()
    total = sum(loss for loss, _ in losses) / sum(n for _, n in losses)
    return math.exp(total), torch.stack(shares).mean(0).numpy()


@torch.no_grad()
def sample(model: Mixtral, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int) -> str:
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt).ids
    for _ in range(tokens):
        logits = model(torch.tensor([ids]))[0][0, -1].float() / 0.7
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    model.train()
    return tokenizer.decode(ids)


def optimizer_for(model: Mixtral, lr: float) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def export(model: Mixtral, out: Path, report: dict[str, Any]) -> None:
    save_file(model.export(), out / "model.safetensors.part", metadata={"format": "pt"})
    (out / "model.safetensors.part").rename(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (out / "training.json").write_text(json.dumps(report, indent=2))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the export.")
@click.option("--minutes", type=float, default=80, show_default=True, help="Wall-clock time of training.")
@click.option("--batch", type=int, default=6, show_default=True, help="Sequences a step.")
@click.option("--length", type=int, default=384, show_default=True, help="Tokens a sequence.")
@click.option("--lr", type=float, default=2e-3, show_default=True)
@click.option("--dropout", type=float, default=0.1, show_default=True)
@click.option("--balance", type=float, default=0.01, show_default=True, help="Weight of the balance loss.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    out: Path, minutes: float, batch: int, length: int, lr: float, dropout: float, balance: float, seed: int
) -> None:
    torch.manual_seed(seed)
    train_text, held_text = split(demo_corpus.novels(out.parent / "corpus"))
    tokenizer = train_tokenizer(train_text, out)
    train, held = encode(tokenizer, train_text), encode(tokenizer, held_text)
    model = Mixtral(CONFIG, dropout)
    optimizer = optimizer_for(model, lr)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(train)} training tokens, {len(held)} held out, {parameters / 1e6:.2f} M parameters", flush=True
    )
    start, step, seen, exported = time.monotonic(), 0, 0, 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            )
        at = torch.randint(0, len(train) - length - 1, (batch,))
        windows = torch.stack([train[a : a + length + 1] for a in at.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, uneven, _ = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        (loss + balance * uneven).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + batch * length
        if step % 50 == 0:
            rate = seen / (time.monotonic() - start)
            print(
                f"{step:6d} {done:6.1%} loss {loss.item():.3f} uneven {uneven.item():.3f} {rate:.0f}/s",
                flush=True,
            )
        if time.monotonic() - start - exported > 600:
            exported = time.monotonic() - start
            perplexity, _ = evaluate(model, held, length)
            print(f"held-out perplexity {perplexity:.2f}", flush=True)
            print(sample(model, tokenizer, "Emma was", 60, seed), flush=True)
            export(model, out, {"steps": step, "tokens": seen, "held_out_perplexity": perplexity})
    perplexity, shares = evaluate(model, held, length)
    report = {
        "parameters": parameters,
        "steps": step,
        "tokens": seen,
        "training_tokens": len(train),
        "held_out_tokens": len(held),
        "minutes": minutes,
        "held_out_perplexity": perplexity,
        "expert_shares": np.round(shares, 4).tolist(),
        "samples": [sample(model, tokenizer, p, 100, seed) for p in ("Emma was", "It is a truth")],
    }
    export(model, out, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
