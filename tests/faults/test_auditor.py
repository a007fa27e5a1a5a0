"""The auditor finds what it is there for: each lie is told to it here, on a real broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_ai import event, results, topology
from lepton_ai.event import Event
from queues.connection import Connection
from tests.faults.auditor import Auditor


@pytest.fixture
def auditor(tmp_path: Path, connection: Connection) -> Auditor:
    """It has seen one job submitted, acknowledged and ended well."""
    auditor = Auditor(tmp_path / "runs")
    auditor.acknowledge([("job", *auditor.numbers(1))])
    (tmp_path / "runs").write_text("0 1.0\n")
    _end(connection, "job")
    return auditor


def _end(connection: Connection, job: str) -> None:
    record = results.encode(results.success(job, {}, None), "msgpack")
    connection.call("SET", topology.result(job), record)
    connection.call("RPUSH", topology.reply("client"), record)
    connection.call("XADD", topology.EVENTS, "*", "e", event.encode(Event("job.succeeded", "worker", jobs=(job,))))


def test_an_honest_broker_is_found_honest(auditor: Auditor, connection: Connection) -> None:
    audit = auditor.audit(connection)
    assert (audit.lost, audit.duplicate_effects, audit.phantom, audit.re_executions, audit.left) == ([], 0, [], 0, {})
    assert auditor.unsuccessful(connection) == {}


def test_a_job_that_never_ended_is_lost(auditor: Auditor, connection: Connection) -> None:
    auditor.acknowledge([("gone", *auditor.numbers(1))])
    assert auditor.audit(connection).lost == ["gone"]


def test_a_job_of_which_nobody_knows_whether_it_was_taken_is_not(auditor: Auditor, connection: Connection) -> None:
    auditor.wonder(auditor.numbers(5))
    assert auditor.audit(connection).lost == []


def test_a_second_final_event_is_a_second_effect(auditor: Auditor, connection: Connection) -> None:
    connection.call("XADD", topology.EVENTS, "*", "e", event.encode(Event("job.failed", "other", jobs=("job",))))
    audit = auditor.audit(connection)
    assert audit.repeated_events == ["job"]
    assert audit.duplicate_effects == 1


def test_a_second_reply_is_a_second_effect(auditor: Auditor, connection: Connection) -> None:
    record = results.encode(results.success("job", {}, None), "msgpack")
    connection.call("RPUSH", topology.reply("another"), record)
    assert auditor.audit(connection).repeated_replies == ["job"]


def test_a_refused_job_that_ran_is_a_phantom(auditor: Auditor, connection: Connection, tmp_path: Path) -> None:
    (number,) = auditor.numbers(1)
    auditor.refuse([number])
    (tmp_path / "runs").write_text(f"0 1.0\n{number} 2.0\n")
    assert auditor.audit(connection).phantom == [number]


def test_a_kernel_that_ran_again_is_counted(auditor: Auditor, connection: Connection, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("0 1.0\n0 2.0\n0 3.0\n")
    assert auditor.audit(connection).re_executions == 2


def test_a_message_that_is_left_is_found(auditor: Auditor, connection: Connection) -> None:
    connection.call("LPUSH", topology.parked("some.kernel"), b"message")
    assert auditor.audit(connection).left == {topology.parked("some.kernel"): 1}


def test_what_is_counted_in_bundles_and_in_no_list_is_found(auditor: Auditor, connection: Connection) -> None:
    assert auditor.audit(connection).bundled == {}
    connection.call("HSET", topology.BUNDLED, topology.LANE, 3, topology.lane("ann"), 0)
    connection.call("HSET", topology.COUNTERS, "bundled", -2)
    assert auditor.audit(connection).bundled == {topology.LANE: 3, "counter": -2}


def test_what_was_accepted_and_became_nothing_breaks_conservation(auditor: Auditor, connection: Connection) -> None:
    assert auditor.audit(connection).conservation is None
    connection.call("HSET", topology.COUNTERS, "accepted", 5, "succeeded", 3, "failed", 1)
    assert auditor.audit(connection).conservation == 1
