"""The client straight on a broker: no router and no worker, so every answer here is one that the test has pushed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest

from lepton_ai import Announcement, Client, JobHandle, KernelSpec, Peaks, topology, wire
from lepton_ai.errors import (
    BrokerUnavailable,
    InvalidArguments,
    InvalidSettings,
    JobCancelled,
    JobFailed,
    KernelFailed,
    LeptonError,
    NoBroker,
    OptionNotSupported,
    ResultTimeout,
)
from lepton_ai.identity import minute_of
from lepton_ai.job import Cost, Meta, Placement, Record
from queues.broker import Broker
from queues.connection import Connection


@pytest.fixture
def client(broker_url: str) -> Iterator[Client]:
    with Client(broker_url) as client:
        yield client


def waiting(connection: Connection, priority: int = 5) -> list[wire.Envelope]:
    """The messages of a list of the lane, oldest first."""
    raw = connection.call("LRANGE", topology.lane_list(priority), 0, -1)
    return [wire.read_envelope(each) for each in raw[::-1]]


def reply_list(connection: Connection) -> str:
    """Where the client of the oldest waiting job waits for its results."""
    found = wire.read_options(waiting(connection)[0].headers).reply_to
    assert found is not None
    return found


def finish(connection: Connection, metas: Sequence[Meta], *, reply: str | None = None) -> None:
    """What a commit leaves: each record in its key, and on the reply list where there is one."""
    records = [(meta.task_id, wire.encode_meta(meta, "msgpack")) for meta in metas]
    commands: list[tuple[str | bytes, ...]] = [("SET", topology.result(job), record) for job, record in records]
    if reply is not None:
        commands.append(("RPUSH", reply, *(record for _, record in records)))
    connection.many(commands)


def succeeded(job: JobHandle, value: Any, record: Record | None = None) -> Meta:
    return wire.success(job.id, {"x": wire.to_value(value)}, record)


# -- submit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [None, *range(1, 10)])
def test_a_job_waits_on_the_list_of_its_priority(client: Client, connection: Connection, priority: int | None) -> None:
    job = client.submit("a.b", {"x": 1}, priority=priority)
    assert [each.headers.id for each in waiting(connection, priority or 5)] == [job.id]
    assert sum(connection.many([("LLEN", each) for each in topology.lane_lists()])) == 1


def test_the_message_has_the_kernel_the_arguments_and_the_options(client: Client, connection: Connection) -> None:
    client.submit("a.b", {"a": np.arange(3.0)}, device="gpu")
    (found,) = waiting(connection)
    arguments, callbacks = wire.read_body(found, limit_bytes=1000)
    options = wire.read_options(found.headers)
    np.testing.assert_array_equal(wire.decode_value(arguments["a"]), np.arange(3.0))
    assert (found.headers.task, callbacks) == ("a.b", False)
    assert (options.device, options.result, options.shapes) == ("gpu", "msgpack", {"a": [3]})


def test_many_jobs_wait_in_the_order_of_their_rows(client: Client, connection: Connection) -> None:
    jobs = client.submit_many("a.b", ({"x": at} for at in range(1000)))
    assert [each.headers.id for each in waiting(connection)] == [job.id for job in jobs]


def test_no_rows_are_no_jobs(client: Client, connection: Connection) -> None:
    assert client.submit_many("a.b", []) == []
    assert connection.call("DBSIZE") == 0


@pytest.mark.parametrize("priority", [0, 10])
def test_a_priority_out_of_range_is_refused_and_nothing_sent(
    client: Client, connection: Connection, priority: int
) -> None:
    with pytest.raises(OptionNotSupported, match="priority"):
        client.submit("a.b", {}, priority=priority)
    assert connection.call("DBSIZE") == 0


def test_one_row_that_cannot_be_sent_keeps_all_from_being_sent(client: Client, connection: Connection) -> None:
    with pytest.raises(InvalidArguments):
        client.submit_many("a.b", [{"x": 1}, {"x": object()}])
    assert connection.call("DBSIZE") == 0


def test_submitting_from_many_threads_loses_nothing(client: Client, connection: Connection) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda at: client.submit("a.b", {"x": at}), range(200)))
    assert sorted(each.headers.id for each in waiting(connection)) == sorted(job.id for job in jobs)


# -- result -----------------------------------------------------------------------------------------------------------


def test_a_result_that_does_not_come_in_time_raises_with_the_state(client: Client) -> None:
    job = client.submit("a.b", {"x": 1})
    with pytest.raises(ResultTimeout, match=f"{job.id} is waiting after 0.05 s"):
        job.result(timeout=0.05)


def test_a_result_may_be_waited_for_again_after_a_timeout(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    with pytest.raises(ResultTimeout):
        job.result(timeout=0)
    finish(connection, [succeeded(job, 7)], reply=reply_list(connection))
    assert job.result(timeout=5) == {"x": 7}


def test_each_result_reaches_its_own_handle_in_whatever_order_they_come(client: Client, connection: Connection) -> None:
    jobs = client.submit_many("a.b", ({"x": at} for at in range(600)))
    finish(connection, [succeeded(job, at) for at, job in enumerate(jobs)][::-1], reply=reply_list(connection))
    assert [job.result(timeout=5)["x"] for job in jobs] == list(range(600))


def test_results_reach_the_right_handles_from_several_threads(client: Client, connection: Connection) -> None:
    jobs = client.submit_many("a.b", ({"x": at} for at in range(64)))
    reply = reply_list(connection)
    started = threading.Barrier(9)

    def wait(first: int) -> list[int]:
        started.wait(5)
        return [job.result(timeout=10)["x"] for job in jobs[first::8]]

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(wait, first) for first in range(8)]
        started.wait(5)
        for at, job in enumerate(jobs):
            finish(connection, [succeeded(job, at)], reply=reply)
        assert [each.result(10) for each in found] == [list(range(first, 64, 8)) for first in range(8)]


def test_a_waiting_thread_is_woken_at_once(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    reply = reply_list(connection)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(job.result, 10)
        while b"blmpop" not in connection.call("CLIENT", "LIST", "TYPE", "NORMAL"):
            pass
        start = time.monotonic()
        finish(connection, [succeeded(job, 1)], reply=reply)
        assert found.result(5) == {"x": 1}
    assert time.monotonic() - start < 0.5


def test_an_array_comes_back_as_an_array(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [succeeded(job, np.arange(4, dtype=np.int16))], reply=reply_list(connection))
    found = job.result(timeout=5)["x"]
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, np.arange(4))


@pytest.mark.parametrize(
    "error", [KernelFailed("ZeroDivisionError: by nought"), InvalidArguments("argument 'b' is missing", "b")]
)
def test_a_failed_job_raises_its_own_error(client: Client, connection: Connection, error: LeptonError) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [wire.failure(job.id, error)], reply=reply_list(connection))
    with pytest.raises(type(error), match=error.message) as raised:
        job.result(timeout=5)
    assert raised.value.field == error.field


def test_a_cancelled_job_raises_that_it_was(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [wire.failure(job.id, JobCancelled("revoked"))], reply=reply_list(connection))
    with pytest.raises(JobCancelled, match=job.id):
        job.result(timeout=5)
    assert job.state == "cancelled"


def test_a_failure_that_celery_stored_raises_with_its_words(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    celerys = {"exc_type": "WorkerLostError", "exc_message": "killed", "exc_module": "billiard.exceptions"}
    finish(connection, [Meta("FAILURE", celerys, task_id=job.id)])
    with pytest.raises(JobFailed, match="WorkerLostError: killed"):
        client.job(job.id).result(timeout=5)


def test_a_result_is_asked_for_once_and_kept(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [succeeded(job, 1)], reply=reply_list(connection))
    job.result(timeout=5)
    connection.call("FLUSHALL")
    assert (job.result(), job.done, job.state) == ({"x": 1}, True, "succeeded")


def test_a_result_that_reached_its_key_alone_is_found(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [succeeded(job, 1)])
    start = time.monotonic()
    assert job.result(timeout=10) == {"x": 1}
    assert time.monotonic() - start < 5


def test_a_result_for_a_handle_that_was_dropped_disturbs_nobody(client: Client, connection: Connection) -> None:
    dropped, kept = client.submit_many("a.b", [{"x": 1}, {"x": 2}])
    metas = [succeeded(dropped, 1), succeeded(kept, 2)]
    del dropped
    finish(connection, metas, reply=reply_list(connection))
    assert kept.result(timeout=5) == {"x": 2}


def test_another_clients_job_is_waited_for_by_its_id(client: Client, connection: Connection, broker_url: str) -> None:
    job = client.submit("a.b", {"x": 1})
    with Client(broker_url) as other, ThreadPoolExecutor(1) as pool:
        found = pool.submit(other.job(job.id).result, 10)
        finish(connection, [succeeded(job, 1)], reply=reply_list(connection))
        assert found.result(10) == {"x": 1}
    assert job.result(timeout=5) == {"x": 1}


def test_a_second_handle_of_ones_own_job_is_resolved_as_soon(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [succeeded(job, 1)], reply=reply_list(connection))
    start = time.monotonic()
    assert client.job(job.id).result(timeout=5) == {"x": 1}
    assert time.monotonic() - start < 0.5
    assert job.result(timeout=5) == {"x": 1}


def test_another_clients_job_times_out_too(client: Client) -> None:
    with pytest.raises(ResultTimeout, match="waiting"):
        client.job("no-such-job").result(timeout=0.02)


def test_a_state_that_is_not_final_is_waited_through(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [Meta("STARTED", {"pid": 1}, task_id=job.id)])
    with pytest.raises(ResultTimeout):
        client.job(job.id).result(timeout=0.02)


# -- why --------------------------------------------------------------------------------------------------------------


def placement(job: JobHandle, state: str = "placed") -> Placement:
    return Placement(job.id, "a.b", state, "the only one", 1.0, "router", "cpu")


def place(connection: Connection, job: JobHandle, found: Placement, minute: int | None = None) -> None:
    at = minute_of(job.id) if minute is None else minute
    assert at is not None
    connection.call("HSET", topology.jobs(at), job.id, msgspec.msgpack.encode(found))


def test_a_job_that_no_router_has_seen_waits_and_has_no_placement(client: Client) -> None:
    job = client.submit("a.b", {"x": 1})
    assert (job.state, job.done, job.why()) == ("waiting", False, None)


@pytest.mark.parametrize("state", ["placed", "parked"])
def test_a_job_that_was_placed_says_where_and_why(client: Client, connection: Connection, state: str) -> None:
    job = client.submit("a.b", {"x": 1})
    place(connection, job, placement(job, state))
    assert (job.state, job.done, job.why()) == (state, False, placement(job, state))


def test_a_result_that_nobody_will_place_says_so(client: Client) -> None:
    job = client.submit("a.b", {"x": 1})
    with pytest.raises(ResultTimeout, match=r"no router has placed it yet: is one running\?"):
        job.result(timeout=0)


def test_a_result_of_a_parked_job_says_why_it_is_parked(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    place(connection, job, placement(job, "parked"))
    with pytest.raises(ResultTimeout, match=r"is parked after 0 s \(the only one\)"):
        job.result(timeout=0)


def test_a_foreign_id_is_looked_for_in_the_last_minutes(client: Client, connection: Connection) -> None:
    job = client.job("celerys-own-id")
    place(connection, job, placement(job), int(time.time()) // 60 - 3)
    assert job.why() == placement(job)


def test_a_finished_job_says_what_it_really_cost(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    record = Record(placement(job), Cost("worker", "cpu", 0.1, 0.2, 0.3, 4))
    finish(connection, [succeeded(job, 1, record)], reply=reply_list(connection))
    job.result(timeout=5)
    assert (job.record(), job.why()) == (record, placement(job))


def test_a_failed_jobs_record_has_error_and_placement(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    place(connection, job, placement(job))
    error = KernelFailed("it broke")
    finish(connection, [wire.failure(job.id, error)])
    assert job.record() == Record(placement(job), error=error.to_wire())


# -- the fleet --------------------------------------------------------------------------------------------------------


def announcement(incarnation: str, device: str, *kernels: str) -> Announcement:
    specs = tuple(KernelSpec(name, {"x": "float32"}, {"y": "float32"}, "1", "1") for name in kernels)
    return Announcement(incarnation, f"{device}@host", device, "cpu", 1, False, Peaks(1, 1, 1, 1, 1), specs, 1.0)


def test_live_workers_are_listed_by_device_with_their_kernels(
    client: Client, connection: Connection, broker: Broker
) -> None:
    found = [announcement("two", "cpu.b", "a.b", "c.d"), announcement("one", "cpu.a", "a.b")]
    for each in found:
        connection.many(
            [
                ("SADD", topology.HOLDERS, each.incarnation),
                ("SET", topology.lease(each.incarnation), msgspec.msgpack.encode(each)),
            ]
        )
    connection.call("SADD", topology.HOLDERS, "lapsed")  # and `broker` holds a lease that announces nothing
    assert client.devices() == found[::-1]
    assert list(client.kernels()) == ["a.b", "c.d"]


def test_without_workers_there_are_no_devices(client: Client) -> None:
    assert (client.devices(), client.kernels()) == ([], {})


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "unix:///no/such/socket", "http://127.0.0.1:1"])
def test_a_broker_that_is_not_there_is_said_to_be_unavailable(url: str) -> None:
    with Client(url) as client, pytest.raises(BrokerUnavailable):
        client.submit("a.b", {"x": 1})


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "http://127.0.0.1:1"])
def test_every_question_to_a_broker_that_is_not_there_is_answered_so(url: str) -> None:
    with Client(url) as client:
        for ask in (
            client.devices,
            client.kernels,
            lambda: client.job("x").state,
            lambda: client.job("x").why(),
            lambda: client.job("x").result(timeout=1),
        ):
            with pytest.raises(BrokerUnavailable):
                ask()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("amqp://host", "amqp://host"),
        ("nonsense", "nonsense"),
        ("redis://host:port/0", "host:port"),
        ("redis://host:99999", "host:99999"),
        ("redis://[::1", "::1"),
        ("unix:///path?db=first", "/path"),
        ("http://host:port", "host:port"),
        ("http://[::1", "::1"),
    ],
)
def test_an_address_that_is_none_is_refused_by_name(url: str, named: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        Client(url)
    assert named in refused.value.message


def test_a_password_in_a_wrong_address_is_not_repeated() -> None:
    with pytest.raises(InvalidSettings) as refused:
        Client("redis://:secret@host:port/0")
    assert "secret" not in refused.value.message


def test_without_an_address_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch, broker_url: str) -> None:
    monkeypatch.setenv("LEPTON_REDIS_URL", broker_url)
    with Client() as client:
        assert client.devices() == []


def test_without_any_address_the_ways_to_give_one_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEPTON_REDIS_URL", raising=False)
    with pytest.raises(NoBroker, match="LEPTON_REDIS_URL"):
        Client()


def clients(connection: Connection) -> set[bytes]:
    """Everybody who is connected, by number."""
    return {line.split()[0] for line in connection.call("CLIENT", "LIST", "TYPE", "NORMAL").splitlines()}


def test_leaving_a_with_closes_the_connections(broker_url: str, connection: Connection) -> None:
    before = clients(connection)
    with Client(broker_url) as client:
        client.devices()
        opened = clients(connection) - before
    assert len(opened) == 1
    while clients(connection) & opened:
        pass


def test_closing_twice_is_no_mistake(broker_url: str) -> None:
    client = Client(broker_url)
    client.close()
    client.close()
