from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mer._ext.mixture import Mixture

NO_PEERS: dict[str, int]

def table_bytes(n_keys: int, n_experts: int, pairs: int) -> int: ...

class Ask(NamedTuple):
    """What one layer wants of a peer: each of `experts` for the next `counts` of `tokens`, rows of x,
    each output times that one of `weights`.

    x f32 [T, hidden], rounded as the mixture rounds, is to be copied before `ask` returns. deadline: in ns of
    the monotonic clock; an answer behind it is late.
    """

    turn: int
    deadline: int
    layer: int
    x: NDArray[np.float32]
    experts: list[int]
    counts: list[int]
    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]

class Peers(Protocol):
    def ask(self, peer: int, ask: Ask) -> bool: ...
    def expected_ns(self, peer: int, rows: int) -> int: ...
    def probe(self, peer: int, ask: Ask) -> None: ...

class RemoteTier:
    n_keys: int
    n_experts: int
    patience_ns: int
    read_ns: float
    reads: int
    def __init__(self, mixture: Mixture, n_keys: int, peers: Peers, patience_ns: int) -> None: ...
    def answer(self, turn: int, peer: int, experts: list[int], rows: bytes | None) -> None: ...
    def hold(self, holders: NDArray[np.int32]) -> None: ...
    def remember(self, heat: NDArray[np.float32]) -> None: ...
    def heats(self) -> tuple[NDArray[np.float32], int]: ...
    def note_read_py(self, ns: int, unseen: int, nbytes: int) -> None: ...
    def stats(self) -> dict[str, float]: ...
