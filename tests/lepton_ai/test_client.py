"""The client straight on a broker: no router and no worker, so every answer here is one that the test has pushed.

And over HTTP, where an ingest would not do: one that breaks off, or says what the test wants said.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from lepton_ai import (
    Announcement,
    Client,
    CloudEvent,
    JobHandle,
    KernelSpec,
    Peaks,
    bundle,
    event,
    results,
    sse,
    topology,
    wire,
)
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
from lepton_ai.event import Cursor, Event, cloud_events
from lepton_ai.event_stream import MISSED, OPENED, Pause, follow
from lepton_ai.identity import minute_of
from lepton_ai.job import Cost, Meta, Placement, Record
from lepton_ai.succession import sequel_of
from queues.broker import Broker
from queues.connection import Connection


@pytest.fixture
def client(broker_url: str) -> Iterator[Client]:
    with Client(broker_url) as client:
        yield client


def waiting(connection: Connection, priority: int = 5) -> list[wire.Envelope]:
    """The messages of a list of the lane, oldest first."""
    raw = connection.call("LRANGE", topology.lane_list(priority), 0, -1)
    return [wire.read_envelope(each) for message in raw[::-1] for each in bundle.singles(message)]


def reply_list(connection: Connection) -> str:
    """Where the client of the oldest waiting job waits for its results."""
    found = wire.read_options(waiting(connection)[0].headers).reply_to
    assert found is not None
    return found


def finish(connection: Connection, metas: Sequence[Meta], *, reply: str | None = None) -> None:
    """What a commit leaves: each record in its key, and on the reply list where there is one."""
    records = [(meta.task_id, results.encode(meta, "msgpack")) for meta in metas]
    commands: list[tuple[str | bytes, ...]] = [("SET", topology.result(job), record) for job, record in records]
    if reply is not None:
        commands.append(("RPUSH", reply, *(record for _, record in records)))
    connection.many(commands)


def succeeded(job: JobHandle, value: Any, record: Record | None = None) -> Meta:
    return results.success(job.id, {"x": wire.to_value(value)}, record)


# -- submit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [None, *range(1, 10)])
def test_a_job_waits_on_the_list_of_its_priority(client: Client, connection: Connection, priority: int | None) -> None:
    job = client.submit("a.b", {"x": 1}, priority=priority)
    assert [each.headers.id for each in waiting(connection, priority or 5)] == [job.id]
    assert sum(connection.many([("LLEN", each) for each in topology.lane_lists()])) == 1


def test_the_message_has_the_kernel_the_arguments_and_the_options(client: Client, connection: Connection) -> None:
    client.submit("a.b", {"a": np.arange(3.0)}, device="gpu")
    (found,) = waiting(connection)
    body, options = wire.read_body(found, limit_bytes=1000), wire.read_options(found.headers)
    np.testing.assert_array_equal(wire.decode_value(body.kwargs["a"]), np.arange(3.0))
    assert (found.headers.task, sequel_of(found.headers, body.embed)) == ("a.b", None)
    assert (options.device, options.result, options.shapes) == ("gpu", "msgpack", {"a": [3]})


def test_many_jobs_wait_in_the_order_of_their_rows(client: Client, connection: Connection) -> None:
    jobs = client.submit_many("a.b", ({"x": at} for at in range(1000)))
    assert [each.headers.id for each in waiting(connection)] == [job.id for job in jobs]


def test_many_jobs_are_few_commands(client: Client, connection: Connection) -> None:
    connection.call("CONFIG", "RESETSTAT")
    client.submit_many("a.b", ({"x": at} for at in range(1000)))
    stats = connection.call("INFO", "commandstats").decode().splitlines()
    (pushes,) = (line for line in stats if line.startswith("cmdstat_lpush:"))
    assert int(pushes.partition("calls=")[2].partition(",")[0]) <= 10


def test_what_is_encoded_goes_out_while_more_is_to_come(client: Client, connection: Connection) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for at in range(1000):
            seen.append(connection.call("LLEN", topology.LANE))
            yield {"x": at}

    seen: list[int] = []
    client.submit_many("a.b", rows())
    assert 0 < seen[600] <= 600


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
    finish(connection, [results.failure(job.id, error)], reply=reply_list(connection))
    with pytest.raises(type(error), match=error.message) as raised:
        job.result(timeout=5)
    assert raised.value.field == error.field


def test_a_cancelled_job_raises_that_it_was(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [results.failure(job.id, JobCancelled("revoked"))], reply=reply_list(connection))
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


def test_each_job_of_a_bundle_that_was_placed_says_where_it_went_itself(client: Client, connection: Connection) -> None:
    """The rest of its run of ids waits still, but for one with a note of its own."""
    jobs = client.submit_many("a.b", [{"x": 1}] * 20)
    key, shared = topology.jobs(minute_of(jobs[0].id) or 0), jobs[0].id[:-3]
    note = bundle.shared_note(msgspec.msgpack.encode(placement(jobs[0])), 12)
    connection.call("HSET", key, shared, note, jobs[15].id, msgspec.msgpack.encode(placement(jobs[15], "parked")))
    assert [job.why() for job in jobs[:12]] == [placement(job) for job in jobs[:12]]
    expected = ["placed"] * 12 + ["waiting"] * 3 + ["parked"] + ["waiting"] * 4
    assert [job.state for job in jobs] == expected
    connection.call("HSET", key, jobs[3].id, msgspec.msgpack.encode(placement(jobs[3], "parked")))
    assert jobs[3].state == "parked", "what happened to it alone is newer"


def test_a_job_of_a_bundle_can_be_cancelled_and_is_told_of_alone(client: Client, connection: Connection) -> None:
    jobs = client.submit_many("a.b", [{"x": 1}] * 20)
    assert jobs[7].cancel()
    assert connection.call("ZRANGE", topology.CANCELLED, 0, -1) == [jobs[7].id.encode()]
    assert [each.subject for each in client.events("0", timeout=0)] == [jobs[7].id]


def test_the_jobs_of_bundles_are_counted_in_the_lane_of_their_tenant(broker_url: str, connection: Connection) -> None:
    with Client(broker_url) as client, Client(broker_url, tenant="ann") as ann:
        client.submit_many("a.b", [{"x": 1}] * 300)
        ann.submit_many("a.b", [{"x": at, "y": [1.0] * (at % 2)} for at in range(6)])
        ann.submit_many("a.b", [{"x": 1}] * 9)
    counted = connection.call("HGETALL", topology.BUNDLED)
    lengths = connection.many([("LLEN", lane) for lane in (topology.LANE, topology.lane("ann"))])
    assert [
        length + int(counted[lane.encode()])
        for length, lane in zip(lengths, ("lepton.ingest", "lepton.ingest.ann"), strict=True)
    ] == [300, 15]


@pytest.mark.parametrize("priority", [1, 5, 9])
def test_bundles_wait_on_the_list_of_their_priority_and_are_counted_in_their_lane(
    client: Client, connection: Connection, priority: int
) -> None:
    jobs = client.submit_many("a.b", [{"x": 1}] * 20, priority=priority)
    assert [each.headers.id for each in waiting(connection, priority)] == [job.id for job in jobs]
    (lane,) = connection.call("HKEYS", topology.BUNDLED)
    assert lane.decode() == topology.LANE == wire.lane_of(connection.call("LINDEX", topology.lane_list(priority), 0))


def test_a_kernel_may_have_an_argument_that_is_called_bundle(client: Client, connection: Connection) -> None:
    client.submit_many("a.b", [{"bundle": at} for at in range(3)] + [{"bundle": at, "n": 1} for at in range(9)])
    found = [wire.read_body(each, limit_bytes=1000).kwargs["bundle"] for each in waiting(connection)]
    assert found == [0, 1, 2, *range(9)]


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
    finish(connection, [results.failure(job.id, error)])
    assert job.record() == Record(placement(job), error=error.to_wire())


# -- map --------------------------------------------------------------------------------------------------------------


def cut_off(connection: Connection) -> None:
    """Breaks every connection that is not a test's own (those have names)."""
    for line in connection.call("CLIENT", "LIST", "TYPE", "NORMAL").split(b"\n"):
        if b" name= " in line:
            connection.call("CLIENT", "KILL", "ID", line.split()[0].removeprefix(b"id="))


Answer = Callable[[str, dict[str, Any]], Meta | None]


def echoed(job_id: str, arguments: dict[str, Any]) -> Meta:
    return results.success(job_id, {"x": arguments["x"]}, None)


@contextmanager
def answering(url: str, answer: Answer = echoed, *, replies: bool = True) -> Iterator[None]:
    """In the place of router and worker: takes every job of the lane and answers it."""
    stopped = threading.Event()

    def work() -> None:
        connection = Connection(url, "answering")
        while not stopped.is_set():
            taken = connection.call("BLMPOP", 0.05, 1, topology.LANE, "RIGHT", "COUNT", 100)
            for raw in (each for message in (taken[1] if taken else ()) for each in bundle.singles(message)):
                found = wire.read_envelope(raw)
                meta = answer(found.headers.id, wire.read_body(found, limit_bytes=10_000).kwargs)
                if meta is not None:
                    finish(connection, [meta], reply=wire.read_options(found.headers).reply_to if replies else None)
        connection.close()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            stopped.set()
        working.result(10)


@pytest.mark.parametrize("window", [1, 7, 1000])
def test_each_row_comes_back_once_with_its_own_result(client: Client, broker_url: str, window: int) -> None:
    rows = [{"x": at * 10} for at in range(1200 if window > 1 else 60)]
    with answering(broker_url):
        found = [(job.row, job.result(timeout=0)["x"]) for job in client.map("a.b", rows, window=window)]
    assert sorted(found) == [(at, at * 10) for at in range(len(rows))]


def test_what_was_mapped_needs_nobody_for_its_result(client: Client, broker_url: str, connection: Connection) -> None:
    with answering(broker_url):
        jobs = list(client.map("a.b", [{"x": 1}, {"x": 2}]))
    connection.call("FLUSHALL")
    assert sorted(job.result()["x"] for job in jobs) == [1, 2]


def test_a_job_is_handed_out_while_others_go_on(client: Client, broker_url: str) -> None:
    with answering(broker_url, lambda job_id, given: echoed(job_id, given) if given["x"] else None):
        assert next(client.map("a.b", [{"x": 0}, {"x": 1}])).row == 1


def test_no_more_than_the_window_are_under_way(client: Client, broker_url: str) -> None:
    taken, handed_out, most = 0, 0, 0

    def rows() -> Iterator[dict[str, int]]:
        nonlocal taken, most
        for at in range(500):
            taken += 1
            most = max(most, taken - handed_out)
            yield {"x": at}

    with answering(broker_url):
        for _ in client.map("a.b", rows(), window=20):
            handed_out += 1
    assert (handed_out, most) == (500, 20)


def test_rows_may_be_endless(client: Client, broker_url: str) -> None:
    with answering(broker_url):
        jobs = client.map("a.b", ({"x": at} for at in itertools.count()), window=50)
        assert len({job.row for job in itertools.islice(jobs, 400)}) == 400
        jobs.close()


def test_rows_that_are_slow_to_come_hold_up_no_result_for_long(client: Client, broker_url: str) -> None:
    taken = 0

    def rows() -> Iterator[dict[str, int]]:
        nonlocal taken
        while True:
            time.sleep(0.03)  # longer than rows are gathered: each goes out alone
            taken += 1
            yield {"x": taken}

    with answering(broker_url):
        next(client.map("a.b", rows(), window=1000))
    assert taken < 100


def test_a_failed_job_is_handed_out_like_any_other(client: Client, broker_url: str) -> None:
    def answer(job_id: str, given: dict[str, Any]) -> Meta:
        return echoed(job_id, given) if given["x"] else results.failure(job_id, KernelFailed("by nought"))

    with answering(broker_url, answer):
        zero, one = sorted(client.map("a.b", [{"x": 0}, {"x": 1}]), key=lambda job: job.row or 0)
    assert (zero.state, one.result()) == ("failed", {"x": 1})
    with pytest.raises(KernelFailed, match="by nought"):
        zero.result()


def test_a_row_that_cannot_be_sent_is_a_failed_job_and_the_others_go_out(client: Client, broker_url: str) -> None:
    with answering(broker_url):
        jobs = {job.row: job for job in client.map("a.b", [{"x": 0}, {"x": object()}, {"x": 2}])}
    assert [jobs[row].state for row in range(3)] == ["succeeded", "failed", "succeeded"]
    with pytest.raises(InvalidArguments, match="cannot be sent"):
        jobs[1].result()


def test_a_mapped_result_that_reached_its_key_alone_is_found(client: Client, broker_url: str) -> None:
    with answering(broker_url, replies=False):
        assert len(list(client.map("a.b", ({"x": at} for at in range(300)), window=300))) == 300


def test_a_stored_result_that_cannot_be_read_is_a_failed_job(client: Client, connection: Connection) -> None:
    jobs = client.map("a.b", [{"x": 1}])
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(next, jobs)
        while not (sent := waiting(connection)):
            pass
        connection.call("SET", topology.result(sent[0].headers.id), b"{nonsense")
        assert found.result(10).state == "failed"


def test_a_connection_that_breaks_ends_neither_a_map_nor_a_wait(
    client: Client, broker_url: str, connection: Connection
) -> None:
    held = client.submit("a.b", {"x": -1})
    jobs = client.map("a.b", ({"x": at} for at in range(400)), window=100)

    def answer(job_id: str, given: dict[str, Any]) -> Meta | None:
        if given["x"] % 50 == 0:
            cut_off(connection)
        return echoed(job_id, given) if job_id != held.id else None

    with answering(broker_url, answer), ThreadPoolExecutor(1) as pool:
        result = pool.submit(held.result, 30)
        assert {job.row for job in jobs} == set(range(400))
        finish(connection, [succeeded(held, 5)])
        assert result.result(30) == {"x": 5}


def test_a_push_whose_answer_is_lost_while_all_its_results_come_does_not_end_a_map(
    client: Client, broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct: Any = client._connection
    push, lost = direct._push, []

    def flaky(options: Any, messages: list[bytes]) -> None:
        push(options, messages)
        if not lost:
            lost.append(len(messages))
            while connection.call("LLEN", direct._reply_to) < len(messages):
                time.sleep(0.005)
            direct._pump(lambda: False, 0.0)  # as another thread that waits would
            raise BrokerUnavailable("the answer was lost")

    direct._was_there = True
    monkeypatch.setattr(direct, "_push", flaky)
    with answering(broker_url):
        found = sorted(job.row for job in client.map("a.b", ({"x": at} for at in range(50)), window=10))
    assert found == list(range(50))
    assert lost == [10]


def test_what_a_map_sends_again_after_a_lost_answer_is_what_has_no_result_yet(
    client: Client, broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bundles of what is left of a run of ids."""
    direct: Any = client._connection
    push, sent = direct._push, []

    def flaky(options: Any, messages: list[Any]) -> None:
        push(options, messages)
        sent.append([each.id for each in messages])
        if len(sent) == 1:
            first = waiting(connection)
            ended = [results.success(each.headers.id, {"x": -1}, None) for each in first[10:20]]
            finish(connection, ended, reply=reply_list(connection))
            direct._pump(lambda: False, 0.0)
            raise BrokerUnavailable("the answer was lost")

    direct._was_there = True
    monkeypatch.setattr(direct, "_push", flaky)
    jobs = client.map("a.b", ({"x": at} for at in range(60)), window=60)
    first = next(jobs)
    until_sent_again = [*sent]
    with answering(broker_url):
        found = {job.row: job.result(0)["x"] for job in (first, *jobs)}
    assert until_sent_again[:1] == [sent[0]]
    assert len(sent[0]) == 60
    assert sent[1] == sent[0][:10] + sent[0][20:]
    assert found == {at: -1 if 10 <= at < 20 else at for at in range(60)}


def test_nothing_is_submitted_before_the_first_is_asked_for(client: Client, connection: Connection) -> None:
    client.map("a.b", [{"x": 1}])
    assert connection.call("DBSIZE") == 0


def test_no_rows_are_no_jobs_to_map(client: Client) -> None:
    assert list(client.map("a.b", [])) == []


def test_leaving_a_map_early_leaves_its_jobs_and_forgets_them(client: Client, broker_url: str) -> None:
    jobs = client.map("a.b", ({"x": at} for at in range(100)), window=10)
    with answering(broker_url, lambda job_id, given: echoed(job_id, given) if given["x"] < 1 else None):
        next(jobs)
    jobs.close()
    assert not client._connection._told  # type: ignore[attr-defined]
    later = client.submit("a.b", {"x": 5})
    with answering(broker_url):
        assert later.result(timeout=5) == {"x": 5}


def test_an_error_of_the_rows_ends_the_map(client: Client, broker_url: str) -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield {"x": 1}
        raise ZeroDivisionError

    with answering(broker_url), pytest.raises(ZeroDivisionError):
        list(client.map("a.b", rows()))


def test_maps_and_results_in_several_threads_do_not_disturb_each_other(client: Client, broker_url: str) -> None:
    def mapped(first: int) -> list[int]:
        rows = ({"x": first + at} for at in range(300))
        return sorted(job.result(timeout=0)["x"] for job in client.map("a.b", rows, window=40))

    def submitted(first: int) -> list[int]:
        return [client.submit("a.b", {"x": first + at}).result(timeout=10)["x"] for at in range(100)]

    with answering(broker_url), ThreadPoolExecutor(4) as pool:
        maps = [pool.submit(mapped, first) for first in (0, 1000)]
        others = [pool.submit(submitted, first) for first in (2000, 3000)]
        assert [each.result(60) for each in maps] == [list(range(first, first + 300)) for first in (0, 1000)]
        assert [each.result(60) for each in others] == [list(range(first, first + 100)) for first in (2000, 3000)]


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "http://127.0.0.1:1"])
def test_a_map_needs_a_window_and_known_options_and_a_broker(url: str) -> None:
    with Client(url) as client:
        with pytest.raises(OptionNotSupported, match="window"):
            client.map("a.b", [{"x": 1}], window=0)
        with pytest.raises(OptionNotSupported, match="priority"):
            client.map("a.b", [{"x": 1}], priority=10)
        with pytest.raises(BrokerUnavailable):
            next(client.map("a.b", [{"x": 1}]))


# -- cancel -----------------------------------------------------------------------------------------------------------


def told(connection: Connection) -> list[Event]:
    """Every Event of the stream."""
    return [
        each for _, fields in connection.call("XRANGE", topology.EVENTS, "-", "+") for each in event.decode(fields[1])
    ]


def test_cancelling_leaves_a_mark_and_tells_of_it(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    assert job.cancel()
    assert abs(float(connection.call("ZSCORE", topology.CANCELLED, job.id)) - time.time()) < 60
    assert [(each.type, each.jobs) for each in told(connection)] == [("job.cancel_asked", (job.id,))]


@pytest.mark.parametrize("error", [None, KernelFailed("it broke"), JobCancelled("revoked")])
def test_what_has_ended_is_not_cancelled(client: Client, connection: Connection, error: LeptonError | None) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [succeeded(job, 1) if error is None else results.failure(job.id, error)])
    assert (client.cancel(job.id), client.job(job.id).cancel(), job.cancel()) == (False, False, False)
    assert connection.call("EXISTS", topology.CANCELLED, topology.EVENTS) == 0


def test_a_job_that_runs_may_be_cancelled(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [Meta("STARTED", {"pid": 1}, task_id=job.id)])
    assert client.cancel(job.id)


def test_whose_result_is_at_hand_is_not_cancelled_and_nobody_asked(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    finish(connection, [succeeded(job, 1)], reply=reply_list(connection))
    job.result(timeout=5)
    connection.call("FLUSHALL")
    assert not job.cancel()
    assert connection.call("DBSIZE") == 0


# -- events -----------------------------------------------------------------------------------------------------------


def happened(connection: Connection, *events: Event, at: str = "*") -> str:
    """The entry of a step in which these happened."""
    entry: bytes = connection.call("XADD", topology.EVENTS, at, "e", event.encode(*events))
    return entry.decode()


def placed(*jobs: str) -> Event:
    return Event("job.placed", "router", "a.b", "cpu", jobs)


def subjects(events: Iterator[CloudEvent]) -> list[str]:
    return [each.subject for each in events]


def test_events_are_told_from_the_call_on_and_not_from_the_first_step(client: Client, connection: Connection) -> None:
    happened(connection, placed("before"))
    events = client.events(timeout=0)
    happened(connection, placed("between"), Event("device.online", "w", device="cpu"))
    assert subjects(events) == ["between", "cpu"]


def test_events_on_an_empty_stream_are_those_to_come(client: Client, connection: Connection) -> None:
    events = client.events(timeout=0)
    happened(connection, placed("a"))
    assert subjects(events) == ["a"]


def test_events_from_0_are_all_that_are_kept(client: Client, connection: Connection) -> None:
    entries = [happened(connection, placed(str(at))) for at in range(250)]
    connection.call("XTRIM", topology.EVENTS, "MINID", entries[20])
    assert subjects(client.events("0", timeout=0)) == [str(at) for at in range(20, 250)]


def test_an_event_has_all_that_a_cloud_event_has(client: Client, connection: Connection) -> None:
    entry = happened(connection, placed("a", "b"))
    assert list(client.events("0", timeout=0)) == list(cloud_events(entry, [placed("a", "b")]))


steps = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=6)


@given(steps)
@example_settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wherever_a_reader_goes_on_it_misses_and_repeats_nothing(
    client: Client, connection: Connection, steps: list[list[int]]
) -> None:
    connection.call("DEL", topology.EVENTS)
    for at, step in enumerate(steps):
        jobs = (tuple(f"{at}.{each}.{job}" for job in range(count)) for each, count in enumerate(step))
        happened(connection, *(Event("job.placed", "router", jobs=each) for each in jobs))
    every = list(client.events("0", timeout=0))
    assert len({each.id for each in every}) == len(every) == sum(max(1, count) for step in steps for count in step)
    for at, each in enumerate(every):
        assert list(client.events(each.id, timeout=0)) == every[at + 1 :]


def test_only_the_events_of_one_subject_where_one_is_named(client: Client, connection: Connection) -> None:
    happened(connection, placed("a", "b"), placed("ab"), Event("job.succeeded", "w", jobs=("b", "a")))
    found = [(each.type, each.subject) for each in client.events("0", job="a", timeout=0)]
    assert found == [("io.lepton.job.placed.v1", "a"), ("io.lepton.job.succeeded.v1", "a")]


def test_a_reader_whose_place_is_no_longer_kept_is_told_first(client: Client, connection: Connection) -> None:
    entries = [happened(connection, placed(str(at))) for at in range(4)]
    connection.call("XTRIM", topology.EVENTS, "MINID", entries[2])
    missed, *rest = client.events(f"{entries[0]}.0", job="3", timeout=0)
    assert (missed.type, missed.data) == (MISSED, {"after": entries[0], "first": entries[2]})
    assert subjects(iter(rest)) == ["3"]
    assert subjects(client.events(entries[2], timeout=0)) == ["3"]


def test_a_slow_reader_from_under_whom_events_were_trimmed_is_told(client: Client, connection: Connection) -> None:
    events = client.events()
    happened(connection, placed("a"))
    assert next(events).subject == "a"
    last = [happened(connection, placed(each)) for each in "bcd"][-1]
    connection.call("XTRIM", topology.EVENTS, "MINID", last)
    assert [next(events).type, next(events).subject] == [MISSED, "d"]
    events.close()


def test_what_others_have_put_into_the_stream_is_passed_over(client: Client, connection: Connection) -> None:
    connection.call("XADD", topology.EVENTS, "*", "other", "field")
    connection.call("XADD", topology.EVENTS, "*", "e", b"\xc1 no msgpack")
    happened(connection, placed("a"))
    assert subjects(client.events("0", timeout=0)) == ["a"]


def test_events_end_after_a_time_without_one(client: Client, connection: Connection) -> None:
    events = client.events(timeout=0.3)
    start = time.monotonic()
    assert list(events) == []
    assert 0.25 < time.monotonic() - start < 5


def test_events_of_others_do_not_keep_a_reader_waiting(client: Client, connection: Connection, broker_url: str) -> None:
    stopped = threading.Event()

    def busy() -> None:
        other = Connection(broker_url, "busy")
        while not stopped.is_set():
            happened(other, placed("b"))
        other.close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(busy)
        assert list(client.events(job="a", timeout=0.2)) == []
        stopped.set()


def test_a_reader_that_waits_is_woken_at_once(client: Client, connection: Connection) -> None:
    events = client.events()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(next, events)
        while b"cmd=xread" not in connection.call("CLIENT", "LIST"):
            pass
        start = time.monotonic()
        happened(connection, placed("a"))
        assert found.result(5).subject == "a"
        assert time.monotonic() - start < 0.5
    events.close()


def test_a_reader_has_a_connection_of_its_own_and_closes_it(client: Client, connection: Connection) -> None:
    before = clients(connection)
    events = client.events()
    (opened,) = clients(connection) - before
    events.close()
    while opened in clients(connection):
        pass


def test_a_reader_that_is_cut_off_misses_and_repeats_nothing(client: Client, connection: Connection) -> None:
    events = client.events(timeout=5)
    found = []
    for at in range(5):
        happened(connection, placed(f"{at}.0", f"{at}.1"))
        found.append(next(events).subject)
        cut_off(connection)
        found.append(next(events).subject)
    assert found == [f"{at}.{job}" for at in range(5) for job in range(2)]
    events.close()


@pytest.mark.parametrize("since", ["", "now", "1-2-3", "-1", "1.2"])
@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "http://127.0.0.1:1"])
def test_what_is_no_place_in_the_stream_is_refused_at_the_call(url: str, since: str) -> None:
    with Client(url) as client, pytest.raises(InvalidArguments, match="not the id of an event"):
        client.events(since)


def test_a_broker_that_stays_away_is_given_up_after_half_a_minute() -> None:
    now = 0.0
    follower = follow(Cursor(), clock=lambda: now)
    assert (next(follower), follower.send(True)) == (("PING",), OPENED)
    asked = next(follower)

    def tried_again() -> bool:
        nonlocal now
        pause = follower.throw(BrokerUnavailable("away"))
        assert isinstance(pause, Pause)
        now += pause.seconds
        return next(follower) == asked

    with pytest.raises(BrokerUnavailable, match="away"):
        all(iter(tried_again, False))
    assert 30 <= now < 33


def test_a_broker_that_comes_back_in_time_is_asked_where_the_reader_stood() -> None:
    now = 0.0
    follower = follow(Cursor.parse("5-0"), clock=lambda: now)
    next(follower)
    follower.send(True)
    asked = next(follower)
    for _ in range(3):  # each absence is a new one
        while now % 100 < 29:
            pause = follower.throw(BrokerUnavailable("away"))
            assert isinstance(pause, Pause)
            now += pause.seconds
            assert next(follower)[1:] == asked[1:]  # type: ignore[index]
        now += 100 - now % 100
        assert follower.send([(b"5-0", {})])[0] == "XREAD"  # type: ignore[index]
        assert follower.send([]) == asked


# -- events of one job ------------------------------------------------------------------------------------------------


def test_a_jobs_events_are_told_from_its_first_to_its_last(client: Client, connection: Connection) -> None:
    job, other = client.submit_many("a.b", [{"x": 1}, {"x": 2}])
    happened(connection, placed(job.id, other.id))
    happened(connection, Event("job.succeeded", "w", jobs=(other.id,)))
    happened(connection, Event("job.succeeded", "w", jobs=(job.id,)))
    happened(connection, placed(job.id))  # nothing comes after the last
    assert [each.type for each in job.events()] == ["io.lepton.job.placed.v1", "io.lepton.job.succeeded.v1"]


def test_the_events_of_a_foreign_id_are_looked_for_in_all_that_is_kept(client: Client, connection: Connection) -> None:
    happened(connection, Event("job.failed", "w", jobs=("celerys-own",)), at="5-0")
    assert subjects(client.job("celerys-own").events()) == ["celerys-own"]


def test_a_jobs_events_end_with_what_is_kept_where_it_has_ended(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    happened(connection, placed(job.id))
    finish(connection, [succeeded(job, 1)])
    start = time.monotonic()
    assert [each.type for each in job.events()] == ["io.lepton.job.placed.v1"]
    assert time.monotonic() - start < 10


def test_a_jobs_events_wait_for_its_end_and_no_longer_than_asked(client: Client, connection: Connection) -> None:
    job = client.submit("a.b", {"x": 1})
    assert list(job.events(timeout=0.1)) == []
    events = job.events()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(list, events)
        happened(connection, Event("job.cancelled", "w", jobs=(job.id,)))
        assert subjects(iter(found.result(10))) == [job.id]


def test_a_job_whose_first_events_were_trimmed_says_so(client: Client, connection: Connection) -> None:
    happened(connection, placed("older"), at="1-0")
    job = client.submit("a.b", {"x": 1})
    happened(connection, placed(job.id))
    last = happened(connection, Event("job.failed", "w", jobs=(job.id,)))
    connection.call("XTRIM", topology.EVENTS, "MINID", last)
    assert [each.type for each in job.events()] == [MISSED, "io.lepton.job.failed.v1"]


# -- events over HTTP -------------------------------------------------------------------------------------------------

Script = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def ingest(*scripts: Script) -> Iterator[tuple[str, list[BaseHTTPRequestHandler]]]:
    """A server that answers each request with the next script (and the last one for ever); and who asked."""
    asked: list[BaseHTTPRequestHandler] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self)
            scripts[min(len(asked), len(scripts)) - 1](self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def streamed(*parts: bytes, length: int | None = None) -> Script:
    """An event stream that ends after these bytes, or breaks off where it said that it had more."""

    def script(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        if length is not None:
            handler.send_header("content-length", str(length))
        handler.end_headers()
        for part in parts:
            handler.wfile.write(part)
            handler.wfile.flush()

    return script


def refused(status: int, **problem: Any) -> Script:
    def script(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(msgspec.json.encode(problem))

    return script


def viewed(state: str) -> Script:
    def script(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(msgspec.msgpack.encode({"id": "job", "kernel": "a.b", "state": state}))

    return script


def silent(handler: BaseHTTPRequestHandler) -> None:
    streamed(b": connected\n\n")(handler)
    handler.rfile.read(1)  # until the other side leaves


def message(number: int, kind: str = "job.placed", job: str = "job") -> bytes:
    (each,) = cloud_events(f"{number}-0", [Event(kind, "w\u2028", jobs=(job,))])
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (each.id.encode(), each.type.encode(), msgspec.json.encode(each))


def test_events_over_http_go_on_behind_the_last_one_after_a_break() -> None:
    first = streamed(b": connected\nid: 4-0\n\n", message(5), message(6), message(7)[:20], length=5000)
    with ingest(first, streamed(message(7)), silent) as (url, asked), Client(url) as client:
        events = client.events()
        assert [next(events).id for _ in range(3)] == ["5-0.0", "6-0.0", "7-0.0"]
        events.close()
    assert [each.headers["last-event-id"] for each in asked[:2]] == [None, "6-0.0"]


def test_events_over_http_that_break_off_before_the_first_go_on_from_where_they_began() -> None:
    first = streamed(b": connected\nid: 4-0\n\n", length=5000)
    with ingest(first, streamed(message(5)), silent) as (url, asked), Client(url) as client:
        events = client.events()
        assert next(events).id == "5-0.0"
        events.close()
    assert asked[1].headers["last-event-id"] == "4-0"


def test_events_over_http_begin_where_they_are_asked_to() -> None:
    with ingest(streamed(message(5)), silent) as (url, asked), Client(url) as client:
        events = client.events("4-0.2", job="some job")
        events.close()
    assert (asked[0].path, asked[0].headers["last-event-id"]) == ("/v1/events?job=some+job", "4-0.2")


def test_an_ingest_that_is_away_for_a_moment_is_tried_again() -> None:
    away = refused(503, code="broker_unavailable", detail="away")
    scripts = (streamed(message(5)), away, refused(502), streamed(message(6)), silent)
    with ingest(*scripts) as (url, _), Client(url) as client:
        events = client.events()
        assert [next(events).id for _ in range(2)] == ["5-0.0", "6-0.0"]
        events.close()


def test_an_ingest_that_is_away_for_a_moment_ends_no_wait() -> None:
    away = refused(503, code="broker_unavailable", detail="away")
    with ingest(viewed("waiting"), away, away, viewed("succeeded")) as (url, asked), Client(url) as client:
        job = client.job("job")
        assert job.state == "waiting"
        assert job.result() == {}
        assert len(asked) == 4


def test_an_ingest_that_is_away_longer_than_a_wait_may_last_is_said_to_be() -> None:
    away = refused(503, code="broker_unavailable", detail="away")
    with ingest(viewed("waiting"), away) as (url, _), Client(url) as client:
        job = client.job("job")
        assert job.state == "waiting"
        with pytest.raises(BrokerUnavailable, match="away"):
            job.result(timeout=0.2)


def test_an_ingest_that_refuses_events_is_not_tried_again() -> None:
    refusal = refused(422, code="invalid_arguments", detail="no such place", field="since")
    with ingest(streamed(message(5)), refusal) as (url, asked), Client(url) as client:
        events = client.events()
        next(events)
        with pytest.raises(InvalidArguments, match="no such place"):
            next(events)
        assert len(asked) == 2


def test_an_ingest_that_cannot_be_asked_for_events_says_so_at_the_call() -> None:
    with (
        ingest(refused(503, code="broker_unavailable", detail="away")) as (url, _),
        Client(url) as client,
        pytest.raises(BrokerUnavailable, match="away"),
    ):
        client.events()


def test_events_over_http_end_after_a_time_without_one() -> None:
    with ingest(silent) as (url, _), Client(url) as client:
        start = time.monotonic()
        assert list(client.events(timeout=0.1)) == []
        assert time.monotonic() - start < 5


def test_a_jobs_events_over_http_end_with_its_last() -> None:
    with ingest(streamed(message(5), message(6, "job.succeeded"), message(7))) as (url, _), Client(url) as client:
        assert [each.id for each in client.job("job").events()] == ["5-0.0", "6-0.0"]


def test_a_jobs_events_over_http_end_where_it_has_ended_and_its_last_is_not_kept() -> None:
    scripts = (
        streamed(message(5)),
        viewed("placed"),
        streamed(),
        viewed("failed"),
        streamed(message(6)),
        viewed("failed"),
    )
    with ingest(*scripts) as (url, asked), Client(url) as client:
        assert [each.id for each in client.job("job").events()] == ["5-0.0", "6-0.0"]
    assert [each.path.partition("?")[0] for each in asked] == ["/v1/jobs/job/events", "/v1/jobs/job"] * 2 + [
        "/v1/jobs/job/events"
    ]


def test_a_message_is_read_alike_however_its_bytes_come() -> None:
    sent = (
        b": a comment\r\nid: 1\r\n\r\nid: 2\r\ndata: a\r\ndata:b\nother: x\nevent: kind\n"
        b"\ndata: c\r\rid\n\nid: 3\ndata: cut off"
    )
    expected = [
        sse.Message("1", "", b""),
        sse.Message("2", "kind", b"a\nb"),
        sse.Message("2", "", b"c"),
        sse.Message("", "", b""),
    ]
    for size in range(1, len(sent)):
        parser = sse.Parser()
        parts = (sent[at : at + size] for at in range(0, len(sent), size))
        assert [each for part in parts for each in parser.feed(part)] == expected


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
            lambda: client.job("x").cancel(),
            lambda: client.job("x").events(),
            lambda: client.events("0"),
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
