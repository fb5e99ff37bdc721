"""Notes what the tests of this directory have compared; with --write-models it becomes docs/models.md."""

from __future__ import annotations

import evidence
import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    evidence.begin()
    result = yield
    evidence.keep(f"{item.path.stem}::{item.originalname}")
    return result


def pytest_collection_modifyitems(config, items):
    """What compares the table with what ran runs last; where it is to be written, not at all."""
    items.sort(key=lambda item: item.path.stem == "test_models_table")
    if config.option.write_models:
        items[:] = [item for item in items if item.path.stem != "test_models_table"]


def pytest_runtest_logreport(report):
    if report.skipped and "/oracle/" in report.fspath:
        evidence.skipped.append(report.nodeid)


def pytest_sessionfinish(session):
    if session.config.option.write_models:
        evidence.write(session)
