"""`mer run --profile`: a Chrome trace of the real program, checked event by event."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from engine_models import write_text_model

from mer.streaming.profile import ProfileSummary

LAYERS, PROMPT, ANSWER = 2, "The old man", 6


def mer(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from mer.cli.main import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("profile") / "model")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """(what the program said, its events)."""
    file = tmp_path_factory.mktemp("trace") / "profile.json"
    options = ["--temperature", 0, "--ignore-eos", "--context", 64, "--cache-experts", 4, "--json"]
    done = mer("run", model, PROMPT, "-n", ANSWER, *options, "--profile", file)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), json.loads(file.read_text())["traceEvents"]


def ns(event, name="ts") -> int:
    return round(1000 * event[name])


def spans(events, name=None):
    """(start, end, name) in ns, outer ones first."""
    found = [(ns(e), ns(e) + ns(e, "dur"), e["name"]) for e in events if e["ph"] == "X"]
    return sorted((s for s in found if name in (None, s[2])), key=lambda s: (s[0], -s[1]))


def test_every_step_and_layer_is_there(run):
    said, events = run
    count = Counter(e["name"] for e in events if e["ph"] == "X")
    assert count["step"] == count["begin"] == count["logits"] == count["sampling and text"] == ANSWER
    for name in (*(f"layer {i}" for i in range(LAYERS)),):
        assert count[name] == ANSWER
    for name in ("attend", "route", "experts", "finish"):
        assert count[name] == LAYERS * ANSWER
    assert count["predict"] == (LAYERS - 1) * ANSWER
    steps = [e["args"] for e in events if e["name"] == "step"]
    assert [s["tokens"] for s in steps] == [said["usage"]["prompt_tokens"]] + [1] * (ANSWER - 1)


def test_spans_nest(run):
    """Whatever begins inside a span ends inside it, and what a span is inside of is what it should be."""
    open_spans: list[tuple[int, int, str]] = []
    parents: dict[str, set[str]] = {}
    for span in spans(run[1]):
        while open_spans and open_spans[-1][1] <= span[0]:
            open_spans.pop()
        if open_spans:
            assert span[1] <= open_spans[-1][1], (span, open_spans[-1])
        parents.setdefault(span[2], set()).add(open_spans[-1][2] if open_spans else "")
        open_spans.append(span)
    every_layer = {f"layer {i}" for i in range(LAYERS)}
    assert parents["step"] == parents["sampling and text"] == {""}
    assert parents["layer 0"] == parents["logits"] == {"step"}
    assert parents["attend"] == parents["experts"] == parents["finish"] == every_layer
    assert parents["compute"] == parents["wait for reads"] == {"experts"}


def test_layers_follow_each_other(run):
    layers = [s for s in spans(run[1]) if s[2].startswith("layer")]
    assert [s[2] for s in layers] == [f"layer {i}" for i in range(LAYERS)] * ANSWER
    assert all(a[1] <= b[0] for a, b in pairwise(layers))


def test_reads_are_asynchronous_events_with_their_bytes(run):
    said, events = run
    begun = {e["id"]: e for e in events if e["ph"] == "b"}
    ended = {e["id"]: e for e in events if e["ph"] == "e"}
    assert begun.keys() == ended.keys()
    assert all(ns(begun[i]) <= ns(ended[i]) for i in begun)
    timings = said["timings"]
    demand = [e for e in begun.values() if e["name"] == "read"]
    assert len(demand) == timings["misses"]
    # What was read ahead in the last layers may still be under way at the end.
    total = sum(e["args"]["bytes"] for e in begun.values())
    assert 0 < total <= timings["bytes_read"]
    assert {e["args"]["layer"] for e in begun.values()} == set(range(LAYERS))


def test_the_times_are_those_of_the_summary(run):
    said, events = run
    for name, total in (("compute", "expert_s"), ("wait for reads", "io_wait_s"), ("step", "step_s")):
        found = sum(end - start for start, end, _ in spans(events, name)) / 1e9
        # The end of a step is looked at twice, and others may have the processor in between.
        assert found == pytest.approx(said["timings"][total], rel=0.5, abs=1e-3)
    assert said["profile"]["decode_steps"] == ANSWER - 1
    assert 0 < said["profile"]["python_share"] < 1
    assert 0 < said["profile"]["kernel_s"] < said["profile"]["step_s"]


def test_the_summary_says_it(model, tmp_path):
    done = mer(
        "run", model, PROMPT, "-n", 3, "--context", 64, "--ignore-eos", "--profile", tmp_path / "p.json"
    )
    assert "2 decode steps of " in done.stderr
    assert "Python between kernels " in done.stderr
    assert ProfileSummary(0, 0.0, 0.0).python_share == 0


@pytest.mark.parametrize(
    ("path", "why"), [("/dev/null/p", "Not a directory"), ("/dev/full", "No space left on device")]
)
def test_a_file_that_cannot_be_written(model, path, why):
    done = mer("run", model, PROMPT, "-n", 3, "--profile", path)
    assert done.returncode == 1
    assert done.stderr.endswith(f"profile {path}: {why}; name a file that can be written\n")
