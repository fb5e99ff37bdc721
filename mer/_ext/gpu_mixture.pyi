import numpy as np
from numpy.typing import NDArray

from mer._ext.device import Device
from mer._ext.mixture import Mixture

# What kernels are called, by ggml's numbers of the formats.
NAMES: dict[int, str]

def staging_bytes(layers: NDArray[np.int64], n_experts: int, top_k: int, max_tokens: int) -> int: ...
def buffer_bytes(layers: NDArray[np.int64], n_experts: int, top_k: int, max_tokens: int) -> list[int]: ...

class GpuMixture:
    nbytes: int
    def __init__(self, device: Device, mixture: Mixture) -> None: ...
