"""`mer pull` from a hub on loopback, by the real client, and the names of what it has fetched."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from cli_models import MER, environment, mer, write_mixtral
from gguf_models import write_gguf
from hub_server import COMMIT, Hub
from huggingface_hub import scan_cache_dir
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from safetensors.numpy import load_file, save_file

from mer import Engine
from mer.errors import CheckpointError
from mer.weights import hub as names
from mer.weights.hub import Name
from mer.weights.pull import _Tracker

# Shards of 25 MB: huggingface_hub writes 10 at a time.
LARGE = {"intermediate_size": 4096}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = {"config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS}


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub")
    write_mixtral(path / "small")
    write_mixtral(path / "large", **LARGE)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "README.md"):
        (path / "small" / name).parent.mkdir(exist_ok=True)
        (path / "small" / name).write_bytes(b"nobody needs this")
    _gguf(path / "gguf")
    (path / "bin").mkdir()
    (path / "bin/pytorch_model.bin").write_bytes(bytes(10))
    (path / "strange").mkdir()
    (path / "strange/config.json").write_text('{"model_type": "strange_moe"}')
    (path / "strange/model.safetensors").write_bytes(bytes(2_000_000))
    return {f"org/{each.name}": each for each in path.iterdir()}


def _gguf(path):
    """One model in two formats, the second in parts in a folder of its own, and what belongs to no model."""
    (path / "Q8_0").mkdir(parents=True)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    write_gguf(model, path / "Tiny-F16.gguf", formats={"_exps": "f16"})
    write_gguf(model, path / "Q8_0/Tiny-Q8_0.gguf", shards=9, formats={"_exps": "q8_0"})
    shutil.copy(path / "Tiny-F16.gguf", path / "mmproj-F16.gguf")
    return path


@pytest.fixture
def hub(repos):
    with Hub(dict(repos)) as server:
        yield server


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


# Several commands in one process: to start it takes longer than what most of them do.
PROGRAM = """
import contextlib, io, json, os, sys
from mer.cli import main
done = []
for words, variables in json.loads(sys.argv[1]):
    os.environ.update(variables)
    sys.argv = ["mer", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main._run()
    done.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


@pytest.fixture
def variables(hub, home):
    """Of a process with an empty cache, for which this is the hub."""
    return environment(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_TOKEN="", HF_HUB_DISABLE_XET="1")


@pytest.fixture
def run(variables):
    """Run commands, each with variables of its own: run(words, (words, {name: value}), ...) -> their ends."""

    def run(*commands, **more):
        given = [each if isinstance(each, tuple) else (each, {}) for each in commands]
        words = json.dumps([(words.split(), set) for words, set in given])
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, words], env=variables | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [subprocess.CompletedProcess(words, *each) for each in json.loads(done.stdout)]

    return run


def snapshot(home, repo):
    return home / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT


def failed(done, *words):
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in error


def worked(done):
    assert done.returncode == 0, done.stderr
    return done


def test_pull_fetches_what_is_needed_and_nothing_else(run, hub, home, repos):
    (done,) = run("pull org/small")
    worked(done)
    path = snapshot(home, "org/small")
    assert done.stdout == f"{path}\n"
    assert 'mer run org/small "Once upon a time"' in done.stderr
    assert {file.name for file in path.rglob("*")} == NEEDED
    assert hub.names() == NEEDED
    for file in path.iterdir():
        assert file.read_bytes() == (repos["org/small"] / file.name).read_bytes()
    # The cache is one that huggingface_hub understands.
    (found,) = scan_cache_dir(home / "hub").repos
    assert (found.repo_id, {ref for each in found.revisions for ref in each.refs}) == ("org/small", {"main"})
    assert not list(path.parents[1].rglob("*.incomplete"))
    hub.asked.clear()
    (again,) = run("pull org/small")
    assert again.stdout == done.stdout
    assert not hub.names(), "nothing is fetched twice"


def test_a_name_is_a_model_for_every_command(run, home, tmp_path, variables):
    run("pull org/small")
    store = tmp_path / "org/small"
    store.parent.mkdir()
    inspected, answer, verified, converted = run(
        "inspect org/small",
        "run org/small word -n 3 --temperature 0",
        f"verify org/small@{COMMIT}",
        f"convert org/small {store}",
        HF_HUB_OFFLINE="1",
    )
    assert "mixtral" in worked(inspected).stdout
    worked(answer)
    assert "readable" in worked(verified).stdout
    worked(converted)
    # A path that exists goes before a name.
    assert "expert store" in mer("inspect", "org/small", env=variables, cwd=tmp_path).stdout


def test_gguf(run, hub, home):
    hub.architectures["org/gguf"] = "llama"
    unknown, done, inspected, other, fetched, there = run(
        "pull org/gguf:Q4_K_M",
        "pull org/gguf",
        "inspect org/gguf",
        "inspect org/gguf:F16",
        "pull org/gguf:f16",
        "inspect org/gguf:F16",
    )
    failed(unknown, "org/gguf:Q4_K_M", "Q8_0", "F16")
    path = snapshot(home, "org/gguf")
    parts = sorted((path / "Q8_0").iterdir())
    assert len(parts) > 1
    assert worked(done).stdout == f"{parts[0]}\n"
    assert re.search(r":Q8_0 .* <- taken\n", done.stderr)
    assert re.search(r":F16 .*[KM]iB\n", done.stderr)
    assert hub.names() == {*(part.name for part in parts), "Tiny-F16.gguf"}
    assert "GGUF" in worked(inspected).stdout
    failed(other, "in the hub's cache are GGUF files of org/gguf as Q8_0", "mer pull org/gguf:F16")
    worked(fetched)
    assert "f16" in worked(there).stdout
    # A part that was lost is named, and what brings it back.
    parts[1].unlink()
    (lost,) = run("inspect org/gguf:Q8_0")
    failed(lost, str(parts[1]), "mer pull org/gguf:Q8_0")


@pytest.mark.parametrize("lost", ["config.json", SHARDS[1]])
def test_partly_fetched(run, home, lost):
    run("pull org/small")
    (snapshot(home, "org/small") / lost).unlink()
    refused, fetched, inspected = run("run org/small x", "pull org/small", "inspect org/small")
    failed(refused, f"{lost} is missing", "mer pull org/small")
    worked(fetched)
    worked(inspected)


def test_a_connection_that_is_cut(run, hub, home, repos):
    hub.faults[SHARDS[0]] = [("cut", 15 << 20), ("cut", 1), (503, 0), ("whole", 0)]
    (done,) = run("pull org/large")
    worked(done)
    assert hub.contents(SHARDS[0]) == [None, *3 * ["bytes=10485760-"]]
    path = snapshot(home, "org/large") / SHARDS[0]
    assert path.read_bytes() == (repos["org/large"] / SHARDS[0]).read_bytes()


def test_interrupted_and_gone_on_with(run, hub, home, repos, variables):
    hub.faults[SHARDS[0]] = [("stall", 12 << 20)]
    process = subprocess.Popen(
        [MER, "pull", "org/large"],
        env=variables, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    blobs = home / "hub/models--org--large/blobs"
    deadline = time.monotonic() + 60
    # The other shard is there, of this one what is written at a time.
    while [file.stat().st_size for file in blobs.glob("*.incomplete")] != [10 << 20]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (other,) = run("pull org/large")
    failed(other, SHARDS[0], "another process")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert "the same command goes on" in err
    hub.release.set()
    hub.asked.clear()
    partly, done = run("inspect org/large", "pull org/large")
    failed(partly, f"{SHARDS[0]} is missing", "mer pull org/large")
    assert "of them are there" in worked(done).stderr
    assert hub.contents(SHARDS[0]) == ["bytes=10485760-"]
    assert not hub.contents(SHARDS[1])
    path = snapshot(home, "org/large") / SHARDS[0]
    assert path.read_bytes() == (repos["org/large"] / SHARDS[0]).read_bytes()


def test_what_arrives_damaged(run, hub, home):
    hub.faults[SHARDS[1]] = [("damaged", 0)]
    refused, fetched, verified = run("pull org/large", "pull org/large", "verify org/large")
    failed(refused, SHARDS[1], "damaged")
    worked(fetched)
    assert "finite" in verified.stdout


def test_tokens(run, hub):
    hub.token, hub.private, hub.gated = "secret", {"org/small"}, {"org/large"}
    private, nothing, gated, wrong = run(
        "pull org/small", "pull org/nothing", "pull org/large", ("pull org/small", {"HF_TOKEN": "wrong"})
    )
    failed(private, "no such model", "HF_TOKEN")
    failed(nothing, "no such model", "check the name")
    failed(gated, "is gated", f"{hub.url}/org/large")
    failed(wrong, "does not accept the token")
    hub.asked.clear()
    (done,) = run("pull org/large", HF_TOKEN="secret")
    worked(done)
    of_models = [(path, headers) for _, path, headers in hub.asked if "org/" in path]
    assert any(path.startswith("/cdn/") for path, _ in of_models)
    for path, headers in of_models:
        assert ("Authorization" in headers) != path.startswith("/cdn/"), "no other host gets the token"


def test_a_hub_that_refuses(run, hub):
    cases = [
        (429, {"Retry_After": "7"}, ["too many requests", "in 7 seconds"]),
        (500, {}, ["answers 500"]),
        (503, {}, ["answers 503"]),
        (403, {}, ["refuses it"]),
        (200, {}, ["does not answer as a hub"]),
    ]
    hub.faults["org/small"] = [(status, headers) for status, headers, _ in cases]
    for done, (_, _, words) in zip(run(*["pull org/small"] * len(cases)), cases, strict=True):
        failed(done, "org/small", *words)


def test_what_can_not_be_fetched(run, hub, home):
    hub.architectures["org/gguf"] = "gptj"
    revision, pickled, quant, strange, gptj, *unnamed = run(
        "pull org/small@v9", "pull org/bin", "pull org/small:Q4_K_M", "pull org/strange", "pull org/gguf",
        "pull small", "pull /org/small", "pull org/small/x", "pull org/small:", "pull ..",
    )  # fmt: skip
    failed(revision, "no revision v9")
    failed(pickled, "pytorch_model.bin", "neither safetensors nor GGUF")
    failed(quant, "org/small:Q4_K_M", "none")
    failed(strange, "strange_moe", "known are", "mixtral")
    failed(gptj, "general.architecture 'gptj'", "known are", "qwen3moe")
    assert hub.names() == {"config.json"}
    for done in unnamed:
        assert done.returncode == 2
        assert "ORG/NAME" in done.stderr


def test_no_hub(run):
    (offline,) = run("pull org/small", HF_HUB_OFFLINE="1")
    failed(offline, "HF_HUB_OFFLINE")
    (nobody,) = run("pull org/small", HF_ENDPOINT="http://127.0.0.1:9")
    failed(nobody, "http://127.0.0.1:9 can't be reached")


def test_no_room(hub, variables):
    def with_free(n):
        code = (
            "import shutil, sys\n"
            "real = shutil.disk_usage\n"
            f"shutil.disk_usage = lambda path: real(path)._replace(free={n} << 20)\n"
            "from mer.cli.main import main\nsys.argv = ['mer', 'pull', 'org/large']\nmain()"
        )
        return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)

    done = with_free(100)
    failed(done, "org/large", "to come", "104,857,600", "HF_HOME")
    assert not hub.contents(SHARDS[0])
    worked(with_free(200))


def test_a_device_that_fills_up(hub, home, variables):
    """By a limit on files, which the system reports as it does a full device, but for the error's number."""
    code = (
        "import errno, signal, sys, resource\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12 << 20, -1))\n"
        "errno.ENOSPC = errno.EFBIG\n"
        "from mer.cli.main import main\nsys.argv = ['mer', 'pull', 'org/large']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    failed(done, "org/large", f"{home / 'hub'} is full", "make room", "what has come is kept")
    assert any(file.stat().st_size >= 10 << 20 for file in home.rglob("*.incomplete"))


def test_a_name_that_nobody_has_fetched(run):
    *missing, path, dotted = run(
        "run org/none x", "inspect org/none", "serve org/none", "inspect org/none/x", "inspect ./org/none"
    )
    for done in missing:
        failed(done, "org/none", "mer pull org/none")
    failed(path, "org/none/x does not exist")
    failed(dotted, "does not exist")


async def test_engine_takes_a_name(run, home, monkeypatch):
    run("pull org/small")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    async with Engine.open("org/small", context=64) as engine:
        assert engine.spec.family == "mixtral"
    with pytest.raises(CheckpointError, match="mer pull org/other"):
        await Engine.open("org/other")
    async with Engine.open("demo", context=64) as engine:
        assert engine.tokenizer is not None


def test_an_older_snapshot_is_usable_until_the_new_one_is_whole(run, hub, repos, tmp_path):
    """The hub has a newer commit, whose last shard does not come."""
    run("pull org/small")
    newer = shutil.copytree(repos["org/small"], tmp_path / "newer")
    tensors = load_file(newer / SHARDS[1])
    save_file({name: -each for name, each in tensors.items()}, newer / SHARDS[1])
    hub.repos["org/small"], hub.commit = newer, COMMIT[::-1]
    hub.faults[SHARDS[1]] = [(404, 0)]
    refused, older, done, there = run(
        "pull org/small", "inspect org/small", "pull org/small", "inspect org/small"
    )
    failed(refused, "org/small")
    assert COMMIT in worked(older).stdout
    worked(done)
    assert COMMIT[::-1] in worked(there).stdout


@pytest.mark.parametrize(
    ("file", "label"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "Q4_K_M"),
        ("mixtral-8x7b-v0.1.Q5_0.gguf", "Q5_0"),
        ("BF16/Qwen3-30B-A3B-BF16-00001-of-00002.gguf", "BF16"),
        ("UD-IQ1_S/DeepSeek-R1-UD-IQ1_S-00003-of-00004.gguf", "UD-IQ1_S"),
        ("gpt-oss-20b-mxfp4.gguf", "mxfp4"),
        ("gpt-oss-20b-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("Qwen3-30B-A3B.gguf", "Qwen3-30B-A3B"),
    ],
)
def test_labels(file, label):
    (variant,) = names.gguf_variants(["README.md", "mmproj-F16.gguf", "imatrix.gguf", file])
    assert (variant.label, variant.files) == (label, (file,))


def test_names_of_paths():
    """What `mer serve` calls a model, and what an error advises to fetch."""
    snapshot = Path("/x/hub/models--org--a.b-c/snapshots") / COMMIT
    assert names.name_of(snapshot) == "org/a.b-c"
    assert names.name_of(snapshot / "Q8_0/T-Q8_0-00001-of-00002.gguf") == "org/a.b-c:Q8_0"
    assert names.name_of(Path("/x/models/org")) is None
    assert names.advice(snapshot / "x") == "go on with: mer pull org/a.b-c"
    assert names.advice(Path("/x/model")) == "fetch it again"


def test_progress_of_the_hubs_own_protocol():
    """Files of more than 50 GB come by it only: its reporter has a bar of ours for tqdm's."""
    seen = []
    tracker = _Tracker(5, 100, lambda done, total: seen.append((done, total)))
    with XetDownloadProgressReporter(
        reconstruction_desc="x", total=95, log_level=30, tqdm_class=tracker.bar()
    ) as reporter:
        for n in (40, 95):
            reporter.update_progress(
                SimpleNamespace(
                    total_bytes=95, total_bytes_completed=n, total_bytes_completion_rate=1.0,
                    total_transfer_bytes_completed=n, total_transfer_bytes_completion_rate=1.0,
                )
            )  # fmt: skip
    assert seen == [(45, 100), (100, 100)]


def test_choosing_a_variant():
    def choose(name, *files):
        return names.choose(Name.parse(name), names.gguf_variants(list(files)), "there").files[0]

    files = ("m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-UD-Q4_K_XL.gguf")
    assert choose("a/b", *files) == "m-Q4_K_M.gguf"
    assert choose("a/b:q8_0", *files) == "m-Q8_0.gguf"
    assert choose("a/b:Q4_K_XL", *files) == "m-UD-Q4_K_XL.gguf"
    assert choose("a/b:m-Q2_K", *files) == "m-Q2_K.gguf"
    assert choose("a/b", "m-IQ3_M.gguf") == "m-IQ3_M.gguf"
    with pytest.raises(CheckpointError, match=r"choose one of IQ3_M, Q2_K: a/b:IQ3_M"):
        choose("a/b", "m-IQ3_M.gguf", "m-Q2_K.gguf")
    with pytest.raises(CheckpointError, match=r"several files are Q2_K.*:m-Q2_K, :n-Q2_K"):
        choose("a/b:Q2_K", "m-Q2_K.gguf", "n-Q2_K.gguf")
