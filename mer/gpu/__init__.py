"""NVIDIA GPUs, where there are any: finding one, its kernels, opening it."""

from mer.gpu.opening import open_device, uses_gpu, vram_budget

__all__ = ["open_device", "uses_gpu", "vram_budget"]
