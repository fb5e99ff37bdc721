"""docs/models.md says what tests have shown: it is compared with the known families and with what ran."""

from __future__ import annotations

import ast
from pathlib import Path

import evidence

from mer.model.families import FAMILIES
from mer.weights.gguf_families import BY_FAMILY

COMMITTED = evidence.read(evidence.TABLE.read_text())


def sources(source: str) -> set[str]:
    return {family for family, kind in COMMITTED if kind == source}


def test_every_family_is_there():
    assert sources("safetensors") == set(FAMILIES)
    # GLM-4.7-Flash in GGUF is read as the DeepSeek-V3 that its metadata describes, Solar Open as GLM-4-MoE,
    # Mistral as a Llama.
    assert sources("GGUF") >= {family.model_type for family in BY_FAMILY.values()} - {
        "glm4_moe_lite",
        "solar_open",
        "mistral",
    }


def test_tests_that_are_named_are_there():
    for row in COMMITTED.values():
        for name in row.tests:
            file, _, function = name.partition("::")
            tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
            assert function in {each.name for each in ast.walk(tree) if hasattr(each, "name")}, name


def test_the_table_agrees_with_what_ran(request):
    """Of some tests: all that they have shown is there. Of all: nothing else."""
    ran = evidence.records()
    advice = f"docs/models.md is not what the tests show; write it anew: {evidence.WRITE}"
    for key, row in ran.items():
        assert key in COMMITTED, advice
        committed = COMMITTED[key]
        for name in ("experts", "others", "oracles", "tests"):
            assert getattr(row, name) <= getattr(committed, name), f"{advice} ({key}, {name})"
        assert max(row.largest) <= max(committed.largest), f"{advice} ({key})"
    if evidence.whole(request.session):
        assert evidence.render(ran) == evidence.TABLE.read_text(), advice
