"""bench.gpu: its ceiling by hand, its table, and what it takes from llama.cpp's llama-bench."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from test_bench_tools import SMALL, nothing

from bench import compare, gpu, gpu_check, gpu_peer
from bench.make_model import write_store
from bench.shapes import model_config
from bench.synthetic import Weights
from mer.weights import formats

SHAPE = SimpleNamespace(dense_bytes=200, experts_bytes=1000)
HAVE = gpu.Bandwidths(gpu=1000, to_gpu=50, from_gpu=50, memory=100, disk=10)


@pytest.mark.parametrize(
    ("per", "seconds"),
    [
        # dense 2 s; then 500 bytes on the GPU (0.5 s) beside 500 here (5 s)
        ({"vram_share": 0.5, "bus": 0, "missed": 0}, 2 + 5),
        # dense 2 s; then all of them on the GPU
        ({"vram_share": 1.0, "bus": 0, "missed": 0}, 2 + 1),
        ({"vram_share": 1.0, "bus": 400, "missed": 0}, 8),
        ({"vram_share": 0.5, "bus": 0, "missed": 90}, 9),
    ],
)
def test_the_ceiling_is_the_slowest_of_what_happens_at_once(per: dict[str, float], seconds: float) -> None:
    assert gpu.ceiling(SHAPE, {}, per, HAVE) == pytest.approx(1 / seconds)  # type: ignore[arg-type]
    if not per["bus"] and not per["missed"]:  # a half of what is dense goes there: 0.1 and 1 s, not 2
        half = gpu.ceiling(SHAPE, {"dense_share": 0.5}, per, HAVE)  # type: ignore[arg-type]
        assert half == pytest.approx(1 / (seconds - 2 + 1.1))


@pytest.mark.parametrize(("vram", "left"), [(0, 12), (70, 12), (100, 12), (139, 9), (140, 8), (1000, 0)])
def test_llama_cpp_leaves_the_processor_what_does_not_fit(vram: int, left: int) -> None:
    assert gpu_peer.cpu_layers(12, 100, 10, vram) == left


def test_what_llama_bench_prints() -> None:
    common = {"build_number": 7, "build_commit": "abc", "gpu_info": "Card 1"}
    runs = [{"n_prompt": 512, "n_gen": 0, "avg_ts": 100.5}, {"n_prompt": 0, "n_gen": 128, "avg_ts": 20.25}]
    found = gpu_peer.read(json.dumps([common | run for run in runs]))
    assert found == {"prefill": 100.5, "decode": 20.25, "build": "7 abc", "gpu": "Card 1"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "store"
    config = model_config("qwen3-30b-a3b", 3, vocab_size=600, hidden_size=256, **SMALL["qwen3-30b-a3b"])
    write_store(config, Weights(config, formats.by_name("q4_0"), formats.Q8_0), path, nothing)
    return path


def test_every_run_is_measured_and_compared(store, tmp_path, monkeypatch) -> None:
    sizes = [
        "--prompt",
        "32",
        "--decode",
        "8",
        "--warm",
        "16",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "j"),
    ]
    arguments = [str(store), "--device", "cpu", "--vram", "none", *sizes]
    monkeypatch.setattr(gpu, "DEPTH", 2)
    done = CliRunner().invoke(gpu.main, arguments)
    assert done.exit_code == 0, done.output
    runs = json.loads((tmp_path / "j").read_text())["shapes"][0]["runs"]
    assert [(run["experts"], run["same"]) for run in runs] == [("25", True), ("100", True)]
    half, whole = (run["per_token"] for run in runs)
    assert half["missed"] > whole["missed"]
    for per in half, whole:
        assert per["memory_share"] + per["disk_share"] == pytest.approx(1)
    # other weights, and so other bits
    other = {"drawn": [[1], []]} | runs[0]["found"]
    given = iter([runs[0]["found"], other | {"drawn": 0}])
    monkeypatch.setattr(gpu.gpu_engine, "measure", lambda *_, **__: next(given))
    refused = CliRunner().invoke(gpu.main, arguments)
    assert refused.exit_code == 1
    assert "differs between runs" in refused.output


def test_so_much_of_a_gpu(store) -> None:
    """A part of what the whole model would have; its head is all there."""
    shape = gpu.Shape(store)
    head, share = shape.model.head, 3 / 48
    shape.share = share
    assert shape.vram("4") == int(head + (4e9 - head) * share)
    assert shape.vram("4GiB") == int(head + ((4 << 30) - head) * share)


def test_compare_has_rows_with_a_gpu(store, tmp_path, monkeypatch) -> None:
    """They are those of bench.gpu, for the same shares of the experts."""
    mine = {"prefill": 1.0, "decode": 1.0, "read_per_token": 1.0, "hit_rate": 1.0, "peak": 1, "tokens": []}
    mine["prefill_read"] = 1.0
    mine["steady"] = {"filled_after": 3, "decode_tokens_per_s": 2.0, "read_per_token": 6.0}
    monkeypatch.setattr(compare, "run_mer", lambda *_: mine)
    ceilings = compare.ceilings.Ceilings(1, 2.0, 1.0, 4096, 1, 3.0, 1.0)
    monkeypatch.setattr(compare.ceilings, "measure", lambda *_, **__: ceilings)
    monkeypatch.setattr(gpu, "card", lambda device: ("Card 1", {"memory": 1e12, "to_device": 5e10}))
    monkeypatch.setattr(gpu, "measure", lambda *_: HAVE)
    timings = {"hits": 1, "misses": 1, "vram_hits": 2, "bus_bytes": 0, "bytes_read": 0}
    timings |= {"decode_tokens_per_s": 5.0, "prefill_tokens_per_s": 7.0}
    found = {name: {"timings": timings} for name in ("decode", "prefill")} | {"drawn": 1, "vram": None}
    asked = []

    def measured(path, seconds, **options):
        asked.append(options)
        return found | {"drawn": len(asked) // 4}

    monkeypatch.setattr(gpu.gpu_engine, "measure", measured)
    gguf = tmp_path / "x.gguf"
    gguf.touch()
    arguments = [str(store), str(gguf), "--shares", "25,100", "--rounds", "1", "--json", str(tmp_path / "j")]
    arguments += ["--device", "cuda:1", "--vram", "none,4GiB"]
    done = CliRunner().invoke(compare.main, arguments)
    assert "Card 1" in done.output
    assert gpu.DIFFER in done.output  # of the last
    assert done.exit_code == 1
    assert re.search(r"once full .* 2\.00 ", done.output)
    report = json.loads((tmp_path / "j").read_text())
    runs = [(run["vram_gb"], run["experts"], run["same"]) for run in report["gpu"]["runs"]]
    assert runs == [("none", "25", True), ("4GiB", "25", True), ("none", "100", True), ("4GiB", "100", False)]
    assert [(a["device"], a["cache_experts"]) for a in asked[:2]] == [("cpu", "25%"), ("cuda:1", "25%")]
    monkeypatch.setattr(gpu, "card", lambda device: ("no GPU", {}))
    refused = CliRunner().invoke(compare.main, arguments)
    assert "there is no GPU that can be used" in refused.output


def test_a_check_goes_on_when_a_part_fails(tmp_path: Path) -> None:
    def part(name: str, code: str, seconds: float = 60, **more: object) -> gpu_check.Part:
        path = tmp_path / f"{name}_part.py"
        path.write_text(code)
        return gpu_check.Part(name, "", [path.stem], seconds, env={"PYTHONPATH": str(tmp_path)}, **more)

    (report := tmp_path / "report.json").write_text('{"n": 1}')
    wanted = [
        part("good", "print('first'); print('last')"),
        part("bad", "raise SystemExit('why')"),
        part("child", "", needs="bad"),
        part("slow", "import subprocess; subprocess.run(['sleep', '600'])", 0.5),
        part("told", "", report=report, told=lambda found: f"n is {found['n']}"),
        part("half", "", report=tmp_path / "none.json"),
    ]
    seen: list[int] = []
    outcomes = gpu_check.run_all(wanted, 600, tmp_path, lambda some: seen.append(len(some)))
    states = ["done", "failed (1)", "not tried, for want of bad", "took longer than 0.5 s", "done", "done"]
    assert [each.state for each in outcomes] == states
    assert [each.told for each in outcomes][:2] == ["last", "why"]
    assert outcomes[4].told == "n is 1"
    assert "none.json" in outcomes[5].told
    assert seen == [1, 2, 3, 4, 5, 6]
    (late,) = gpu_check.run_all(wanted[:1], 0, tmp_path, lambda some: None)
    assert late.state == "no time was left"
