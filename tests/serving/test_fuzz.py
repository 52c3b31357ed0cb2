"""Requests made up from the server's own OpenAPI document: whatever is asked, the server answers and stays whole.

60 of them, by schemathesis, which `make setup` installs; `make fuzz` tries 1,000.
"""

from __future__ import annotations

from collections import Counter

import httpx2
import hypothesis
import pytest
from hypothesis import strategies

from proxytune.serving.api import FILES
from tests.serving.conftest import STEERED, metric, running, until

schemathesis = pytest.importorskip("schemathesis", reason="no schemathesis here")
KEY = "fuzz"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SHARES = {"/v1/completions": 0.45, "/v1/chat/completions": 0.35, "/tokenize": 0.12, "/v1/models/{model}": 0.08}


@pytest.fixture(scope="module")
def keyed(house):
    with running(house.settings(max_tokens=8), KEY) as found:
        yield found


@pytest.fixture(scope="module")
def operations(keyed) -> dict:
    document = httpx2.get(f"{keyed.url}/openapi.json", headers=HEADERS, timeout=60).json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=keyed.url)
    return {found.ok().path: found.ok() for found in schema.get_all_operations()}


def test_the_document_tells_every_route_but_the_page_s(keyed, operations):
    hidden = {"/openapi.json", *FILES}
    assert {route.path for route in keyed.app.routes} - hidden == set(operations)


def tame(body: dict, path: str, model: str) -> None:
    """Ask for what is served: hardly any made-up name is, and hardly any made-up number is small."""
    body |= {"model": model} | ({"max_tokens": 3, "n": 2} if "/v1/" in path else {})
    for field in ("max_completion_tokens", "steering", "stream_options", *(["alpha"] if model == "base" else [])):
        body.pop(field, None)


@pytest.mark.hypothesis  # for `make fuzz`: the plugin looks no deeper than the test itself
@pytest.mark.parametrize("path", SHARES)
def test_requests_of_every_kind_are_answered_as_the_document_says(keyed, operations, path):
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    conforms = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
    found = Counter()
    count = round(SHARES[path] * (60 if hypothesis.settings().max_examples < 1000 else 1000))

    @hypothesis.settings(max_examples=count, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=operations[path].as_strategy(), model=strategies.sampled_from(["base", STEERED, None]))
    def ask(case, model):
        if model and isinstance(case.body, dict):
            tame(case.body, path, model)
        if model and case.path_parameters:
            case.path_parameters["model"] = model
        answer = case.call(headers=HEADERS, timeout=300)
        found[answer.status_code] += 1
        case.validate_response(answer, checks=[not_a_server_error, *conforms])

    ask()
    print(path, dict(found))
    assert sum(found.values()) >= count
    assert count < 50 or (found[200] > 20 and len(found) > 1)
    assert httpx2.get(f"{keyed.url}/health", timeout=60).status_code == 200
    assert metric(keyed.url, "proxytune_failures_total", headers=HEADERS) == 0
    for model in ("base", STEERED):
        until(lambda model=model: metric(keyed.url, f'proxytune_rows{{model="{model}"}}', headers=HEADERS) == 0)
