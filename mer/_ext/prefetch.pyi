from mer._ext.cache import ExpertCache
from mer._ext.uring import Reader

class Prefetcher:
    under_way: int
    issued: int
    useful: int
    failed: int
    bytes_read: int
    def __init__(self, cache: ExpertCache, reader: Reader, max_reads: int, capacity: int) -> None: ...
