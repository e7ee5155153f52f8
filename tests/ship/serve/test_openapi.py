"""The OpenAPI document says what the server does: schemathesis makes requests from it and checks the answers."""

from pathlib import Path

import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from foveal.ship.serve.app import build
from foveal.ship.serve.limits import Limits, Settings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def schema(small: Path):
    return schemathesis.openapi.from_asgi(
        "/openapi.json", build(Settings(small, page=False, limits=Limits(images=3, body_mb=1)))
    )


GETS = ("/model", "/metrics", "/health", "/health/live", "/health/ready")
OPERATIONS = [(path, "get", GenerationMode.POSITIVE) for path in GETS]
OPERATIONS += [(path, "post", mode) for path in ("/predict", "/explain") for mode in GenerationMode]


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_answers_are_as_documented(schema, path: str, method: str, mode: GenerationMode):
    @settings(max_examples=20 if method == "post" else 1, deadline=None, derandomize=True, database=None)
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


def test_every_route_is_documented(schema):
    described = schema.raw_schema["paths"]
    assert set(described) == {"/predict", "/explain", *GETS}
    body = described["/predict"]["post"]["requestBody"]["content"]
    assert body["multipart/form-data"]["schema"]["properties"]["files"]["maxItems"] == 3
    assert body["application/json"]["schema"]["properties"]["images"]["maxItems"] == 3
    assert set(described["/predict"]["post"]["responses"]) == {"200", "400", "408", "413", "415", "422", "503"}
