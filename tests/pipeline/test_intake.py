from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai import wire
from lepton_ai.identity import new_id
from lepton_ai.job import Options
from pipeline import intake
from pipeline.intake import Dead, Incoming, Refused


def message(**headers: Any) -> bytes:
    found = json.loads(wire.envelope(new_id(), "a.b", {"n": 1}, Options(reply_to="lepton:reply:me", result="msgpack")))
    found["headers"] |= headers
    return json.dumps(found).encode()


def test_a_message_is_a_job_with_its_options() -> None:
    found = intake.read(message())
    assert isinstance(found, Incoming)
    assert (found.headers.task, found.options.reply_to) == ("a.b", "lepton:reply:me")


@pytest.mark.parametrize("headers", [{"eta": "2030-01-01T00:00:00+00:00"}, {"timelimit": [1, None]}])
def test_what_is_not_done_is_refused_to_him_who_waits_in_his_encoding(headers: dict[str, Any]) -> None:
    found = intake.read(message(**headers))
    assert isinstance(found, Refused)
    assert found.outcome.reply_to == "lepton:reply:me"
    assert wire.read_meta(found.outcome.record).status == "FAILURE"
    assert found.outcome.record[:1] != b"{", "msgpack, as the client asked"


def test_whatever_stands_in_the_headers_for_those_who_watch_is_no_reason_to_refuse() -> None:
    assert isinstance(intake.read(message(origin=None, argsrepr=7, kwargsrepr=["x"])), Incoming)


@given(st.binary(max_size=200))
def test_bytes_never_raise(data: bytes) -> None:
    assert isinstance(intake.read(data), Dead)


@pytest.mark.parametrize(("step", "priority"), [(0, None), (3, 3), (5, 3), (6, 2), (9, 1)])
def test_a_celery_priority_is_ours_where_ours_is_not_given(step: int, priority: int | None) -> None:
    found = json.loads(message())
    found["properties"]["priority"] = step
    read = intake.read(json.dumps(found).encode())
    assert isinstance(read, Incoming)
    assert read.options.priority == priority


def test_a_cancelled_job_ends_as_revoked() -> None:
    outcome = intake.cancelled("one", Options(), "json")
    assert (outcome.status, wire.read_meta(outcome.record).status) == ("cancelled", "REVOKED")
