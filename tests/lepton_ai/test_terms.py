from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lepton_ai import AsyncClient, Client, results, topology, wire
from lepton_ai.errors import InvalidArguments, OptionNotSupported
from lepton_ai.job import Options
from lepton_ai.terms import Terms, check_tenant
from queues.connection import Connection

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DAY_S = 86_400


@pytest.mark.parametrize(
    ("terms", "field"),
    [
        ({"delay_s": -0.001}, "delay_s"),
        ({"delay_s": 30 * DAY_S + 1}, "delay_s"),
        ({"delay_s": float("nan")}, "delay_s"),
        ({"delay_s": float("inf")}, "delay_s"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": -1}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"deadline_s": 1e300}, "deadline_s"),
        ({"delay_s": 5, "deadline_s": 5}, "deadline_s"),
        ({"options": Options(must_meet=True)}, "must_meet"),
        ({"options": Options(limit_s=0)}, "limit_s"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(terms: dict[str, Any], field: str) -> None:
    with pytest.raises(OptionNotSupported) as raised:
        Terms(**terms).checked()
    assert raised.value.field == field


@pytest.mark.parametrize("terms", [{}, {"delay_s": 0}, {"delay_s": 30 * DAY_S}, {"delay_s": 1, "deadline_s": 1.5}])
def test_what_is_in_range_is_taken(terms: dict[str, Any]) -> None:
    assert Terms(**terms).checked() == Terms(**terms)


def test_times_are_in_utc_from_now() -> None:
    found = Terms(delay_s=1.5, deadline_s=60).times(NOW)
    assert found == {"eta": "2026-01-02T03:04:06.500000+00:00", "expires": "2026-01-02T03:05:05+00:00"}
    assert Terms(delay_s=0).times(NOW) == {}


@pytest.mark.parametrize("name", [None, "a", "0", "team-a", "team_a", "x" * 63])
def test_a_tenants_name_is_taken(name: str | None) -> None:
    assert check_tenant(name) == name


@pytest.mark.parametrize("name", ["", "A", "-a", "_a", "a.b", "a b", "x" * 64, "ä", "a\n", "backfill"])
def test_what_can_be_no_tenant_is_refused_by_both_clients(name: str) -> None:
    for make in (
        check_tenant,
        lambda name: Client("redis://x", tenant=name),
        lambda n: AsyncClient("http://x", tenant=n),
    ):
        with pytest.raises(InvalidArguments) as raised:
            make(name)
        assert raised.value.field == "tenant"


# -- as they travel ---------------------------------------------------------------------------------------------------


def message(connection: Connection, lane: str = topology.LANE) -> wire.Envelope:
    return wire.read_envelope(connection.call("RPOP", lane))


def test_a_delay_a_deadline_and_a_limit_are_celerys_headers_and_ours(broker_url: str, connection: Connection) -> None:
    with Client(broker_url) as client:
        client.submit("a.b", {"x": 1}, delay_s=60, deadline_s=90, limit_s=2.5)
    headers = message(connection).headers
    now = datetime.now(UTC)
    assert isinstance(headers.expires, str)
    assert headers.eta is not None
    assert timedelta(seconds=50) < datetime.fromisoformat(headers.eta) - now < timedelta(seconds=61)
    assert timedelta(seconds=80) < datetime.fromisoformat(headers.expires) - now < timedelta(seconds=91)
    assert wire.read_options(headers).limit_s == 2.5


def test_rows_have_them_too(broker_url: str, connection: Connection) -> None:
    with Client(broker_url) as client:
        client.submit_many("a.b", [{"x": 1}, {"x": 2}], delay_s=60, deadline_s=90, limit_s=2)
        jobs = client.map("a.b", [{"x": 3}], deadline_s=90, limit_s=2)
        from threading import Thread

        thread = Thread(target=lambda: next(jobs, None), daemon=True)
        thread.start()
        for _ in range(3):
            raw = connection.call("BRPOP", topology.LANE, 10)[1]
            headers = wire.read_envelope(raw).headers
            assert headers.expires is not None
            assert wire.read_options(headers).limit_s == 2
        record = results.encode(results.success(headers.id, {"x": 3}, None), "msgpack")
        connection.call("SET", topology.result(headers.id), record)
        thread.join(10)


def test_that_a_deadline_must_be_met_is_an_option_of_ours(broker_url: str, connection: Connection) -> None:
    with Client(broker_url) as client:
        client.submit_many("a.b", [{"x": 1}] * 10, deadline_s=90, must_meet=True)
    for _ in range(10):
        assert wire.read_options(message(connection).headers).must_meet


def test_nothing_is_sent_where_a_term_is_wrong(broker_url: str, connection: Connection) -> None:
    with Client(broker_url) as client:
        for wrong in ({"delay_s": -1.0}, {"deadline_s": 0.0}, {"limit_s": 0.0}, {"must_meet": True}):
            with pytest.raises(OptionNotSupported):
                client.submit("a.b", {}, **wrong)
            with pytest.raises(OptionNotSupported):
                client.map("a.b", [], **wrong)
    assert connection.call("DBSIZE") == 0


@pytest.mark.parametrize("priority", [None, 1, 9])
def test_a_tenants_jobs_wait_in_its_lane_which_is_listed(
    broker_url: str, connection: Connection, priority: int | None
) -> None:
    with Client(broker_url, tenant="team-a") as client:
        job = client.submit("a.b", {"x": 1}, priority=priority)
    found = message(connection, topology.lane_list(priority or 5, "lepton.ingest.team-a"))
    assert found.headers.id == job.id
    assert connection.call("SMEMBERS", topology.LANES) == [b"lepton.ingest.team-a"]
    assert connection.call("LLEN", topology.LANE) == 0
