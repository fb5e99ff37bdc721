"""Small models that call tools: their weights are random, so what they say is forced; it can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tool_templates
from engine_models import write_text_model
from tokenizers import AddedToken, Tokenizer

# No free text in it: a random model hardly ever ends one.
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Bern", "Zürich", "São Paulo"]},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "wind": {"type": "boolean"},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}


def write_tool_model(path: Path, name: str = "hermes", special: tuple[str, ...] = ()) -> Path:
    """A model whose chat template is of this family. special: texts that are special tokens of it."""
    write_text_model(path, chat=True, max_position_embeddings=4096)
    template = tool_templates.ALL[name]
    if name == "hermes":  # without thoughts, which would not end either
        template = "".join(line for line in template.splitlines(True) if "<think>" not in line)
    (path / "chat_template.jinja").write_text(template)
    if special:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        for _ in special:  # in the place of ordinary tokens, so that the embedding fits
            spare = json.loads(tokenizer.to_str())
            spare["model"]["vocab"].pop(old := max(spare["model"]["vocab"], key=spare["model"]["vocab"].get))
            spare["model"]["merges"] = [m for m in spare["model"]["merges"] if "".join(m) != old]
            tokenizer = Tokenizer.from_str(json.dumps(spare))
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
        tokenizer.save(str(path / "tokenizer.json"))
    return path
