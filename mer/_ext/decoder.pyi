from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mer._ext.kernels import Kernels, Pool

SPAN: int
INDEX_CHUNK: int

def embed(weight: Any, tokens: NDArray[np.int32], out: NDArray[np.float32]) -> bool: ...

class Decoder:
    n_layers: int
    def __init__(
        self,
        spec: Any,
        kernels: Kernels,
        pool: Pool,
        buffers: Mapping[str, NDArray[Any]],
        weights: Mapping[str, Any],
        kv: int,
    ) -> None: ...
    def add_layer(self, weights: Mapping[str, Any], blocks: NDArray[Any]) -> None: ...
    def begin(
        self,
        positions: NDArray[np.int32],
        query_offsets: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        tokens: NDArray[np.int32] | None = None,
    ) -> None: ...
    def attend(self, layer: int) -> None: ...
    def feed(self, layer: int) -> None: ...
    def route(self, layer: int) -> None: ...
    def predict(self, layer: int) -> None: ...
    def finish(self, layer: int) -> None: ...
    def hidden_states(self) -> int: ...
    def logits(self, rows: NDArray[np.int32]) -> None: ...

class Join:
    def __init__(
        self, decoder: Decoder, weights: Mapping[str, Any], buffers: Mapping[str, NDArray[Any]]
    ) -> None: ...
    def join(self, states: NDArray[np.float32]) -> None: ...
