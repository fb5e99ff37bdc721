from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_C = TypeVar("_C", bound=Callable[..., object])

KINDS: tuple[str, ...]

class Recorder:
    def timed(self, kind: str, call: _C) -> _C: ...
    def take(self) -> NDArray[np.int64]: ...
