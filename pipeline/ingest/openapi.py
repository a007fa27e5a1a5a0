"""What OpenAPI says of bodies that are decoded and encoded by hand, because their type depends on the media type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIResponse, Operation, RequestBody, Schema

from lepton_ai import wire
from lepton_ai.accounts import Accounts
from lepton_ai.dead import DeadLetter, Settled
from lepton_ai.device import Announcement
from lepton_ai.event import CloudEvent
from lepton_ai.kernel import KernelSpec
from lepton_ai.remote import JobRequest, JobView
from lepton_ai.remote_protocol import Chosen
from pipeline.ingest.body import NDJSON
from pipeline.ingest.problem import MEDIA_TYPE, Problem

__all__ = [
    "ACCOUNTS",
    "DEAD",
    "DEAD_LETTER",
    "DEVICES",
    "EVENTS",
    "JOB_EVENTS",
    "KERNELS",
    "ONE_JOB",
    "ONE_JOB_CANCELLED",
    "PURGED",
    "REPLAYED",
    "STATUS",
    "SUBMITTED",
    "JobLine",
]

SSE: Final = "text/event-stream"


class JobLine(JobView, omit_defaults=True):
    """A JobView as one line of NDJSON. `index` is the number of its job in the request, from 0."""

    index: int | None = None


class _RawSchema(Schema):
    """A schema that msgspec has already written."""

    def __init__(self, written: dict[str, Any]) -> None:
        super().__init__()
        self._written = written

    def to_schema(self) -> dict[str, Any]:
        return self._written


def _operation(
    answers: Mapping[int, tuple[str, Mapping[str, Any]]], body: Mapping[str, Any] | None = None, told: str = ""
) -> Any:
    """An Operation with these answers (a description, and the type of each content), and problems besides."""

    @dataclass
    class Described(Operation):
        def __post_init__(self) -> None:
            self.responses = {
                str(status): OpenAPIResponse(description, content=_content(content, answers=True))
                for status, (description, content) in answers.items()
            }
            self.responses["default"] = OpenAPIResponse(
                "What went wrong.", content=_content({MEDIA_TYPE: Problem}, answers=True)
            )
            if body is not None:
                self.request_body = RequestBody(_content(body, answers=False), description=told, required=True)

    return Described


def _content(types: Mapping[str, Any], *, answers: bool) -> dict[str, OpenAPIMediaType]:
    found = {}
    for media, kind in types.items():
        schemas, components = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
        found[media] = OpenAPIMediaType(Schema())
        written = _inlined(schemas[0], components)
        if answers:
            written = _numbers_may_be_null(written)
        found[media].schema = _RawSchema(_sent_as_events(written) if media == SSE else written)
    return found


def _sent_as_events(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a server-sent event whose data are what a schema says."""
    text = {"type": "string"}
    data = text | {"contentMediaType": "application/json", "contentSchema": schema}
    return {"type": "object", "properties": {"id": text, "event": text, "data": data}, "required": ["id", "data"]}


def _numbers_may_be_null(schema: Any) -> Any:
    """A JSON schema of what we write: a number that is not finite is null in JSON."""
    if isinstance(schema, list):
        return [_numbers_may_be_null(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _numbers_may_be_null(value) for key, value in schema.items()}
    return found | {"type": ["number", "null"]} if schema.get("type") == "number" else found


def _inlined(schema: Any, components: dict[str, Any]) -> Any:
    """A JSON schema with its references replaced by what they name."""
    if isinstance(schema, list):
        return [_inlined(each, components) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(components[schema["$ref"].rpartition("/")[2]], components)
    return {key: _inlined(value, components) for key, value in schema.items()}


def _either(kind: Any) -> dict[str, Any]:
    """In whichever of the two the client asks for."""
    return {"application/json": kind, wire.MSGPACK: kind}


_ANY_JOBS: Any = JobRequest | list[JobRequest]
_ANY_VIEWS: Any = JobView | list[JobView]
_VIEW = _either(JobView)
_VIEWS = _either(_ANY_VIEWS) | {NDJSON: JobLine}

SUBMITTED = _operation(
    {
        200: (
            "Every job has ended within `wait_s`; or, as NDJSON, each as it ends, then the others as they are.",
            _VIEWS,
        ),
        202: ("All are accepted.", _VIEWS),
    },
    _either(_ANY_JOBS) | {NDJSON: JobRequest},
    "One job or many.",
)
ONE_JOB = _operation({200: ("The job as it stands.", _VIEW)})
ONE_JOB_CANCELLED = _operation(
    {200: ("The job has ended.", _VIEW), 202: ("Whoever holds the job has been asked to end it.", _VIEW)}
)
ACCOUNTS = _operation({200: ("All terms, at one moment.", _either(Accounts))})
_SETTLED = {200: ("How many, and why others were not.", _either(Settled))}
DEAD = _operation({200: ("The newest first.", _either(list[DeadLetter]))})
DEAD_LETTER = _operation({200: ("The dead letter.", _either(DeadLetter))})
REPLAYED = _operation(_SETTLED, _either(Chosen), "Which ones.")
PURGED = _operation(_SETTLED)
DEVICES = _operation({200: ("The workers that are alive.", _either(list[Announcement]))})
KERNELS = _operation({200: ("The kernels, by name.", _either(list[KernelSpec]))})
STATUS = _operation({200: ("It is.", {"application/json": dict[str, str]})})
_MESSAGES = "Server-sent events; the data of each is a CloudEvent, and its id is where to go on (`Last-Event-ID`)."
EVENTS = _operation({200: (_MESSAGES, {SSE: CloudEvent})})
JOB_EVENTS = _operation(
    {200: (_MESSAGES, {SSE: CloudEvent}), 204: ("The event of `Last-Event-ID` was the job's last: come no more.", {})}
)
