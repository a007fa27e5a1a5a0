"""What becomes of a worker's jobs when one of its kernels runs past its limit, and that the process ends for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from lepton_ai import event, topology, wire
from lepton_ai.errors import BrokerUnavailable
from lepton_ai.identity import new_id, new_ids, run_of
from lepton_ai.kernel import Kernel
from lepton_ai.succession import FollowUps
from queues.broker import Broker
from queues.steps import Commit
from tasks.watchdog import EXIT_CODE, Watchdog
from tests.tasks.workshop import DEVICE, SETTINGS, MakeWorker, NoCanvas, Worker, bundle_of, followed, message, until

#: A job's own limit may end a worker at once, its kernel's never within a test.
OWN = msgspec.structs.replace(SETTINGS, least_limit_s=0.01)
ALONE_QUEUE = topology.alone_queue(DEVICE)


class End:
    """Stands for the end of the process."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self._came = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self._came.set()

    def wait(self) -> int:
        assert self._came.wait(5), "the process does not end"
        return self.codes[0]

    @property
    def is_planned(self) -> bool:
        """Whether a timer will end the process."""
        return any(isinstance(each, threading.Timer) and each.function is self for each in threading.enumerate())


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch) -> End:
    monkeypatch.setattr("tasks.watchdog._LOOK_S", 0.01)
    return End()


@pytest.fixture
def watch(end: End) -> Iterator[Callable[[Worker], None]]:
    """Sets a watchdog on a worker."""
    watchdogs: list[Watchdog] = []

    def start(worker: Worker) -> None:
        watchdogs.append(Watchdog(worker.slots.settings, worker.slots, end))
        watchdogs[-1].start()

    yield start
    for each in watchdogs:
        each.stop()
        each._thread.join(5)


def hang(worker: Worker, batch: Any = None, limit_s: float = 0.01) -> None:
    """Gives a worker the kernel `test.hung`, which hangs until the gate is opened and may not."""
    worker.shop._add("test.hung", batch, worker.shop._gated)
    worker.shop.repertoire.kernels["test.hung"] = Kernel(
        "test.hung", inputs={"x": "float64[n]"}, outputs={"y": "float64[n]"}, flops="n", bytes="n", batch=batch,
        limit_s=limit_s,
    )  # fmt: skip


def send(worker: Worker, *kernels: str, **options: Any) -> list[bytes]:
    """A job of each of these kernels, in one push."""
    jobs = zip(new_ids(len(kernels)), kernels, strict=True)
    messages = [message(job, 1.0, kernel, **options) for job, kernel in jobs]
    worker.push(*messages)
    return messages


def id_of(sent: bytes) -> str:
    return wire.read_envelope(sent).headers.id


def oldest_first(worker: Worker, key: str) -> list[bytes]:
    found: list[bytes] = worker.connection.call("LRANGE", key, 0, -1)
    return found[::-1]


def held(worker: Worker, slot: int = 0) -> list[bytes]:
    return oldest_first(worker, topology.held(worker.incarnation, slot))


def attempts(worker: Worker) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = worker.connection.call("HGETALL", topology.ATTEMPTS)
    return found


def has_lease(worker: Worker) -> bool:
    return bool(worker.connection.call("EXISTS", topology.lease(worker.incarnation)))


# -- a kernel's limit -----------------------------------------------------------------------------------------------


def test_the_culprit_alone_stays_held_and_the_rest_of_its_batch_is_given_back_unsuspected(
    worker: Worker, watch: Any, end: End
) -> None:
    hang(worker)
    worker.warm_up()
    first, culprit, last = send(worker, "test.double", "test.hung", "test.double")
    watch(worker)
    assert end.wait() == EXIT_CODE
    assert (held(worker), oldest_first(worker, topology.AGAIN)) == ([culprit], [first, last])
    assert not has_lease(worker)
    worker.lease.recover()
    assert attempts(worker) == {id_of(culprit).encode(): b"1"}
    assert oldest_first(worker, topology.ALONE) == [culprit]


def test_what_other_slots_hold_is_given_back_unsuspected(make_worker: MakeWorker, watch: Any, end: End) -> None:
    worker = make_worker(slots=2)
    hang(worker)
    culprit, other = send(worker, "test.hung", "test.gated")
    for _ in range(2):
        assert worker.shop.entered.acquire(timeout=5)
    watch(worker)
    end.wait()
    assert oldest_first(worker, topology.AGAIN) == [other]
    worker.lease.recover()
    assert attempts(worker) == {id_of(culprit).encode(): b"1"}
    assert worker.connection.call("EXISTS", topology.result(id_of(other))) == 0


def test_a_suspect_that_waits_for_its_turn_stays_a_suspect(worker: Worker, watch: Any, end: End) -> None:
    hang(worker, limit_s=60)
    (culprit,) = send(worker, "test.hung")
    assert worker.shop.entered.acquire(timeout=5)
    (suspect_id,) = new_ids(1)
    suspect = message(suspect_id, 1.0)
    worker.connection.call("LPUSH", ALONE_QUEUE, suspect)
    until(lambda: worker.slots.holding.get(1), "the suspect waits in its slot")
    (running,) = worker.slots.running
    worker.slots._slots[0].runner.running = msgspec.structs.replace(running, kill_after_s=0.0)
    watch(worker)
    end.wait()
    assert oldest_first(worker, topology.ALONE) == [suspect]
    worker.lease.recover()
    assert attempts(worker) == {id_of(culprit).encode(): b"1"}


def test_a_group_over_its_limit_comes_back_as_suspects_and_nobody_has_an_attempt(
    worker: Worker, watch: Any, end: End
) -> None:
    hang(worker, batch="concat")
    worker.warm_up()
    one, beside, two = send(worker, "test.hung", "test.double", "test.hung")
    watch(worker)
    end.wait()
    assert oldest_first(worker, topology.ALONE) == [one, two]
    assert oldest_first(worker, topology.AGAIN) == [beside]
    assert held(worker) == []
    worker.lease.recover()
    assert attempts(worker) == {}


def test_a_bundle_with_the_culprit_comes_back_as_a_suspect_and_nobody_has_an_attempt(
    worker: Worker, watch: Any, end: End
) -> None:
    """Whoever takes it up runs its jobs one by one, and the culprit is found then."""
    hang(worker)
    worker.warm_up()
    (beside,) = (message(job, 1.0) for job in new_ids(1))
    hung = bundle_of(run_of(new_id(), 4), [1.0, 2.0, 3.0, 4.0], "test.hung")
    worker.push(beside, hung)
    watch(worker)
    end.wait()
    worker.lease.recover()
    assert (oldest_first(worker, topology.ALONE), oldest_first(worker, topology.AGAIN)) == ([hung], [beside])
    assert attempts(worker) == {}
    assert held(worker) == []


def test_a_bundle_that_ran_as_one_launch_comes_back_as_a_suspect(worker: Worker, watch: Any, end: End) -> None:
    hang(worker, batch="concat")
    worker.warm_up()
    (beside,) = (message(job, 1.0) for job in new_ids(1))
    hung = bundle_of(run_of(new_id(), 4), [1.0, 2.0, 3.0, 4.0], "test.hung")
    worker.push(beside, hung)
    watch(worker)
    end.wait()
    assert (oldest_first(worker, topology.ALONE), oldest_first(worker, topology.AGAIN)) == ([hung], [beside])
    worker.lease.recover()
    assert attempts(worker) == {}


def test_of_a_series_the_one_that_hangs_is_the_culprit_and_its_neighbours_are_not_suspected(
    worker: Worker, watch: Any, end: End
) -> None:
    hang(worker, limit_s=0.5)
    worker.shop.gates[1.0] = threading.Event()
    worker.shop.gates[1.0].set()
    worker.warm_up()
    jobs = worker.send_series(1.0, 2.0, 3.0, kernel="test.hung")
    watch(worker)
    assert end.wait() == EXIT_CODE
    assert [id_of(each) for each in held(worker)] == [jobs[1]]
    assert [id_of(each) for each in oldest_first(worker, topology.AGAIN)] == [jobs[0], jobs[2]]
    worker.lease.recover()
    assert attempts(worker) == {jobs[1].encode(): b"1"}


def test_of_two_copies_of_the_culprit_one_stays_held(worker: Worker, watch: Any, end: End) -> None:
    hang(worker)
    worker.warm_up()
    (culprit,) = (message(job, 1.0, "test.hung") for job in new_ids(1))
    worker.push(culprit, culprit)
    watch(worker)
    end.wait()
    assert (held(worker), oldest_first(worker, topology.AGAIN)) == ([culprit], [culprit])
    worker.lease.recover()
    assert attempts(worker) == {id_of(culprit).encode(): b"1"}


# -- a job's own limit ----------------------------------------------------------------------------------------------


class Following(NoCanvas):
    """A Canvas that lets one message follow a failure."""

    def after_failure(self, sequel: Any, failure: Any) -> FollowUps:
        assert sequel.errbacks == [{"task": "theirs.alarm"}]
        return FollowUps((("theirs", b"alarm for " + failure.task_id.encode()),), chord_part=b"part")

    def finish(self, part: bytes) -> bool:
        return False  # it stays, to be seen


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[Commit]:
    """What is committed."""
    found: list[Commit] = []
    commit = Broker.commit

    def noted(broker: Broker, step: Commit) -> list[str]:
        done = commit(broker, step)
        found.append(step)
        return done

    monkeypatch.setattr(Broker, "commit", noted)
    return found


def test_a_jobs_own_limit_refuses_it_at_once_with_its_follow_ups_in_the_same_commit(
    make_worker: MakeWorker, watch: Any, end: End, commits: list[Commit]
) -> None:
    worker = make_worker(settings=OWN)
    worker.slots.canvas = Following()
    (job,) = new_ids(1)
    embed = {"errbacks": [{"task": "theirs.alarm"}], "chord": {"task": "theirs.body"}}
    worker.push(followed(job, embed, "test.gated", limit_s=0.01, reply_to="lepton:reply:me"))
    watch(worker)
    assert end.wait() == EXIT_CODE
    (step,) = commits
    assert [(each.job, each.status) for each in step.outcomes] == [(job, "failed")]
    assert step.pushes == [(job, "theirs", b"alarm for " + job.encode())]
    assert step.chord_parts == [(job, b"part")]
    assert [(each.type, each.jobs) for each in event.decode(step.event)] == [("job.failed", (job,))]
    assert worker.failure(job)[:2] == ("FAILURE", "TimeLimitExceeded")
    assert worker.connection.call("LLEN", "lepton:reply:me") == 1
    assert oldest_first(worker, "theirs") == [b"alarm for " + job.encode()]
    assert worker.connection.call("HGETALL", topology.CHORD_PARTS) == {job.encode(): b"part"}
    assert worker.counters() == {"failed": 1}
    worker.lease.recover()
    assert attempts(worker) == {}
    assert worker.connection.call("EXISTS", topology.ALONE, topology.AGAIN) == 0


def test_nobody_else_is_touched_by_a_jobs_own_limit(make_worker: MakeWorker, watch: Any, end: End) -> None:
    worker = make_worker(slots=2, settings=OWN)
    (other,) = send(worker, "test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    (culprit,) = send(worker, "test.gated", limit_s=0.01)
    watch(worker)
    end.wait()
    assert worker.failure(id_of(culprit))[1] == "TimeLimitExceeded"
    assert oldest_first(worker, topology.AGAIN) == [other]
    assert worker.connection.call("EXISTS", topology.result(id_of(other))) == 0
    assert worker.counters() == {"failed": 1}
    worker.lease.recover()
    assert attempts(worker) == {}


def test_of_two_copies_of_a_job_over_its_own_limit_one_is_refused_and_the_process_ends(
    make_worker: MakeWorker, watch: Any, end: End
) -> None:
    worker = make_worker(settings=OWN)
    worker.warm_up()
    (culprit,) = (message(job, 1.0, "test.gated", limit_s=0.01) for job in new_ids(1))
    worker.push(culprit, culprit)
    watch(worker)
    end.wait()
    assert worker.failure(id_of(culprit))[1] == "TimeLimitExceeded"
    assert oldest_first(worker, topology.AGAIN) == [culprit]


def test_an_ignored_result_of_a_job_over_its_own_limit_is_counted_and_not_stored(
    make_worker: MakeWorker, watch: Any, end: End
) -> None:
    worker = make_worker(settings=OWN)
    (job,) = new_ids(1)
    ignored = json.loads(message(job, 1.0, "test.gated", limit_s=0.01))
    ignored["headers"]["ignore_result"] = True
    worker.push(json.dumps(ignored).encode())
    watch(worker)
    end.wait()
    assert worker.connection.call("EXISTS", topology.result(job)) == 0
    assert worker.counters() == {"failed": 1}


# -- what comes in between ------------------------------------------------------------------------------------------


def test_a_kernel_that_ends_in_that_very_moment_has_its_result_and_the_process_goes_on(
    make_worker: MakeWorker, watch: Any, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(settings=OWN)
    release, tried = Broker.release, threading.Event()

    def late(broker: Broker, *words: Any) -> None:
        worker.shop.gate.set()
        worker.stream.read(5000)  # the commit
        try:
            release(broker, *words)
        finally:
            tried.set()

    monkeypatch.setattr(Broker, "release", late)
    hang(worker)
    (culprit,) = send(worker, "test.hung")
    watch(worker)
    assert tried.wait(5)
    assert worker.double(id_of(culprit)) == [2.0]
    until(lambda: not end.is_planned, "nothing ends the process any more")
    assert worker.double(worker.send(5.0)[0]) == [10.0]
    assert (end.codes, worker.counters()) == ([], {"succeeded": 2})


def test_a_job_that_ends_before_it_is_refused_for_its_own_limit_is_not_failed(
    make_worker: MakeWorker, watch: Any, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(settings=OWN)
    release = Broker.release

    def then_it_ends(broker: Broker, *words: Any) -> None:
        release(broker, *words)
        worker.shop.gate.set()
        worker.stream.read(5000)

    monkeypatch.setattr(Broker, "release", then_it_ends)
    (culprit,) = send(worker, "test.gated", limit_s=0.01)
    watch(worker)
    end.wait()
    # It was over its limit by then: the worker itself says so, once.
    assert worker.failure(id_of(culprit))[1] == "TimeLimitExceeded"
    assert worker.counters() == {"failed": 1}


def test_a_hung_kernel_whose_batch_was_given_to_another_ends_the_process_all_the_same(
    worker: Worker, watch: Any, end: End
) -> None:
    hang(worker)
    (culprit,) = send(worker, "test.hung")
    assert worker.shop.entered.acquire(timeout=5)
    worker.connection.call("DEL", topology.lease(worker.incarnation))
    worker.lease.recover()
    worker.lease.announce(b"")
    watch(worker)
    assert end.wait() == EXIT_CODE
    assert oldest_first(worker, topology.ALONE) == [culprit]
    assert not has_lease(worker)


def test_with_a_broker_that_is_away_the_process_ends_all_the_same(
    worker: Worker, watch: Any, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: object) -> Broker:
        raise BrokerUnavailable("it is away")

    hang(worker)
    (culprit,) = send(worker, "test.hung")
    assert worker.shop.entered.acquire(timeout=5)
    monkeypatch.setattr(worker.slots, "connect", away)
    watch(worker)
    assert end.wait() == EXIT_CODE
    assert held(worker) == [culprit]


def test_with_a_broker_that_does_not_answer_the_process_ends_after_a_while(
    worker: Worker, watch: Any, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def silent(_: object) -> Broker:
        answered.wait(20)
        raise BrokerUnavailable("it said nothing")

    monkeypatch.setattr("tasks.watchdog._PATIENCE_S", 0.05)
    hang(worker)
    send(worker, "test.hung")
    assert worker.shop.entered.acquire(timeout=5)
    monkeypatch.setattr(worker.slots, "connect", silent)
    watch(worker)
    try:
        assert end.wait() == EXIT_CODE
    finally:
        answered.set()


def test_what_keeps_within_its_limit_is_left_alone(worker: Worker, watch: Any, end: End) -> None:
    looks = threading.Semaphore(0)
    hang(worker, limit_s=60)
    send(worker, "test.hung")
    assert worker.shop.entered.acquire(timeout=5)
    running = type(worker.slots).running

    class Looked(type(worker.slots)):  # type: ignore[misc]
        @property
        def running(self) -> Any:
            looks.release()
            return running.fget(self)  # type: ignore[attr-defined]

    worker.slots.__class__ = Looked
    watch(worker)
    for _ in range(3):
        assert looks.acquire(timeout=5)
    assert (end.codes, has_lease(worker)) == ([], True)
