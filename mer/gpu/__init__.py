"""NVIDIA GPUs, where there are any: finding one, its kernels, opening it."""

from mer.gpu.opening import open_device, vram_budget

__all__ = ["open_device", "vram_budget"]
