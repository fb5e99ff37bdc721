from mer._ext.device import Device
from mer._ext.mixture import Mixture

class GpuMixture:
    nbytes: int
    def __init__(self, device: Device, mixture: Mixture) -> None: ...
