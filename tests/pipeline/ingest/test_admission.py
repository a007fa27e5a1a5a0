"""What an ingest lets in: one job a key, a lane a tenant, and no more than there is room for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import msgspec
import pytest
import redis.asyncio as redis

from lepton_ai import AsyncClient, Client, event, results, topology, wire
from lepton_ai.bundle import shared_note
from lepton_ai.device import Announcement, Peaks
from lepton_ai.durability import Barrier
from lepton_ai.errors import (
    BrokerUnavailable,
    InvalidArguments,
    InvalidSettings,
    KernelFailed,
    KeyConflict,
    LeptonError,
    OptionNotSupported,
    Overloaded,
    QuotaExceeded,
    TooLarge,
    UnknownJob,
)
from lepton_ai.idempotency import fingerprint, job_id
from lepton_ai.identity import minute_of, new_id, run_of
from lepton_ai.job import Placement, Record
from lepton_ai.kernel import KernelSpec
from lepton_ai.remote import JobRequest
from lepton_ai.settings import Settings
from pipeline.ingest import admission
from pipeline.ingest.admission import Drain
from pipeline.ingest.door import Door
from pipeline.ingest.view import view as view_of
from queues.connection import Connection
from queues.embedded import EmbeddedBroker
from tests.pipeline.ingest.served import problem, serving

DOUBLE = KernelSpec("test.double", {"x": "float32[n]"}, {"y": "float32[n]"}, "n", "8*n")
JOB = {"kernel": "test.double", "arguments": {"x": [1.0, 2.0]}}
Found = TypeVar("Found")


@pytest.fixture(autouse=True)
def _worker(connection: Connection) -> None:
    """A worker's lease, without a worker."""
    value = Announcement("w", "w", "cpu", "cpu", 1, False, Peaks(1e9, 1e9, 1e9, 0.0, 0.0), (DOUBLE,), 0.0)
    connection.many([("SET", topology.lease("w"), msgspec.msgpack.encode(value)), ("SADD", topology.HOLDERS, "w")])


def through(url: str, work: Callable[[Door], Awaitable[Found]], **settings: Any) -> Found:
    """What `work` makes of an open door."""

    async def run() -> Found:
        door = Door(Settings(**settings), url)
        async with door.open():
            return await work(door)

    return asyncio.run(run())


def request(values: Any = (1.0, 2.0), **more: Any) -> JobRequest:
    return JobRequest("test.double", {"x": list(values)}, **more)


def waiting(connection: Connection, lane: str = topology.LANE) -> list[str]:
    """The ids on a lane, oldest first."""
    return [wire.read_envelope(each).headers.id for each in connection.call("LRANGE", lane, 0, -1)[::-1]]


def end(connection: Connection, job: str) -> None:
    record = results.encode(results.success(job, {"y": [2.0, 4.0]}, Record()), "msgpack")
    connection.call("SET", topology.result(job), record)


def accepted(connection: Connection) -> list[str]:
    """The jobs that the event stream says were accepted."""
    entries = connection.call("XRANGE", topology.EVENTS, "-", "+")
    return [job for _, (_, raw) in entries for each in event.decode(raw) for job in each.jobs]


# -- many at once -----------------------------------------------------------------------------------------------------


def calls(connection: Connection) -> int:
    """How often a function has been called, by anybody."""
    found: bytes = connection.call("INFO", "commandstats")
    return sum(
        int(line.partition(b"calls=")[2].partition(b",")[0]) for line in found.splitlines() if b"_fcall:" in line
    )


def test_requests_that_come_at_once_are_accepted_in_a_step_or_two(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        await door.accept([request()], 0)  # the functions are there now, and the kernels known
        before = calls(connection)
        found = await asyncio.gather(*(door.accept([request()] * 2, 0, "team-a") for _ in range(50)))
        return found, calls(connection) - before

    found, called = through(broker_url, work)
    jobs = [view.id for views in found for view in views]
    assert len(set(jobs)) == 100
    assert sorted(waiting(connection, topology.lane("team-a"))) == sorted(accepted(connection)[1:]) == sorted(jobs)
    assert called <= 2


def test_where_there_is_no_room_for_all_that_come_at_once_each_has_its_own_answer(
    broker_url: str, connection: Connection
) -> None:
    async def work(door: Door) -> Any:
        return await asyncio.gather(*(door.accept([request()], 0) for _ in range(8)), return_exceptions=True)

    found = through(broker_url, work, waiting_jobs=3)
    kept = [each[0].id for each in found if not isinstance(each, Overloaded)]
    assert len(kept) == 3
    assert sorted(waiting(connection)) == sorted(kept)


def test_whoever_goes_away_does_not_harm_who_came_with_him(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        requests = [asyncio.create_task(door.accept([request()], 0)) for _ in range(3)]
        while not waiting(connection):
            requests[1].cancel()
            await asyncio.sleep(0)
        first, gone, last = await asyncio.gather(*requests, return_exceptions=True)
        assert isinstance(gone, asyncio.CancelledError)
        return [first[0].id, last[0].id]

    kept = through(broker_url, work)
    assert set(kept) <= set(waiting(connection))


def test_each_of_those_that_come_at_once_is_told_that_the_broker_is_away(broker_url: str) -> None:
    async def work(door: Door) -> Any:
        async def fails(*_: object, **__: object) -> None:
            raise redis.ConnectionError("gone")

        await door.accept([request()], 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(admission.functions, "call", fails)
            return await asyncio.gather(*(door.accept([request()], 0) for _ in range(3)), return_exceptions=True)

    found = through(broker_url, work)
    assert [type(each) for each in found] == [BrokerUnavailable] * 3
    assert len(set(map(id, found))) == 3


# -- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_is_accepted_once_and_told_of_once(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        return [(await door.accept([request(key="k")], 0))[0] for _ in range(3)]

    assert {(view.id, view.state, view.kernel) for view in through(broker_url, work)} == {
        (job_id("k"), "waiting", "test.double")
    }
    assert waiting(connection) == accepted(connection) == [job_id("k")]
    assert connection.call("GET", topology.key(job_id("k"))) == fingerprint("test.double", {"x": [1, 2]})


def test_a_key_that_stands_for_another_job_refuses_the_whole_list_and_names_it(
    broker_url: str, connection: Connection
) -> None:
    async def work(door: Door) -> Any:
        await door.accept([request(key="k")], 0)
        return await door.accept([request(), request(key="l"), request([3.0], key="k")], 0)

    with pytest.raises(KeyConflict, match="'k'") as raised:
        through(broker_url, work)
    assert (raised.value.field, getattr(raised.value, "index", None)) == ("key", 2)
    assert waiting(connection) == [job_id("k")]
    assert connection.call("EXISTS", topology.key(job_id("l"))) == 0


def test_a_list_has_each_key_once(broker_url: str, connection: Connection) -> None:
    requests = [request(key="k"), request(), request(key="k"), request(key="l")]
    views = through(broker_url, lambda door: door.accept(requests, 0))
    assert [views[at].id for at in (0, 2, 3)] == [job_id("k"), job_id("k"), job_id("l")]
    assert waiting(connection) == [job_id("k"), views[1].id, job_id("l")]
    assert sorted(accepted(connection)) == sorted(waiting(connection))
    with pytest.raises(KeyConflict) as raised:
        through(broker_url, lambda door: door.accept([request(key="m"), request([9.0], key="m")], 0))
    assert getattr(raised.value, "index", None) == 1


def test_a_job_that_has_ended_is_answered_with_its_result(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        await door.accept([request(key="k")], 0)
        end(connection, job_id("k"))
        return [(await door.accept([request(key="k")], wait_s))[0] for wait_s in (0, 5)]

    for view in through(broker_url, work):
        assert (view.state, view.result) == ("succeeded", {"y": [2.0, 4.0]})
    assert len(waiting(connection)) == 1


def test_whoever_waits_for_anothers_job_has_its_result_too(broker_url: str, connection: Connection) -> None:
    """The direct client's reply list gets the reply; two doors find the result by its key."""
    with Client(broker_url) as client:
        client.submit("test.double", {"x": [1.0, 2.0]}, key="k")

    async def work(door: Door) -> Any:
        asyncio.get_running_loop().call_later(0.2, end, connection, job_id("k"))
        lines = door.accept_each([request(key="k"), request(key="k")], 5)
        told = [each async for views in lines for each in views]
        return told, await door.accept([request(key="k"), request(key="k")], 5)

    told, views = through(broker_url, work)
    assert [index for index, _ in told] == [0, 1]
    assert [view.state for view in (*(view for _, view in told), *views)] == ["succeeded"] * 4
    assert len(waiting(connection)) == 1


def test_a_job_that_goes_on_is_answered_as_it_stands_after_the_wait(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        await door.accept([request(key="k")], 0)
        return await door.accept([request(key="k"), request()], 0.1)

    assert [view.state for view in through(broker_url, work)] == ["waiting", "waiting"]


def test_a_job_of_a_key_is_known_as_long_as_its_key_is(broker_url: str, connection: Connection) -> None:
    connection.call("SET", topology.key(job_id("k")), b"")
    view = through(broker_url, lambda door: door.look(job_id("k"), 0))
    assert view.state == "waiting"
    with pytest.raises(UnknownJob):
        through(broker_url, lambda door: door.look(job_id("l"), 0))


def test_a_job_between_its_tries_is_scheduled_and_its_last_error_known() -> None:
    error = KernelFailed("not yet")
    placement = Placement("job", "a.b", "scheduled", "it is due soon", 0.0, "router-1")
    found = view_of("job", "a.b", results.retrying("job", error, None), placement)
    assert found.state == "scheduled"
    assert found.record is not None
    assert (found.record.placement, found.record.error) == (placement, error.to_wire())


def test_a_job_that_is_due_later_is_scheduled(broker_url: str, connection: Connection) -> None:
    connection.call("ZADD", topology.ETA, 4_102_444_800_000, "job")
    view = through(broker_url, lambda door: door.look("job", 0))
    assert view.state == "scheduled"
    assert view.record is not None
    assert view.record.placement is not None
    assert view.record.placement.reason == "it is due at 2100-01-01T00:00:00+00:00"


def test_each_job_of_a_bundle_that_was_placed_is_shown_where_it_went_itself(
    broker_url: str, connection: Connection
) -> None:
    jobs = run_of(new_id(), 6)
    placed = Placement(jobs[0], "a.b", "placed", "because", 1.0, "router-1", "cpu")
    note = shared_note(msgspec.msgpack.encode(placed), 4)
    connection.call("HSET", topology.jobs(minute_of(jobs[0]) or 0), jobs[0][:-3], note)

    async def work(door: Door) -> Any:
        return [await door.look(job, 0) for job in jobs[:4]]

    views = through(broker_url, work)
    assert [(view.id, view.state, view.kernel) for view in views] == [(job, "placed", "a.b") for job in jobs[:4]]
    assert [view.record.placement.job for view in views] == list(jobs[:4])
    with pytest.raises(UnknownJob):
        through(broker_url, lambda door: door.look(jobs[4], 0))


# -- terms and tenants ------------------------------------------------------------------------------------------------


def test_the_terms_of_a_job_travel_with_it(broker_url: str, connection: Connection) -> None:
    through(broker_url, lambda door: door.accept([request(delay_s=60, deadline_s=90, limit_s=2.5)], 0))
    headers = wire.read_envelope(connection.call("RPOP", topology.LANE)).headers
    assert headers.eta is not None
    assert isinstance(headers.expires, str)
    assert headers.eta < headers.expires
    assert wire.read_options(headers).limit_s == 2.5


@pytest.mark.parametrize("wrong", [{"delay_s": -1}, {"deadline_s": 0}, {"limit_s": 0}, {"delay_s": 1e9}])
def test_terms_out_of_range_are_refused_by_name_and_index(
    broker_url: str, connection: Connection, wrong: dict[str, float]
) -> None:
    with pytest.raises(OptionNotSupported) as raised:
        through(broker_url, lambda door: door.accept([request(), request(**wrong)], 0))
    assert (raised.value.field, getattr(raised.value, "index", None)) == (*wrong, 1)
    assert waiting(connection) == []


def test_a_tenants_jobs_wait_in_its_lane_which_is_listed(broker_url: str, connection: Connection) -> None:
    views = through(broker_url, lambda door: door.accept([request(key="k"), request(priority=9)], 0, "team-a"))
    lane = topology.lane("team-a")
    assert [waiting(connection, each) for each in (lane, topology.lane_list(9, lane))] == [[v.id] for v in views]
    assert views[0].id == job_id("k", "team-a")
    assert connection.call("SMEMBERS", topology.LANES) == [lane.encode()]
    assert waiting(connection) == []


@pytest.mark.parametrize("name", ["", "A", "backfill", "x" * 64])
def test_what_can_be_no_tenant_is_refused(broker_url: str, name: str) -> None:
    with pytest.raises(InvalidArguments) as raised:
        through(broker_url, lambda door: door.accept([request()], 0, name))
    assert raised.value.field == "tenant"


# -- room -------------------------------------------------------------------------------------------------------------


def refused(url: str, tenant: str | None = None, count: int = 1, **settings: Any) -> LeptonError:
    with pytest.raises(LeptonError) as raised:
        through(url, lambda door: door.accept([request()] * count, 0, tenant), **settings)
    return raised.value


def test_a_tenant_has_its_quota_and_others_theirs(broker_url: str, connection: Connection) -> None:
    def submit(tenant: str | None, count: int) -> Any:
        return through(broker_url, lambda door: door.accept([request()] * count, 0, tenant), tenant_jobs=10)

    submit("team-a", 9)
    error = refused(broker_url, "team-a", 2, tenant_jobs=10)
    assert isinstance(error, QuotaExceeded)
    assert error.message == "too much of the tenant team-a waits already: 9 jobs, and 10 jobs may"
    assert len(waiting(connection, topology.lane("team-a"))) == 9
    submit("team-b", 10)
    submit(None, 10)
    assert isinstance(refused(broker_url, None, tenant_jobs=10), QuotaExceeded)


def test_all_lanes_together_have_a_limit(broker_url: str, connection: Connection) -> None:
    for tenant in ("team-a", "team-b", None):
        through(broker_url, lambda door, of=tenant: door.accept([request()] * 3, 0, of))
    error = refused(broker_url, "team-c", 2, waiting_jobs=10)
    assert isinstance(error, Overloaded)
    assert error.message == "too much waits already: 9 jobs, and 10 jobs may"


@pytest.mark.parametrize(
    ("limits", "kind"), [({"tenant_bytes": 1000}, QuotaExceeded), ({"waiting_bytes": 1000}, Overloaded)]
)
def test_bytes_have_limits_too(broker_url: str, limits: dict[str, int], kind: type[LeptonError]) -> None:
    error = refused(broker_url, None, 2, **limits)
    assert type(error) is kind
    assert "MiB" in error.message


def test_a_broker_whose_memory_is_nearly_full_takes_no_more(broker_url: str, connection: Connection) -> None:
    used = int(connection.call("INFO", "memory").decode().partition("used_memory:")[2].split()[0])
    connection.call("CONFIG", "SET", "maxmemory", used * 10 // 9)
    try:
        error = refused(broker_url)
    finally:
        connection.call("CONFIG", "SET", "maxmemory", "0")
    assert isinstance(error, Overloaded)
    assert "nearly full" in error.message
    assert waiting(connection) == []


def test_a_job_that_is_there_already_needs_no_room(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        await door.accept([request(key="k")], 0)
        return await door.accept([request(key="k")], 0)

    assert through(broker_url, work, tenant_jobs=1)[0].id == job_id("k")


def test_a_request_of_too_many_jobs_is_refused(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_MOST_JOBS", 3)
    assert isinstance(refused(broker_url, None, 4), TooLarge)


def test_a_broker_without_the_functions_is_given_them(broker_url: str, connection: Connection) -> None:
    connection.call("FUNCTION", "FLUSH")
    assert through(broker_url, lambda door: door.accept([request()], 0))
    assert len(waiting(connection)) == 1


def test_a_lane_that_is_no_list_is_said_to_be_wrong(broker_url: str, connection: Connection) -> None:
    connection.call("SET", topology.LANE, "odd")
    error = refused(broker_url)
    assert isinstance(error, BrokerUnavailable)
    assert topology.LANE in error.message


def test_an_acceptance_is_on_the_disk_where_that_is_asked_for(broker_url: str, connection: Connection) -> None:
    def waits() -> int:
        stats = connection.call("INFO", "commandstats").decode()
        return int(stats.partition("cmdstat_waitaof:calls=")[2].partition(",")[0] or 0)

    async def work(door: Door) -> list[int]:
        await door.ping()
        counts = [waits()]
        for requests in ([request()], [request(key="k")], [request(key="k")]):
            await door.accept(requests, 0)
            counts.append(waits())
        return counts

    connection.call("CONFIG", "RESETSTAT")
    first, *counts = through(broker_url, work, durability="fsync")
    assert [count - first for count in counts] == [1, 2, 4]  # of one that was there already, it is asked once more
    assert len(waiting(connection)) == 2


def test_what_is_not_known_to_be_on_the_disk_is_no_acceptance(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        door._admission._barrier = Barrier(0.1)
        await door.accept([request(key="k")], 0)

    connection.call("CONFIG", "SET", "appendfsync", "no")
    try:
        with pytest.raises(BrokerUnavailable, match="disk"):
            through(broker_url, work)
    finally:
        connection.call("CONFIG", "SET", "appendfsync", "everysec")
    assert through(broker_url, lambda door: door.accept([request(key="k")], 0), durability="fsync")


def test_a_broker_that_cannot_be_so_durable_is_said_before_anything_is_accepted(
    broker_url: str, connection: Connection
) -> None:
    connection.call("CONFIG", "SET", "appendonly", "no")
    try:
        for work in (lambda door: door.ping(), lambda door: door.accept([request()], 0)):
            with pytest.raises(InvalidSettings, match="append-only"):
                through(broker_url, work, durability="fsync")
    finally:
        connection.call("CONFIG", "SET", "appendonly", "yes")
    assert waiting(connection) == []


def test_whoever_is_refused_is_told_when_there_will_be_room() -> None:
    now = [0.0]
    drain = Drain(lambda: now[0])
    assert drain.until(100, 100) == 1.0  # nothing is known yet
    for ended in range(0, 2000, 10):  # ten jobs a second
        drain.observe(ended)
        now[0] += 1
    assert drain.rate_hz == pytest.approx(10, rel=0.01)
    assert drain.until(1000, 1000) == 6.0  # 50 of them
    assert drain.until(10_000, 1000) == 60.0
    assert drain.until(10, 1000) == 1.0
    drain.observe(0)  # the counters began anew
    assert drain.rate_hz >= 0


# -- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ingest_url(_embedded: EmbeddedBroker) -> Iterator[str]:
    with serving(_embedded.url, LEPTON_TENANT_JOBS="100", LEPTON_WAITING_JOBS="150") as (_, url):
        yield url


@pytest.fixture
def http(ingest_url: str, connection: Connection) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=ingest_url, timeout=15) as http:
        yield http


@pytest.mark.parametrize("header", ["order-17", '"order-17"'])
def test_the_header_and_the_field_name_the_same_key(http: httpx.Client, connection: Connection, header: str) -> None:
    first = http.post("/v1/jobs", json=JOB, headers={"idempotency-key": header})
    again = http.post("/v1/jobs", json=JOB | {"key": "order-17"})
    assert [each.status_code for each in (first, again)] == [202, 202]
    assert first.json()["id"] == again.json()["id"] == job_id("order-17")
    assert waiting(connection) == [job_id("order-17")]


def test_a_header_may_hold_quotes(http: httpx.Client) -> None:
    answered = http.post("/v1/jobs", json=JOB, headers={"idempotency-key": '"a\\"b\\\\"'})
    assert answered.json()["id"] == job_id('a"b\\')


def test_the_same_key_with_another_job_is_422(http: httpx.Client) -> None:
    http.post("/v1/jobs", json=JOB | {"key": "k"})
    answered = problem(http.post("/v1/jobs", json=JOB | {"arguments": {"x": [3.0]}, "key": "k"}), 422)
    assert (answered["code"], answered["field"]) == ("key_conflict", "key")
    assert "index" not in answered


@pytest.mark.parametrize(
    ("body", "header", "status", "field"),
    [
        ([JOB], "k", 422, "key"),
        (JOB | {"key": "other"}, "k", 422, "key"),
        (JOB, '"k', 400, "Idempotency-Key"),
        (JOB, "", 422, "key"),
        (JOB, "k" * 256, 422, "key"),
    ],
    ids=["list", "two keys", "no string", "empty", "long"],
)
def test_a_key_that_cannot_be_one_is_refused(
    http: httpx.Client, connection: Connection, body: Any, header: str, status: int, field: str
) -> None:
    answered = problem(http.post("/v1/jobs", json=body, headers={"idempotency-key": header}), status)
    assert answered["field"] == field
    assert waiting(connection) == []


def test_a_job_that_has_ended_is_200_with_its_result(http: httpx.Client, connection: Connection) -> None:
    http.post("/v1/jobs", json=JOB | {"key": "k"})
    end(connection, job_id("k"))
    answered = http.post("/v1/jobs", json=JOB | {"key": "k"}, params={"wait_s": 1})
    assert (answered.status_code, answered.json()["result"]) == (200, {"y": [2.0, 4.0]})


def test_a_tenant_is_named_in_a_header(http: httpx.Client, connection: Connection) -> None:
    assert http.post("/v1/jobs", json=JOB, headers={"lepton-tenant": "team-a"}).status_code == 202
    assert len(waiting(connection, topology.lane("team-a"))) == 1
    answered = problem(http.post("/v1/jobs", json=JOB, headers={"lepton-tenant": "Team A"}), 422)
    assert (answered["code"], answered["field"]) == ("invalid_arguments", "tenant")


def test_too_much_is_429_of_a_tenant_and_503_altogether_with_a_time(http: httpx.Client) -> None:
    for tenant, count, status in (("a", 100, 202), ("a", 1, 429), ("b", 50, 202), ("b", 1, 503)):
        answered = http.post("/v1/jobs", json=[JOB] * count, headers={"lepton-tenant": tenant})
        assert answered.status_code == status
        if status != 202:
            assert int(answered.headers["retry-after"]) >= 1
            assert answered.json()["code"] == {429: "quota_exceeded", 503: "overloaded"}[status]


def test_the_clients_raise_what_the_ingest_refuses(ingest_url: str, connection: Connection) -> None:
    async def asynchronously() -> None:
        async with AsyncClient(ingest_url, tenant="a") as client:
            with pytest.raises(QuotaExceeded) as raised:
                await client.submit("test.double", {"x": [1.0]})
            assert raised.value.retry_after_s >= 1

    with Client(ingest_url, tenant="a") as client:
        client.submit_many("test.double", [{"x": [1.0]}] * 100)
        with pytest.raises(QuotaExceeded) as raised:
            client.submit("test.double", {"x": [1.0]})
        assert raised.value.retry_after_s >= 1
        with pytest.raises(KeyConflict):
            client.submit_many("test.double", [{"x": [1.0]}, {"x": [2.0]}], keys=["k", "k"])
    asyncio.run(asynchronously())


def drain(connection: Connection, lane: str, jobs: int, *, ends: bool) -> int:
    """Takes jobs off a lane, slowly, as a router and its workers do."""
    for taken in range(jobs):
        popped = connection.call("BRPOP", lane, 10)
        if popped is None:
            return taken
        envelope = wire.read_envelope(popped[1])
        if ends:
            record = results.encode(results.success(envelope.headers.id, {"y": [1.0]}, Record()), "msgpack")
            connection.call("SET", topology.result(envelope.headers.id), record)
            connection.call("RPUSH", wire.read_options(envelope.headers).reply_to or "", record)
    return jobs


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_many_rows_go_on_where_there_is_room_again(ingest_url: str, broker_url: str, kind: str) -> None:
    rows, lane = [{"x": [float(at)]} for at in range(230)], topology.lane("a")

    async def asynchronously() -> list[Any]:
        async with AsyncClient(ingest_url, tenant="a") as client:
            return [job.id for job in await client.submit_many("test.double", rows)]

    other = Connection(broker_url, "drain")
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(drain, other, lane, 230, ends=False)
        if kind == "async":
            ids = asyncio.run(asynchronously())
        else:
            with Client(ingest_url, tenant="a") as own:
                ids = [job.id for job in own.submit_many("test.double", rows)]
        assert drained.result() == 230
    other.close()
    assert len(set(ids)) == 230


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_map_goes_on_where_there_is_room_again(ingest_url: str, broker_url: str, kind: str) -> None:
    """The window is larger than the quota, so whatever ends makes room for the next."""
    rows, lane = [{"x": [float(at)]} for at in range(300)], topology.lane("a")

    async def asynchronously() -> list[int | None]:
        async with AsyncClient(ingest_url, tenant="a") as client:
            return [job.row async for job in client.map("test.double", rows, window=800)]

    other = Connection(broker_url, "drain")
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(drain, other, lane, 300, ends=True)
        if kind == "async":
            found = asyncio.run(asynchronously())
        else:
            with Client(ingest_url, tenant="a") as own:
                found = [job.row for job in own.map("test.double", rows, window=800)]
        assert drained.result() == 300
    other.close()
    assert sorted(each or 0 for each in found) == list(range(300))


def test_fifty_at_once_through_both_doors_are_one_job(ingest_url: str, broker_url: str, connection: Connection) -> None:
    start = threading.Barrier(50)

    def submit(number: int) -> str:
        with Client(ingest_url if number % 2 else broker_url) as own:
            own.devices()  # the connection is there
            start.wait(60)
            return own.submit("test.double", {"x": [1.0, 2.0]}, key="k").id

    with ThreadPoolExecutor(50) as pool:
        assert set(pool.map(submit, range(50))) == {job_id("k")}
    assert waiting(connection) == [job_id("k")]


def test_the_interface_describes_all_of_it(http: httpx.Client) -> None:
    found = http.get("/openapi/openapi.json").json()["paths"]["/v1/jobs"]["post"]
    assert {"lepton-tenant", "idempotency-key"} <= {each["name"].lower() for each in found["parameters"]}
    assert {"key", "delay_s", "deadline_s", "limit_s"} <= set(str(found["requestBody"]).replace("'", " ").split())
