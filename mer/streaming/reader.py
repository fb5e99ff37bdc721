"""Reading extents of files: `Reader`, and memory that it can read straight into."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mer._ext.uring import BACKENDS, Reader

__all__ = ["BACKENDS", "DIRECT_ALIGNMENT", "Reader", "aligned_empty"]

# What O_DIRECT asks of offsets, lengths and addresses (Reader.alignment is this or 1).
DIRECT_ALIGNMENT = 4096


def aligned_empty(nbytes: int, file_offset: int = 0) -> NDArray[np.uint8]:
    """An uninitialised uint8 array [nbytes] that `Reader.read_into` fills from `file_offset` without a copy.

    Its address equals `file_offset` modulo 4096, so that O_DIRECT can read all but the first and the last
    block of the extent straight into place.
    """
    raw = np.empty(nbytes + 2 * DIRECT_ALIGNMENT, np.uint8)
    skip = (file_offset - raw.ctypes.data) % DIRECT_ALIGNMENT
    return raw[skip : skip + nbytes]
