"""A model's config.json, read key by key with types and bounds checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mer.errors import CheckpointError, UnsupportedModelError


class Config:
    """config.json of the checkpoint at `path`. Methods raise CheckpointError naming file and key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        # What a GGUF file says comes under config.json's names.
        self._place = f"{path} (its metadata)" if path.suffix == ".gguf" else f"{path}/config.json"
        self._values = values

    def inner(self, name: str) -> Config:
        """The object of this name as a config of its own; where there is none, this one."""
        values = self._values.get(name)
        if values is None:
            return self
        if not isinstance(values, dict):
            raise self.wrong(f"{name} is {values!r}, it must be an object")
        found = Config(Path(), values)
        found._place = f"{self._place}, {name}"
        return found

    def but(self, **values: Any) -> Config:
        """This one with other values."""
        found = Config(Path(), {**self._values, **values})
        found._place = self._place
        return found

    def wrong(self, text: str) -> CheckpointError:
        """The error to raise when the values contradict each other or the tensors."""
        return CheckpointError(f"{self._place}: {text}")

    def unsupported(self, text: str) -> UnsupportedModelError:
        """The error to raise for what this file asks for and `mer` can't do."""
        return UnsupportedModelError(f"{self._place}: {text}")

    def get(self, *names: str) -> Any:
        """Value of the first of these keys that is there and not null, else None."""
        for name in names:
            value = self._values.get(name)
            if value is not None:
                return value
        return None

    def has(self, name: str) -> bool:
        """Whether this key stands in the file, be it as null."""
        return name in self._values

    def integer(self, *names: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; required when there is no default."""
        value = self._required(names, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(
                f"{self._present(names)} is {value!r}, it must be a whole number of at least {minimum}"
            )
        return value

    def number(self, *names: str, default: float | None = None, above: float = 0.0) -> float:
        """A finite number greater than `above`; required when there is no default."""
        return self.as_number(self._present(names), self._required(names, default), above)

    def as_number(self, name: str, value: Any, above: float = 0.0) -> float:
        """The same check for a value found elsewhere in the file."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < float("inf"):
            raise self.wrong(f"{name} is {value!r}, it must be a number greater than {above:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._required((name,), default)
        if not isinstance(value, bool):
            raise self.wrong(f"{name} is {value!r}, it must be true or false")
        return value

    def integers(self, name: str) -> list[int]:
        """A list of whole numbers; empty when absent."""
        value = self.get(name) or []
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            raise self.wrong(f"{name} is {value!r}, it must be a list of whole numbers")
        return value

    def expect(self, name: str, *known: Any) -> None:
        """Absent, or one of these values: anything else is mathematics that `mer` has not."""
        value = self.get(name)
        if value is not None and value not in known:
            names = " or ".join(repr(each) for each in known)
            raise self.unsupported(f"{name} is {value!r}, only {names} is supported")

    def _present(self, names: tuple[str, ...]) -> str:
        """That of the names which stands in the file."""
        return next((name for name in names if self._values.get(name) is not None), names[0])

    def _required(self, names: tuple[str, ...], default: Any) -> Any:
        value = self.get(*names)
        if value is None and default is None:
            raise self.wrong(f"the key {names[0]} is missing")
        return default if value is None else value
