"""The decoder's dense part on a simulated GPU: the logits are, byte for byte, those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_models import convert_to, prompt
from family_cases import CASES
from gpu_simulator import Simulator
from harness import Runner
from make_checkpoints import make

from mer._ext.device import Device
from mer.model import device_scratch
from mer.model.placement import Placement, refusal

# Of each what it alone has: windows, sinks, norms, biases, shared experts, gates, scales, caps, plain layers.
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "gemma4_text", "phimoe", "minimax_m2"]
FAMILIES += ["granitemoeshared", "hunyuan_v1_moe", "glm4_moe", "llama", "ernie4_5_moe", "flex_olmo"]
FAMILIES += ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"]

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator()


@pytest.fixture
def device(simulator: Simulator) -> Iterator[Device]:
    yield simulator.open()
    simulator.reset()


def write(path: Path, family: str, dense: str | None = None, **changes: object) -> Path:
    make(path / "model", family, **changes)
    return convert_to(path / "model", path / "store", None, dense)


def steps(runner: Runner) -> bytes:
    """A prompt in chunks, another one beside it, single tokens of three in a batch: all logits."""
    found = [runner.step({0: prompt(43)}), runner.step({0: prompt(19, 1), 1: prompt(10, 2), 2: prompt(1, 3)})]
    found += [runner.step({i: prompt(1, 4 + i) for i in (2, 0, 1)}) for _ in range(2)]
    found += [runner.step({1: prompt(9, 8)}, rows=[8, 2])]
    return b"".join(rows.tobytes() for step in found for _, rows in sorted(step.items()))


def check(path: Path, device: Device, layers: int, head: bool = False, **settings: object) -> None:
    """The CPU alone and with the device, that must have had work, give the same."""
    # The order of F32, F16 and BF16 is that of AVX2.
    settings = {"isa": "avx2", "n_blocks": 24, "max_tokens": 48} | settings
    expected = steps(Runner(path, **settings))
    assert np.isfinite(np.frombuffer(expected, np.float32)).all()
    runner = Runner(path, device=device, placement=Placement(layers, head), **settings)
    assert not any("q" in weights for weights in runner.model.dense.layers[:layers])  # no RAM is taken
    assert steps(runner) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, device, simulator, family):
    path = write(tmp_path, family, num_hidden_layers=2)
    check(path, device, 2, head=True)
    assert simulator.counts().launches > 100


@pytest.mark.parametrize("family", ["qwen2_moe", "llama"])
def test_nothing_happens_before_it_is_waited_for(tmp_path, device, simulator, family):
    simulator.defer()
    check(write(tmp_path, family, num_hidden_layers=2), device, 2, head=True)


@pytest.mark.parametrize(("layers", "head"), [(1, False), (2, False), (3, False), (3, True)])
def test_some_layers(tmp_path, device, layers, head):
    check(write(tmp_path, "qwen2_moe"), device, layers, head)


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_rounded_keys_and_values(tmp_path, device, family, kv):
    check(write(tmp_path, family, num_hidden_layers=2), device, 2, True, kv_dtype=kv)


@pytest.mark.parametrize("dense", ["q8_0", "q4_0"])
def test_quantised_matrices(tmp_path, device, dense):
    check(write(tmp_path, "qwen2_moe", dense, num_hidden_layers=2), device, 2, True)


# With rows that quantised matrices can have.
LATENT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
}


@pytest.mark.parametrize(("dense", "kv"), [(None, "f16"), (None, "q8_0"), ("q8_0", "f32")])
def test_latents(tmp_path, device, dense, kv):
    changes = LATENT if dense else {}
    check(write(tmp_path, "deepseek_v3", dense, **changes), device, 3, True, kv_dtype=kv)


@pytest.mark.parametrize("case", ["lite", "scaled", "odd"])
def test_kinds_of_latent_attention(tmp_path, device, monkeypatch, case):
    """Queries of the hidden state itself, biases and a tied head, odd numbers; a few queries at a time."""
    monkeypatch.setattr(device_scratch, "_SCORES", 1)
    make(tmp_path / "model", "deepseek_v2", **CASES["deepseek_v2"][case])
    check(tmp_path / "model", device, 3, head=True)


def test_long_context(tmp_path, device, monkeypatch):
    """Of several rounds of maxima, and of more queries than their scores have room for."""
    path = write(tmp_path, "llama", **SMALL)
    monkeypatch.setattr(device_scratch, "_SCORES", 1)
    found = []
    for placement in (Placement(), Placement(1, True)):
        runner = Runner(path, isa="avx2", n_blocks=150, max_tokens=800, device=device, placement=placement)
        for _ in range(3):
            runner.step({0: prompt(700)}, rows=[0])
        found.append(runner.step({0: prompt(5)})[0].tobytes())
    assert found[0] == found[1]


def test_who_stays_on_the_cpu(tmp_path):
    for family in ("deepseek_v3", "deepseek_v32", "qwen3_next", "llama"):
        make(tmp_path / family, family)
    assert "DSA" in refusal(Runner(tmp_path / "deepseek_v32").spec)
    assert refusal(Runner(tmp_path / "qwen3_next").spec) is None
    assert refusal(Runner(tmp_path / "llama").spec) is None
    assert refusal(Runner(tmp_path / "deepseek_v3").spec) is None
