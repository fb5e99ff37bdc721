"""Rows of a stored matrix in another order or form, a slab at a time, for a container that wants them so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mer.weights.formats import Format

_T = TypeVar("_T", bound=np.generic)


class Source(Protocol):
    """A matrix [rows, cols] that is read by rows, as its format stores them or as f32.

    name, origin: what it is and the file it comes from, for messages.
    """

    @property
    def name(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def format(self) -> Format: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    def raw(self, start: int, stop: int) -> NDArray[np.uint8]: ...
    def read(self, start: int, stop: int) -> NDArray[np.float32]: ...


@frozen(eq=False)
class Picked:
    """Of each `block` rows of `base` those that `order` [n] names, in that order."""

    base: Source
    block: int
    order: NDArray[np.intp]

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def origin(self) -> str:
        return self.base.origin

    @property
    def format(self) -> Format:
        return self.base.format

    @property
    def rows(self) -> int:
        return self.base.rows // self.block * len(self.order)

    @property
    def cols(self) -> int:
        return self.base.cols

    def raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        first, last = self._blocks(start, stop)
        return self._pick(self.base.raw(first * self.block, last * self.block), start, stop)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        first, last = self._blocks(start, stop)
        return self._pick(self.base.read(first * self.block, last * self.block), start, stop)

    def _blocks(self, start: int, stop: int) -> tuple[int, int]:
        return start // len(self.order), -(-stop // len(self.order))

    def _pick(self, data: NDArray[_T], start: int, stop: int) -> NDArray[_T]:
        first, last = self._blocks(start, stop)
        kept = data.reshape(last - first, self.block, -1)[:, self.order].reshape(-1, data.shape[1])
        return kept[start - first * len(self.order) : stop - first * len(self.order)]


class _Computed(ABC):
    """Values that do not lie so in any file: stored in the format of `base`, they are rounded to it again."""

    def __init__(self, base: Source) -> None:
        self.base = base
        self.name, self.origin, self.format = base.name, base.origin, base.format

    def raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self.format.quantize(self.read(start, stop))

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[np.float32]: ...


class Turned(_Computed):
    """Of each `block` rows of `base` the first `size`, transposed: [base.rows / block * base.cols, size]."""

    def __init__(self, base: Source, block: int, size: int) -> None:
        super().__init__(base)
        self._block = block
        self.rows, self.cols = base.rows // block * base.cols, size

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        each = self.base.cols
        parts = [
            self.base.read(n * self._block, n * self._block + self.cols).T
            for n in range(start // each, -(-stop // each))
        ]
        skipped = start // each * each
        return np.concatenate(parts)[start - skipped : stop - skipped]


class Columns(_Computed):
    """The columns of `base` that `order` names, in that order."""

    def __init__(self, base: Source, order: NDArray[np.intp]) -> None:
        super().__init__(base)
        self._order = order
        self.rows, self.cols = base.rows, len(order)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.base.read(start, stop)[:, self._order])


class Mapped(_Computed):
    """`function` of each value of `base`."""

    def __init__(self, base: Source, function: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
        super().__init__(base)
        self._function = function
        self.rows, self.cols = base.rows, base.cols

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._function(self.base.read(start, stop))
