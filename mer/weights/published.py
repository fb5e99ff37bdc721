"""Weights quantised as models are published: codes beside their scales, in tensors of their own.

    F8_E4M3    NAME.weight with NAME.weight_scale_inv or, in DeepSeek-V4's files, NAME.scale: one number for
               each block of weight_block_size; or NAME.weight_scale (compressed-tensors): one for each row,
               block or matrix. A number is multiplied by its scale.
    MXFP4      NAME.weight, I8 [rows, cols / 2], with NAME.scale, F8_E8M0 [rows, cols / 32]: DeepSeek-V4's
               experts. Two neighbours are one byte, the first in its low half.
    INT4       NAME.weight_packed, I32 [rows, cols / 8], with NAME.weight_scale [rows, groups]: as
               Kimi-K2-Thinking is (compressed-tensors, pack-quantized). Code + 8 in four bits, the first in
               the lowest. That is Q4_0 with a scale that may not fit F16.

`mer convert` turns all of it to what the kernels multiply; codes and scales of MXFP4 and INT4 are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from attrs import evolve

from mer.errors import CheckpointError, UnsupportedModelError
from mer.weights.extents import Scales, SplitBlocks
from mer.weights.formats import F8_E4M3, F8_E8M0, INTEGERS, MXFP4, Q4_0
from mer.weights.tensors import TensorInfo

_READ: Final = (
    "mer reads BF16, F16, F32, FP8, MXFP4, and of compressed-tensors float-quantized (FP8) and "
    "pack-quantized (INT4): take the model's original weights, or a GGUF of it"
)
# By format of compressed-tensors: type and num_bits.
_GROUPS: Final = {"float-quantized": ("float", 8), "pack-quantized": ("int", 4)}
# DeepSeek's, where config.json does not say.
_FP8_BLOCK: Final = (128, 128)
# What the scales beside NAME.weight are called: NAME and one of these.
_SCALE_NAMES: Final = ("weight_scale", "scale")


def check(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where config.json says that weights are stored as mer can't read them."""
    quantisation = config.get("quantization_config")
    if not isinstance(quantisation, dict):
        return
    method = quantisation.get("quant_method")
    if method == "compressed-tensors":
        _check_groups(path, quantisation)
    elif method not in (None, "fp8", "mxfp4"):
        raise _refused(path, f"the weights are quantised by {method!r}")


def _refused(path: Path, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{path / 'config.json'}: {what}; {_READ}")


def _check_groups(path: Path, quantisation: Mapping[str, Any]) -> None:
    """compressed-tensors: what each group of matrices is quantised to."""
    groups = quantisation.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(each, dict) for each in groups.values()):
        raise CheckpointError(f"{path / 'config.json'}: config_groups is {groups!r}, it must be an object")
    for name, group in groups.items():
        what = f"{name} of compressed-tensors has"
        form, weights = group.get("format") or quantisation.get("format"), group.get("weights")
        if form not in _GROUPS or not isinstance(weights, dict):
            raise _refused(path, f"{what} the format {form!r}")
        kind, bits = _GROUPS[form]
        for key, value in ("type", kind), ("num_bits", bits), ("symmetric", True):
            if weights.get(key) != value:
                raise _refused(
                    path, f"{what} {key} {weights.get(key)!r}, {form} is read with {value!r} alone"
                )
        if weights.get("actorder") == "group":
            raise _refused(path, f"{what} columns in another order (actorder 'group')")


def attach(path: Path, config: Mapping[str, Any], files: list[Path], tensors: dict[str, TensorInfo]) -> None:
    """Tell each quantised matrix where its scales are, and what it holds. Raises CheckpointError."""
    block = _block(path, config)
    for name, info in list(tensors.items()):
        if name.endswith(".weight_packed"):
            _attach_int4(files, tensors, name)
        elif len(info.shape) == 2 and info.weights is F8_E4M3:
            tensors[name] = _with_scales(files, tensors, info, block)
        elif len(info.shape) == 2 and info.dtype == "I8":
            tensors[name] = _mxfp4(files, tensors, info)


def _block(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    quantisation = config.get("quantization_config")
    given = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    if given is None:
        return _FP8_BLOCK
    if not (isinstance(given, list) and len(given) == 2 and all(type(n) is int and n > 0 for n in given)):
        raise CheckpointError(f"{path / 'config.json'}: weight_block_size is {given!r}, it must be two sizes")
    return given[0], given[1]


def _scale_of(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo | None:
    """The scales beside `name`; also NAME_scale_inv where that is no NAME.weight."""
    base = name.removesuffix("weight")
    names = [f"{name}_scale_inv", *(base + each for each in _SCALE_NAMES if base != name)]
    return next((tensors[each] for each in names if each in tensors), None)


def _with_scales(
    files: list[Path], tensors: Mapping[str, TensorInfo], info: TensorInfo, block: tuple[int, int]
) -> TensorInfo:
    scale = _scale_of(tensors, info.name)
    if scale is None:
        return info  # whoever reads it is told
    rows, cols = info.shape
    shape = scale.shape
    if scale.name.endswith("weight_scale"):  # one of the matrix, or of each row, or as the others have them
        if shape in ((), (1,), (1, 1)):
            block, shape = (rows, cols), (1, 1)
        elif shape in ((rows,), (rows, 1)):
            block, shape = (1, cols), (rows, 1)
    wanted = -(-rows // block[0]), -(-cols // block[1])
    if shape != wanted or scale.format.block != 1 or scale.format in INTEGERS:
        raise CheckpointError(
            f"{files[scale.file]}: tensor {scale.name} is {scale.dtype} {list(scale.shape)}; "
            f"for blocks of {block[0]} x {block[1]} of {list(info.shape)} it must be F32 {list(wanted)}"
        )
    return evolve(info, scales=Scales(scale.file, scale.offset, scale.format, *wanted, *block))


def _mxfp4(files: list[Path], tensors: Mapping[str, TensorInfo], info: TensorInfo) -> TensorInfo:
    scale = _scale_of(tensors, info.name)
    if scale is None or scale.weights is not F8_E8M0:
        return info  # whoever wants it is told that I8 holds no weights
    rows, cols = info.shape[0], 2 * info.shape[1]
    if cols % 32 or scale.shape != (rows, cols // 32):
        raise CheckpointError(
            f"{files[scale.file]}: tensor {scale.name} has shape {list(scale.shape)}; beside {info.name} "
            f"{list(info.shape)}, two codes a byte, it must be {[rows, cols // 32]}, one for each 32 codes"
        )
    layout = SplitBlocks(scale.file, scale.offset, 0, 1, scale.format, cols // 32)
    return evolve(info, shape=(rows, cols), weights=MXFP4, layout=layout)


def _attach_int4(files: list[Path], tensors: dict[str, TensorInfo], packed: str) -> None:
    """NAME.weight in the place of NAME.weight_packed."""
    base = packed.removesuffix("_packed")
    info, scale = tensors.pop(packed), tensors.get(f"{base}_scale")
    tensors.pop(f"{base}_shape", None)
    where = f"{files[info.file]}: tensor {packed}"
    for more in "zero_point", "g_idx":
        if f"{base}_{more}" in tensors:
            raise UnsupportedModelError(f"{where} has a {base}_{more}, which is not supported; {_READ}")
    if info.dtype != "I32" or len(info.shape) != 2:
        raise UnsupportedModelError(
            f"{where} is {info.dtype} {list(info.shape)}, not I32 [rows, cols / 8]; {_READ}"
        )
    rows, cols = info.shape[0], 8 * info.shape[1]
    if scale is None or scale.format.block != 1 or len(scale.shape) != 2 or scale.shape[0] != rows:
        found = "missing" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise CheckpointError(
            f"{where} {list(info.shape)}: {base}_scale is {found}, it must be [{rows}, groups]"
        )
    groups = scale.shape[1]
    if groups == 0 or cols % groups or cols // groups % 32:
        raise UnsupportedModelError(
            f"{where}: {cols} columns have {groups} scales, mer reads groups of 32, 64, 96 ... alone; {_READ}"
        )
    layout = SplitBlocks(scale.file, scale.offset, 0, 1, scale.format, groups)
    tensors[base] = evolve(info, name=base, shape=(rows, cols), weights=Q4_0, layout=layout)
