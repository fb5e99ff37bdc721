from mer._ext.ahead import AheadDepth
from mer._ext.cache import ExpertCache
from mer._ext.uring import Reader

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
    depth: AheadDepth
    def __init__(
        self,
        cache: ExpertCache,
        reader: Reader,
        max_reads: int,
        capacity: int,
        n_experts: int,
        top_k: int,
        most_pairs: int,
    ) -> None: ...
    def stats(self) -> dict[str, int]: ...
