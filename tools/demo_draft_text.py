"""Texts for the bundled model's draft head: a part of what the model was trained on, and what was held out.

    python tools/demo_draft_text.py /tmp/demo

writes data.txt and held.txt there, for `mer draft train demo` (docs/speculative.md). Development only.
"""

from __future__ import annotations

from pathlib import Path

import click
import demo_corpus
from train_demo import split

NOVELS, OTHERS, PIECE = 420_000, 30_000, 6_000  # characters


def pieces(text: str, characters: int) -> list[str]:
    """So much of it, from all over."""
    count = characters // PIECE
    return [text[i * (len(text) // count) :][:PIECE] for i in range(count)]


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(out: Path) -> None:
    corpus = out / "corpus"
    train, held = split(demo_corpus.novels(corpus))
    others = "\n".join("\n".join(paragraphs) for paragraphs in demo_corpus.others(corpus))
    (out / "data.txt").write_text("\n".join(pieces("\n".join(train), NOVELS) + pieces(others, OTHERS)))
    (out / "held.txt").write_text("\n".join(held))


if __name__ == "__main__":
    main()
