"""Kernels for one kind of GPU: compiled by NVRTC at run time, and kept on disk.

NVRTC comes with NVIDIA's own packages (`mer[cuda]`). All of `kernels/*.cu` becomes one module, one behind the
other in the order of their names; they can include one another and nothing else. What comes out is machine
code (a cubin) and not PTX: a driver of the same CUDA major version takes it even where NVRTC is of a newer
minor one, while PTX would have to be of a version that the driver knows.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from attrs import frozen

from mer.config import cache_dir
from mer.errors import GpuError

_log = logging.getLogger("mer")

_KERNELS: Final = Path(__file__).parent / "kernels"
# A product is fused with a sum only where the code says so: on every device the same operations.
_OPTIONS: Final = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
# In as many threads as there are processors.
_SPLIT: Final = "--split-compile=0"
_INSTALL: Final = "pip install 'mer[cuda]'"
_INSTALL_12: Final = "what goes with it: pip install 'mer[cuda12]'"
# The first with dp4a.
_LEAST: Final = (6, 1)
_DIGEST: Final = 32


@cache
def _nvrtc() -> ModuleType:
    try:
        return import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise GpuError(f"what compiles kernels for a GPU is not installed ({error}): {_INSTALL}") from None


def _asked(result: tuple[Any, ...], what: str) -> Any:
    """What an NVRTC function returned beside its status. Raises GpuError."""
    status, *rest = result
    if status:
        raise GpuError(f"NVRTC, {what}: {status.name}")
    return rest[0] if rest else None


@cache
def nvrtc_version() -> tuple[int, int]:
    """(13, 5) of CUDA 13.5. Raises GpuError, saying what to install, where NVRTC is not there."""
    nvrtc = _nvrtc()
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the bindings are there and the library is not
        why = str(error).splitlines()[0]
        raise GpuError(
            f"NVRTC, which compiles kernels for a GPU, is not installed ({why}): {_INSTALL}"
        ) from None
    if status:
        raise GpuError(f"NVRTC does not start: {status.name}")
    return major, minor


def sources(folder: Path = _KERNELS) -> dict[str, bytes]:
    """Name -> text of the kernels' files. Raises GpuError where there are none."""
    try:
        found = {
            file.name: file.read_bytes()
            for file in sorted(folder.iterdir())
            if file.suffix in (".cu", ".cuh")
        }
    except OSError as error:
        raise GpuError(f"the kernels' code can't be read: {error}; install mer again") from None
    if not any(name.endswith(".cu") for name in found):
        raise GpuError(f"{folder} has no kernels; install mer again")
    return found


def cuda(driver: int) -> str:
    """13.5 of 13050."""
    return f"{driver // 1000}.{driver % 1000 // 10}"


@frozen
class Target:
    """What kernels are compiled for. driver: its version as it says it, 13000 of CUDA 13.0."""

    capability: tuple[int, int]
    driver: int

    @property
    def architecture(self) -> str:
        """sm_90 of (9, 0)."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


def check(target: Target) -> None:
    """Raises GpuError, with what to do, where what NVRTC makes would not run there."""
    major, minor = nvrtc_version()
    if target.driver // 1000 < major:
        raise GpuError(
            f"the driver is of CUDA {cuda(target.driver)}, and kernels that NVRTC {major}.{minor} makes want "
            f"CUDA {major} or later; install a newer driver" + (f", or {_INSTALL_12}" if major == 13 else "")
        )
    number = 10 * target.capability[0] + target.capability[1]
    if target.capability < _LEAST:
        raise GpuError(
            f"compute capability {number / 10} is too little: kernels want {_LEAST[0]}.{_LEAST[1]}"
        )
    known = _asked(_nvrtc().nvrtcGetSupportedArchs(), "asking for architectures")
    if number not in known:
        newer = "; a newer one may: pip install -U nvidia-cuda-nvrtc" if number > known[-1] else ""
        raise GpuError(
            f"NVRTC {major}.{minor} compiles for compute capability {known[0] / 10} to {known[-1] / 10}, and "
            f"this device has {number / 10}{newer}"
        )


def kernels(target: Target, folder: Path = _KERNELS) -> bytes:
    """The cubin, from the cache or compiled now, which takes some twenty seconds of a processor.

    Raises GpuError where NVRTC is missing or does not know such a device, and for code that does not compile.
    """
    check(target)
    code = sources(folder)
    try:
        file = cache_dir() / "kernels" / f"{target.architecture}-{_key(code, target)}.cubin"
    except OSError as error:  # no home: compiled at each start
        _log.warning("kernels for the GPU are not kept: %s", error)
        return compile_kernels(code, target)
    image = _load(file)
    if image is None:
        begun = time.monotonic()
        image = compile_kernels(code, target)
        _log.info("compiled kernels for %s in %.1f s", target.architecture, time.monotonic() - begun)
        _store(file, image)
    return image


def compile_kernels(code: Mapping[str, bytes], target: Target) -> bytes:
    """A cubin of all the .cu files among `code`. Raises GpuError with what the compiler says."""
    nvrtc = _nvrtc()
    text = "".join(f'#include "{name}"\n' for name in sorted(code) if name.endswith(".cu")).encode()
    names, files = [name.encode() for name in code], list(code.values())
    program = _asked(nvrtc.nvrtcCreateProgram(text, b"mer.cu", len(names), files, names), "making a program")
    try:
        given = (f"--gpu-architecture={target.architecture}", _SPLIT, *_OPTIONS)
        options = [each.encode() for each in given]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status:
            log = bytearray(_asked(nvrtc.nvrtcGetProgramLogSize(program), "asking for its log"))
            _asked(nvrtc.nvrtcGetProgramLog(program, log), "asking for its log")
            said = log.rstrip(b"\0").decode(errors="replace").strip()
            raise GpuError(f"kernels for {target.architecture} do not compile ({status.name}):\n{said}")
        image = bytearray(_asked(nvrtc.nvrtcGetCUBINSize(program), "asking for a cubin"))
        _asked(nvrtc.nvrtcGetCUBIN(program, image), "asking for a cubin")
        return bytes(image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _key(code: Mapping[str, bytes], target: Target) -> str:
    """Of everything that a cubin hangs on, and of the driver that took it."""
    parts = [repr((_OPTIONS, target.architecture, nvrtc_version(), target.driver)).encode()]
    for name, text in sorted(code.items()):
        parts += [name.encode(), text]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _checksum(image: bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=_DIGEST).digest()


def _load(file: Path) -> bytes | None:
    """None: it is not there, or not whole."""
    try:
        kept = file.read_bytes()
    except OSError:
        return None
    image = kept[_DIGEST:]
    return image if image and kept[:_DIGEST] == _checksum(image) else None


def _store(file: Path, image: bytes) -> None:
    """Whole or not at all; where it can't be written, kernels are compiled again at the next start."""
    part: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, part = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".part")
        with os.fdopen(handle, "wb") as out:
            out.write(_checksum(image) + image)
        os.replace(part, file)
    except OSError as error:
        _log.warning("kernels for the GPU are not kept: %s", error)
        if part is not None:
            with suppress(OSError):
                os.unlink(part)
