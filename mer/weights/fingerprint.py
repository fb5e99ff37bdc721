"""Which model it is that lies in a directory, told without reading all of it; and which code runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Final

from mer import _ext
from mer.errors import CheckpointError
from mer.weights.tensors import Checkpoint

_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 4096


def compiled_code() -> bytes:
    """16 bytes that change with the compiled parts of this package."""
    digest = blake2b(digest_size=16)
    for path in sorted(Path(next(iter(_ext.__path__))).glob("*.so")):
        digest.update(path.read_bytes())
    return digest.digest()


def fingerprint(checkpoint: Checkpoint) -> bytes:
    """16 bytes that change with the model.

    They come of its config, the places of its tensors, and each file's name, size, time of change and some
    samples of its content. Raises CheckpointError.
    """
    return _fingerprint(
        checkpoint, lambda path, status: f"{path.name} {status.st_size} {status.st_mtime_ns}\n"
    )


def content_fingerprint(checkpoint: Checkpoint) -> bytes:
    """The same of copies on several machines: without names and times of files. Raises CheckpointError."""
    return _fingerprint(checkpoint, lambda _, status: f"{status.st_size}\n")


def _fingerprint(checkpoint: Checkpoint, describe: Callable[[Path, os.stat_result], str]) -> bytes:
    config = json.dumps(checkpoint.config, sort_keys=True, default=str)
    digest = blake2b(config.encode(), digest_size=16)
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.file} {info.offset}\n".encode())
    for path in checkpoint.files:
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                digest.update(describe(path, status).encode())
                for i in range(_SAMPLES):
                    digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, status.st_size * i // _SAMPLES))
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    return digest.digest()
