"""`mer verify`: is every weight of a model as it was written?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mer.cli.common import messages, model_argument, output, progress_bar, size
from mer.model import families
from mer.weights.checkpoint import open_checkpoint
from mer.weights.verify import verify as find_damage


@click.command()
@click.argument("model", callback=model_argument)
def verify(model: Path) -> None:
    """Read every weight of MODEL and say which are damaged.

    What `mer convert` wrote has a checksum for every tensor. A Hugging Face directory has none: there every
    tensor must be readable and no weight NaN or infinite. Exits with 1 when something is damaged.
    """
    checkpoint = open_checkpoint(model)
    families.load(checkpoint)
    with progress_bar() as bar:
        task = bar.add_task("verifying", total=None)
        damaged = find_damage(checkpoint, lambda done, total: bar.update(task, completed=done, total=total))
    n_tensors = len(checkpoint.tensors) + len(checkpoint.experts)
    for each in damaged:
        click.echo(f"{each.file}: {each.tensor}: {each.what.removeprefix(f'{each.file}: ')}")
    if damaged:
        advice = "convert the model again" if checkpoint.kind == "store" else "fetch these files again"
        messages().print(f"{len(damaged)} of {n_tensors:,} tensors are damaged: {advice}", soft_wrap=True)
        sys.exit(1)
    nbytes = size(sum(file.stat().st_size for file in checkpoint.files))
    checked = (
        "every checksum is right" if checkpoint.kind == "store" else "every tensor is readable and finite"
    )
    output().print(f"{model}: {n_tensors:,} tensors, {nbytes}: {checked}", soft_wrap=True)
