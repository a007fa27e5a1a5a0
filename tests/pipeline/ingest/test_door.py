from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
import redis.asyncio as redis

from lepton_ai import event, results, topology, wire
from lepton_ai.device import Announcement, Peaks, ResourceState
from lepton_ai.errors import (
    BrokerUnavailable,
    DeadlineUnattainable,
    InvalidArguments,
    LeptonError,
    OptionNotSupported,
    Overloaded,
    UnknownJob,
    UnknownKernel,
)
from lepton_ai.event import Event, Observation
from lepton_ai.identity import minute_of, new_id
from lepton_ai.job import Placement, Record
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement.costs import CostModel
from lepton_ai.remote import JobRequest
from lepton_ai.settings import Settings
from pipeline.deadlines import Backlog
from pipeline.ingest import admission
from pipeline.ingest import door as door_module
from pipeline.ingest.door import Door
from pipeline.ingest.view import placed
from queues.connection import Connection

DOUBLE = KernelSpec("test.double", {"x": "float32[n]", "times": "int64 = 2"}, {"y": "float32[n]"}, "n", "8*n")
Found = TypeVar("Found")


def announce(connection: Connection, incarnation: str = "worker-1", *kernels: KernelSpec, device: str = "cpu") -> None:
    """A worker's lease, without a worker."""
    peaks = Peaks(1e9, 1e9, 1e9, 0.0, 0.0)
    value = Announcement(incarnation, incarnation, device, device, 1, False, peaks, kernels or (DOUBLE,), 0.0)
    lease = topology.lease(incarnation)
    connection.many([("SET", lease, msgspec.msgpack.encode(value)), ("SADD", topology.HOLDERS, incarnation)])


def through(url: str, work: Callable[[Door], Awaitable[Found]]) -> Found:
    """What `work` makes of an open door."""

    async def run() -> Found:
        door = Door(Settings(), url)
        async with door.open():
            return await work(door)

    return asyncio.run(run())


def request(values: Any = (1.0, 2.0), **more: Any) -> JobRequest:
    return JobRequest("test.double", {"x": list(values)}, **more)


async def answer(connection: Connection, meta: Callable[[str], Any]) -> str:
    """Plays router and worker for one job: takes it off the lane and answers its waiter as a commit does."""
    _, message = await asyncio.to_thread(connection.call, "BRPOP", *topology.lane_lists(), 5)
    envelope = wire.read_envelope(message)
    record = results.encode(meta(envelope.headers.id), "msgpack")
    connection.call("SET", topology.result(envelope.headers.id), record)
    connection.call("RPUSH", wire.read_options(envelope.headers).reply_to or "", record)
    return envelope.headers.id


def success(job_id: str) -> Any:
    return results.success(job_id, {"y": [2.0, 4.0]}, Record())


# -- accept -----------------------------------------------------------------------------------------------------


def test_an_accepted_job_is_on_the_lane_as_a_message_of_celery(broker_url: str, connection: Connection) -> None:
    announce(connection)
    (view,) = through(broker_url, lambda door: door.accept([request()], 0))
    assert (view.kernel, view.state, view.result) == ("test.double", "waiting", None)
    (message,) = connection.call("LRANGE", topology.LANE, 0, -1)
    envelope = wire.read_envelope(message)
    assert (envelope.headers.id, envelope.headers.task) == (view.id, "test.double")
    assert wire.read_body(envelope, limit_bytes=1000).kwargs == {"x": [1.0, 2.0]}
    assert wire.read_options(envelope.headers).shapes == {"x": [2]}


@pytest.mark.parametrize("priority", [None, 1, 2, 3, 4, 6, 7, 9])
def test_a_job_stands_in_the_list_of_its_priority(
    broker_url: str, connection: Connection, priority: int | None
) -> None:
    announce(connection)
    through(broker_url, lambda door: door.accept([request(priority=priority)], 0))
    assert connection.call("LLEN", topology.lane_list(priority or topology.DEFAULT_PRIORITY)) == 1


def test_a_list_keeps_its_order(broker_url: str, connection: Connection) -> None:
    announce(connection)
    views = through(broker_url, lambda door: door.accept([request([float(at)]) for at in range(50)], 0))
    messages = connection.call("LRANGE", topology.LANE, 0, -1)[::-1]
    assert [wire.read_envelope(message).headers.id for message in messages] == [view.id for view in views]


def test_a_list_with_one_wrong_job_is_refused_whole_and_the_job_is_named(
    broker_url: str, connection: Connection
) -> None:
    announce(connection)
    with pytest.raises(InvalidArguments) as raised:
        through(broker_url, lambda door: door.accept([request(), request(), request([[1.0]])], 0))
    assert (raised.value.field, getattr(raised.value, "index", None)) == ("x", 2)
    assert connection.call("KEYS", "lepton.ingest*") == connection.call("KEYS", "lepton:jobs:*") == []


def learn(connection: Connection) -> None:
    """What the telemetry service keeps: each job takes 10 ms."""
    model, seen = CostModel(), Observation("test.double", "cpu", 1, 2.0, 16.0, 1e-6, 0.01, 8.0)
    for _ in range(400):
        model.learn(seen, Peaks(1e9, 1e9, 1e9, 0.0, 0.0))
    connection.call("SET", topology.MODEL, model.snapshot())


def meet(deadline_s: float, **more: Any) -> JobRequest:
    return request(deadline_s=deadline_s, must_meet=True, **more)


def options_on_the_lane(connection: Connection) -> Any:
    (message,) = connection.call("LRANGE", topology.LANE, 0, -1)
    return wire.read_options(wire.read_envelope(message).headers)


def test_a_job_that_cannot_meet_its_deadline_is_refused_with_the_estimate(
    broker_url: str, connection: Connection
) -> None:
    announce(connection)
    learn(connection)
    with pytest.raises(DeadlineUnattainable) as raised:
        through(broker_url, lambda door: door.accept([meet(60.0), meet(0.002)], 0))
    assert raised.value.estimate_s == pytest.approx(0.01, rel=0.3)
    assert getattr(raised.value, "index", None) == 1
    assert connection.call("KEYS", "lepton.ingest*") == []


def test_a_job_that_can_meet_its_deadline_is_accepted_for_good(broker_url: str, connection: Connection) -> None:
    """Once it is accepted no router refuses it, whatever has come meanwhile."""
    announce(connection)
    learn(connection)
    (view,) = through(broker_url, lambda door: door.accept([meet(60.0)], 0))
    assert view.state == "waiting"
    assert not options_on_the_lane(connection).must_meet


def test_a_deadline_that_need_not_be_met_refuses_nothing(broker_url: str, connection: Connection) -> None:
    announce(connection)
    learn(connection)
    through(broker_url, lambda door: door.accept([request(deadline_s=0.002)], 0))
    assert connection.call("LLEN", topology.LANE) == 1


def test_without_a_measurement_a_job_that_must_meet_its_deadline_is_accepted(
    broker_url: str, connection: Connection
) -> None:
    announce(connection)
    through(broker_url, lambda door: door.accept([meet(1e-3)], 0))
    assert connection.call("LLEN", topology.LANE) == 1


def test_what_routers_tell_and_what_waits_count_against_a_deadline(broker_url: str, connection: Connection) -> None:
    announce(connection)
    learn(connection)
    through(broker_url, lambda door: door.accept([meet(20.0)], 0))
    told = msgspec.msgpack.encode(Backlog({"cpu": 30.0}, typical_s=1.0))
    connection.many([("SADD", topology.HOLDERS, "router-1"), ("SET", topology.backlog("router-1"), told)])
    with pytest.raises(DeadlineUnattainable) as raised:
        through(broker_url, lambda door: door.accept([meet(20.0)], 0))
    assert raised.value.estimate_s == pytest.approx(31, rel=0.01)  # and one that waits in the lane


def test_jobs_of_one_request_count_against_the_deadlines_of_those_behind_them(
    broker_url: str, connection: Connection
) -> None:
    announce(connection)
    learn(connection)
    told = msgspec.msgpack.encode(Backlog({}, typical_s=1.0))
    connection.many([("SADD", topology.HOLDERS, "router-1"), ("SET", topology.backlog("router-1"), told)])
    with pytest.raises(DeadlineUnattainable) as raised:
        through(broker_url, lambda door: door.accept([meet(5.5)] * 10, 0))
    assert getattr(raised.value, "index", None) == 6


def test_a_device_beyond_its_limits_meets_no_deadline_and_misses_none(broker_url: str, connection: Connection) -> None:
    announce(connection)
    announce(connection, "worker-2", device="gpu")
    learn(connection)
    state = ResourceState(0, 0.0, 0.0, 0, 1, share=0.0, reason="hot")
    connection.call("SET", topology.state("worker-2"), msgspec.msgpack.encode(state))
    with pytest.raises(DeadlineUnattainable, match="cpu, where it would end soonest"):
        through(broker_url, lambda door: door.accept([meet(0.002)], 0))


def test_a_job_that_is_there_already_is_answered_however_late_it_would_be(
    broker_url: str, connection: Connection
) -> None:
    announce(connection)
    (first,) = through(broker_url, lambda door: door.accept([meet(0.002, key="one")], 0))
    learn(connection)
    (second,) = through(broker_url, lambda door: door.accept([meet(0.002, key="one")], 0))
    assert second.id == first.id
    with pytest.raises(DeadlineUnattainable):
        through(broker_url, lambda door: door.accept([meet(0.002, key="another")], 0))


@pytest.mark.parametrize(
    ("wrong", "error", "field"),
    [
        (request(must_meet=True), OptionNotSupported, "must_meet"),
        (JobRequest("test.absent", {}), UnknownKernel, "kernel"),
        (JobRequest("test.double", {}), InvalidArguments, "x"),
        (JobRequest("test.double", {"x": [1.0], "z": 1}), InvalidArguments, "z"),
        (JobRequest("test.double", {"x": [1.0], "times": 0.5}), InvalidArguments, "times"),
        (request(priority=0), OptionNotSupported, "priority"),
        (request(priority=10), OptionNotSupported, "priority"),
    ],
    ids=["deadline", "kernel", "missing", "extra", "type", "low", "high"],
)
def test_a_wrong_job_is_refused_by_name_and_not_published(
    broker_url: str, connection: Connection, wrong: JobRequest, error: type[LeptonError], field: str
) -> None:
    announce(connection)
    with pytest.raises(error) as raised:
        through(broker_url, lambda door: door.accept([wrong], 0))
    assert raised.value.field == field
    assert connection.call("LLEN", topology.LANE) == 0


def test_without_any_worker_a_job_is_refused_and_the_reason_said(broker_url: str) -> None:
    with pytest.raises(UnknownKernel, match="no worker is online"):
        through(broker_url, lambda door: door.accept([request()], 0))


def test_a_kernel_that_comes_online_later_is_accepted_at_once(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> None:
        with pytest.raises(UnknownKernel):
            await door.accept([request()], 0)
        announce(connection)
        await door.accept([request()], 0)

    through(broker_url, work)
    assert connection.call("LLEN", topology.LANE) == 1


def test_a_kernel_whose_workers_are_just_away_is_still_accepted(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> None:
        await door.kernels()
        connection.call("DEL", topology.lease("worker-1"))
        await door.accept([request()], 0)

    announce(connection)
    through(broker_url, work)
    assert connection.call("LLEN", topology.LANE) == 1


def test_a_kernel_whose_signature_cannot_be_read_here_hides_no_other(broker_url: str, connection: Connection) -> None:
    announce(connection, "worker-1", KernelSpec("test.newer", {"x": "complex<3>"}, {}, "1", "1"), DOUBLE)
    names = through(broker_url, lambda door: door.kernels())
    assert [spec.name for spec in names] == ["test.double"]


def accepted(connection: Connection) -> list[list[Event]]:
    """The Events of each entry of the stream."""
    return [list(event.decode(fields[1])) for _, fields in connection.call("XRANGE", topology.EVENTS, "-", "+")]


def test_what_is_accepted_is_told_in_one_entry_with_an_event_a_kernel(broker_url: str, connection: Connection) -> None:
    half = msgspec.structs.replace(DOUBLE, name="test.half")
    announce(connection, "worker-1", DOUBLE, half)
    requests = [request(), JobRequest("test.half", {"x": [1.0]}), request()]
    views = through(broker_url, lambda door: door.accept(requests, 0))
    ids = [view.id for view in views]
    ((double, other),) = accepted(connection)
    assert (double.type, double.kernel, double.jobs) == ("job.accepted", "test.double", (ids[0], ids[2]))
    assert (other.type, other.kernel, other.jobs) == ("job.accepted", "test.half", (ids[1],))
    assert double.source == other.source
    assert double.source.startswith("ingest-")


def test_what_is_refused_is_not_told(broker_url: str, connection: Connection) -> None:
    announce(connection)
    with pytest.raises(InvalidArguments):
        through(broker_url, lambda door: door.accept([request(), request([[1.0]])], 0))
    assert through(broker_url, lambda door: door.accept([], 0)) == []
    assert accepted(connection) == []


def test_very_many_are_told_in_entries_that_a_follower_can_hold(
    broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_JOBS_IN_ENTRY", 20)
    announce(connection)
    views = through(broker_url, lambda door: door.accept([request()] * 50, 0))
    told = [each.jobs for (each,) in accepted(connection)]
    assert [len(jobs) for jobs in told] == [20, 20, 10]
    assert [job for jobs in told for job in jobs] == [view.id for view in views]


def test_the_stream_is_kept_within_its_limit(broker_url: str, connection: Connection) -> None:
    async def work() -> None:
        door = Door(Settings(events_kept=1), broker_url)
        async with door.open():
            for _ in range(150):
                await door.accept([request()], 0)

    announce(connection)
    asyncio.run(work())
    assert 1 <= connection.call("XLEN", topology.EVENTS) <= 100  # whole nodes of a hundred go at once


# -- waiting ----------------------------------------------------------------------------------------------------


def test_the_reply_reaches_the_request_that_waits(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        return await asyncio.gather(door.accept([request()], 5), answer(connection, success))

    announce(connection)
    started_s = time.monotonic()
    (view,), job_id = through(broker_url, work)
    assert (view.id, view.state, view.result) == (job_id, "succeeded", {"y": [2.0, 4.0]})
    assert time.monotonic() - started_s < 2


def test_each_of_two_waiting_requests_gets_its_own(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        first = asyncio.create_task(door.accept([request([1.0])], 5))
        second = asyncio.create_task(door.accept([request([2.0])], 5))
        ids = [await answer(connection, lambda job: results.success(job, {"y": job}, Record())) for _ in range(2)]
        return [(await first)[0], (await second)[0]], ids

    announce(connection)
    views, ids = through(broker_url, work)
    assert {view.id for view in views} == set(ids)
    assert all(view.result == {"y": view.id} for view in views)


def test_a_failure_is_told_with_its_code_and_field(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        failed = answer(connection, lambda job: results.failure(job, InvalidArguments("x is odd", "x")))
        return await asyncio.gather(door.accept([request()], 5), failed)

    announce(connection)
    (view,), _ = through(broker_url, work)
    assert (view.state, view.result) == ("failed", None)
    assert view.error == {"code": "invalid_arguments", "message": "x is odd", "field": "x"}


def test_a_wait_that_ends_before_the_job_says_how_it_stands(broker_url: str, connection: Connection) -> None:
    announce(connection)
    (view,) = through(broker_url, lambda door: door.accept([request()], 0.05))
    assert (view.state, view.result) == ("waiting", None)


def test_an_array_that_came_back_is_an_array_on_the_wire(broker_url: str, connection: Connection) -> None:
    def arrays(job: str) -> Any:
        return results.success(job, {"y": wire.to_value(np.array([2.0], "<f4"))}, Record())

    async def work(door: Door) -> Any:
        return await asyncio.gather(door.accept([request()], 5), answer(connection, arrays))

    announce(connection)
    (view,), _ = through(broker_url, work)
    assert (view.result["y"].dtype, view.result["y"].shape) == ("<f4", [1])


def test_nothing_is_kept_of_a_request_that_has_been_answered(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        await asyncio.gather(door.accept([request()], 5), answer(connection, success))
        await door.accept([request()], 0.01)
        return len(door.replies)

    announce(connection)
    assert through(broker_url, work) == 0


def test_a_reply_that_nobody_can_read_does_not_keep_others_waiting(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        connection.call("RPUSH", door.replies.name, b"\xc1 no record")
        await asyncio.sleep(0.1)
        return await asyncio.gather(door.accept([request()], 2), answer(connection, success))

    announce(connection)
    (view,), _ = through(broker_url, work)
    assert view.state == "succeeded"


# -- look -------------------------------------------------------------------------------------------------------


def test_an_accepted_job_is_found_while_it_waits(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        (accepted,) = await door.accept([request()], 0)
        return accepted, await door.look(accepted.id, 0)

    announce(connection)
    accepted, found = through(broker_url, work)
    assert (found.id, found.kernel, found.state) == (accepted.id, "test.double", "waiting")


def test_a_placed_job_says_where(broker_url: str, connection: Connection) -> None:
    job = new_id()
    placement = Placement(job, "test.double", "placed", "because", 1.0, "router-1", "cpu")
    connection.call("HSET", topology.jobs(minute_of(job) or 0), job, msgspec.msgpack.encode(placement))
    view = through(broker_url, lambda door: door.look(job, 0))
    assert (view.state, view.kernel, view.record) == ("placed", "test.double", Record(placement))


def test_results_that_have_come_are_told_though_their_placements_cannot_be_had(tmp_path: Path) -> None:
    meta = results.success(new_id(), {"y": [2.0]}, Record())
    away = redis.Redis(unix_socket_path=str(tmp_path / "nobody"))
    assert asyncio.run(placed(away, {meta.task_id: meta})) == {meta.task_id: (meta, None)}


def test_a_placement_that_cannot_be_read_is_none(broker_url: str, connection: Connection) -> None:
    async def work() -> Any:
        async with redis.Redis.from_url(broker_url) as client:
            return await placed(client, {meta.task_id: meta})

    meta = results.success(new_id(), {"y": [2.0]}, Record())
    connection.call("HSET", topology.jobs(minute_of(meta.task_id) or 0), meta.task_id, b"\xc1")
    assert asyncio.run(work()) == {meta.task_id: (meta, None)}


def test_what_a_router_has_placed_meanwhile_is_not_overwritten(
    broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_id()
    placement = Placement(job, "test.double", "placed", "because", 1.0, "router-1", "cpu")
    connection.call("HSET", topology.jobs(minute_of(job) or 0), job, msgspec.msgpack.encode(placement))
    monkeypatch.setattr(door_module, "new_ids", lambda count: [job])
    announce(connection)

    async def work(door: Door) -> Any:
        await door.accept([request()], 0)
        return await door.look(job, 0)

    assert through(broker_url, work).state == "placed"


def test_looking_with_a_wait_returns_once_the_job_has_ended(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        (accepted,) = await door.accept([request()], 0)
        started_s = time.monotonic()
        found, _ = await asyncio.gather(door.look(accepted.id, 5), answer(connection, success))
        return found, time.monotonic() - started_s

    announce(connection)
    found, took_s = through(broker_url, work)
    assert (found.state, found.result) == ("succeeded", {"y": [2.0, 4.0]})
    assert took_s < 1


def test_the_result_of_a_job_of_another_door_is_found(broker_url: str, connection: Connection) -> None:
    job = new_id()
    connection.call("SET", topology.result(job), results.encode(success(job), "json"))
    assert through(broker_url, lambda door: door.look(job, 0)).result == {"y": [2.0, 4.0]}


@pytest.mark.parametrize("job", [new_id(), "no-uuid", "", "é" * 100])
def test_a_job_that_nobody_knows_is_unknown(broker_url: str, job: str) -> None:
    with pytest.raises(UnknownJob):
        through(broker_url, lambda door: door.look(job, 0))


def test_devices_are_listed_by_name_and_routers_are_none(broker_url: str, connection: Connection) -> None:
    announce(connection, "worker-2", device="gpu")
    announce(connection, "worker-1", device="cpu")
    connection.many([("SET", topology.lease("router-1"), b""), ("SADD", topology.HOLDERS, "router-1", "worker-9")])
    found = through(broker_url, lambda door: door.announcements())
    assert [each.device for each in found] == ["cpu", "gpu"]


# -- no broker --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [
        lambda door: door.accept([request()], 0),
        lambda door: door.look("job", 0),
        lambda door: door.announcements(),
        lambda door: door.kernels(),
        lambda door: door.ping(),
        lambda door: door.cancel("job", 0),
        lambda door: door.job_events("job", None),
        lambda door: anext(door.accept_each([request()], 1)),
    ],
    ids=["accept", "look", "announcements", "kernels", "ping", "cancel", "job_events", "accept_each"],
)
def test_without_a_broker_every_call_says_so(tmp_path: Path, work: Callable[[Door], Awaitable[Any]]) -> None:
    with pytest.raises(BrokerUnavailable):
        through(f"unix://{tmp_path}/none.sock", work)


def test_a_broker_that_is_full_is_told_and_not_taken_for_acceptance(broker_url: str, connection: Connection) -> None:
    announce(connection)
    connection.call("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(Overloaded, match="full"):
            through(broker_url, lambda door: door.accept([request()], 0))
    finally:
        connection.call("CONFIG", "SET", "maxmemory", "0")
    assert connection.call("LLEN", topology.LANE) == 0


def test_a_broken_connection_is_made_again_and_replies_still_come(broker_url: str, connection: Connection) -> None:
    async def work(door: Door) -> Any:
        await door.ping()
        connection.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        for _ in range(3):  # each connection in the pool may have to find out by itself
            with contextlib.suppress(BrokerUnavailable):
                await door.ping()
        return await asyncio.gather(door.accept([request()], 5), answer(connection, success))

    announce(connection)
    (view,), _ = through(broker_url, work)
    assert view.state == "succeeded"
