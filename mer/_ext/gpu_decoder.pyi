from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from mer._ext.decoder import Decoder
from mer._ext.device import Device
from mer._ext.vram import VramTier

def layer_arrays(spec: Any, weights: Mapping[str, Any]) -> dict[str, NDArray[Any]]: ...

class GpuDecoder(Decoder):
    gpu_layers: int
    taken_bytes: int
    kv_bytes: int
    def place(
        self,
        device: Device,
        layers: int,
        n_blocks: int,
        places: Mapping[str, tuple[int, int]],
        head: Mapping[str, Any],
        buffers: Mapping[str, NDArray[Any]],
        tier: VramTier | None = None,
    ) -> None: ...
    def leave_device(self) -> None: ...
