"""What the files beside a tokenizer say about it: any of them may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from mer.errors import CheckpointError
from mer.weights.checkpoint import parse_object


class Text:
    """A file of such a `Texts`: what is needed of a Path."""

    def __init__(self, origin: Path, name: str, text: str | None) -> None:
        self._origin = origin
        self._name = name
        self._text = text

    def __str__(self) -> str:
        return f"{self._origin} ({self._name})"

    def exists(self) -> bool:
        return self._text is not None

    def read_text(self, encoding: str) -> str:
        """Raises FileNotFoundError."""
        if self._text is None:
            raise FileNotFoundError(str(self))
        return self._text


class Texts:
    """A directory that is none: what `origin`, one file, says, as files by name."""

    def __init__(self, origin: Path, texts: Mapping[str, str]) -> None:
        self._origin = origin
        self.texts = texts

    def __truediv__(self, name: str) -> Text:
        return Text(self._origin, name, self.texts.get(name))


Folder = Path | Texts


def read_optional(path: Path | Text) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file. Raises CheckpointError."""
    text = read_text(path)
    if text is None:
        return {}
    return parse_object(path, text)


def read_text(path: Path | Text) -> str | None:
    """The text in `path`, UTF-8; None when there is no such file. Raises CheckpointError."""
    try:
        return path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text: {error}; fetch it again") from error


def special_tokens(path: Folder, config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens ('bos_token', ...) of the model in directory `path`.

    config: its tokenizer_config.json. Where that lists no tokens, special_tokens_map.json counts as well,
    as in transformers.
    """
    found = dict(config)
    if "added_tokens_decoder" not in config:
        found |= read_optional(path / "special_tokens_map.json")
    contents = {name: _content(value) for name, value in found.items() if name.endswith("_token")}
    return {name: content for name, content in contents.items() if content is not None}


def added_tokens(
    path: Folder, config: Mapping[str, Any], special: Mapping[str, str]
) -> list[tuple[int, AddedToken]]:
    """Tokens added to the vocabulary, by id: tokenizer_config.json's, else added_tokens.json's.

    special: named special tokens; the older file does not say which are special. Raises CheckpointError.
    """
    if "added_tokens_decoder" in config:
        file: Path | Text = path / "tokenizer_config.json"
        entries = config["added_tokens_decoder"]
    else:
        file = path / "added_tokens.json"
        named = set(special.values())
        entries = {
            id: {"content": content, "special": content in named}
            for content, id in read_optional(file).items()
        }
    try:
        return sorted(
            ((int(id), _added_token(entry)) for id, entry in entries.items()), key=lambda entry: entry[0]
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: the added tokens must map ids to tokens, that is not so: {error}; fetch it again"
        ) from error


def eos_ids(path: Folder, config: Mapping[str, Any]) -> frozenset[int] | None:
    """Tokens that end an answer, from the first of generation_config.json and config.json that names any.

    config: the model's config.json. None when neither does. Raises CheckpointError.
    """
    generation = read_optional(path / "generation_config.json")
    language_model = config.get("text_config")  # of a model that also sees
    for file, values in (
        ("generation_config.json", generation),
        ("config.json", config),
        ("config.json", language_model if isinstance(language_model, dict) else {}),
    ):
        ids = values.get("eos_token_id")
        if ids is None:
            continue
        found = ids if isinstance(ids, list) else [ids]
        if not all(type(id) is int for id in found):
            raise CheckpointError(
                f"{path / file}: eos_token_id is {ids!r}, it must be one token id or a list of them"
            )
        # -1 stands for "none" in some files.
        return frozenset(id for id in found if id >= 0)
    return None


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    special = entry.get("special") is True
    return AddedToken(
        entry["content"],
        single_word=entry.get("single_word", False),
        lstrip=entry.get("lstrip", False),
        rstrip=entry.get("rstrip", False),
        normalized=entry.get("normalized", not special),
        special=special,
    )


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
