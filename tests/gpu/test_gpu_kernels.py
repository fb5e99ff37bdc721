"""The GPU's kernels, run by the simulated device, give the CPU's bytes; and NVRTC compiles them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu_simulator import KERNELS, Simulator
from test_kernels import BLOCK, FORMATS, INTEGER, Bytes, Floats, make

from mer._ext.device import Device
from mer._ext.gpu_mixture import NAMES
from mer._ext.kernels import Kernels, isas

THREADS, ROWS, MANY_ROWS, MANY_TOKENS = 128, 8, 64, 32  # as in mer_gpu.cuh
PRODUCT = np.dtype("u8,u8,u8,u8,i4,i4")
Q8_0 = 8


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator()


@pytest.fixture
def device(simulator: Simulator) -> Iterator[Device]:
    yield simulator.open()
    simulator.reset()


def reference(fmt: int) -> Kernels:
    if fmt in INTEGER:
        return Kernels("scalar")
    if "avx2" not in isas():
        pytest.skip("the order of F32, F16 and BF16 is that of AVX2")
    return Kernels("avx2")


class Memory:
    """Arrays on a device, freed together."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.held: list[int] = []

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        for pointer in self.held:
            self.device.free_py(pointer)

    def room(self, nbytes: int) -> int:
        self.held.append(self.device.alloc_py(nbytes))
        return self.held[-1]

    def put(self, array: np.ndarray, shift: int = 0) -> int:
        """The address of a copy that begins `shift` bytes behind an aligned one."""
        at = self.room(array.nbytes + shift) + shift
        self.device.upload_py(at, np.ascontiguousarray(array))
        return at

    def get(self, pointer: int, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        out = np.empty(shape, dtype)
        self.device.download_py(out, pointer)
        self.device.finish_py()
        return out


def prepared(memory: Memory, fmt: int, x: Floats) -> tuple[int, int]:
    """Activations on the device, as `fmt` wants them, and the bytes from one to the next."""
    acts = reference(fmt).prepare_py(fmt, x) if fmt in INTEGER else x
    stride = -(-acts.shape[1] * acts.itemsize // 64) * 64
    rows = np.zeros((len(x), stride), np.uint8)
    rows[:, : acts.shape[1] * acts.itemsize] = acts.view(np.uint8).reshape(len(x), -1)
    return memory.put(rows), stride


def launch(
    device: Device,
    memory: Memory,
    fmt: int,
    products: list[tuple[int, ...]],
    acts: tuple[int, int],
    rows: int,
    cols: int,
    y_stride: int,
    many: bool = False,
) -> None:
    table = memory.put(np.array(products, PRODUCT))
    arguments = [np.uint64(table), np.int32(len(products)), np.uint64(acts[0]), np.int64(acts[1])]
    arguments += [np.int32(rows), np.int32(cols), np.int64(y_stride)]
    if many:
        most = max(each[-1] for each in products)
        grid = (-(-rows // MANY_ROWS), len(products), -(-most // MANY_TOKENS))
        device.launch_py(f"mer_many_{NAMES[fmt]}", grid, THREADS, arguments)
    else:
        device.launch_py(f"mer_rows_{NAMES[fmt]}", (-(-rows // ROWS), len(products), 1), THREADS, arguments)


def product(device: Device, fmt: int, w: Bytes, x: Floats, shift: int = 0, many: bool = False) -> Floats:
    """One matrix with all of x."""
    rows, cols, n_tok = len(w), x.shape[1], len(x)
    with Memory(device) as memory:
        y = memory.room(4 * rows * n_tok)
        matrix = memory.put(w, shift)
        products = [(matrix, 0, y, 0, 0, n_tok)]
        launch(device, memory, fmt, products, prepared(memory, fmt, x), rows, cols, rows, many)
        return memory.get(y, (n_tok, rows))


def shapes(fmt: int) -> list[tuple[int, int, int]]:
    """(rows, cols, tokens): beside those of one block, spans that end early and late."""
    if BLOCK[fmt] == 1:
        return [(1, 1, 1), (3, 7, 2), (17, 33, 5), (9, 255, 4), (8, 512, 1), (11, 1031, 3)]
    if BLOCK[fmt] == 256:
        return [(1, 256, 1), (3, 256, 9), (17, 768, 5), (8, 2048, 1), (9, 2304, 4), (10, 4352, 2)]
    return [(1, 32, 1), (3, 32, 9), (17, 96, 5), (8, 2048, 1), (9, 2080, 4), (10, 4128, 2)]


@FORMATS
def test_products_have_the_bytes_of_the_cpu(device: Device, fmt: int) -> None:
    for n, (rows, cols, n_tok) in enumerate(shapes(fmt)):
        w, x = make(fmt, rows, cols, n_tok)
        assert product(device, fmt, w, x, n).tobytes() == reference(fmt).matmul_py(fmt, w, x).tobytes()


@FORMATS
def test_products_of_many_tokens_have_the_bytes_of_the_cpu(device: Device, fmt: int) -> None:
    b = 37 if BLOCK[fmt] == 1 else BLOCK[fmt]
    for n, (rows, cols, n_tok) in enumerate([(1, b, 1), (67, b, 34), (17, 9 * b, 8), (66, 5 * b, 3)]):
        w, x = make(fmt, rows, cols, n_tok)
        assert product(device, fmt, w, x, n, True).tobytes() == reference(fmt).matmul_py(fmt, w, x).tobytes()


@FORMATS
def test_weights_at_any_address(device: Device, fmt: int) -> None:
    w, x = make(fmt, 9, 256, 2)
    want = reference(fmt).matmul_py(fmt, w, x).tobytes()
    for shift in range(1, 17):
        assert product(device, fmt, w, x, shift).tobytes() == want


@FORMATS
def test_many_products_of_one_launch(device: Device, fmt: int) -> None:
    """Several matrices of one shape, each with its own tokens, chosen by an index or in a row, and a bias."""
    rows, cols, n_x = 13, 512, 7
    k = reference(fmt)
    x = make(fmt, 1, cols, n_x)[1]
    chosen = [np.array(c, np.int32) for c in ([3], [6, 0, 1, 1, 5], [2, 3, 4])]
    with Memory(device) as memory:
        acts = prepared(memory, fmt, x)
        products, want = [], []
        for n, tokens in enumerate(chosen):
            w = make(fmt, rows, cols, 1, seed=n)[0]
            bias = np.linspace(-1, 1, rows).astype(np.float32) if n != 1 else None
            y = memory.room(4 * 100 * len(tokens))
            index = memory.put(tokens) if n != 2 else 0
            added = memory.put(bias) if bias is not None else 0
            first = 2 if n == 2 else 0
            products.append((memory.put(w, n), added, y, index, first, len(tokens)))
            want.append(k.matmul_py(fmt, w, x[tokens]) + (0 if bias is None else bias))
        launch(device, memory, fmt, products, acts, rows, cols, 100)
        for (_, _, y, _, _, count), each in zip(products, want, strict=True):
            assert memory.get(y, (count, 100))[:, :rows].tobytes() == each.tobytes()


@FORMATS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_activations(device: Device, fmt: int, bad: float) -> None:
    """The same bytes, but where infinities meet: there a CPU's NaN has a sign."""
    w, x = make(fmt, 9, 512, 3)
    x[1, 300] = bad
    got, want = product(device, fmt, w, x), reference(fmt).matmul_py(fmt, w, x)
    assert not np.isfinite(got[1]).any()
    if fmt in INTEGER:
        assert got.tobytes() == want.tobytes()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("fmt", INTEGER)
def test_extreme_weights(device: Device, fmt: int) -> None:
    """Random bytes: scales of every kind (subnormal, huge, infinite, NaN), all codes."""
    rng = np.random.default_rng(fmt)
    w = rng.integers(0, 256, make(fmt, 40, 512, 1)[0].shape, np.uint8)
    x = rng.choice([-1.0, 1.0, 3e-30, 1e25], (3, 512)).astype(np.float32)
    got, want = product(device, fmt, w, x), reference(fmt).matmul_py(fmt, w, x)
    np.testing.assert_array_equal(got.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)])
    assert np.isnan(got[np.isnan(want)]).all()


def test_activations_have_the_bytes_of_the_cpu(device: Device) -> None:
    rng = np.random.default_rng(5)
    for cols in (32, 96, 256, 2080):
        x = (rng.standard_normal((9, cols)) * np.exp(20 * rng.standard_normal((9, 1)))).astype(np.float32)
        x[1, :32] = 0
        x[2] *= 1e-36
        x[3] = np.arange(cols) - cols / 2 + 0.5
        x[3, ::32] = 127
        x[4, 3] = np.finfo(np.float32).max
        x[5], x[6] = 2.0**-101, -(2.0**-99)
        x[7, 7], x[8, 8] = np.nan, -np.inf
        want = Kernels("scalar").prepare_py(Q8_0, x)
        with Memory(device) as memory:
            wide = np.zeros((9, cols + 3), np.float32)
            wide[:, :cols] = x
            acts = memory.put(np.zeros_like(want))
            arguments = [np.uint64(memory.put(wide)), np.int64(cols + 3), np.uint64(acts)]
            arguments += [np.int64(want.shape[1]), np.int32(cols), np.int32(9)]
            device.launch_py("mer_quantise", (-(-cols // THREADS), 5, 1), THREADS, arguments)
            assert memory.get(acts, want.shape, np.uint8).tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", range(3))
def test_gates_have_the_bytes_of_the_cpu(device: Device, kind: int) -> None:
    rng = np.random.default_rng(8)
    gate, up = (rng.standard_normal((2, 3000)) * np.exp(2 * rng.standard_normal((2, 3000)))).astype(
        np.float32
    )
    gate[:9] = [0, -0.0, np.inf, np.nan, -200, 200, -3.4e38, 3.4e38, -np.inf]
    up[9:13] = [np.nan, np.inf, -np.inf, -0.0]
    want = Kernels("scalar").swiglu_py(gate, up, (1.702, 7.0, 1.0) if kind == 2 else None, gelu=kind == 1)
    with Memory(device) as memory:
        h = memory.put(gate)
        arguments = [np.uint64(h), np.uint64(memory.put(up)), np.uint64(h), np.int32(3), np.int32(1000)]
        arguments += [np.int32(kind), np.float32(1.702), np.float32(7), np.float32(1)]
        device.launch_py("mer_activate", (7, 1, 1), THREADS, arguments)
        got = memory.get(h, (3000,))
    real = ~np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[real], want.view(np.uint32)[real])
    assert np.isnan(got[~real]).all()


@pytest.mark.parametrize("kind", range(3))
def test_activated_and_quantised_at_once(device: Device, kind: int) -> None:
    rng = np.random.default_rng(9)
    gate, up = (3 * rng.standard_normal((2, 5, 288))).astype(np.float32)
    gate[1, 40] = np.nan
    k = Kernels("scalar")
    h = k.swiglu_py(gate.ravel(), up.ravel(), (1.702, 7.0, 1.0) if kind == 2 else None, gelu=kind == 1)
    want = k.prepare_py(Q8_0, h.reshape(5, 288))
    with Memory(device) as memory:
        acts = memory.put(np.zeros_like(want))
        arguments = [np.uint64(memory.put(gate)), np.uint64(memory.put(up)), np.uint64(acts)]
        arguments += [np.int64(want.shape[1]), np.int32(5), np.int32(288)]
        arguments += [np.int32(kind), np.float32(1.702), np.float32(7), np.float32(1)]
        device.launch_py("mer_activate_quantise", (3, 2, 1), THREADS, arguments)
        assert memory.get(acts, want.shape, np.uint8).tobytes() == want.tobytes()


def test_the_benchmark_compares_and_reports(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bench import gpu_kernels

    monkeypatch.setenv("MER_CUDA_DRIVER", str(simulator.path))
    report = tmp_path / "report.json"
    sizes = ["--rows", "16", "--cols", "256", "--mib", "1", "--products", "16", "--json", str(report)]
    monkeypatch.setattr("sys.argv", ["gpu_kernels", "--formats", "q8_0,f16", "--tokens", "1,64", *sizes])
    gpu_kernels.main()
    found = [(r["format"], r["kernel"], r["tokens"]) for r in json.loads(report.read_text())["results"]]
    assert found == [(f, k, n) for f in ("q8_0", "f16") for k, n in (("few", 1), ("many", 64))]
    monkeypatch.setattr(gpu_kernels, "ROWS", 16)  # half of the rows are left out
    with pytest.raises(SystemExit, match="8 of 16 numbers"):
        gpu_kernels.main()


def test_nvrtc_compiles_all_kernels() -> None:
    """As one program, without a warning, and with no product and sum fused that the code does not fuse.

    That takes long: for one architecture only, which has all that the code asks for in assembly.
    """
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    text = "".join(f'#include "{path.name}"\n' for path in sorted(KERNELS.glob("*.cu")))
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"mer.cu", 0, [], [])
    options = ["-arch=sm_80", "-std=c++17", "-fmad=false", "--split-compile=0", f"-I{KERNELS}"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [each.encode() for each in options])
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    assert (status.value, bytes(log).strip(b"\0 \n").decode()) == (0, "")
    ptx = bytearray(nvrtc.nvrtcGetPTXSize(program)[1])
    nvrtc.nvrtcGetPTX(program, ptx)
    code = bytes(ptx).decode()
    for kernel in code.split(".entry ")[1:]:
        name = kernel.split("(")[0]
        if not name.startswith(("mer_rows_", "mer_many_", "mer_quantise", "mer_activate")):
            continue
        assert ("fma." in kernel) == (name.split("_")[-1] in ("f32", "f16", "bf16")), name
    assert ".ftz" not in code
    assert "div.approx" not in code
