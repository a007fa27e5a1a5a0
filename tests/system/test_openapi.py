"""What the OpenAPI document says of the ingest is so: schemathesis asks by it and holds every answer against it."""

from __future__ import annotations

import contextlib
from typing import Any

import hypothesis
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lepton_ai.settings import Settings
from pipeline.ingest.door import Door
from pipeline.ingest.routes import make_asgi
from pipeline.supervisor import Fleet

CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MSGPACK = "application/x-msgpack"
NDJSON = "application/x-ndjson"
MATRIX = [[1.0, 2.0], [3.0, 4.0]]
GOOD = {"kernel": "linalg.matmul", "arguments": {"a": MATRIX, "b": MATRIX}}


@schemathesis.serializer(MSGPACK)
def _msgpack(_: Any, value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError:  # it has no integers of more than 64 bits
        hypothesis.reject()


@schemathesis.serializer(NDJSON)
def _ndjson(_: Any, value: Any) -> bytes:
    return msgspec.json.encode(value) + b"\n"


@schemathesis.deserializer(MSGPACK)
def _from_msgpack(_: Any, response: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(msgspec.msgpack.decode(response.content)))  # infinity is null


@schemathesis.deserializer(NDJSON)
def _from_ndjson(_: Any, response: Any) -> Any:
    return msgspec.json.decode(response.content.splitlines()[0])


#: The document that every ingest serves.
DOCUMENT = make_asgi(Settings(), Door(Settings(), "redis://nobody.invalid")).openapi_schema.to_schema()


def asking(**phases: Any) -> Any:
    config = {"max-stream-events": 1, "request-timeout": 10, "phases": phases}
    return schemathesis.openapi.from_dict(DOCUMENT, config=SchemathesisConfig.from_dict(config))


schema = asking()
#: Bodies are nested deep and take a second each to think up; those that mean harm are in test_hostile_bytes.py.
jobs = asking(coverage={"enabled": False})


def hold(case: Any, fleet: Fleet) -> None:
    """Asks, and holds the answer against the document."""
    with contextlib.suppress(KeyError, TypeError, ValueError):  # a wait that is none is refused
        if 0 <= float(case.query["wait_s"]) <= 60:  # an id that nobody knows is waited for, too
            case.query["wait_s"] = 0.01
    if case.path == "/v1/events":
        case.query.pop("job", None)  # of nobody's job there is silence
    case.call_and_validate(fleet.http_url, checks=CHECKS)


@schema.exclude(path="/v1/jobs").parametrize()
@hypothesis.settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_the_document_says(case: Any, fleet: Fleet) -> None:
    hold(case, fleet)


@jobs.include(path="/v1/jobs").parametrize()
@hypothesis.settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_every_answer_to_a_submission_is_as_the_document_says(case: Any, fleet: Fleet) -> None:
    hold(case, fleet)


def ask(fleet: Fleet, path: str, method: str, **more: Any) -> Any:
    """One answer that is as the document says."""
    return schema[path][method].Case(**more).call_and_validate(fleet.http_url, checks=CHECKS)


@pytest.mark.parametrize("sent", ["application/json", MSGPACK, NDJSON])
@pytest.mark.parametrize("accepted", ["application/json", MSGPACK, NDJSON])
def test_so_it_is_all_the_way_of_a_job(fleet: Fleet, sent: str, accepted: str) -> None:
    headers = {"accept": accepted}
    submission: dict[str, Any] = {"body": GOOD, "media_type": sent, "headers": headers}
    assert ask(fleet, "/v1/jobs", "POST", **submission).status_code == 202
    ended = ask(fleet, "/v1/jobs", "POST", **submission, query={"wait_s": 10})
    assert ended.status_code == 200
    found = _from_msgpack(None, ended) if "msgpack" in ended.headers["content-type"][0] else _from_ndjson(None, ended)
    assert found["state"] == "succeeded"
    job = {"path_parameters": {"job_id": found["id"]}}
    for method in ("GET", "DELETE"):
        assert ask(fleet, "/v1/jobs/{job_id}", method, **job, headers=headers).status_code == 200
    assert ask(fleet, "/v1/jobs/{job_id}/events", "GET", **job).status_code == 200
    nobodys = {"path_parameters": {"job_id": "nobodys"}}
    for method in ("GET", "DELETE"):
        assert ask(fleet, "/v1/jobs/{job_id}", method, **nobodys).status_code == 404


@pytest.mark.parametrize("accepted", ["application/json", MSGPACK])
@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/devices", "/v1/kernels"])
def test_so_it_is_of_the_fleet(fleet: Fleet, path: str, accepted: str) -> None:
    assert ask(fleet, path, "GET", headers={"accept": accepted}).status_code == 200


@pytest.mark.parametrize("sent", ["application/json", MSGPACK])
def test_so_it_is_of_many_jobs(fleet: Fleet, sent: str) -> None:
    answer = ask(fleet, "/v1/jobs", "POST", body=[GOOD] * 3, media_type=sent, query={"wait_s": 10})
    assert [each["state"] for each in answer.json()] == ["succeeded"] * 3
