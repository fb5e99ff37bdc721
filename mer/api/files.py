"""Whether a model's files are those that were opened, as a server sees them from outside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mer.weights.checkpoint import open_checkpoint
from mer.weights.hub import locate


def mark(path: Path) -> dict[Path, tuple[int, ...]]:
    """Of all files of a model. Raises what opening it raises."""
    return look(dict.fromkeys(open_checkpoint(locate(path)).files, ()))


def look(files: Mapping[Path, object]) -> dict[Path, tuple[int, ...]]:
    """(device, inode, size, time of the last change in ns) of each; empty for one that is not there."""
    found: dict[Path, tuple[int, ...]] = {}
    for file in files:
        try:
            stat = file.stat()
            found[file] = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        except OSError:
            found[file] = ()
    return found


def all_have_checksums(path: Path) -> bool:
    """Raises what opening it raises."""
    checkpoint = open_checkpoint(locate(path))
    experts = checkpoint.experts.values()
    return checkpoint.tensors.keys() <= checkpoint.checksums.keys() and all(each.checksum for each in experts)
