"""A checkpoint as the rest of `mer` sees it: files, named tensors, experts by layer and number."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from attrs import Factory, frozen
from numpy.typing import NDArray

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights import formats
from mer.weights.extents import ExpertExtents, Scales, SplitBlocks
from mer.weights.formats import Format

_FORMATS: Final = {
    "F32": formats.F32,
    "F16": formats.F16,
    "BF16": formats.BF16,
    "F8_E4M3": formats.F8_E4M3,
    "F8_E8M0": formats.F8_E8M0,
    **{form.name.upper(): form for form in formats.INTEGERS},
}


def format_of_dtype(dtype: str) -> Format | None:
    """The format of a safetensors dtype; None for what is no weight (integers, booleans ...)."""
    return _FORMATS.get(dtype)


@frozen
class TensorInfo:
    """A tensor on disk. shape: in elements; offset (from the file's start) and nbytes: bytes.

    file: index into Checkpoint.files. dtype: as safetensors names it, or the name of a block format. Of
    weights whose scales lie elsewhere (`scales`, `layout`) offset and nbytes are those of the codes.
    """

    name: str
    file: int
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    weights: Format | None
    scales: Scales | None = None
    layout: SplitBlocks | None = None

    @property
    def format(self) -> Format:
        """Raises UnsupportedModelError for a dtype that holds no weights."""
        if self.weights is None:
            raise UnsupportedModelError(f"tensor {self.name} has dtype {self.dtype}, which holds no weights")
        return self.weights

    @property
    def cols(self) -> int:
        """Length of a row: the last dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Product of all dimensions but the last."""
        return math.prod(self.shape[:-1])


@frozen(eq=False)
class StoredExpert:
    """An expert of an expert store. checksum: of all bytes of its one piece, padding included."""

    name: str
    extents: ExpertExtents
    checksum: str


@frozen(eq=False)
class Checkpoint:
    """An opened checkpoint; no weights are in memory. config: config.json. tensors: by name.

    kind: 'hf'; 'gguf' (config and tensors under Hugging Face's names all the same); or 'store' for the output
    of `mer convert`, whose experts are then in `experts`, by (layer, expert). checksums: of a store's dense
    tensors.
    """

    path: Path
    kind: Literal["hf", "gguf", "store"]
    config: dict[str, Any]
    files: list[Path]
    tensors: Mapping[str, TensorInfo]
    experts: Mapping[tuple[int, int], StoredExpert] = Factory(dict)
    checksums: Mapping[str, str] = Factory(dict)

    def tensor(self, name: str) -> TensorInfo:
        """Raises CheckpointError when there is none of this name."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path}: the tensor {name} is missing; the download may be incomplete"
            )
        return info

    def read_bytes(self, file: int, offset: int, nbytes: int, what: str) -> NDArray[np.uint8]:
        """uint8 [nbytes] by plain reads. `what` names the data in the CheckpointError when that fails."""
        data = np.empty(nbytes, np.uint8)
        view, done = data.data, 0
        path = self.files[file]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < nbytes:
                    count = os.preadv(descriptor, [view[done:]], offset + done)
                    if count == 0:
                        raise CheckpointError(
                            f"{path}: ends inside {what}: the file is truncated, fetch or write it again"
                        )
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{path}: reading {what} failed: {error.strerror}") from error
        return data

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as they are stored: uint8 [nbytes]."""
        info = self.tensor(name)
        return self.read_bytes(info.file, info.offset, info.nbytes, f"tensor {name}")

    def numpy(self, name: str) -> NDArray[np.float32]:
        """The tensor's values: f32 [*shape], scales applied."""
        from mer.weights.rows import dense_rows  # it reads by way of this class

        info = self.tensor(name)
        return dense_rows(self, info).read(0, info.rows).reshape(info.shape)
