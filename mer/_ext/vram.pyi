import numpy as np
from numpy.typing import NDArray

from mer._ext.cache import ExpertCache
from mer._ext.device import Device
from mer._ext.kernels import Pool
from mer._ext.mixture import Mixture

NO_VRAM: dict[str, int | None]

def host_bytes(
    layers: NDArray[np.int64], n_experts: int, top_k: int, max_tokens: int, slot_bytes: int
) -> int: ...
def slots_in(
    nbytes: int, layers: NDArray[np.int64], n_experts: int, top_k: int, max_tokens: int, slot_bytes: int
) -> int: ...

class VramTier:
    n_slots: int
    slot_bytes: int
    def __init__(
        self, device: Device, cache: ExpertCache, mixture: Mixture, pool: Pool, nbytes: int
    ) -> None: ...
    def stats(self) -> dict[str, float | str | None]: ...
