"""Which models the tests of tests/oracle compared with which oracle: docs/models.md is made of it.

Nothing has to be done for a new family: the harness says what it opens, `oracle` of test_families and its
like say whom they ask, and a test that passes and did both is in a row of the table.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path

import pytest
from attrs import field, fields, frozen

from mer.model.families import Architecture
from mer.weights.checkpoint import Checkpoint

TABLE = Path(__file__).parents[2] / "docs/models.md"
WRITE = ".venv/bin/python -m pytest tests/oracle --write-models"  # of a new family: -k FAMILY
SOURCES = {"hf": "safetensors", "gguf": "GGUF", "store": "expert store"}
_INTRODUCTION = f"""# Models

Written by `{WRITE}`, from tests that passed: a row says
which family (`model_type` of config.json) was run from which source, with weights in which formats, and whose
numbers came out. What is not here was not run. Most of it on small random models, since an error of the
mathematics shows in any size; the largest is named, with its number of weights. `mer inspect MODEL` says
whether a model of yours is understood, and what it needs.

Safetensors and GGUF files are read where they lie; an expert store is what `mer convert` makes of them.

"""
_COLUMNS = ("family", "source", "experts in", "other matrices in", "largest", "oracle", "tests")


@frozen
class Row:
    """What was run of one family from one kind of source. largest: (parameters, what to print)."""

    experts: set[str] = field(factory=set)
    others: set[str] = field(factory=set)
    largest: set[tuple[int, str]] = field(factory=set)
    oracles: set[str] = field(factory=set)
    tests: set[str] = field(factory=set)


Table = dict[tuple[str, str], Row]

_opened: list[tuple[Checkpoint, Architecture]] = []
_asked: set[str] = set()
skipped: list[str] = []
_records: Table = defaultdict(Row)


def opened(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """The test that is running computes with this model."""
    _opened.append((checkpoint, architecture))


def asked(oracle: str) -> None:
    """The test that is running has expected values from this one."""
    _asked.add(oracle)


def begin() -> None:
    """Forget what no test has ended with."""
    _opened.clear()
    _asked.clear()


def keep(test: str) -> None:
    """The test has passed."""
    for checkpoint, architecture in _opened if _asked else ():
        row = _records[checkpoint.config["model_type"], SOURCES[checkpoint.kind]]
        experts = [matrix for layer in architecture.experts for e in layer.experts for matrix in e.matrices]
        infos = [checkpoint.tensors[name] for name in dict.fromkeys(architecture.dense.values())]
        row.experts.update(matrix.format.name for matrix in experts)
        row.others.update(info.format.name for info in infos if len(info.shape) > 1 and info.shape[0] > 1)
        size = sum(math.prod(info.shape) for info in infos) + sum(m.rows * m.cols for m in experts)
        row.largest.add((size, _shape(architecture)))
        row.oracles.update(_asked)
        row.tests.add(test)


def _shape(architecture: Architecture) -> str:
    spec = architecture.spec
    text = f"{spec.hidden} wide, {spec.n_layers} {'layer' if spec.n_layers == 1 else 'layers'}"
    return text + (f", {spec.router.n_experts} experts" if architecture.experts else "")


def records() -> Table:
    """Of the tests that have passed so far."""
    return _records


def whole(session: pytest.Session) -> bool:
    """Whether every test of this directory has run and passed, none skipped."""
    option = session.config.option
    chosen = option.keyword or option.markexpr or getattr(option, "lf", False)
    parts = any("::" in argument for argument in session.config.args)
    wanted = {path for path in Path(__file__).parent.glob("test_*.py") if path.stem != "test_models_table"}
    there = wanted <= {item.path for item in session.items}
    return there and not chosen and not parts and not skipped and not session.testsfailed


def render(table: Table) -> str:
    """The text of docs/models.md."""
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    for (family, source), row in sorted(table.items(), key=lambda item: (item[0][0], -len(item[0][1]))):
        size, shape = max(row.largest)
        largest = f"{shape}: {size:,}"
        cells = [row.experts or {"none"}, row.others, None, row.oracles, {f"`{test}`" for test in row.tests}]
        words = [largest if each is None else ", ".join(sorted(each)) for each in cells]
        lines.append(_line([f"`{family}`", source, *words]))
    return _INTRODUCTION + "\n".join(lines) + "\n"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def write(session: pytest.Session) -> None:
    """Write docs/models.md: of all tests, if they passed; else add to it what those that did have shown."""
    table = dict(_records)
    if not whole(session):
        for key, old in read(TABLE.read_text()).items():
            new = table.get(key, Row())
            names = [each.name for each in fields(Row)]
            table[key] = Row(*(getattr(old, name) | getattr(new, name) for name in names))
    TABLE.write_text(render(table))


def read(text: str) -> Table:
    """The table in the text of docs/models.md."""
    table: Table = {}
    for line in re.findall(r"^\| (`.*) \|$", text, re.MULTILINE):
        family, source, experts, others, largest, oracles, tests = line.split(" | ")
        shape, _, size = largest.rpartition(": ")
        table[family.strip("`"), source] = Row(
            set() if experts == "none" else set(experts.split(", ")),
            set(others.split(", ")),
            {(int(size.replace(",", "")), shape)},
            set(oracles.split(", ")),
            {test.strip("`") for test in tests.split(", ")},
        )
    return table
