"""Slots: what they take, when they stop, and what becomes of a batch whose broker or lease is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from lepton_ai import topology, wire
from lepton_ai.errors import BrokerUnavailable, Fenced
from lepton_ai.identity import new_ids
from queues.broker import Broker
from queues.steps import Commit
from tests.tasks.workshop import DEVICE, QUEUE, SETTINGS, MakeWorker, Worker, message, until


def test_slots_run_side_by_side(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=3)
    worker.send(1.0, 2.0, 3.0, kernel="test.gated")
    for _ in range(3):
        assert worker.shop.entered.acquire(timeout=5)
    assert worker.slots.busy == 3
    worker.shop.gate.set()


def test_a_slot_takes_one_job_at_a_time_where_they_are_slow(make_worker: MakeWorker) -> None:
    worker = make_worker(settings=msgspec.structs.replace(SETTINGS, batch_s=1e-9))
    for job in worker.send(1.0, 2.0, 3.0):
        worker.double(job)
    assert worker.shop.launches == {1: 3}


def test_a_batch_that_was_given_to_another_is_lost_and_not_ended(worker: Worker) -> None:
    (job,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    worker.connection.call("DEL", topology.lease(worker.incarnation))
    worker.lease.recover()
    worker.lease.announce(b"")
    worker.shop.gate.set()
    until(lambda: ("lost", job) in worker.books.seen, "the worker knows")
    assert job not in worker.books.endings


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


def test_an_idle_worker_asks_for_no_marks(worker: Worker) -> None:
    worker.slots.heed(worker.lease)
    assert worker.books.revoked == set()


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
    assert other.lease.recover().messages == 1
    frozen.shop.gate.set()
    frozen.slots.drain()
    assert frozen.connection.call("EXISTS", topology.result(job)) == 0
    assert frozen.counters() == {"fenced": 1}
    frozen.connection.call("LMOVE", topology.ALONE, QUEUE, "RIGHT", "LEFT")  # as a router would
    other.shop.gate.set()
    other.slots.start()
    assert other.double(job) == [2.0]
    assert other.counters() == {"fenced": 1, "succeeded": 1}


def test_a_commit_whose_lease_has_lapsed_waits_for_the_heartbeat_and_runs_nothing_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = threading.Semaphore(0)
    commit = Broker.commit

    def watched(broker: Broker, step: Commit) -> list[str]:
        try:
            return commit(broker, step)
        except Fenced:
            refused.release()
            raise

    monkeypatch.setattr(Broker, "commit", watched)
    (job,) = worker.send(1.0, kernel="test.gated")
    assert worker.shop.entered.acquire(timeout=5)
    worker.connection.call("DEL", topology.lease(worker.incarnation))
    worker.shop.gate.set()
    for _ in range(2):
        assert refused.acquire(timeout=5)
    worker.lease.announce(b"")
    assert worker.double(job) == [2.0]
    worker.slots.drain()
    assert worker.counters() == {"succeeded": 1}
    assert len(worker.shop.contexts) == 1


def test_a_job_that_both_its_old_and_its_new_worker_finish_has_one_result(make_worker: MakeWorker) -> None:
    slow, quick = make_worker(), make_worker(start=False)
    (job,) = slow.send(1.0, kernel="test.gated")
    assert slow.shop.entered.acquire(timeout=5)
    slow.connection.call("DEL", topology.lease(slow.incarnation))
    quick.lease.recover()
    slow.lease.announce(b"")  # it thaws, and takes its lease again, before it knows that its batch is gone
    slow.connection.call("LMOVE", topology.ALONE, topology.held(quick.incarnation, 0), "RIGHT", "LEFT")
    quick.shop.gate.set()
    quick.slots.start()
    assert quick.double(job) == [2.0]
    slow.shop.gate.set()
    slow.slots.drain()
    assert slow.counters() == {"succeeded": 1, "fenced": 1}


def test_what_a_slot_holds_from_before_is_run_first(make_worker: MakeWorker) -> None:
    worker = make_worker(start=False)
    first, second = new_ids(2)
    worker.connection.call("LPUSH", topology.held(worker.incarnation, 0), message(first, 1.0))
    worker.push(message(second, 2.0))
    worker.slots.start()
    worker.double(second)
    assert [job for what, job in worker.books.seen if what == "started"] == [first, second]


# -- suspects ---------------------------------------------------------------------------------------------------


def ids_of(messages: Iterable[bytes]) -> list[str]:
    return [wire.read_envelope(each).headers.id for each in messages]


def test_a_suspect_runs_while_the_others_hold_nothing(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=2)
    worker.shop.gates |= {1.0: threading.Event(), 7.0: threading.Event()}
    before = worker.send(1.0, 2.0, kernel="test.gated")
    worker.enters(2)
    (suspect,) = worker.suspect(7.0)
    until(lambda: worker.slots.gate._alone, "the slot for suspects waits to be alone")
    (after,) = worker.send(5.0)
    worker.shop.gates[1.0].set()
    worker.double(before[0])
    assert not worker.shop.entered.acquire(timeout=0.1), "another still runs"
    assert worker.connection.call("EXISTS", topology.result(after)) == 0, "and who is done is not let in again"
    worker.shop.gate.set()
    worker.enters()
    assert {slot: ids_of(held) for slot, held in worker.held().items()} == {2: [suspect]}
    assert [worker.double(job) for job in before] == [[2.0], [4.0]]
    assert worker.slots.busy == 1
    worker.shop.gates[7.0].set()
    assert worker.double(suspect) == [14.0]
    assert worker.double(after) == [10.0]


def test_suspects_are_taken_one_at_a_time_and_each_runs_by_itself(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=2)
    worker.warm_up()
    suspects = worker.suspect(1.0, 2.0, 3.0, kernel="test.double")
    assert [worker.double(job) for job in suspects] == [[2.0], [4.0], [6.0]]
    assert worker.shop.launches == {1: 4}


def test_many_suspects_do_not_keep_the_others_out_for_long(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.slots._ALONE_S", 0.0)
    worker = make_worker()
    suspects = worker.suspect(*range(1, 21), kernel="test.double")
    (other,) = worker.send(50.0)
    for job in (*suspects, other):
        worker.double(job)
    worker.slots.drain()
    order = [job for what, job in worker.books.seen if what == "ended"]
    assert order.index(other) < order.index(suspects[-1])
    assert [job for job in order if job != other] == suspects


def test_a_suspect_that_was_held_from_before_is_run_by_itself_first(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=2, start=False)
    (suspect,) = new_ids(1)
    worker.connection.call("LPUSH", topology.held(worker.incarnation, 2), message(suspect, 1.0, "test.gated"))
    worker.slots.start()
    worker.enters()
    (other,) = worker.send(5.0)
    assert not worker.shop.entered.acquire(timeout=0.1)
    assert worker.connection.call("EXISTS", topology.result(other)) == 0
    worker.shop.gate.set()
    assert (worker.double(suspect), worker.double(other)) == ([2.0], [10.0])


def test_a_worker_drains_with_the_suspect_that_it_has_taken(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=2)
    worker.shop.gates[7.0] = threading.Event()
    worker.send(1.0, kernel="test.gated")
    worker.enters()
    first, second = worker.suspect(7.0, 8.0)
    until(lambda: 2 in worker.held(), "the first is taken")
    draining = threading.Thread(target=worker.slots.drain)
    draining.start()
    worker.shop.gate.set()
    worker.enters()
    worker.shop.gates[7.0].set()
    draining.join(5)
    assert worker.double(first) == [14.0]
    assert worker.connection.call("EXISTS", topology.result(second)) == 0
    assert worker.connection.call("LLEN", topology.alone_queue(DEVICE)) == 1


def test_a_suspect_that_was_given_back_before_its_turn_is_not_run(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=2)
    worker.send(1.0, kernel="test.gated")
    worker.enters()
    (suspect,) = worker.suspect(7.0)
    until(lambda: 2 in worker.held(), "it is taken")
    worker.slots.abandon()
    assert worker.lease.resign() == 2
    worker.shop.gate.set()
    worker.slots.drain()
    assert len(worker.shop.contexts) == 1
    assert worker.connection.call("EXISTS", topology.result(suspect)) == 0


def test_a_worker_whose_slots_wait_for_a_suspect_is_abandoned_in_little_time(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=8)
    worker.suspect(7.0)
    worker.enters()
    started_s = time.monotonic()
    worker.slots.abandon()
    assert time.monotonic() - started_s < 1.0


def test_a_slot_without_work_does_not_keep_the_gate(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=1)
    worker.warm_up()
    for value in (1.0, 2.0, 3.0):
        (suspect,) = worker.suspect(value, kernel="test.double")
        assert worker.double(suspect) == [2 * value]


def test_what_runs_and_what_is_held_can_be_seen_from_outside(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=2)
    (job,) = worker.send(1.0, kernel="test.gated", limit_s=50.0)
    worker.enters()
    (running,) = worker.slots.running
    assert (running.jobs, running.kill_after_s, running.by_own_limit) == ((job,), 50.0, True)
    assert {slot: ids_of(held) for slot, held in worker.slots.holding.items()} == {running.slot: [job]}
    worker.shop.gate.set()
    worker.double(job)
    until(lambda: not worker.slots.running and not worker.slots.holding, "it is over")
