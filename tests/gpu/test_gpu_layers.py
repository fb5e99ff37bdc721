"""Dense layers on a (simulated) GPU: which, what they take, and that no answer depends on them."""

from __future__ import annotations

import json

import pytest
from attrs import evolve
from click.testing import CliRunner
from engine_models import GREEDY, Logits, convert_to, opened, prompt, write_text_model
from oracle.make_checkpoints import make

from mer import Engine
from mer._ext.gpu_decoder import layer_arrays
from mer._ext.uring import Reader
from mer.cli import hit_rates
from mer.cli.doctor import doctor
from mer.config import EngineConfig
from mer.engine import budget as budgets
from mer.engine.placing import choose
from mer.engine.runner import Runner
from mer.errors import BudgetError, ConfigError
from mer.model.dense import device_bytes, load_dense
from mer.model.families import load
from mer.model.placement import ON_THE_CPU, Placement
from mer.model.spec import ClampSpec
from mer.streaming import probe as disk
from mer.streaming.experts import expert_tables
from mer.weights.checkpoint import open_checkpoint

PROMPTS = [prompt(40, vocab=300), prompt(9, 1, 211)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("layers") / "model")


def chosen(path, vram, **settings):
    """(Placement, bytes) of that much memory."""
    checkpoint = open_checkpoint(path)
    architecture, config = load(checkpoint), EngineConfig(context=64, step_tokens=16, **settings)
    tables = expert_tables(architecture.experts, path)
    sizes = budgets.measure(checkpoint, architecture, tables, config)
    return choose(checkpoint, architecture, tables, sizes, config, vram)


@pytest.mark.parametrize("layers", [0, 1, "auto"])
async def test_an_engine_with_layers_there(model, simulator, monkeypatch, layers):
    logits = Logits(monkeypatch)
    rows, kv = [], []
    for settings in ({"device": "cpu"}, {"device": "cuda", "vram": "200MiB", "gpu_layers": layers}):
        async with opened(model, context=64, step_tokens=16, max_running=2, **settings) as engine:
            for ids in PROMPTS:
                await engine.generate(ids, evolve(GREEDY, max_tokens=3))
                rows.append(logits.take(ids))
            placement = engine._runner.placement
            kv.append(engine._runner.budget.kv)
    assert rows[:2] == rows[2:]
    assert placement == {0: ON_THE_CPU, 1: Placement(1), "auto": Placement(2, True)}[layers]
    assert kv[1] == kv[0] * (2 - placement.layers) // 2


def test_as_many_as_there_is_room_for(model):
    everything, taken = chosen(model, 1 << 30)
    assert everything == Placement(2, True)
    counts = [chosen(model, taken * 2 * i // 12) for i in range(13)]
    sizes = [placement.layers + placement.head for placement, _ in counts]
    assert sizes == sorted(sizes)
    assert set(sizes) == {0, 1, 2, 3}
    assert all(used <= taken * 2 * i // 12 for i, (_, used) in enumerate(counts))
    # Who asks for a number gets it, without room for experts, or is told what it takes.
    assert chosen(model, taken, gpu_layers=99) == (everything, taken)
    with pytest.raises(BudgetError, match=r"gpu_layers 3: .* MiB of the GPU's memory, and .* may be used"):
        chosen(model, taken - 1, gpu_layers=3)
    assert chosen(model, 1 << 30, gpu_layers=0) == (ON_THE_CPU, 0)


def test_what_the_device_takes(model, simulator):
    """No more than was planned."""
    before = simulator.counts()
    runner = Runner.open(model, EngineConfig(device="cuda", vram="200MiB", context=64, step_tokens=16))
    _, planned = chosen(model, 1 << 30)
    after = simulator.counts()
    assert 0 < after.bytes - before.bytes <= planned
    runner.close()


@pytest.mark.parametrize(
    ("vram", "layers"), [("200MiB", "auto"), ("200MiB", 1), ("22MiB", "auto"), ("4MiB", "auto")]
)
def test_doctor_knows_what_an_engine_will_do(model, simulator, monkeypatch, vram, layers):
    monkeypatch.setattr(disk.probe, "__kwdefaults__", disk.probe.__kwdefaults__ | {"seconds": 0.02})
    monkeypatch.setattr(hit_rates, "_TOKENS", 3)
    asked = ["--device", "cuda:0", "--vram", vram, "--gpu-layers", str(layers)]
    settings = {"device": "cuda:0", "vram": vram, "gpu_layers": layers}
    said = CliRunner().invoke(doctor, [str(model), "--json", *asked])
    runner = Runner.open(model, EngineConfig(**settings))
    there, placement = runner.vram, runner.placement
    runner.close()
    assert said.exit_code == 0, said.output
    facts = json.loads(said.stdout)["on_gpu"]
    found = (there.layers, there.slots) if there else (0, 0)
    assert (facts["layers"], facts["slots"], facts["head"]) == (*found, placement.head)
    assert (facts["of_layers"], facts["of_experts"]) == (2, 12)
    assert f"room for {found[1]} of 12 experts" in facts["told"] or not found[1]


def test_what_latent_attention_takes(tmp_path):
    """No less is planned than layers bring: a quantised matrix that makes keys of latents becomes F16."""
    rows = {"q_lora_rank": 64, "kv_lora_rank": 96, "qk_nope_head_dim": 96, "v_head_dim": 32}
    make(tmp_path / "model", "deepseek_v3", **rows)
    checkpoint = open_checkpoint(convert_to(tmp_path / "model", tmp_path / "store", None, "q4_0"))
    architecture = load(checkpoint)
    reader = Reader([str(file) for file in checkpoint.files], backend="preadv")
    found = load_dense(checkpoint, architecture, reader)
    reader.close()
    planned, _ = device_bytes(checkpoint, architecture)
    for nbytes, weights in zip(planned, found.layers, strict=True):
        arrays = layer_arrays(architecture.spec, weights)
        assert sum(-(-array.nbytes // 256) * 256 for array in arrays.values()) <= nbytes


def test_who_stays_on_the_cpu(tmp_path):
    make(tmp_path / "dsa", "deepseek_v32")
    assert chosen(tmp_path / "dsa", 1 << 30) == (ON_THE_CPU, 0)
    with pytest.raises(
        ConfigError, match="gpu_layers 2: of this model only experts can be on a GPU, its attention"
    ):
        chosen(tmp_path / "dsa", 1 << 30, gpu_layers=2)


async def test_clamped_blocks(tmp_path, simulator, monkeypatch):
    """Plain and shared ones, of a model that no family has."""
    make(tmp_path / "model", "deepseek_v3", num_hidden_layers=2)
    logits = Logits(monkeypatch)

    async def rows(**settings):
        async with opened(tmp_path / "model", context=64, step_tokens=16, **settings) as engine:
            await engine.generate(PROMPTS[1], evolve(GREEDY, max_tokens=2))
            placed = engine._runner.placement.layers
        return placed, logits.take(PROMPTS[1])

    def clamped(checkpoint):
        found = load(checkpoint)
        return evolve(found, spec=evolve(found.spec, clamp=ClampSpec(1.3, 0.4, 0.2)))

    _, plain = await rows(device="cpu")
    monkeypatch.setattr("mer.engine.runner.load", clamped)
    _, expected = await rows(device="cpu")
    assert expected != plain
    assert await rows(device="cuda", vram="60MiB") == (2, expected)


async def test_a_device_that_fails(model, simulator):
    """Another one that is opened afterwards has layers on it again; see test_gpu_lost for the first."""
    settings = {"device": "cuda", "vram": "200MiB", "context": 64, "step_tokens": 16}
    engine = await Engine.open(model, **settings)
    before = (await engine.generate(PROMPTS[1], evolve(GREEDY, max_tokens=3))).token_ids
    simulator.fail_from(40)
    assert (await engine.generate(PROMPTS[1], evolve(GREEDY, max_tokens=3))).token_ids == before
    assert engine._runner.placement == ON_THE_CPU
    await engine.close()
    simulator.reset()
    async with opened(model, **settings) as engine:
        assert (await engine.generate(PROMPTS[1], evolve(GREEDY, max_tokens=3))).token_ids == before
        assert engine._runner.placement == Placement(2, True)


@pytest.mark.parametrize("value", [-1, True, 1.5, "some"])
def test_refused_numbers(value):
    with pytest.raises(ConfigError, match="gpu_layers"):
        EngineConfig(gpu_layers=value)
    assert EngineConfig(gpu_layers="3").gpu_layers == 3


def test_layers_without_a_gpu(model, monkeypatch):
    monkeypatch.setenv("MER_CUDA_DRIVER", "/nowhere/libcuda.so.1")
    with pytest.raises(ConfigError, match="gpu_layers 1: there is no GPU"):
        Runner.open(model, EngineConfig(gpu_layers=1))
    with pytest.raises(ConfigError, match="leave one"):
        EngineConfig(device="cpu", gpu_layers=1)
