"""What README.md and docs/ show is run here: every command, every program, `make demo`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mer
from mer.demo import model_path

ROOT = Path(__file__).parent.parent
MER = [sys.executable, "-c", "from mer.cli.main import main; main()"]
README = (ROOT / "README.md").read_text()
# `mer serve` does not end by itself: test_http_docs and test_serve run it.
# `mer pull` needs a hub and `mer top` a terminal: test_pull, test_top.
COMMANDS = re.findall(r"^    (mer (?!serve|pull|top).+?)(?:  +#.*)?$", README, re.MULTILINE)
PROGRAMS = [
    (name, program)
    for name in ("README.md", "docs/python.md")
    for program in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
]


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


def test_there_are_commands_and_programs():
    assert len(COMMANDS) >= 6
    assert len(PROGRAMS) >= 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "store"
    shutil.copytree(model_path(), path)
    return path


@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_the_readme(line, store, tmp_path):
    """With MODEL, STORE and PATH in their places. The demo has no chat template (see test_run_cli)."""
    words = shlex.split(line)[1:]
    places = {"MODEL": "demo", "STORE": str(store), "PATH": str(store / "experts-00001.safetensors")}
    if words[0] == "convert":
        places |= {"STORE": str(tmp_path / "new"), "model.gguf": str(tmp_path / "model.gguf")}
    done = run([*MER, *(places.get(word, word) for word in words)])
    if words[0] == "chat":
        assert done.returncode == 1
        assert "no chat template" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize(("name", "program"), PROGRAMS)
def test_program_of_the_docs(name, program):
    done = run([sys.executable, "-c", program.replace('"path/to/model"', repr(str(model_path())))])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 20


def test_make_demo():
    """The README's first command: it streams, writes words and says what it took."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = run(["make", "demo", f"PYTHON={sys.executable}"], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"[a-z]{2,}", done.stdout)) > 80
    assert "cache of 12 of 48 experts" in done.stderr
    for what in (
        r"[\d.]+ tokens/s",
        r"waiting for reads",
        r"hit rate [\d.]+%",
        r"[\d.]+ MiB read",
        r"peak [\d.]+ MiB",
    ):
        assert re.search(what, done.stderr), what
    read = float(re.search(r"([\d.]+) MiB read", done.stderr)[1])
    assert read > 12, "a quarter of 12 MiB fits: the rest must have come from disk, and more than once"


def test_code_of_the_walk_through_is_that_of_the_family():
    """What docs/adding-a-model.md quotes stands somewhere in the sources, as it is."""
    page = (ROOT / "docs/adding-a-model.md").read_text()
    folders = ("mer/model/families", "mer/weights/gguf_families", "tests/oracle")
    sources = [file.read_text() for folder in folders for file in (ROOT / folder).glob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert any(block in source for source in sources), block


def test_links_lead_somewhere():
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_the_site(tmp_path):
    """Built without a warning: every link leads somewhere, every docstring can be set."""
    made = run([sys.executable, "tools/site.py", str(tmp_path / "site")], cwd=ROOT)
    assert (made.returncode, made.stderr) == (0, "")
    index = (tmp_path / "site/index.html").read_text()
    assert "Mixture-of-Experts" in index
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "site" / f"{page.stem}.html").is_file()
        assert f'href="{page.stem}.html"' in index, f"tools/site.py: NAV lacks {page.stem}"
    reference = (tmp_path / "site/reference/python.html").read_text()
    errors = ("MerError", "QueueFullError", "RequestTimeoutError")
    for name in mer.__all__:
        place = f"mer.errors.{name}" if name in errors else f"mer.{name}"
        assert f'id="{place}"' in reference, f"docs/reference/python.md lacks {name}"
    assert "https://fonts" not in index
