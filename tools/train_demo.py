"""Train the bundled model: a small Mixtral on Jane Austen's novels. Development only; needs torch and npm.

    python tools/train_demo.py --out /tmp/demo/hf --minutes 120
    mer convert /tmp/demo/hf mer/demo/model --experts q8_0 --dense q8_0
    python tools/demo_card.py /tmp/demo/hf mer/demo/model

Everything is made here: the corpus (packages of Debian and npm), the tokenizer, the weights. The novels alone
are soon learnt by heart, so other prose is mixed in, much of it at first and little at the end. The learning
rate falls to zero at the given wall-clock time. The held-out text is looked at every few minutes and at the
end, and what predicts it best is kept as a Hugging Face directory.
Each worker is one process with one thread: at these sizes threads would mostly wait for each other.
"""

from __future__ import annotations

import json
import math
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import attrs
import click
import demo_corpus
import numpy as np
import torch
from demo_model import CONFIG, Mixtral
from demo_optim import Share
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F  # noqa: N812 (everybody's name for it)

HELD_OUT = 0.03  # the end of each novel
SHORT, LONG_FROM = 256, 0.7  # tokens a sequence; the model's whole context from this part of the time on
MUON_LR, ADAM_LR, LEVEL = 0.02, 3e-3, 0.3  # the rates stay level for this part of the time, then fall
OTHER_FIRST, OTHER_LAST = 0.7, 0.1  # the share of other prose, falling evenly over the time
SAMPLES = ("Emma was", "It is a truth", "Mr. Darcy")


@attrs.frozen
class Job:
    """What the workers share; model, gradients and clock [1] lie in shared memory."""

    model: Mixtral
    tokenizer: Tokenizer
    train: torch.Tensor
    other: torch.Tensor
    held: torch.Tensor
    gradients: list[list[torch.Tensor]]
    clock: torch.Tensor
    barrier: Barrier
    out: Path
    start: float
    minutes: float
    batch: int
    dropout: float
    balance: float
    peak: float
    every: float
    seed: int


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


def export(model: Mixtral, out: Path, report: dict[str, Any]) -> None:
    save_file(model.export(), out / "model.safetensors.part", metadata={"format": "pt"})
    (out / "model.safetensors.part").rename(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (out / "training.json").write_text(json.dumps(report, indent=2))


def report(job: Job, step: int, perplexity: float, shares: np.ndarray) -> dict[str, Any]:
    """What the model card says of the model as it is now."""
    workers, seconds = len(job.gradients), time.time() - job.start
    return {
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "steps": step,
        "tokens": step * workers * job.batch,
        "training_tokens": len(job.train),
        "other_tokens": len(job.other),
        "held_out_tokens": len(job.held),
        "minutes": round(seconds / 60),
        "workers": workers,
        "batch": job.batch,
        "dropout": job.dropout,
        "peak": job.peak,
        "tokens_per_second": round(step * workers * job.batch / seconds),
        "held_out_perplexity": perplexity,
        "expert_shares": np.round(shares, 4).tolist(),
        "samples": [sample(job.model, job.tokenizer, p, 100, job.seed) for p in SAMPLES],
    }


def rates(done: float, step: int) -> float:
    """The learning rate's factor: warm-up, level, then linearly down to nothing at the deadline."""
    return min(1.0, (step + 1) / 20) * min(1.0, max(0.0, (1 - done) / (1 - LEVEL)))


def draw(job: Job, done: float, length: int, generator: torch.Generator) -> torch.Tensor:
    """Windows for one step [n, length + 1], from random places of the novels and of the other prose."""
    n = job.batch // length
    other = OTHER_FIRST + (OTHER_LAST - OTHER_FIRST) * done
    windows = []
    for chance, place in torch.rand(n, 2, generator=generator).tolist():
        text = job.other if chance < other else job.train
        at = int(place * (len(text) - length - 1))
        windows.append(text[at : at + length + 1])
    return torch.stack(windows)


def work(rank: int, job: Job) -> None:
    """One single-threaded process of the training; process 0 also keeps the clock, reports and exports."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(job.seed * 1000 + rank)
    torch.manual_seed(job.seed * 1000 + rank)
    model, share = job.model, Share(job.model, job.gradients, rank)
    for p, g in zip(model.parameters(), job.gradients[rank], strict=True):
        p.grad = g
    step, looked, best = 0, 0.0, math.inf
    while (done := job.clock[0].item()) < 1:
        length = SHORT if done < LONG_FROM else CONFIG["max_position_embeddings"]
        windows = draw(job, done, length, generator)
        for g in job.gradients[rank]:
            g.zero_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, uneven, _ = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        (loss + job.balance * uneven).backward()
        step += 1
        if rank == 0:
            elapsed = time.time() - job.start
            job.clock[0] = elapsed / (60 * job.minutes)
        job.barrier.wait()  # every gradient is there
        factor = job.peak * rates(job.clock[0].item(), step)
        share.step(MUON_LR * factor, ADAM_LR * factor)
        job.barrier.wait()  # every parameter is new
        if rank == 0:
            seen = step * len(job.gradients) * job.batch
            if step % 20 == 0:
                line = f"{step:6d} {done:6.1%} loss {loss.item():.3f} uneven {uneven.item():.3f}"
                print(f"{line} {seen} tokens {seen / elapsed:.0f}/s", flush=True)
            if elapsed - looked > 60 * job.every or job.clock[0].item() >= 1:
                looked = elapsed
                perplexity, shares = evaluate(model, job.held, SHORT)
                print(f"held-out perplexity {perplexity:.2f}", flush=True)
                if perplexity < best:
                    best = perplexity
                    export(model, job.out, report(job, step, perplexity, shares))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the export.")
@click.option("--minutes", type=float, default=60, show_default=True, help="Wall-clock time of training.")
@click.option("--workers", type=int, default=2, show_default=True, help="Processes, one thread each.")
@click.option("--batch", type=int, default=2560, show_default=True, help="Tokens a step and worker.")
@click.option("--dropout", type=float, default=0.3, show_default=True)
@click.option("--balance", type=float, default=0.03, show_default=True, help="Weight of the balance loss.")
@click.option("--peak", type=float, default=1, show_default=True, help="Factor on the learning rates.")
@click.option(
    "--every", type=float, default=3, show_default=True, help="Minutes between looks at held-out text."
)
@click.option("--init", type=click.Path(path_type=Path), help="An earlier export to continue from.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    out: Path,
    minutes: float,
    workers: int,
    batch: int,
    dropout: float,
    balance: float,
    peak: float,
    every: float,
    init: Path | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    corpus = out.parent / "corpus"
    train_text, held_text = split(demo_corpus.novels(corpus))
    other_text = ["\n".join(paragraphs) for paragraphs in demo_corpus.others(corpus)]
    tokenizer = train_tokenizer(train_text, out)
    train, other, held = (encode(tokenizer, text) for text in (train_text, other_text, held_text))
    model = Mixtral(CONFIG, dropout).share_memory()
    if init is not None:
        model.load(load_file(init / "model.safetensors"))
    parameters = sum(p.numel() for p in model.parameters())
    line = f"{len(train)} training tokens, {len(other)} of other prose, {len(held)} held out"
    print(f"{line}, {parameters / 1e6:.2f} M parameters", flush=True)
    gradients = [
        [torch.zeros_like(p.data).share_memory_() for p in model.parameters()] for _ in range(workers)
    ]
    clock = torch.zeros(1).share_memory_()
    barrier = torch.multiprocessing.get_context("fork").Barrier(workers)
    job = Job(
        model, tokenizer, train, other, held, gradients, clock, barrier, out, time.time(),
        minutes, batch, dropout, balance, peak, every, seed,
    )  # fmt: skip
    torch.multiprocessing.start_processes(work, (job,), nprocs=workers, start_method="fork")
    print((out / "training.json").read_text())


if __name__ == "__main__":
    main()
