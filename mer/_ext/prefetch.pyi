import numpy as np
from numpy.typing import NDArray

from mer._ext.ahead import AheadDepth, AheadSwitch
from mer._ext.cache import ExpertCache
from mer._ext.uring import Reader

EARLY_LAYERS: int
NOTHING_AHEAD: dict[str, int]

class Prefetcher:
    under_way: int
    issued: int
    useful: int
    failed: int
    bytes_read: int
    useful_bytes: int
    guessed: int
    right: int
    switch: AheadSwitch | None
    depth: AheadDepth
    early: AheadDepth
    early_issued: int
    def __init__(
        self,
        cache: ExpertCache,
        reader: Reader,
        max_reads: int,
        capacity: int,
        n_experts: int,
        top_k: int,
        most_pairs: int,
        early_layers: int,
    ) -> None: ...
    @property
    def early_layers(self) -> int: ...
    def read_likely(self, likely: NDArray[np.int32]) -> None: ...
    def stats(self) -> dict[str, int]: ...
