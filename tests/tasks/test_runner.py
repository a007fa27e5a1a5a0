"""Slots on a real broker, with a device and kernels that are made here and observed from inside."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from lepton_ai import cancellation, event, topology, wire
from lepton_ai.device import Peaks
from lepton_ai.errors import BrokerUnavailable
from lepton_ai.event import Event
from lepton_ai.identity import minute_of, new_id, new_ids
from lepton_ai.job import Meta, Options, Placement
from lepton_ai.kernel import Context, Inputs, Kernel, Outputs
from lepton_ai.settings import Settings
from queues.broker import Broker
from queues.connection import Connection
from queues.event_stream import EventStream
from tasks.runner import Ending
from tasks.slots import Slots
from tasks.warmup import Repertoire

DEVICE = "cpu.test"
QUEUE = topology.device_queue(DEVICE)
#: Batches of any predicted length, so that what is taken at once depends on the queue alone.
SETTINGS = Settings(lease_s=60, heartbeat_s=30, batch_s=1e6)


class TinyDriver:
    """Host memory, nothing else."""

    kind = "cpu"
    emulated = True

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def peaks(self) -> Peaks:
        return Peaks(1.0, 1.0, 1.0, 0.0, 0.0)

    def upload(self, array: np.ndarray) -> np.ndarray:
        return array

    def download(self, value: Any) -> np.ndarray:
        return np.asarray(value)

    def synchronize(self) -> None: ...

    def close(self) -> None: ...


class Books:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.revoked: set[str] = set()
        self.shown: set[str] = set()
        self.endings: dict[str, Ending] = {}
        self.fractions: list[float] = []

    def taken(self, jobs: Sequence[tuple[str, str]], shown: Collection[str]) -> None:
        self.seen += [("taken", job) for job, _ in jobs]
        self.shown |= set(shown)

    def started(self, jobs: Sequence[str]) -> None:
        self.seen += [("started", job) for job in jobs]

    def ended(self, endings: Sequence[Ending]) -> None:
        self.seen += [("ended", ending.job) for ending in endings]
        self.endings |= {ending.job: ending for ending in endings}

    def lost(self, jobs: Sequence[str]) -> None:
        self.seen += [("lost", job) for job in jobs]

    def progressed(self, jobs: Sequence[str], kernel: str, fraction: float) -> None:
        self.fractions.append(fraction)

    def revoke(self, jobs: Collection[str]) -> None:
        self.revoked |= set(jobs)

    def is_revoked(self, job: str) -> bool:
        return job in self.revoked


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("not even its message can be had")


RAISES: dict[int, BaseException] = {
    -1: ValueError("below zero"),
    -2: SystemExit(3),
    -3: FileNotFoundError(2, "not found", b"caf\xe9".decode("utf-8", "surrogateescape")),
    -4: Unprintable(),
    -5: RecursionError("deep"),
}
RETURNS: dict[int, Any] = {
    100: {"z": np.zeros(1)},
    101: {},
    102: None,
    103: {"y": np.zeros(1, np.complex128)},
    104: {"y": np.array([object()])},
    105: {"y": np.array(["text"])},
    106: {"y": np.zeros(1), "z": np.zeros(1)},
}


class Shop:
    """The kernels of these tests: `test.double` doubles, unless a value in RAISES or RETURNS is among its inputs."""

    def __init__(self) -> None:
        self.launches: Counter[int] = Counter()
        """How many jobs were in the launches, by how often."""
        self.entered = threading.Semaphore(0)
        """Released whenever `test.gated` is entered."""
        self.gate = threading.Event()
        """`test.gated` returns once it is set."""
        self.contexts: list[Context] = []
        self.repertoire = Repertoire({}, {}, {})
        self._add("test.double", "concat", self._double)
        self._add("test.gated", None, self._gated)

    def _add(self, name: str, batch: Any, run: Callable[[Inputs, Context], Outputs]) -> None:
        kernel = Kernel(
            name, inputs={"x": "float64[n]"}, outputs={"y": "float64[n]"}, flops="2*n", bytes="8*n", batch=batch
        )
        self.repertoire.kernels[name] = kernel
        self.repertoire.runs[name] = run

    def _double(self, inputs: Inputs, context: Context) -> Outputs:
        self.launches[len(inputs["x"])] += 1
        for value in inputs["x"]:
            if value in RAISES:
                raise RAISES[value]
            if value in RETURNS:
                return RETURNS[value]
        return {"y": 2 * inputs["x"]}

    def _gated(self, inputs: Inputs, context: Context) -> Outputs:
        self.contexts.append(context)
        self.entered.release()
        assert self.gate.wait(20)
        return {"y": 2 * inputs["x"]}


class Worker:
    """Slots, a lease kept by the test, and a producer's view of its jobs."""

    def __init__(self, url: str, connection: Connection, slots: int = 1, settings: Settings = SETTINGS) -> None:
        self.connection = connection
        self.shop = Shop()
        self.books = Books()
        self.incarnation = f"worker-{new_id()}"
        self.lease = Broker(connection, self.incarnation, settings)
        self.lease.announce(b"")
        self.stream = EventStream(connection)
        self.slots = Slots(settings, url, self.incarnation, DEVICE, TinyDriver(slots), self.shop.repertoire, self.books)

    def send(self, *values: float, kernel: str = "test.double", **options: Any) -> list[str]:
        """One job a value, in one push, so that a slot which is idle takes them at once."""
        ids = new_ids(len(values))
        self.push(*(message(job_id, value, kernel, **options) for job_id, value in zip(ids, values, strict=True)))
        return ids

    def push(self, *messages: bytes) -> None:
        self.connection.call("LPUSH", QUEUE, *messages)

    def warm_up(self) -> None:
        """A first job, after which a slot knows how long jobs take and takes more than one."""
        self.double(self.send(1.0)[0])

    def meta(self, job_id: str, timeout_s: float = 5.0) -> Meta:
        """The job's record, as soon as there is one."""
        deadline = time.monotonic() + timeout_s
        while (raw := self.connection.call("GET", topology.result(job_id))) is None:
            assert time.monotonic() < deadline, f"job {job_id} has no result after {timeout_s} s"
            self.stream.read(50)  # a commit emits an event
        return wire.read_meta(raw)

    def double(self, job_id: str) -> list[float]:
        found = self.meta(job_id)
        assert found.status == "SUCCESS", found
        return found.result["y"]

    def failure(self, job_id: str) -> tuple[str, str, str]:
        """Status, Celery's name of the exception, and its message."""
        found = self.meta(job_id)
        return found.status, found.result["exc_type"], found.result["exc_message"][0]

    def counters(self) -> dict[str, int]:
        found = self.connection.call("HGETALL", topology.COUNTERS)
        return {name.decode(): int(count) for name, count in found.items()}


def message(job_id: str, value: float, kernel: str = "test.double", **options: Any) -> bytes:
    return wire.envelope(job_id, kernel, {"x": [value]}, Options(**options))


MakeWorker = Callable[..., Worker]


@pytest.fixture(autouse=True)
def _quick_to_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.runner._TAKE_S", 0.05)


@pytest.fixture
def make_worker(broker_url: str, connection: Connection) -> Iterator[MakeWorker]:
    """Makes workers whose slots run, and drains them at the end."""
    workers: list[Worker] = []

    def make(slots: int = 1, settings: Settings = SETTINGS, *, start: bool = True) -> Worker:
        workers.append(Worker(broker_url, connection, slots, settings))
        if start:
            workers[-1].slots.start()
        return workers[-1]

    yield make
    for worker in workers:
        worker.shop.gate.set()
        drained = threading.Thread(target=worker.slots.drain, daemon=True)
        drained.start()
        drained.join(5)
        assert not drained.is_alive(), "the slots do not end"


@pytest.fixture
def worker(make_worker: MakeWorker) -> Worker:
    return make_worker()


# -- results ----------------------------------------------------------------------------------------------------


def test_a_job_is_run_and_its_result_committed(worker: Worker) -> None:
    (job,) = worker.send(21.0)
    assert worker.double(job) == [42.0]


def test_nothing_is_held_and_everything_counted_after_the_commit(worker: Worker) -> None:
    for job in worker.send(*range(1, 30)):
        worker.double(job)
    assert worker.connection.call("KEYS", "lepton:held:*") == []
    assert worker.counters() == {"succeeded": 29}


def test_a_reply_goes_to_the_client_that_waits(worker: Worker) -> None:
    sent = worker.send(1.0, 2.0, reply_to="lepton:reply:me", result="msgpack")
    replies: list[Meta] = []
    while len(replies) < 2:
        popped = worker.connection.call("BLPOP", "lepton:reply:me", 5)
        assert popped, "no reply came"
        replies.append(wire.read_meta(popped[1]))
    assert [reply.task_id for reply in replies] == sent


def test_the_record_has_the_placement_and_what_the_job_cost(worker: Worker) -> None:
    job = new_id()
    placement = Placement(job, "test.double", "placed", "because", time.time() - 1.0, "router-1", DEVICE)
    key = topology.jobs(minute_of(job) or 0)
    worker.connection.call("HSET", key, job, msgspec.msgpack.encode(placement))
    worker.push(message(job, 1.0))
    record = worker.meta(job).lepton
    assert record.placement == placement
    assert (record.cost.worker, record.cost.device, record.cost.batch) == (worker.incarnation, DEVICE, 1)
    assert 1.0 <= record.cost.wait_s < 3.0


def test_one_event_tells_what_a_launch_taught(worker: Worker) -> None:
    worker.warm_up()
    stream = EventStream(worker.connection)
    sent = worker.send(1.0, 2.0, 3.0)
    ((_, told),) = stream.read(5000)
    assert (told.type, told.source, told.device, told.jobs) == (
        "job.succeeded",
        worker.incarnation,
        DEVICE,
        tuple(sent),
    )
    assert (told.observation.kernel, told.observation.jobs, told.observation.flops) == ("test.double", 3, 6.0)
    assert told.observation.run_s > 0


def test_a_batch_runs_in_one_launch_and_each_job_gets_its_own(worker: Worker) -> None:
    worker.warm_up()
    sent = worker.send(1.0, 2.0, 3.0, 4.0)
    assert [worker.double(job) for job in sent] == [[2.0], [4.0], [6.0], [8.0]]
    assert worker.shop.launches == {1: 1, 4: 1}
    assert worker.meta(sent[0]).lepton.cost.batch == 4


def test_a_slot_takes_one_job_at_a_time_where_they_are_slow(make_worker: MakeWorker) -> None:
    worker = make_worker(settings=msgspec.structs.replace(SETTINGS, batch_s=1e-9))
    for job in worker.send(1.0, 2.0, 3.0):
        worker.double(job)
    assert worker.shop.launches == {1: 3}


def test_slots_run_side_by_side(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=3)
    worker.send(1.0, 2.0, 3.0, kernel="test.gated")
    for _ in range(3):
        assert worker.shop.entered.acquire(timeout=5)
    assert worker.slots.busy == 3
    worker.shop.gate.set()


def test_celerys_books_hear_of_each_job_in_its_order(worker: Worker) -> None:
    (job,) = worker.send(1.0)
    worker.double(job)
    worker.slots.drain()
    assert worker.books.seen == [("taken", job), ("started", job), ("ended", job)]


# -- failures ---------------------------------------------------------------------------------------------------


def test_one_culprit_in_a_batch_fails_and_the_others_succeed(worker: Worker) -> None:
    worker.warm_up()
    sent = worker.send(1.0, 2.0, -1.0, 4.0)
    status, name, text = worker.failure(sent[2])
    assert (status, name) == ("FAILURE", "KernelFailed")
    assert text == "ValueError: below zero"
    assert [worker.double(sent[at]) for at in (0, 1, 3)] == [[2.0], [4.0], [8.0]]
    assert worker.counters() == {"succeeded": 4, "failed": 1}


def test_a_kernel_that_raises_leaves_its_traceback_in_the_record(worker: Worker) -> None:
    assert "below zero" in (worker.meta(worker.send(-1.0)[0]).traceback or "")


@pytest.mark.parametrize("value", sorted(RAISES))
def test_whatever_a_kernel_raises_fails_its_job_and_the_slot_goes_on(worker: Worker, value: int) -> None:
    bad, good = worker.send(value, 5.0)
    status, name, text = worker.failure(bad)
    assert (status, name) == ("FAILURE", "KernelFailed")
    assert type(RAISES[value]).__name__ in text
    assert worker.double(good) == [10.0]


@pytest.mark.parametrize("value", sorted(RETURNS))
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_whatever_a_kernel_returns_ends_its_job_and_the_slot_goes_on(worker: Worker, value: int, encoding: str) -> None:
    bad, good = new_ids(2)
    as_tensor = wire.envelope(bad, "test.double", {"x": np.array([float(value)])}, Options(result=encoding))
    worker.push(as_tensor if encoding == "msgpack" else message(bad, value), message(good, 5.0))
    assert worker.double(good) == [10.0]
    assert worker.failure(bad)[0] == "FAILURE"


def test_outputs_with_wrong_names_say_what_was_expected(worker: Worker) -> None:
    status, name, text = worker.failure(worker.send(100)[0])
    assert (status, name) == ("FAILURE", "KernelFailed")
    assert "['z']" in text
    assert "['y']" in text


def test_arguments_that_a_kernel_itself_refuses_fail_as_such(worker: Worker) -> None:
    from lepton_ai.errors import InvalidArguments

    def refuse(inputs: Inputs, context: Context) -> Outputs:
        raise InvalidArguments("x must be prime", "x")

    worker.shop.repertoire.runs["test.double"] = refuse
    (job,) = worker.send(4.0)
    found = worker.meta(job)
    assert (found.result["exc_type"], found.traceback) == ("InvalidArguments", None)
    assert found.lepton.error == {"code": "invalid_arguments", "message": "x must be prime", "field": "x"}


def test_a_job_that_does_not_fit_its_signature_fails_beside_others_that_do(worker: Worker) -> None:
    worker.warm_up()
    bad, good = new_ids(2)
    worker.push(wire.envelope(bad, "test.double", {"x": [[1.0]]}, Options()), message(good, 5.0))
    assert worker.failure(bad)[1] == "InvalidArguments"
    assert worker.double(good) == [10.0]


def test_bytes_that_are_no_message_are_dropped_and_harm_nobody(worker: Worker) -> None:
    worker.warm_up()
    good = new_id()
    worker.push(b"\xff no message", message(good, 5.0))
    assert worker.double(good) == [10.0]
    assert worker.connection.call("KEYS", "lepton:held:*") == []


def test_a_job_that_has_expired_is_revoked_and_never_run(worker: Worker) -> None:
    job = new_id()
    late = json.loads(message(job, 1.0))
    late["headers"]["expires"] = "2020-01-01T00:00:00+00:00"
    worker.push(json.dumps(late).encode())
    found = worker.meta(job)
    assert (found.status, found.lepton.error["code"]) == ("REVOKED", "cancelled")
    assert worker.shop.launches == {}


def test_a_revoked_job_gets_a_revoked_record_and_is_never_run(worker: Worker) -> None:
    job = new_id()
    worker.books.revoked.add(job)
    worker.push(message(job, 1.0))
    found = worker.meta(job)
    assert (found.status, found.lepton.error["code"]) == ("REVOKED", "cancelled")
    assert worker.shop.launches == {}
    assert worker.counters() == {"cancelled": 1}


def test_a_running_kernel_can_see_that_its_job_was_revoked(worker: Worker) -> None:
    (job,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    (context,) = worker.shop.contexts
    assert not context.cancelled
    worker.books.revoked.add(job)
    assert context.cancelled
    worker.shop.gate.set()
    assert worker.meta(job).status == "REVOKED"  # what it returned may be half of a result


def test_a_result_that_is_ignored_is_not_stored_but_counted(worker: Worker) -> None:
    ignored, kept = new_ids(2)
    envelope = json.loads(message(ignored, 1.0))
    envelope["headers"]["ignore_result"] = True
    worker.push(json.dumps(envelope).encode(), message(kept, 5.0))
    worker.double(kept)
    assert worker.connection.call("GET", topology.result(ignored)) is None
    assert worker.counters() == {"succeeded": 2}


def test_the_same_job_twice_has_one_result_and_counts_as_a_duplicate(worker: Worker) -> None:
    worker.warm_up()
    job, last = new_ids(2)
    worker.push(message(job, 1.0), message(job, 1.0), message(last, 5.0))
    assert worker.double(job) == [2.0]
    worker.double(last)
    assert worker.counters() == {"succeeded": 3, "duplicate": 1}


# -- stopping and pausing ---------------------------------------------------------------------------------------


def test_drain_finishes_and_commits_what_runs_and_takes_nothing_more(worker: Worker) -> None:
    (running,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    (waiting,) = worker.send(2.0, kernel="test.gated")
    draining = threading.Thread(target=worker.slots.drain)
    draining.start()
    assert worker.slots._stopping.wait(5)
    assert worker.connection.call("EXISTS", topology.result(running)) == 0
    worker.shop.gate.set()
    draining.join(5)
    assert not draining.is_alive()
    assert worker.double(running) == [2.0]
    assert worker.connection.call("EXISTS", topology.result(waiting)) == 0
    assert worker.connection.call("LLEN", QUEUE) == 1


def test_an_idle_worker_drains_at_once(worker: Worker) -> None:
    started_s = time.monotonic()
    worker.slots.drain()
    assert time.monotonic() - started_s < 2.0


def test_a_paused_worker_finishes_what_runs_takes_nothing_and_goes_on_when_resumed(worker: Worker) -> None:
    (running,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    worker.slots.pause()
    (waiting,) = worker.send(2.0)
    worker.shop.gate.set()
    assert worker.double(running) == [2.0]
    assert worker.connection.call("LLEN", QUEUE) == 1
    worker.slots.resume()
    assert worker.double(waiting) == [4.0]


def test_a_paused_worker_can_be_drained(worker: Worker) -> None:
    worker.warm_up()
    worker.slots.pause()
    draining = threading.Thread(target=worker.slots.drain, daemon=True)
    draining.start()
    draining.join(5)
    assert not draining.is_alive()


def test_once_abandoned_no_slot_takes_anything_more(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=2)
    worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    worker.slots.abandon()
    (after,) = worker.send(2.0)
    worker.shop.gate.set()
    worker.slots.drain()
    assert worker.connection.call("LLEN", QUEUE) == 1
    assert worker.connection.call("EXISTS", topology.result(after)) == 0


# -- a broker that goes away, a lease that lapses ---------------------------------------------------------------


def kill_others(worker: Worker) -> None:
    worker.connection.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def test_a_result_is_committed_once_though_the_connection_broke_while_its_job_ran(worker: Worker) -> None:
    (job,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    kill_others(worker)
    worker.shop.gate.set()
    assert worker.double(job) == [2.0]
    assert worker.counters() == {"succeeded": 1}
    assert len(worker.shop.contexts) == 1


def test_an_idle_slot_whose_connection_breaks_connects_again(worker: Worker) -> None:
    worker.warm_up()
    kill_others(worker)
    assert worker.double(worker.send(5.0)[0]) == [10.0]


def test_many_jobs_over_a_connection_that_keeps_breaking_end_once_each(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=2, settings=msgspec.structs.replace(SETTINGS, batch_jobs=8))
    sent = [job for _ in range(20) for job in worker.send(*range(1, 11))]
    for at in range(0, 200, 40):
        worker.double(sent[at])
        kill_others(worker)
    for job in sent:
        worker.double(job)
    worker.slots.drain()
    assert worker.counters() == {"succeeded": 200}
    assert worker.connection.call("KEYS", "lepton:held:*") == []


def test_a_lost_reply_to_a_commit_doubles_nothing(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit happened, its answer never came: the slot sends it again and is refused."""
    from lepton_ai.errors import BrokerUnavailable

    commit, lost = Broker.commit, []

    def commit_and_lose(broker: Broker, step: Any) -> list[str]:
        found = commit(broker, step)
        if not lost:
            lost.append(step)
            raise BrokerUnavailable("the answer was lost")
        return found

    monkeypatch.setattr(Broker, "commit", commit_and_lose)
    first, second = worker.send(1.0, 2.0)
    assert worker.double(first) == [2.0]
    assert worker.double(second) == [4.0]
    assert worker.counters() == {"succeeded": 2}
    assert sum(worker.shop.launches.values()) == 2


def test_a_batch_whose_lease_was_lost_is_not_committed_and_runs_again_elsewhere(make_worker: MakeWorker) -> None:
    frozen, other = make_worker(), make_worker(start=False)
    (job,) = frozen.send(1.0, kernel="test.gated")
    assert frozen.shop.entered.acquire(timeout=5)
    frozen.connection.call("DEL", topology.lease(frozen.incarnation))
    assert other.lease.recover() == 1
    frozen.shop.gate.set()
    frozen.slots.drain()
    assert frozen.connection.call("EXISTS", topology.result(job)) == 0
    assert frozen.counters() == {}
    frozen.connection.call("LMOVE", topology.AGAIN, QUEUE, "RIGHT", "LEFT")  # as a router would
    other.shop.gate.set()
    other.slots.start()
    assert other.double(job) == [2.0]
    assert other.counters() == {"succeeded": 1}


def test_a_lease_that_lapses_and_is_taken_again_before_anyone_recovers_costs_a_run_and_no_job(worker: Worker) -> None:
    (job,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    worker.connection.call("DEL", topology.lease(worker.incarnation))
    worker.shop.gate.set()
    assert worker.shop.entered.acquire(timeout=5)  # the commit was refused, and what is still held runs again
    worker.lease.announce(b"")
    assert worker.double(job) == [2.0]
    assert worker.counters() == {"succeeded": 1}


def test_a_job_that_both_its_old_and_its_new_worker_finish_has_one_result(make_worker: MakeWorker) -> None:
    slow, quick = make_worker(), make_worker(start=False)
    (job,) = slow.send(1.0, kernel="test.gated")
    assert slow.shop.entered.acquire(timeout=5)
    slow.connection.call("DEL", topology.lease(slow.incarnation))
    quick.lease.recover()
    slow.lease.announce(b"")  # it thaws, and takes its lease again, before it knows that its batch is gone
    slow.connection.call("LMOVE", topology.AGAIN, topology.held(quick.incarnation, 0), "RIGHT", "LEFT")
    quick.shop.gate.set()
    quick.slots.start()
    assert quick.double(job) == [2.0]
    slow.shop.gate.set()
    slow.slots.drain()
    assert slow.counters() == {"succeeded": 1}


def test_what_a_slot_holds_from_before_is_run_first(make_worker: MakeWorker) -> None:
    worker = make_worker(start=False)
    first, second = new_ids(2)
    worker.connection.call("LPUSH", topology.held(worker.incarnation, 0), message(first, 1.0))
    worker.push(message(second, 2.0))
    worker.slots.start()
    worker.double(second)
    assert [job for what, job in worker.books.seen if what == "started"] == [first, second]


def test_an_event_of_a_failure_names_the_job_and_its_error(worker: Worker) -> None:
    stream = EventStream(worker.connection)
    (job,) = worker.send(-1.0)
    ((_, told),) = stream.read(5000)
    assert told == Event("job.failed", worker.incarnation, "test.double", DEVICE, (job,), data=told.data)
    assert told.data["code"] == "kernel_failed"
    assert event.decode(event.encode(told)) == (told,)


# -- those who watch ------------------------------------------------------------------------------------------------


def mark(worker: Worker, *jobs: str) -> None:
    worker.connection.many(cancellation.mark(jobs, "test"))


def test_a_job_that_is_marked_as_cancelled_never_runs_and_its_mark_is_taken_away(worker: Worker) -> None:
    worker.warm_up()
    gone, good = new_ids(2)
    mark(worker, gone)
    worker.push(message(gone, 1.0), message(good, 5.0))
    assert worker.failure(gone)[0] == "REVOKED"
    assert worker.double(good) == [10.0]
    assert worker.counters() == {"succeeded": 2, "cancelled": 1}
    until(lambda: worker.connection.call("ZCARD", topology.CANCELLED) == 0, "the mark is gone")


def test_a_running_kernel_is_told_of_a_mark_with_the_next_heartbeat(worker: Worker) -> None:
    (job,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    mark(worker, job, new_id())
    assert not worker.shop.contexts[-1].cancelled
    worker.slots.heed(worker.lease)
    assert worker.shop.contexts[-1].cancelled
    assert worker.books.revoked == {job}
    worker.shop.gate.set()
    assert worker.failure(job)[0] == "REVOKED"


def test_an_idle_worker_asks_for_no_marks(worker: Worker) -> None:
    worker.slots.heed(worker.lease)
    assert worker.books.revoked == set()


def test_only_jobs_whose_placement_says_so_are_shown(worker: Worker) -> None:
    shown, hidden = new_ids(2)
    for job in (shown, hidden):
        placement = Placement(job, "test.double", "placed", "", 0.0, "router-1", DEVICE, shown=job == shown)
        worker.connection.call("HSET", topology.jobs(minute_of(job) or 0), job, msgspec.msgpack.encode(placement))
        worker.push(message(job, 1.0))
        worker.meta(job)
    assert worker.books.shown == {shown}
    until(lambda: hidden in worker.books.endings, "both have ended")
    assert worker.books.endings[shown].result == "y=float64[1]"
    assert worker.books.endings[shown].run_s > 0
    assert worker.books.endings[hidden].result == ""


def test_an_ending_says_what_was_raised(worker: Worker) -> None:
    (job,) = worker.send(-1.0)
    worker.failure(job)
    until(lambda: job in worker.books.endings, "it has ended")
    ending = worker.books.endings[job]
    assert (ending.status, ending.error) == ("failed", "KernelFailed('ValueError: below zero')")
    assert "below zero" in (ending.trace or "")


def test_a_batch_that_was_given_to_another_is_lost_and_not_ended(worker: Worker) -> None:
    (job,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    worker.connection.call("DEL", topology.lease(worker.incarnation))
    worker.lease.recover()
    worker.lease.announce(b"")
    worker.shop.gate.set()
    until(lambda: ("lost", job) in worker.books.seen, "the worker knows")
    assert job not in worker.books.endings


def test_progress_is_told_now_and_then_and_stays_between_nought_and_one(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    context = worker.shop.contexts[-1]
    context.progress(0.1)
    assert worker.books.fractions == [], "too soon after the start"
    monkeypatch.setattr("tasks.runner._PROGRESS_S", 0.0)
    for fraction in (-1.0, 0.5, 2):
        context.progress(fraction)
    assert worker.books.fractions == [0.0, 0.5, 1.0]
    worker.shop.gate.set()
    worker.meta(job)


def test_a_kernel_that_was_told_to_stop_is_believed_whatever_is_forgotten_since(worker: Worker) -> None:
    (job,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    worker.books.revoke({job})
    assert worker.shop.contexts[-1].cancelled
    worker.books.revoked.clear()  # as Celery does beyond 50,000 ids
    worker.shop.gate.set()
    assert worker.failure(job)[0] == "REVOKED"


def test_a_commit_whose_answer_was_lost_is_told_as_ended(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, lost = Broker.commit, []

    def flaky(broker: Broker, step: Any) -> list[str]:
        found = commit(broker, step)
        if not lost:
            lost.append(step)
            raise BrokerUnavailable("the answer was lost")
        return found

    monkeypatch.setattr(Broker, "commit", flaky)
    (job,) = worker.send(4.0)
    until(lambda: job in worker.books.endings, "the end is told")
    assert worker.books.endings[job].status == "succeeded"
    assert ("lost", job) not in worker.books.seen


def test_marks_of_a_wrong_type_hold_no_job_up(worker: Worker) -> None:
    worker.connection.call("SET", topology.CANCELLED, "x")
    (job,) = worker.send(4.0)
    assert worker.double(job) == [8.0]


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
