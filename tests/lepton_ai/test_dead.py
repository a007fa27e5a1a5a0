"""Dead letters through every client: straight on a broker and over HTTP, one way and the other."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from lepton_ai import AsyncClient, Client, topology, wire
from lepton_ai.dead import DeadLetter, Settled
from lepton_ai.errors import BrokerUnavailable, InvalidArguments, JobDead
from lepton_ai.idempotency import job_id
from lepton_ai.identity import new_id
from lepton_ai.job import Options
from queues.connection import Connection
from queues.embedded import EmbeddedBroker
from tests.pipeline.ingest.test_routes import problem, serving


@pytest.fixture(scope="module")
def ingest_url(_embedded: EmbeddedBroker) -> Iterator[str]:
    with serving(_embedded.url) as (_, url):
        yield url


class Asked:
    """Any client's verbs, called from a test that does not wait."""

    def __init__(self, url: str, *, is_async: bool) -> None:
        self._url, self._is_async = url, is_async

    def __getattr__(self, verb: str) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            async def work() -> Any:
                async with AsyncClient(self._url) as client:
                    found = getattr(client, verb)(*arguments, **more)
                    return await found if inspect.isawaitable(found) else found

            if self._is_async:
                return asyncio.run(work())
            with Client(self._url) as client:
                return getattr(client, verb)(*arguments, **more)

        return call


@pytest.fixture(params=["direct", "direct-async", "http", "http-async"])
def client(request: pytest.FixtureRequest, broker_url: str, ingest_url: str) -> Asked:
    url = broker_url if request.param.startswith("direct") else ingest_url
    return Asked(url, is_async=request.param.endswith("async"))


def bury(connection: Connection, job: str | None = None, code: str = "poison", **more: Any) -> tuple[str, str]:
    """A dead letter as a worker or router leaves it: its entry and its job."""
    job = job or new_id()
    lane = more.pop("lane", topology.LANE)
    message = more.pop("message", None) or wire.envelope(
        job, "a.b", {"x": np.zeros((2, 3)), "k": 3}, more.pop("options", Options()), lane=lane
    )
    fields = {"job": job, "kernel": "a.b", "code": code, "reason": "it killed 3 workers", "attempts": "3"} | more
    words = [word for pair in (fields | {"message": message}).items() for word in pair]
    record = wire.encode_meta(wire.failure(job, JobDead("it killed 3 workers")), "json")
    connection.many([("SET", topology.result(job), record), ("HSET", topology.ATTEMPTS, job, 3)])
    entry: bytes = connection.call("XADD", topology.DEAD, "*", *words)
    return entry.decode(), job


def unreadable(connection: Connection) -> str:
    added: bytes = connection.call("XADD", topology.DEAD, "*", "reason", "no JSON", "message", b"\x00 odd")
    return added.decode()


def waiting(connection: Connection, lane: str = topology.LANE) -> list[str]:
    return [wire.read_envelope(each).headers.id for each in connection.call("LRANGE", lane, 0, -1)[::-1]]


def test_a_dead_letter_says_what_is_known_of_it(client: Asked, connection: Connection) -> None:
    entry, job = bury(connection, trace="Traceback ...")
    (found,) = client.dead()
    assert found == DeadLetter(
        entry=entry,
        job=job,
        kernel="a.b",
        code="poison",
        reason="it killed 3 workers",
        attempts=3,
        died_at=int(entry.partition("-")[0]) / 1000,
        size_bytes=found.size_bytes,
        arguments={"x": [2, 3], "k": 3},
        trace="Traceback ...",
    )
    assert found.size_bytes > 500


def test_one_that_nobody_could_read_is_listed_all_the_same(client: Asked, connection: Connection) -> None:
    entry = unreadable(connection)
    (found,) = client.dead()
    assert (found.entry, found.job, found.code, found.reason) == (entry, "", "unreadable", "no JSON")
    assert found.arguments is found.trace is None


def test_the_newest_come_first_and_no_more_than_asked(client: Asked, connection: Connection) -> None:
    entries = [bury(connection)[0] for _ in range(130)][::-1]
    assert [each.entry for each in client.dead()] == entries[:100]
    assert [each.entry for each in client.dead(limit=3)] == entries[:3]
    assert [each.entry for each in client.dead(limit=125)] == entries[:125]
    assert [each.entry for each in client.dead(limit=1000)] == entries


def test_one_is_found_by_its_entry_and_by_its_job(client: Asked, connection: Connection) -> None:
    (entry, job), *_ = [bury(connection) for _ in range(50)]
    assert [each.entry for each in (*client.dead(job=entry), *client.dead(job=job))] == [entry, entry]
    assert client.dead(job=new_id()) == client.dead(job="1-1") == []


@pytest.mark.parametrize("by", ["entry", "job"])
def test_a_replayed_job_waits_in_its_lane_and_its_old_end_is_forgotten(
    client: Asked, connection: Connection, by: str
) -> None:
    entry, job = bury(connection, options=Options(priority=9))
    other, _ = bury(connection)
    before = connection.call("XRANGE", topology.DEAD, entry, entry)[0][1]
    assert client.replay([entry if by == "entry" else job]) == Settled(1)
    (message,) = connection.call("LRANGE", topology.lane_list(9), 0, -1)
    assert message in before
    assert [each.entry for each in client.dead()] == [other]
    assert connection.call("EXISTS", topology.result(job)) == connection.call("HEXISTS", topology.ATTEMPTS, job) == 0
    assert connection.call("HGETALL", topology.COUNTERS) == {b"replayed": b"1"}
    with Client(client._url) as own:
        assert own.job(job).state == "waiting"


def test_a_replayed_job_of_a_tenant_goes_back_to_its_lane(client: Asked, connection: Connection) -> None:
    lane = topology.lane("team-a")
    _, job = bury(connection, job_id("k", "team-a"), lane=lane)
    connection.call("SET", topology.key(job), b"fingerprint", "EX", 10)
    client.replay([job])
    assert waiting(connection, lane) == [job]
    assert connection.call("SMEMBERS", topology.LANES) == [lane.encode()]
    assert connection.call("TTL", topology.key(job)) > 1000


def test_all_are_replayed_but_those_that_nobody_can_read(client: Asked, connection: Connection) -> None:
    jobs = [bury(connection)[1] for _ in range(45)]
    entry = unreadable(connection)
    settled = client.replay(all=True)
    assert settled.count == 45
    assert list(settled.left) == [entry]
    assert "no JSON" in settled.left[entry]
    assert waiting(connection) == jobs
    assert [each.entry for each in client.dead()] == [entry]


def test_what_cannot_be_replayed_is_said_and_the_rest_is(client: Asked, connection: Connection) -> None:
    _, job = bury(connection)
    odd = unreadable(connection)
    lies, _ = bury(connection, message=b"{}")
    settled = client.replay([job, odd, lies, "1-1", "nobody"])
    assert settled.count == 1
    assert set(settled.left) == {odd, lies, "1-1", "nobody"}
    assert "nobody can read" in settled.left[odd]
    assert "cannot be read" in settled.left[lies]
    assert "not among" in settled.left["1-1"]
    assert waiting(connection) == [job]


def test_two_operators_at_once_replay_each_once(broker_url: str, ingest_url: str, connection: Connection) -> None:
    jobs = [bury(connection)[1] for _ in range(30)]
    start = threading.Barrier(6)

    def replay(number: int) -> int:
        with Client(ingest_url if number % 2 else broker_url) as own:
            own.dead()
            start.wait(30)
            return own.replay(all=True).count

    with ThreadPoolExecutor(6) as pool:
        counts = list(pool.map(replay, range(6)))
    assert sum(counts) == 30
    assert sorted(waiting(connection)) == sorted(jobs)
    assert connection.call("HGET", topology.COUNTERS, "replayed") == b"30"


def test_what_is_purged_is_gone_and_its_job_keeps_its_error(client: Asked, connection: Connection) -> None:
    entries = [bury(connection) for _ in range(5)]
    assert client.purge([entries[0][0], entries[1][1], "1-1", "nobody"]).count == 2
    assert set(client.purge(["1-1", "nobody"]).left) == {"1-1", "nobody"}
    assert {each.job for each in client.dead()} == {job for _, job in entries[2:]}
    assert connection.call("EXISTS", topology.result(entries[0][1])) == 1
    assert client.purge(all=True) == Settled(3)
    assert client.purge(all=True) == Settled(0)
    assert client.dead() == waiting(connection) == []


@pytest.mark.parametrize("verb", ["replay", "purge"])
@pytest.mark.parametrize("wrong", [{}, {"ids": []}, {"ids": ["1-1"], "all": True}, {"ids": "1-1"}])
def test_all_is_never_meant_by_mistake(client: Asked, verb: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArguments):
        getattr(client, verb)(**wrong)


def test_a_limit_is_one_or_more(client: Asked) -> None:
    with pytest.raises(InvalidArguments):
        client.dead(limit=0)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "http://127.0.0.1:1"])
def test_without_a_broker_it_is_said(url: str) -> None:
    for is_async in (False, True):
        with pytest.raises(BrokerUnavailable):
            Asked(url, is_async=is_async).dead()


# -- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def http(ingest_url: str, connection: Connection) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=ingest_url, timeout=15) as http:
        yield http


def test_dead_letters_over_http(http: httpx.Client, connection: Connection) -> None:
    (first, job), (second, _), (third, _) = (bury(connection) for _ in range(3))
    assert [each["entry"] for each in http.get("/v1/dead").json()] == [third, second, first]
    assert [each["entry"] for each in http.get("/v1/dead", params={"limit": 1, "after": third}).json()] == [second]
    assert http.get(f"/v1/dead/{first}").json() == http.get(f"/v1/dead/{job}").json()
    assert http.get(f"/v1/dead/{job}").json()["arguments"] == {"x": [2, 3], "k": 3}
    assert http.post("/v1/dead/replay", json={"entries": [first]}).json() == {"count": 1, "left": {}}
    assert http.delete(f"/v1/dead/{second}").json() == {"count": 1, "left": {}}
    assert http.delete("/v1/dead").json() == {"count": 1, "left": {}}
    assert http.post("/v1/dead/replay", json={"all": True}).json() == {"count": 0, "left": {}}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/dead?limit=0", None, 422),
        ("GET", "/v1/dead?limit=101", None, 422),
        ("GET", "/v1/dead?after=x", None, 422),
        ("GET", "/v1/dead/1-1", None, 404),
        ("DELETE", "/v1/dead/1-1", None, 404),
        ("POST", "/v1/dead/replay", {}, 422),
        ("POST", "/v1/dead/replay", {"entries": ["1-1"], "all": True}, 422),
        ("POST", "/v1/dead/replay", {"entry": "1-1"}, 422),
        ("POST", "/v1/dead/replay", ["1-1"], 422),
    ],
)
def test_what_is_wrong_is_a_problem(http: httpx.Client, method: str, path: str, body: Any, status: int) -> None:
    problem(http.request(method, path, json=body), status)
