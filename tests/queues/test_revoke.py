from __future__ import annotations

from lepton_ai import topology
from lepton_ai.identity import new_ids
from lepton_ai.settings import Settings
from queues.connection import Connection
from queues.revoke import revoke


def test_every_job_is_marked_once_after_the_node_has_heeded_it(
    broker_url: str, connection: Connection, settings: Settings
) -> None:
    jobs, heeded = new_ids(3), []
    told = revoke(broker_url, "router-1", settings, [*jobs, jobs[0]], heeded.extend)
    assert told == {"ok": "tasks flagged as revoked: 4"}
    assert heeded == [*jobs, jobs[0]]
    assert {each.decode() for each in connection.call("ZRANGE", topology.CANCELLED, 0, -1)} == set(jobs)


def test_one_id_is_no_list_of_letters(broker_url: str, connection: Connection, settings: Settings) -> None:
    revoke(broker_url, "router-1", settings, "one")
    assert connection.call("ZRANGE", topology.CANCELLED, 0, -1) == [b"one"]


def test_many_are_marked_in_parts(broker_url: str, connection: Connection, settings: Settings) -> None:
    revoke(broker_url, "router-1", settings, new_ids(5000))
    assert connection.call("ZCARD", topology.CANCELLED) == 5000
    assert connection.call("XLEN", topology.EVENTS) == 5


def test_more_than_can_be_marked_in_good_time_are_refused_and_none_is_marked(
    broker_url: str, connection: Connection, settings: Settings
) -> None:
    told = revoke(broker_url, "router-1", settings, new_ids(50_001))
    assert "50000 are the most" in told["error"]
    assert connection.call("ZCARD", topology.CANCELLED) == 0
