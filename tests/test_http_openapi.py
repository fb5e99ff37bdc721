"""The OpenAPI document against the server: what it promises is what comes, whatever is sent."""

from __future__ import annotations

import httpx
import hypothesis
import pytest
import schemathesis
from engine_models import write_text_model
from http_server import PATIENCE, serving
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mer.api.http.openapi import document

SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = [result.ok() for result in SCHEMA.get_all_operations()]
# Short answers, so that many can be asked for.
BOUNDS = {"max_tokens": 2, "max_completion_tokens": 2, "n": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = write_text_model(tmp_path_factory.mktemp("openapi") / "small", chat=True)
    with serving(path, "--context", 512) as server:
        yield server


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_what_the_document_says(server, operation, mode):
    """Statuses, content types and bodies are as described; nothing is an error of the server."""
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("nothing can be sent that is wrong")

    @hypothesis.settings(
        max_examples=12, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            for name in BOUNDS.keys() & case.body.keys():
                if type(case.body[name]) is int and case.body[name] > BOUNDS[name]:
                    case.body[name] = BOUNDS[name]
        # What parameters mean together, and whether a text is too long, a schema can't say.
        case.call_and_validate(
            base_url=server.url, timeout=PATIENCE, excluded_checks=[positive_data_acceptance]
        )

    check()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_calls_by_another_name(server, operation):
    """What is refused before anybody looks at the path is in the document as well."""
    answer = httpx.request(
        operation.method, server.url + operation.path, headers={"Host": "evil.example"}, timeout=PATIENCE
    )
    is_open = operation.path in ("/health", "/ready")
    assert answer.status_code == (200 if is_open else 403)
    assert str(answer.status_code) in operation.definition.raw["responses"]
