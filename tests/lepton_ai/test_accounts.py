"""The accounts, through every client and by the doctor."""

from __future__ import annotations

from typing import Any

import pytest

from lepton_ai import topology
from lepton_ai.accounts import Accounts, accounts_of, sizes_command
from lepton_ai.commands.facts import gather
from lepton_ai.errors import BrokerUnavailable
from queues.broker import Broker
from queues.connection import Connection
from tests.lepton_ai.letters import Asked, client, ingest_url

__all__ = ["client", "ingest_url"]


@pytest.fixture(autouse=True)
def _work(broker: Broker, connection: Connection) -> None:
    """Something of everything."""
    connection.call("HSET", topology.COUNTERS, "accepted", 10, "succeeded", 5, "failed", 1, "fenced", 2)
    connection.call("SADD", topology.LANES, topology.lane("team-a"))
    connection.call("LPUSH", topology.LANE, "x", "y")
    connection.call("LPUSH", topology.lane("team-a"), "x")
    connection.call("LPUSH", topology.AGAIN, "x")
    connection.call("SADD", topology.DEVICES, "cpu")
    connection.call("LPUSH", topology.device_queue("cpu"), "x", "y")


def test_every_job_is_somewhere_or_has_ended(client: Asked) -> None:
    found: Accounts = client.accounts()
    assert (found.accepted, found.waiting, found.in_flight) == (13, 4, 2)
    assert found.difference == 13 - 6 - 4 - 2 == 1
    assert (found.terms["lanes"], found.terms["again"], found.terms["fenced"]) == (3, 1, 2)
    assert found.equation() == ("13 accepted = 5 succeeded + 1 failed + 4 waiting + 2 in flight + 1 unaccounted for")


def test_the_doctor_reads_them_at_either_address(broker_url: str, ingest_url: str) -> None:
    for url in (broker_url, ingest_url):
        found = gather(url, {}).accounts
        assert found is not None
        assert found.difference == 1


def test_a_broker_without_our_functions_says_so(connection: Connection) -> None:
    listed = connection.call("FUNCTION", "LIST", "LIBRARYNAME", "lepton_*")
    assert str(sizes_command(listed)[1]).startswith("lepton_sizes_")
    with pytest.raises(BrokerUnavailable, match="start a router"):
        sizes_command([])


@pytest.mark.parametrize("flat", [[b"accepted", 3, b"new_term", 1], ["accepted", 3, "new_term", 1]])
def test_a_term_of_a_later_release_is_shown_too(flat: list[Any]) -> None:
    assert accounts_of(flat) == Accounts(3, 0, 0, 0, {"accepted": 3, "new_term": 1})
