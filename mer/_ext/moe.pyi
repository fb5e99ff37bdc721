from typing import Any

import numpy as np
from numpy.typing import NDArray

from mer._ext.cache import ExpertCache
from mer._ext.device import Device
from mer._ext.kernels import Kernels, Pool
from mer._ext.mixture import Mixture
from mer._ext.prefetch import Prefetcher
from mer._ext.recorder import Recorder
from mer._ext.remote import Peers, RemoteTier
from mer._ext.uring import Reader
from mer._ext.vram import VramTier

def scratch_bytes(
    layers: NDArray[np.int64], reads: NDArray[np.int64], top_k: int, max_tokens: int
) -> int: ...

class ExpertStreamer:
    n_layers: int
    n_experts: int
    top_k: int
    max_tokens: int
    max_reads: int
    prefetcher: Prefetcher | None
    scratch_bytes: int
    mixture: Mixture
    vram: VramTier | None
    def __init__(
        self,
        cache: ExpertCache,
        reader: Reader,
        kernels: Kernels,
        pool: Pool,
        layers: NDArray[np.int64],
        reads: NDArray[np.int64],
        matrices: NDArray[np.int64],
        top_k: int,
        max_tokens: int,
        prefetch: int = 0,
    ) -> None: ...
    def forward(
        self,
        layer: int,
        x: NDArray[np.float32],
        ids: NDArray[np.int32],
        weights: NDArray[np.float32],
        out: NDArray[np.float32],
        ahead: NDArray[np.int32] | None = None,
    ) -> None: ...
    def wants_guesses(self, tokens: int) -> bool: ...
    def use_vram(self, device: Device, nbytes: int) -> None: ...
    def use_peers(self, peers: Peers, patience_ns: int) -> RemoteTier: ...
    def add_biases(
        self, layers: list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]
    ) -> None: ...
    def gelu(self) -> None: ...
    def clamp(self, alpha: float, limit: float, added: float) -> None: ...
    def settle(self) -> None: ...
    def record(self, recorder: Recorder) -> None: ...
    def stats(self) -> dict[str, Any]: ...
