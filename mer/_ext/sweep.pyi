import numpy as np
from numpy.typing import NDArray

from mer._ext.cache import ExpertCache
from mer._ext.uring import Reader

class Sweep:
    experts: int
    nbytes: int
    def __init__(self, cache: ExpertCache, reader: Reader, reads: NDArray[np.int64]) -> None: ...
    def run(self, keys: NDArray[np.int64]) -> None: ...
    def stop(self) -> None: ...
