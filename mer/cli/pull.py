"""`mer pull`: a model fetched from the Hugging Face hub."""

from __future__ import annotations

import click
from rich.console import Console

from mer.cli.common import messages, output, progress_bar, size
from mer.errors import CheckpointError, UnsupportedModelError
from mer.model import families
from mer.streaming.experts import expert_tables
from mer.weights import pull as hub
from mer.weights.checkpoint import open_checkpoint, read_config, require_streamable
from mer.weights.gguf_families import ARCHITECTURES
from mer.weights.hub import Name, Variant


@click.command()
@click.argument("name", metavar="ORG/NAME[@REVISION][:QUANT]")
def pull(name: str) -> None:
    """Fetch a model from the Hugging Face hub, or go on with fetching it.

    Of safetensors everything that mer needs; of GGUF files one model, QUANT (such as Q4_K_M). It is kept in
    the hub's cache, where other programs find it, too, and mer by its name: mer run ORG/NAME.

    HF_HOME says where the cache is, HF_TOKEN who is asking, HF_ENDPOINT which hub is asked.
    """
    asked = Name.parse(name)
    if asked is None:
        raise click.UsageError(f"{name!r} is no name of a model on a hub; write ORG/NAME or ORG/NAME:QUANT")
    console = messages()
    repository = hub.look_up(asked)
    variant = hub.choose(repository)
    _refuse_unknown(repository, variant)
    if variant is not None and asked.quant is None:
        _print_variants(console, repository, variant)
    files = hub.weights_of(repository, variant)
    there, total = hub.there(repository, files), repository.size(files)
    text = f"{asked}: {len(files)} {'file' if len(files) == 1 else 'files'} of weights, {size(total)}"
    console.print(text + (f", {size(there)} of them are there" if there else ""), soft_wrap=True)
    try:
        with progress_bar() as bar:
            task = bar.add_task("fetching", total=total)
            path = hub.fetch_weights(
                repository, files, lambda done, total: bar.update(task, completed=done, total=total)
            )
    except KeyboardInterrupt:
        console.print("what has come is kept: the same command goes on from there", soft_wrap=True)
        raise
    model = path.parent if variant is None else path
    output().print(str(model), soft_wrap=True)
    checkpoint = open_checkpoint(model)
    architecture = families.load(checkpoint)
    try:
        require_streamable(checkpoint)
        expert_tables(architecture.experts, model)
        console.print(f'run it: mer run {asked} "Once upon a time"', soft_wrap=True)
    except CheckpointError:
        console.print(f"convert it first: mer convert {asked} NEW_DIRECTORY", soft_wrap=True)


def _refuse_unknown(repository: hub.Repository, variant: Variant | None) -> None:
    """Fetch the small files of safetensors, and no weights of a model that mer does not know."""
    what, kind, known = "general.architecture", repository.architecture, set(ARCHITECTURES)
    if variant is None:
        path = hub.fetch_texts(repository)
        what, kind, known = "model_type", read_config(path).get("model_type"), set(families.FAMILIES)
    elif kind is None:
        return
    if kind not in known:
        raise UnsupportedModelError(
            f"{repository.name}: {what} {kind!r} is not supported, so its weights are not fetched; known are "
            + ", ".join(sorted(known))
        )


def _print_variants(console: Console, repository: hub.Repository, taken: Variant) -> None:
    """What there is to choose from."""
    if len(repository.variants) == 1:
        return
    console.print(f"{repository.name} has")
    for each in sorted(repository.variants, key=lambda each: repository.size(each.files)):
        mark = "  <- taken" if each == taken else ""
        console.print(f"  :{each.label:<12} {size(repository.size(each.files)):>10}{mark}")
