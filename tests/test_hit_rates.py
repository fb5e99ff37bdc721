"""`mer doctor MODEL`: hit rates by stack distance, against an LRU cache and the engine's; its advice."""

from __future__ import annotations

import json
import re
from collections import OrderedDict

import httpx
import numpy as np
import pytest
from attrs import evolve
from click.testing import CliRunner
from http_server import PATIENCE, serving

from mer import Engine, SamplingParams
from mer.api.admin import model_of
from mer.cli import hit_rates
from mer.cli import inspect as inspecting
from mer.cli.doctor import doctor
from mer.cli.hit_rates import HitRates
from mer.config import EngineConfig
from mer.demo import model_path
from mer.engine import budget as budgets
from mer.errors import ConfigError
from mer.streaming import probe
from mer.streaming.advice import advice
from mer.streaming.distance import Distances, distances
from mer.streaming.machine import Machine, Memory
from mer.streaming.probe import DepthRate, Device
from mer.streaming.trace import COLUMNS

GIB = 1 << 30
HEAD = "# route_trace v1\n# model=m n_layer=3 n_expert=8 n_expert_used=2\n" + COLUMNS + "\n"


def write_trace(path, turns):
    """Random routing: a prompt of 4 tokens and 199 more, of each of `turns`; what each step wants."""
    draw, wanted, lines = np.random.default_rng(turns), [], []
    for step in range(200):
        for layer in range(3):
            tokens = [0, 1, 2, 3] if step == 0 else [step + 3]
            chosen = set()
            for turn in range(turns):
                for token in tokens:
                    # Low numbers are wanted more often.
                    experts = draw.choice(8, 2, replace=False, p=np.arange(8, 0, -1) / 36)
                    lines += [
                        f"{turn},{int(step > 0)},{token},{layer},{i},{e},0.5" for i, e in enumerate(experts)
                    ]
                    fresh = [8 * layer + e for e in experts.tolist() if e not in chosen]
                    chosen |= set(experts.tolist())
                    wanted += [(step > 0, e) for e in fresh]
    path.write_text(HEAD + "\n".join(lines) + "\n")
    return wanted


@pytest.mark.parametrize("turns", [1, 3])
def test_a_cache_of_every_size(tmp_path, turns):
    wanted = write_trace(tmp_path / "trace.csv", turns)
    found = distances(tmp_path / "trace.csv")
    assert found.tokens == 199 * turns
    assert found.accesses == sum(decode for decode, _ in wanted)
    for slots in range(1, 24):
        cache, hits = OrderedDict(), 0
        for decode, expert in wanted:
            hits += decode and expert in cache
            cache[expert] = None
            cache.move_to_end(expert)
            if len(cache) > slots:
                cache.popitem(last=False)
        assert found.hits[slots] == hits / found.accesses
    assert (found.hits[0], found.hits[24]) == (0, 1)


@pytest.mark.parametrize("share", ["10%", "40%"])
async def test_the_engine_finds_as_many(tmp_path, share):
    file = tmp_path / "trace.csv"
    settings = {"cache_policy": "lru", "cache_experts": share, "prefetch": 0, "trace": file, "context": 256}
    async with Engine.open(model_path(), **settings) as engine:
        await engine.generate([5], SamplingParams(max_tokens=150, ignore_eos=True, seed=3))
        stats, slots, spec = engine.stats, engine.budget.slots, engine.spec
    found = distances(file)
    first = spec.n_moe_layers * spec.top_k  # by the prompt's only token, none of which is there
    assert found.accesses == stats.hits + stats.misses - first
    # The engine takes what is there first: which of a layer's experts was used last is another one.
    assert found.hits[slots] == pytest.approx(stats.hits / found.accesses, abs=0.02)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names? n_layer|does not name"),
        ("a,b\n1,2\n", "line 1"),
        (HEAD + "0,1,x,0,0,1,1\n", "line 4"),
        (HEAD + "0,0,0,0,0,1,1\n", "no decoded token"),
        (HEAD + "0,1,0,3,0,1,1\n", "beyond the sizes"),
    ],
)
def test_what_is_no_trace(tmp_path, text, words):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ConfigError, match=words):
        distances(tmp_path / "x.csv")


def test_a_trace_that_is_being_written(tmp_path):
    """Its last line may be cut off anywhere."""
    write_trace(tmp_path / "whole.csv", 1)
    content = (tmp_path / "whole.csv").read_text()
    whole, lines = distances(tmp_path / "whole.csv"), content.splitlines(keepends=True)
    for cut in (2, 6, len(lines[-1]) - 1):
        (tmp_path / "cut.csv").write_text("".join(lines) + lines[-1][:cut])
        assert distances(tmp_path / "cut.csv").accesses == whole.accesses


async def test_a_disk_that_is_full_ends_the_trace_alone(caplog):
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)
    async with Engine.open(model_path(), context=256) as engine:
        expected = (await engine.generate([5], params)).token_ids
    engine = await Engine.open(model_path(), context=256, trace="/dev/full")
    assert (await engine.generate([5], params)).token_ids == expected
    assert caplog.text.count("nothing more is recorded: trace /dev/full: No space left") == 1
    with pytest.raises(ConfigError, match="trace /dev/full: No space left"):
        await engine.close()


async def test_what_more_memory_brings():
    async with Engine.open(model_path(), context=256) as engine:
        budget = engine.budget
    budget = evolve(budget, ram=4 * GIB, interpreter=GIB // 2, slot=GIB // 32, experts=256, slots=100)
    hits = np.linspace(0, 1, 257)
    found = HitRates.of(budget, Distances(100, 1600, hits), 2e9)
    assert [each.hit_rate for each in found.rates] == sorted(each.hit_rate for each in found.rates)
    assert found.rates[-1].hit_rate == 1
    assert found.rates[-1].read_bytes == 0
    now = next(each for each in found.rates if each.ram == found.ram == 4 * GIB)
    assert now.hit_rate == now.slots / 256
    assert now.read_bytes == pytest.approx((1 - now.hit_rate) * 16 * GIB / 32)
    assert found.advice.startswith(f"1.0 GiB more would lift the hit rate from {now.hit_rate:.2f} to 0.")
    flat = HitRates.of(budget, Distances(100, 1600, np.where(np.arange(257) < 256, 0.5, 1)), 2e9)
    assert "would change little" in flat.advice
    assert HitRates.of(evolve(budget, ram=99 * GIB), Distances(100, 1600, hits), 2e9).advice == ""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(probe.probe, "__kwdefaults__", probe.probe.__kwdefaults__ | {"seconds": 0.02})
    monkeypatch.setattr(hit_rates, "_TOKENS", 20)


@pytest.mark.usefixtures("quick")
def test_of_the_bundled_model(tmp_path):
    done = CliRunner().invoke(doctor, ["demo", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["hit_rates"]["rates"][-1]["hit_rate"] == 1
    assert 0 < facts["hit_rates"]["tokens"] <= 80
    file = tmp_path / "trace.csv"
    file.write_text("no trace\n")
    done = CliRunner().invoke(doctor, ["demo", "--trace", str(file)])
    assert isinstance(done.exception, ConfigError)
    file.write_text(HEAD + "0,1,5,0,0,1,1\n")
    done = CliRunner().invoke(doctor, ["demo", "--trace", str(file)])
    assert "of a model with 24 experts" in str(done.exception)
    small = CliRunner().invoke(doctor, ["demo", "--ram", "1MiB"])
    assert small.exit_code == 0
    assert "is too little for this model" in " ".join(small.output.split())


@pytest.mark.usefixtures("quick")
def test_inspect_says_the_same(monkeypatch):
    """How much memory holds so many experts, drafts and their head counted."""
    monkeypatch.setattr(budgets, "resident_bytes", lambda: 100 << 20)
    monkeypatch.setattr(inspecting, "resident_bytes", lambda: 100 << 20)
    found = []
    for command, part, rows in (
        (inspecting.inspect, "memory", "budgets"), (doctor, "hit_rates", "rates"),
    ):  # fmt: skip
        done = CliRunner().invoke(command, ["demo", "--json"])
        assert done.exit_code == 0, done.output
        found.append({row["slots"]: row["ram"] for row in json.loads(done.stdout)[part][rows]})
    both = set(found[0]) & set(found[1])
    assert both == {2, 12, 24, 48}
    assert [found[0][slots] for slots in both] == [found[1][slots] for slots in both]


@pytest.mark.usefixtures("quick")
def test_what_a_server_recorded(tmp_path):
    """Of two models, and of one that was reloaded: each engine has a file of its own."""
    ports = ("--admin-port", 0)
    with serving(
        "demo", "org/two=demo", "--context", 256, "--trace", tmp_path / "routing.csv", *ports
    ) as server:

        def complete(model, prompts):
            body = {"model": model, "prompt": prompts, "max_tokens": 21, "ignore_eos": True}
            told = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).json()
            assert told["usage"]["completion_tokens"] == 21 * len(prompts)

        complete("demo", ["Once upon a time", "She said that"])
        complete("org/two", ["In the morning"])
        admin = re.search(r"admin endpoints at (\S+)", "".join(server.lines))[1]
        assert httpx.post(f"{admin}/admin/reload", json={}, timeout=PATIENCE).status_code == 200
        complete("demo", ["A cat and a dog"])
        refused = httpx.post(f"{admin}/admin/reload", json={"settings": {"trace": "x"}}, timeout=PATIENCE)
        assert "no setting that can be changed" in refused.text
        server.signal()
        assert server.ended() == 0
    tokens = {file.name: distances(file).tokens for file in tmp_path.iterdir()}
    # The first token of an answer comes of its prompt's last step.
    assert tokens == {"routing.csv": 40, "routing.org%2Ftwo.csv": 20, "routing.2.csv": 20}
    done = CliRunner().invoke(doctor, ["demo", "--json", "--trace", str(tmp_path / "routing.csv")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["hit_rates"]["tokens"] == 40


def test_further_models_write_to_places_of_their_own(tmp_path):
    config = EngineConfig(trace=tmp_path / "x.csv", prefix_store=tmp_path / "kv")
    for name, label in (("two", "two"), ("../x", "..%2Fx"), ("..", "..")):
        made = model_of(f"{name}=demo", config, str).config
        assert made.trace == tmp_path / f"x.{label}.csv"
        assert made.prefix_store == tmp_path / "kv" / f"model-{label}"
    assert model_of("two=demo", EngineConfig(), str).config == EngineConfig()


GOOD = Machine(
    kernel="6.8", cpu_model="x", io_uring_disabled=0, huge_pages="madvise", memlock=None,
    may_exceed_memlock=False, open_files=1024, address_space=None, governor="performance",
    memory=Memory(GIB, GIB, None, None),
)  # fmt: skip
NVME = Device("/m", "ext4", True, None, "uring", "", 4096, (DepthRate(8, 3e9),), rotational=False)


@pytest.mark.parametrize(
    ("machine", "device", "refusal", "words"),
    [
        ({}, {}, None, []),
        ({}, {"file_system": "nfs4"}, None, ["nfs4: copy the model to a local NVMe"]),
        ({}, {"file_system": "fuse.sshfs"}, None, ["local NVMe"]),
        ({}, {"rotational": True}, None, []),
        ({}, {"rotational": True, "rates": (DepthRate(1, 2e8),)}, None, ["a disk that turns"]),
        ({}, {"rates": (DepthRate(1, 2e8),)}, None, ["0.20 GB/s"]),
        ({}, {"direct": False, "file_system": "tmpfs"}, None, ["O_DIRECT does not work on tmpfs"]),
        ({}, {}, "seccomp", ["io_uring can't be had (seccomp)"]),
        ({"memlock": 8 << 20}, {}, None, ["memlock"]),
        ({"memlock": 8 << 20, "may_exceed_memlock": True}, {}, None, []),
        ({"governor": "powersave"}, {}, None, ["governor is powersave"]),
        ({"governor": None, "huge_pages": "never"}, {}, None, ["huge pages are off"]),
        ({"open_files": 64, "address_space": GIB}, {}, None, ["64 open files", "ulimit -v"]),
    ],
)
def test_what_is_advised(machine, device, refusal, words):
    found = advice(evolve(GOOD, **machine), evolve(NVME, **device), refusal)
    assert len(found) == len(words)
    for sentence, some in zip(found, words, strict=True):
        assert some in sentence
