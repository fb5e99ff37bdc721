"""Whether files are still what they were when they were opened."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mer.errors import CheckpointError, FilesChangedError


class Unchanged:
    """Files by descriptors of its own, whatever their names mean later; `close` gives them back.

    A file system changes a file's time before bytes of it: what was read before a `check` that finds nothing
    is what was there at first.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises CheckpointError for one that can't be opened."""
        self._files = list(files)
        self._descriptors: list[int] = []
        try:
            for file in self._files:
                self._descriptors.append(os.open(file, os.O_PATH | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            raise CheckpointError(f"{error.filename}: can't be opened: {error.strerror}") from error
        self._were = [_mark(each) for each in self._descriptors]
        self._error = ""

    def check(self) -> None:
        """Raises FilesChangedError if bytes may have changed; from then on always."""
        if not self._error:
            for file, descriptor, was in zip(self._files, self._descriptors, self._were, strict=True):
                if _mark(descriptor) != was:
                    self._error = f"{file} was written over while it was read; open the model anew"
        if self._error:
            raise FilesChangedError(self._error)

    def close(self) -> None:
        """May be called again."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def _mark(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns
