from mer._ext.cache import ExpertCache
from mer._ext.device import Device
from mer._ext.kernels import Pool
from mer._ext.mixture import Mixture

NO_VRAM: dict[str, int | None]

def bounce_bytes(slot_bytes: int) -> int: ...

class VramTier:
    n_slots: int
    slot_bytes: int
    def __init__(
        self, device: Device, cache: ExpertCache, mixture: Mixture, pool: Pool, n_slots: int
    ) -> None: ...
    def stats(self) -> dict[str, float | str | None]: ...
