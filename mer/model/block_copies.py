"""Whole blocks of keys and values, copied out of a cache and into it, wherever their layers are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from mer._ext.gpu_blocks import GpuBlocks
from mer.model.kv import KVCache


class BlockCopies:
    """Copies the blocks of a cache of which a GPU may have the first layers; the bytes are the same.

    A block in a buffer is its layers one behind the other. `take` and `leave_device` are for the thread that
    computes; what `take` returned and `put` are for one other thread.
    """

    def __init__(self, kv: KVCache, device: GpuBlocks | None) -> None:
        """device: of the layers that `kv` has no elements of; None: it has all."""
        self._kv = kv
        self._device = device
        self._lock = threading.Lock()  # held while a block is being put

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self._kv.block_bytes

    def pin(self, buffers: Iterable[NDArray[np.uint8]]) -> None:
        """What blocks will be copied by, until `unpin`: a GPU reaches them quicker then."""
        if self._device is not None:
            self._device.pin(buffers)

    def unpin(self) -> None:
        """The buffers may go."""
        if self._device is not None:
            self._device.unpin()

    def take(self, block: int, buffer: NDArray[np.uint8]) -> Callable[[], bool] | None:
        """Copy a block to the beginning of a buffer, which has to stay until what is returned was called.

        That waits for the copy, and is False where it failed; None: it failed at once. Whatever is computed
        later, the copy is of what is in the block now.
        """
        device, at = self._device, 0
        if device is not None:
            if not device.copy_out(block, buffer):
                return None
            at = device.nbytes
        for layer in self._kv.layers:
            row = layer[block].view(np.uint8)
            buffer[at : at + row.nbytes] = row
            at += row.nbytes
        return device.finish if device is not None else _there

    def put(self, block: int, buffer: NDArray[np.uint8]) -> bool:
        """Whether a block, which nobody uses, is now what is in the buffer."""
        with self._lock:
            at = 0
            if self._device is not None:
                if not self._device.copy_in(block, buffer):
                    return False
                at = self._device.nbytes
            for layer in self._kv.layers:
                row = layer[block].view(np.uint8)
                row[:] = buffer[at : at + row.nbytes]
                at += row.nbytes
            return True

    def leave_device(self) -> None:
        """The cache has all layers from now on; what is in its blocks is lost."""
        with self._lock:
            if self._device is not None:
                self._device.close()
                self._device = None
            self._kv.bring_here()


def _there() -> bool:
    return True
