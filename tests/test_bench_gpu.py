"""bench.gpu: its ceiling by hand, its table, and what it takes from llama.cpp's llama-bench."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from test_bench_tools import SMALL, nothing

from bench import gpu, gpu_peer
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


def test_every_run_is_measured_and_compared(tmp_path, monkeypatch) -> None:
    config = model_config("qwen3-30b-a3b", 3, vocab_size=600, hidden_size=256, **SMALL["qwen3-30b-a3b"])
    write_store(config, Weights(config, formats.by_name("q4_0"), formats.Q8_0), tmp_path / "store", nothing)
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
    arguments = [str(tmp_path / "store"), "--device", "cpu", "--vram", "none", *sizes]
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
