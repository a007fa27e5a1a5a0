from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai import results, wire
from lepton_ai.identity import new_id
from lepton_ai.job import Options, state_of
from pipeline import intake
from pipeline.intake import Dead, Incoming, Refused

#: 2026-01-01, in seconds since the epoch.
NOW = 1767225600.0


def message(**headers: Any) -> bytes:
    found = json.loads(wire.envelope(new_id(), "a.b", {"n": 1}, Options(reply_to="lepton:reply:me", result="msgpack")))
    found["headers"] |= headers
    return json.dumps(found).encode()


def test_a_message_is_a_job_with_its_options() -> None:
    found = intake.read(message(), NOW)
    assert isinstance(found, Incoming)
    assert (found.headers.task, found.options.reply_to) == ("a.b", "lepton:reply:me")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"lepton": {"colour": "red"}}, "option_not_supported"),
        ({"lepton": {"reply_to": "lepton:reply:me", "result": "msgpack", "priority": 10}}, "option_not_supported"),
        ({"eta": "soon"}, "invalid_arguments"),
        ({"expires": "soon"}, "invalid_arguments"),
        ({"expires": 1e300}, "invalid_arguments"),
    ],
)
def test_what_cannot_be_done_is_refused_and_says_why(headers: dict[str, Any], code: str) -> None:
    found = intake.read(message(**headers), NOW)
    assert isinstance(found, Refused)
    assert (found.error.code, found.outcome.status) == (code, "failed")
    assert results.read(found.outcome.record).status == "FAILURE"


def test_a_refusal_reaches_him_who_waits_in_his_encoding() -> None:
    found = intake.read(message(eta="soon"), NOW)
    assert isinstance(found, Refused)
    assert found.outcome.reply_to == "lepton:reply:me"
    assert results.read(found.outcome.record).status == "FAILURE"
    assert found.outcome.record[:1] != b"{", "msgpack, as the client asked"


@pytest.mark.parametrize(
    ("eta", "due_at"),
    [
        (None, None),
        ("2026-01-01T00:00:10+00:00", NOW + 10),
        ("2026-01-01T00:00:10Z", NOW + 10),
        ("2026-01-01T00:00:10", NOW + 10),
        ("2026-01-01T02:00:10+02:00", NOW + 10),
        ("2001-01-01T00:00:00+00:00", 978307200.0),
        ("2026-01-31T00:00:00+00:00", NOW + 30 * 86_400),
    ],
)
def test_a_job_says_when_it_is_due(eta: str | None, due_at: float | None) -> None:
    found = intake.read(message(eta=eta), NOW)
    assert isinstance(found, Incoming)
    assert found.due_at == due_at


def test_nobody_is_held_back_for_more_than_thirty_days() -> None:
    found = intake.read(message(eta="2026-01-31T00:00:01+00:00"), NOW)
    assert isinstance(found, Refused)
    assert (found.error.code, found.error.field) == ("invalid_arguments", "eta")


@pytest.mark.parametrize("expires", ["2026-01-01T00:00:10+00:00", NOW + 10])
def test_a_job_says_after_when_it_is_not_wanted_any_more(expires: str | float) -> None:
    found = intake.read(message(expires=expires), NOW)
    assert isinstance(found, Incoming)
    assert found.deadline_at == NOW + 10


def test_time_limits_are_no_reason_to_refuse() -> None:
    assert isinstance(intake.read(message(timelimit=[1, None]), NOW), Incoming)


def test_whatever_stands_in_the_headers_for_those_who_watch_is_no_reason_to_refuse() -> None:
    assert isinstance(intake.read(message(origin=None, argsrepr=7, kwargsrepr=["x"]), NOW), Incoming)


@given(st.binary(max_size=200))
def test_bytes_never_raise(data: bytes) -> None:
    assert isinstance(intake.read(data, NOW), Dead)


@pytest.mark.parametrize(("step", "priority"), [(0, None), (3, 3), (5, 3), (6, 2), (9, 1)])
def test_a_celery_priority_is_ours_where_ours_is_not_given(step: int, priority: int | None) -> None:
    found = json.loads(message())
    found["properties"]["priority"] = step
    read = intake.read(json.dumps(found).encode(), NOW)
    assert isinstance(read, Incoming)
    assert read.options.priority == priority


def test_a_cancelled_job_ends_as_revoked() -> None:
    outcome = intake.cancelled("one", Options(), "json")
    assert (outcome.status, results.read(outcome.record).status) == ("cancelled", "REVOKED")


def test_an_expired_job_ends_as_revoked_and_says_that_it_expired() -> None:
    outcome = intake.expired("one", Options(), "json")
    meta = results.read(outcome.record)
    assert (outcome.status, meta.status) == ("expired", "REVOKED")
    assert state_of(meta, None) == "expired"
