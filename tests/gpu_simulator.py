"""A CUDA driver without a GPU: a library of the driver API's symbols that runs the kernels on the CPU.

`library()` builds it from tests/gpu/ and mer/gpu/kernels/ (once for each state of the sources, in the folder
for temporary files) and gives its path, for `Device(driver=...)`. `Simulator` orders its faults.

With MER_TEST_GPU=1 in the environment the machine's own GPU takes its place, by its real driver, and what
orders faults is skipped.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from mer._ext.device import DRIVER, Device
from mer.gpu.compile import kernels
from mer.gpu.probe import gpus

REAL = bool(os.environ.get("MER_TEST_GPU"))
ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "mer/gpu/kernels"
FAKE = ROOT / "tests/gpu"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=default", "-pthread", "-DMER_SIMULATED"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas", "-Werror"]

OUT_OF_MEMORY, ECC_UNCORRECTABLE, LAUNCH_FAILED = 2, 214, 719


@cache
def library() -> Path:
    """The path of the simulated libcuda; skips the test where there is no g++ or the CPU is no x86-64."""
    if os.uname().machine != "x86_64" or shutil.which("g++") is None:
        pytest.skip("the simulated GPU needs g++ and x86-64")
    sources = [*sorted(KERNELS.glob("*.cu")), *sorted(FAKE.glob("*.cpp"))]
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in [*sources, *sorted(KERNELS.glob("*.cuh")), *sorted(FAKE.glob("*.h"))]:
        digest.update(path.name.encode() + path.read_bytes())
    home = Path(tempfile.gettempdir()) / f"mer-fake-cuda-{os.getuid()}-{digest.hexdigest()[:16]}"
    made = home / "libcuda.so.1"
    if made.exists():
        return made
    home.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as work:
        objects = [Path(work) / f"{source.stem}{source.suffix}.o" for source in sources]

        def build(source: Path, target: Path) -> None:
            command = ["g++", *FLAGS, f"-I{FAKE}", f"-I{KERNELS}", "-x", "c++", "-c", source, "-o", target]
            subprocess.run(command, check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(build, sources, objects))
        linked = Path(work) / "libcuda.so.1"
        subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", linked], check=True)
        linked.rename(made)
    return made


class Counts(NamedTuple):
    """What lives now, and what was done since reset()."""

    allocations: int
    bytes: int
    pinned: int
    registered: int
    streams: int
    events: int
    modules: int
    launches: int
    copied_in: int
    copied_out: int
    copies: int
    waits: int


class Simulator:
    """The simulated device's faults, by its library's own functions (see fake_cuda.cpp)."""

    def __init__(self) -> None:
        self.path = Path(DRIVER) if REAL else library()
        if REAL:
            return
        self._lib = ctypes.CDLL(str(self.path))
        for name in ("vram", "taken"):
            getattr(self._lib, f"mer_fake_{name}").argtypes = [ctypes.c_size_t]
        self._lib.mer_fake_fail_alloc.argtypes = [ctypes.c_long]
        self._lib.mer_fake_fail_from.argtypes = [ctypes.c_long, ctypes.c_int]
        self._lib.mer_fake_fail_once.argtypes = [ctypes.c_long, ctypes.c_int]
        self.reset()

    @property
    def lib(self) -> ctypes.CDLL:
        if REAL:
            pytest.skip("a GPU takes no orders")
        return self._lib

    def open(self) -> Device:
        """The device, with the kernels."""
        device = Device(driver=str(self.path))
        device.load(kernels(gpus()[0].target) if REAL else b"any")
        return device

    def reset(self) -> None:
        """No faults, no delays, the default size of memory; allocations stay, but of a lost device."""
        if not REAL:
            self.lib.mer_fake_reset()

    def vram(self, nbytes: int) -> None:
        """The size of the device's memory."""
        self.lib.mer_fake_vram(nbytes)

    def taken(self, nbytes: int) -> None:
        """What another process holds of it."""
        self.lib.mer_fake_taken(nbytes)

    def fail_alloc(self, n: int) -> None:
        """The n-th allocation from now on (1: the next) finds no memory."""
        self.lib.mer_fake_fail_alloc(n)

    def fail_from(self, n: int, error: int = LAUNCH_FAILED) -> None:
        """From the n-th call on (1: the next), every call returns `error`."""
        self.lib.mer_fake_fail_from(n, error)

    def fail_once(self, n: int, error: int = OUT_OF_MEMORY) -> None:
        """The n-th call from now on (1: the next) returns `error`, and the device works on."""
        self.lib.mer_fake_fail_once(n, error)

    def defer(self, yes: bool = True) -> None:
        """Copies and kernels happen no sooner than somebody waits for them."""
        if not REAL:  # nobody can say when it does what
            self.lib.mer_fake_defer(int(yes))

    async def given_back(self, before: Counts) -> None:
        """Until no more lives than before: callbacks of the event loop may hold the last answer."""
        for _ in range(1000):
            now = self.counts()
            if now.allocations <= before.allocations and now.registered <= before.registered:
                return
            await asyncio.sleep(0.01)
        raise AssertionError((before, now))

    def counts(self) -> Counts:
        """Without what only waits to be collected."""
        gc.collect()
        return self.now()

    def now(self) -> Counts:
        """The same, as it is."""
        out = (ctypes.c_long * 12)()
        self.lib.mer_fake_counts(out)
        return Counts(*out)
