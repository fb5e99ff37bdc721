"""ggml's matrix product, by the libraries that llama-cpp-python brings (bench/peer.py: how to install it)."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

F32: Final = 0
OVERHEAD: Final = 1 << 20  # of a context that holds no data


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


# name: (result, arguments)
_BASE: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_backend_get_device": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_free": (None, (c_void_p,)),
}
_CPU: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
}


class Ggml:
    """The CPU back end. directory: where libggml-base.so and libggml-cpu.so are. Raises OSError."""

    def __init__(self, directory: Path, threads: int) -> None:
        for name, functions in (("libggml-base.so", _BASE), ("libggml-cpu.so", _CPU)):
            library = ctypes.CDLL(str(directory / name), mode=ctypes.RTLD_GLOBAL)
            for function, (result, arguments) in functions.items():
                found = getattr(library, function)
                found.restype, found.argtypes = result, arguments
                setattr(self, function.removeprefix("ggml_"), found)
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, threads)
        self.device = self.backend_get_device(self.backend)
        self.plain = self.backend_dev_buffer_type(self.device)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml_{name}")

    def repacked(self) -> list[int]:
        """Buffer types that lay weights out anew for this CPU; llama.cpp tries each in turn."""
        registry = self.backend_dev_backend_reg(self.device)
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        types = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device)
        found: list[int] = []
        while types[len(found)]:
            found.append(types[len(found)])
        return found


class Product:
    """y = W x, its weights laid out as `buffer_type` has them. Raises ValueError where that can't be."""

    def __init__(
        self, ggml: Ggml, buffer_type: int, form: int, weights: NDArray[np.uint8], x: NDArray[np.float32]
    ) -> None:
        self._ggml, rows, cols = ggml, len(weights), x.shape[1]
        self._shape = len(x), rows
        params = _InitParams(OVERHEAD, None, True)
        self._contexts = [ggml.init(params), ggml.init(params)]
        w = ggml.new_tensor_2d(self._contexts[0], form, cols, rows)
        self._buffers = [ggml.backend_alloc_ctx_tensors_from_buft(self._contexts[0], buffer_type)]
        inputs = ggml.new_tensor_2d(self._contexts[1], F32, cols, len(x))
        self._y = ggml.mul_mat(self._contexts[1], w, inputs)
        self._graph = ggml.new_graph(self._contexts[1])
        ggml.build_forward_expand(self._graph, self._y)
        self._buffers.append(ggml.backend_alloc_ctx_tensors_from_buft(self._contexts[1], ggml.plain))
        if not all(self._buffers) or not ggml.backend_dev_supports_op(ggml.device, self._y):
            self.close()
            raise ValueError("ggml has no such product")
        ggml.backend_tensor_set(w, weights.ctypes.data, 0, weights.nbytes)
        ggml.backend_tensor_set(inputs, x.ctypes.data, 0, x.nbytes)

    def __enter__(self) -> Product:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def compute(self) -> None:
        self._ggml.backend_graph_compute(self._ggml.backend, self._graph)

    def result(self) -> NDArray[np.float32]:
        """f32 [tokens, rows] of the last compute()."""
        y = np.empty(self._shape, np.float32)
        self._ggml.backend_tensor_get(self._y, y.ctypes.data, 0, y.nbytes)
        return y

    def close(self) -> None:
        for buffer in filter(None, self._buffers):
            self._ggml.backend_buffer_free(buffer)
        for context in self._contexts:
            self._ggml.free(context)
        self._buffers, self._contexts = [], []
