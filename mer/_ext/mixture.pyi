import numpy as np
from numpy.typing import NDArray

from mer._ext.kernels import Kernels, Pool

def mixture_bytes(layers: NDArray[np.int64], n_experts: int, top_k: int, max_tokens: int) -> int: ...
def rounding_bytes(layers: NDArray[np.int64], max_tokens: int) -> int: ...
def narrow(fmt: int, rows: NDArray[np.float32]) -> bytes: ...
def widen(fmt: int, data: bytes, hidden: int) -> NDArray[np.float32]: ...

class Mixture:
    n_layers: int
    n_experts: int
    top_k: int
    max_tokens: int
    scratch_bytes: int
    memory_bytes: int  # of the one allocation that a device may write to
    def __init__(
        self,
        kernels: Kernels,
        pool: Pool,
        layers: NDArray[np.int64],
        n_experts: int,
        top_k: int,
        max_tokens: int,
    ) -> None: ...
    def round_to(self, fmt: int) -> None: ...
    def add_biases(
        self, layers: list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]
    ) -> None: ...
    def gelu(self) -> None: ...
    def clamp(self, alpha: float, limit: float, added: float) -> None: ...
