"""Which GPUs there are, what is said where there are none, and what an engine's settings make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_drivers import FREE, TOTAL, build

from mer.cli.doctor import doctor
from mer.config import EngineConfig
from mer.errors import BudgetError, ConfigError, GpuError
from mer.gpu import open_device, probe, vram_budget
from mer.gpu.opening import chosen


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(**says: Any) -> str:
        library = build(tmp_path, **says)
        monkeypatch.setenv("MER_CUDA_DRIVER", library)
        return library

    return make


def test_what_a_driver_says(driver: Any) -> None:
    driver(COUNT=2)
    first, second = probe.gpus()
    assert (first.ordinal, first.name, first.capability, first.total) == (0, "Fake GPU 0", (9, 0), TOTAL)
    assert (second.ordinal, second.name, second.driver) == (1, "Fake GPU 1", 13000)
    assert first.refusal is None
    assert probe.load(first) == probe.Load(FREE, (64 << 20) / 4e-3)


def test_a_bus_that_can_not_be_measured(driver: Any) -> None:
    driver(PIN=1)
    assert probe.load(probe.gpus()[0]) == probe.Load(FREE, None)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"INIT": 100}, "knows no device"),
        ({"COUNT": 0}, "knows no device"),
        ({"INIT": 999}, r"does not start: broken \(999\)"),
    ],
)
def test_a_driver_without_a_device(driver: Any, says: dict[str, int], words: str) -> None:
    driver(**says)
    with pytest.raises(GpuError, match=words):
        probe.gpus()


def test_devices_that_the_environment_hides(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    driver(INIT=100)
    with pytest.raises(GpuError, match="CUDA_VISIBLE_DEVICES=7"):
        probe.gpus()


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MER_CUDA_DRIVER", str(tmp_path / "libcuda.so.1"))
    with pytest.raises(GpuError, match=r"no NVIDIA driver.*libcuda\.so\.1"):
        probe.gpus()


def test_a_library_that_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MER_CUDA_DRIVER", "libc.so.6")
    with pytest.raises(GpuError, match=r"libc\.so\.6 is no driver.*cuInit"):
        probe.gpus()


def test_a_driver_from_before_what_is_needed(driver: Any) -> None:
    driver(alone=True)
    assert len(probe.gpus()) == 1
    with pytest.raises(ConfigError, match=r"device cuda: the driver is too old: it has no cu"):
        open_device(EngineConfig(device="cuda"))
    assert open_device(EngineConfig()) is None


def test_the_device_that_is_asked_for(driver: Any) -> None:
    driver(COUNT=2)
    opened = {
        name: open_device(EngineConfig(device=name)) for name in ("auto", "cuda", "cuda:0", "cuda:1", "cpu")
    }
    assert {name: device and device.name for name, device in opened.items()} == {
        "auto": "Fake GPU 0",
        "cuda": "Fake GPU 0",
        "cuda:0": "Fake GPU 0",
        "cuda:1": "Fake GPU 1",
        "cpu": None,
    }
    with pytest.raises(ConfigError, match=r"device cuda:2: .*cuda:0 \(Fake GPU 0\), cuda:1 \(Fake GPU 1\)"):
        open_device(EngineConfig(device="cuda:2"))


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"INIT": 100}, "device cuda: the NVIDIA driver knows no device"),
        ({"CONTEXT": 2}, "device cuda: device 0 can't be used: out of memory"),
        ({"IMAGE": "something else"}, "device cuda: device 0 .*loading kernels"),
    ],
)
def test_auto_is_the_cpu_where_cuda_is_an_error(driver: Any, says: dict[str, Any], words: str) -> None:
    driver(**says)
    assert open_device(EngineConfig(device="auto")) is None
    with pytest.raises(ConfigError, match=words):
        open_device(EngineConfig(device="cuda"))


@pytest.mark.parametrize(
    ("says", "packages", "refusal"),
    [
        ({}, (13, 5), None),
        ({"VERSION": 14020}, (13, 5), None),
        ({"VERSION": 12080}, (13, 5), r"of CUDA 12\.8.*NVRTC 13\.5.*newer driver.*mer\[cuda12\]"),
        ({"VERSION": 12080}, (12, 9), None),
        ({"MAJOR": 6}, (13, 5), r"compute capability 6\.0 is too little"),
        ({"MAJOR": 7}, (13, 5), r"NVRTC 13\.5 compiles for .* 7\.5 to 9\.0, and this device has 7\.0$"),
        ({"MAJOR": 13}, (13, 5), r"this device has 13\.0; a newer one may: pip"),
        ({}, None, r"not installed.*pip install 'mer\[cuda\]'"),
    ],
)
def test_what_can_be_compiled_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: Any, packages: Any, refusal: str | None
) -> None:
    from mer.gpu import compile as compiling

    class Bindings:
        @staticmethod
        def nvrtcVersion() -> tuple[int, int, int]:  # noqa: N802
            return (0, *packages)

        @staticmethod
        def nvrtcGetSupportedArchs() -> tuple[int, list[int]]:  # noqa: N802
            return 0, [75, 80, 90]

    def imported(name: str) -> type[Bindings]:
        if packages is None:
            raise ImportError(f"No module named {name!r}")
        return Bindings

    library = build(tmp_path, **says)
    monkeypatch.setattr(probe, "DRIVER", library)
    monkeypatch.setattr(compiling, "import_module", imported)
    for each in (compiling._nvrtc, compiling.nvrtc_version):
        each.cache_clear()
    try:
        (gpu,) = probe.gpus()
        if refusal is None:
            assert gpu.refusal is None
            assert chosen("cuda") == gpu
            return
        with pytest.raises(GpuError, match=refusal):
            chosen("cuda")
        assert open_device(EngineConfig()) is None
    finally:
        for each in (compiling._nvrtc, compiling.nvrtc_version):
            each.cache_clear()


def test_without_a_driver_no_package_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from mer.gpu import open_device; from mer.config import EngineConfig\n"
        "assert open_device(EngineConfig()) is None\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('cuda', 'nvidia')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"MER_CUDA_DRIVER": str(tmp_path / "none")} | _path(), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def _path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path)}


def test_how_much_memory(driver: Any) -> None:
    driver(FREE=3 << 30)
    device = open_device(EngineConfig())
    assert device is not None
    assert vram_budget(device, EngineConfig()) == (3 << 30) - (512 << 20)
    assert vram_budget(device, EngineConfig(vram="1GiB")) == 1 << 30
    with pytest.raises(BudgetError, match=r"vram 4,096 MiB: of Fake GPU 0's 8,192 MiB, 3,072 MiB are free"):
        vram_budget(device, EngineConfig(vram="4GiB"))


@pytest.mark.parametrize(("free", "left"), [(40 << 30, 36 << 30), (400 << 20, 0)])
def test_the_margin(driver: Any, free: int, left: int) -> None:
    driver(FREE=free)
    device = open_device(EngineConfig())
    assert device is not None
    assert vram_budget(device, EngineConfig()) == pytest.approx(left, abs=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "gpu"}, "device 'gpu' is unknown.*cuda:N"),
        ({"device": "cuda:x"}, "cuda:N"),
        ({"device": 0}, "cuda:N"),
        ({"vram": "0"}, "set device to cpu"),
        ({"vram": 0}, "set device to cpu"),
        ({"vram": "0GiB"}, "set device to cpu"),
        ({"vram": "lots"}, "'lots' is not a size"),
        ({"device": "cpu", "vram": "1GiB"}, "leave one of the two out"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**settings)


@pytest.fixture
def quick_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    from mer.streaming import probe as disk

    monkeypatch.setattr(disk, "FILE_BYTES", 64 << 20)
    monkeypatch.setattr(disk.probe, "__kwdefaults__", disk.probe.__kwdefaults__ | {"seconds": 0.02})


def asked(path: Path, *options: str) -> str:
    done = CliRunner().invoke(doctor, [str(path), "--block", "4096", *options])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.mark.usefixtures("quick_doctor")
def test_doctor_with_gpus(driver: Any, tmp_path: Path) -> None:
    driver(COUNT=2)
    facts = json.loads(asked(tmp_path, "--json"))
    first, second = facts["gpu"]["devices"]
    assert facts["gpu"]["why"] is None
    assert first == {
        "ordinal": 0, "name": "Fake GPU 0", "capability": [9, 0], "total": TOTAL, "driver": 13000,
        "refusal": None, "free": FREE, "bus_bytes_per_second": (64 << 20) / 4e-3,
    }  # fmt: skip
    assert second["name"] == "Fake GPU 1"
    used = facts["uses"]["gpu"]
    assert (used["device"], used["why"], used["vram"]) == ("cuda:0", "Fake GPU 0", pytest.approx(0.9 * FREE))
    text = " ".join(asked(tmp_path).replace("│", " ").split())
    assert (
        "cuda:0: Fake GPU 0, 9.0, 8.0 GiB (6.0 GiB free), 16.78 GB/s over the bus, driver of CUDA 13.0"
        in text
    )
    assert "cuda:1: Fake GPU 1" in text
    assert "GPU Fake GPU 0, 5.4 GiB of its memory" in text


@pytest.mark.usefixtures("quick_doctor")
def test_doctor_with_a_gpu_that_is_taken(driver: Any, tmp_path: Path) -> None:
    driver(CONTEXT=2)
    facts = json.loads(asked(tmp_path, "--json"))
    assert facts["gpu"]["devices"][0]["refusal"] == "device 0 can't be used: out of memory"
    assert facts["uses"]["gpu"]["device"] == "cpu"
    text = " ".join(asked(tmp_path).replace("│", " ").split())
    assert "8.0 GiB; can't be used: device 0 can't be used: out of memory" in text
    assert "GPU none: Fake GPU 0: device 0 can't be used" in text


@pytest.mark.usefixtures("quick_doctor")
def test_doctor_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MER_CUDA_DRIVER", str(tmp_path / "libcuda.so.1"))
    facts = json.loads(asked(tmp_path, "--json"))
    assert facts["gpu"]["devices"] == []
    assert "no NVIDIA driver" in facts["gpu"]["why"]
    assert facts["uses"]["gpu"] == {"device": "cpu", "why": facts["gpu"]["why"], "vram": 0}
    assert "GPU      none: there is no NVIDIA driver here" in asked(tmp_path)
