"""Streams that are closed or full, paths and texts that an encoding has not, numbers beyond all bounds."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from cli_models import environment, mer, mer_here

from mer.demo import model_path
from mer.weights.gguf import read_gguf

NO_TEXT = os.fsdecode(b"m\xff\xfe")  # a name that is no UTF-8


def named(directory, name):
    shutil.copytree(model_path(), directory / name)
    return directory / name


def closed(*numbers):
    return lambda: [os.close(number) for number in numbers]


def test_input_that_is_closed():
    """It is empty, as /dev/null is."""
    done = mer("run", "demo", "-", "-q", "-n", 3, "--json", preexec_fn=closed(0))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("numbers", [(2,), (0, 2), (0, 1, 2)])
def test_no_file_of_weights_is_a_stream(numbers, tmp_path):
    """What a library writes on stderr would go into it."""
    links = ", ".join(f"os.readlink('/proc/self/fd/{number}')" for number in numbers)
    code = (
        "import os\nfrom mer.cli import main as frame\n"
        f"def write(): open({str(tmp_path / 'seen')!r}, 'w').write(repr([{links}]))\n"
        "frame._run = write\nframe.main()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, preexec_fn=closed(*numbers))
    assert (tmp_path / "seen").read_text() == repr(["/dev/null"] * len(numbers))


def test_output_that_is_full_is_named():
    with open("/dev/full", "w") as full:
        done = mer("run", "demo", "x", "-q", "-n", 3, stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_path_that_the_terminal_can_not_show(tmp_path, encoding):
    path = named(tmp_path, "größer ∞")
    shown = "größer ∞".encode(encoding, "replace").decode(encoding)
    for command in ("inspect", "verify"):
        done = mer(command, path, env=environment(PYTHONIOENCODING=encoding), encoding=encoding)
        assert (done.returncode, done.stderr) == (0, "")
        assert shown in done.stdout


def test_a_path_that_is_no_text(tmp_path):
    path = named(tmp_path, NO_TEXT)
    strict = environment(PYTHONIOENCODING="utf-8:strict")
    done = mer("verify", path, env=strict, encoding="utf-8", errors="surrogateescape")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{path}: ")
    trace, profile = tmp_path / "trace", tmp_path / "profile"
    done = mer_here("run", path, "x", "-q", "-n", 3, "--trace", trace, "--profile", profile)
    assert (done.returncode, done.stderr) == (0, "")
    assert "# model=m?? " in trace.read_text("utf-8")
    json.loads(profile.read_text("utf-8"))


@pytest.mark.parametrize(("model", "name"), [(NO_TEXT, "m??"), (".", "here"), ("demo", "demo")])
def test_the_name_in_a_gguf_file(tmp_path, monkeypatch, model, name):
    if model != "demo":
        monkeypatch.chdir(named(tmp_path, NO_TEXT if model == NO_TEXT else "here"))
        model = tmp_path / model if model == NO_TEXT else model
    done = mer_here("convert", model, tmp_path / "x.gguf", "--to", "gguf", "--format", "same")
    assert done.returncode == 0, done.stderr
    assert read_gguf(tmp_path / "x.gguf").metadata["general.name"] == name


def test_standard_input_for_two():
    done = mer("run", "demo", "-", "--json-schema", "-", input="{}")
    assert done.returncode == 2
    assert "the prompt and --json-schema can't both be standard input" in done.stderr


def test_a_schema_is_named(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text("{")
    done = mer_here("run", "demo", "x", "--json-schema", file)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {file}: ")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--queue-depth", "9" * 11, "queue_depth 99999999999: must be at most 2147483647"),
        ("--prefetch", "9" * 20, "prefetch 99999999999999999999: must be at most 2147483647"),
        ("--ram", "9" * 320, "is not a size"),
        ("--ram", "0.1", "is not a size"),
    ],
)
def test_numbers_beyond_what_can_be(option, value, said):
    done = mer_here("run", "demo", "x", option, value)
    assert said in done.stderr
    assert "bug of mer" not in done.stderr
    assert done.returncode == (2 if option == "--ram" else 1)


def test_more_read_ahead_than_there_is():
    done = mer_here("run", "demo", "x", "-q", "-n", 3, "--cache-experts", "25%", "--prefetch", (1 << 31) - 1)
    assert (done.returncode, done.stderr) == (0, "")
