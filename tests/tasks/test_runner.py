"""What becomes of the jobs of a batch: results, failures, retries, limits, and what is told of them."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from lepton_ai import cancellation, event, results, topology, wire
from lepton_ai.accounts import accounts_of
from lepton_ai.bundle import shared_note
from lepton_ai.errors import BrokerUnavailable, DeviceOutOfMemory, InvalidArguments, Overloaded, RetryJob
from lepton_ai.event import Event
from lepton_ai.identity import minute_of, new_id, new_ids, run_of
from lepton_ai.job import LATEST_S, Candidate, Estimate, Meta, Options, Placement, Setback
from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Retry
from lepton_ai.quarantine import Quarantined
from lepton_ai.succession import FollowUps
from queues import functions
from queues.event_stream import EventStream
from tests.tasks.workshop import DEVICE, QUEUE, RAISES, RETURNS, Worker, bundle_of, followed, message, until

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
        replies.append(results.read(popped[1]))
    assert [reply.task_id for reply in replies] == sent


def test_the_record_has_what_the_job_cost_and_its_placement_is_kept_as_long(worker: Worker) -> None:
    job = new_id()
    placement = Placement(job, "test.double", "placed", "because", time.time() - 1.0, "router-1", DEVICE)
    key = topology.jobs(minute_of(job) or 0)
    worker.connection.call("HSET", key, job, msgspec.msgpack.encode(placement))
    worker.connection.call("EXPIRE", key, 60)
    worker.push(message(job, 1.0))
    record = worker.meta(job).lepton
    assert record.placement is None
    assert (record.cost.worker, record.cost.device, record.cost.batch) == (worker.incarnation, DEVICE, 1)
    assert 1.0 <= record.cost.wait_s < 3.0
    until_result, until_placement = worker.connection.many([("PTTL", topology.result(job)), ("PTTL", key)])
    assert until_placement >= until_result - 1000


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


def test_launches_that_were_alike_are_told_together_as_their_mean(worker: Worker) -> None:
    worker.warm_up()
    worker.shop.policy()
    small, large = new_ids(3), new_ids(2)
    stream = EventStream(worker.connection)
    as_large = [wire.envelope(job, "test.tries", {"x": np.ones(1000)}, Options()) for job in large]
    first, second, third = (message(job, 1.0, "test.tries") for job in small)
    worker.push(first, as_large[0], second, as_large[1], third)
    found = [each for _, each in stream.read(5000)]
    assert [each.jobs for each in found] == [tuple(small), tuple(large)]
    observed = [each.observation for each in found]
    assert [(each.jobs, each.flops, each.bytes, each.transfer_bytes) for each in observed] == [
        (1, 2.0, 8.0, 8.0),
        (1, 2000.0, 8000.0, 8000.0),
    ]
    assert [each.dims for each in observed] == [(1.0,), (1000.0,)]
    assert worker.meta(small[0]).lepton.cost.batch == 1


def test_of_launches_of_nearly_the_same_size_the_mean_is_told(worker: Worker) -> None:
    worker.warm_up()
    worker.shop.policy()
    stream = EventStream(worker.connection)
    sizes = dict(zip(new_ids(4), (2, 3, 3, 3), strict=True))
    worker.push(*[wire.envelope(job, "test.tries", {"x": np.ones(n)}, Options()) for job, n in sizes.items()])
    ((_, told),) = stream.read(5000)
    assert told.observation.dims == (2.75,)
    assert told.observation.flops == 2 * 2.75


def test_one_that_fails_among_many_that_run_one_after_another_teaches_nothing(worker: Worker) -> None:
    worker.warm_up()
    worker.shop.raising.append(ValueError("the first"))
    stream = EventStream(worker.connection)
    bad, *good = worker.send(1.0, 2.0, 3.0, kernel="test.tries")
    told = {each.type: each.jobs for _, each in stream.read(5000)}
    assert told == {"job.succeeded": tuple(good), "job.failed": (bad,)}


def test_a_job_whose_id_carries_no_minute_has_its_placement_in_its_record(worker: Worker) -> None:
    worker.warm_up()
    jobs = [str(uuid.uuid4()) for _ in range(2)]
    for job, encoding in zip(jobs, ("msgpack", "json"), strict=True):
        estimate = Estimate(0.5, 0.25, 0.125)
        candidates = (Candidate(DEVICE, estimate), Candidate("gpu", excluded="announces no test.double"))
        placement = Placement(
            job, "test.double", "placed", "b", 1.0, "router-1", DEVICE, estimate, candidates, "earliest_finish"
        )
        minute = int(time.time()) // 60
        worker.connection.call("HSET", topology.jobs(minute), job, msgspec.msgpack.encode(placement))
        worker.push(message(job, 1.0, result=encoding))
        assert worker.meta(job).lepton.placement == placement


def test_a_placement_that_cannot_be_read_holds_no_job_up_and_goes_no_further(worker: Worker) -> None:
    for note in (b"\xc1", msgspec.msgpack.encode({"placed_at": 1.0, "candidates": 7})):
        job = str(uuid.uuid4())
        worker.connection.call("HSET", topology.jobs(int(time.time()) // 60), job, note)
        worker.push(message(job, 1.0, result="msgpack"))
        found = worker.meta(job)
        assert (found.status, found.lepton.placement) == ("SUCCESS", None)


def test_a_batch_runs_in_one_launch_and_each_job_gets_its_own(worker: Worker) -> None:
    worker.warm_up()
    sent = worker.send(1.0, 2.0, 3.0, 4.0)
    assert [worker.double(job) for job in sent] == [[2.0], [4.0], [6.0], [8.0]]
    assert worker.shop.launches == {1: 1, 4: 1}
    assert worker.meta(sent[0]).lepton.cost.batch == 4


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
    assert (found.status, found.lepton.error["code"]) == ("REVOKED", "expired")
    assert worker.shop.launches == {}
    assert worker.counters() == {"expired": 1}


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


def test_two_copies_in_one_batch_have_one_effect_and_what_follows_happens_once(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.warm_up()
    monkeypatch.setattr(worker.canvas, "after_success", lambda sequel, _: FollowUps((("theirs", sequel.id.encode()),)))
    job, last = new_ids(2)
    copy = followed(job, {"callbacks": [{"task": "theirs.next"}]})
    worker.push(copy, copy, message(last, 5.0, "test.gated"))
    worker.shop.gate.set()
    worker.double(last)
    assert worker.double(job) == [2.0]
    assert worker.shop.launches == {1: 2}
    assert worker.connection.call("LRANGE", "theirs", 0, -1) == [job.encode()]
    assert worker.counters() == {"succeeded": 3, "duplicate": 1}
    until(lambda: last in worker.books.endings, "it has ended")
    assert [what for what, each in worker.books.seen if each == job].count("ended") == 1


def test_a_job_whose_follow_ups_a_full_broker_has_no_memory_for_is_put_off(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> FollowUps:
        raise Overloaded("no memory for a chord's size")

    monkeypatch.setattr(worker.canvas, "after_success", full)
    job = new_id()
    worker.push(followed(job, {"callbacks": [{"task": "theirs.next"}]}))
    until(lambda: worker.counters().get("retried"), "it has been put off")
    assert worker.connection.call("HKEYS", topology.ETA_MESSAGES) == [job.encode()]
    assert not worker.connection.call("EXISTS", topology.result(job))


# -- retries ----------------------------------------------------------------------------------------------------


def raise_instead(worker: Worker, error: Exception, retry: Retry | None = None) -> None:
    """Lets `test.double` raise this."""

    def run(inputs: Inputs, context: Context) -> Outputs:
        raise error

    spec = worker.shop.repertoire.kernels["test.double"].spec
    worker.shop.repertoire.runs["test.double"] = run
    worker.shop.repertoire.kernels["test.double"] = Kernel(
        spec.name, inputs=spec.inputs, outputs=spec.outputs, flops=spec.flops, bytes=spec.bytes, retry=retry
    )


@pytest.mark.parametrize(
    ("asked_s", "least_s", "most_s"),
    [
        (math.inf, 0.5, 1.0),
        (-math.inf, 0.5, 1.0),
        (math.nan, 0.5, 1.0),
        (None, 0.5, 1.0),
        (1e300, LATEST_S, LATEST_S),
        (-1.0, 0.0, 0.0),
        (60.0, 60.0, 60.0),
    ],
)
def test_a_retry_comes_after_a_time_that_is_no_longer_than_any_job_may_wait(
    worker: Worker, asked_s: float | None, least_s: float, most_s: float
) -> None:
    raise_instead(worker, RetryJob("busy", delay_s=asked_s))
    stream = EventStream(worker.connection)
    before_s = time.time()
    (job,) = worker.send(1.0)
    ((_, told),) = stream.read(5000)
    assert (told.type, told.jobs) == ("job.retried", (job,))
    assert least_s <= told.data["delay_s"] <= most_s
    due_s = float(worker.connection.call("ZSCORE", topology.ETA, job)) / 1000
    assert before_s + least_s - 0.1 <= due_s <= time.time() + most_s
    assert worker.meta(job).status == "RETRY"
    assert worker.counters() == {"retried": 1, "accepted": 1}
    worker.shop.gate.set()
    assert worker.double(worker.send(4.0, kernel="test.gated")[0]) == [8.0], "the slot goes on"


def test_a_job_whose_retries_are_used_up_is_a_dead_letter_with_its_traceback(worker: Worker) -> None:
    raise_instead(worker, ValueError("below zero"), Retry(times=1))
    stream = EventStream(worker.connection)
    (job,) = worker.send(1.0, reply_to="lepton:reply:me")
    ((_, told),) = stream.read(5000)
    assert told.type == "job.retried"
    assert worker.connection.call("EXISTS", "lepton:reply:me", topology.DEAD) == 0
    worker.lease.due([job])
    worker.connection.call("LMOVE", topology.AGAIN, QUEUE, "RIGHT", "LEFT")  # as a router would
    ((_, told),) = stream.read(5000)
    assert (told.type, told.jobs) == ("job.dead", (job,))
    found = worker.meta(job)
    assert (found.status, found.result["exc_type"]) == ("FAILURE", "KernelFailed")
    assert "ValueError: below zero" in (found.traceback or "")
    assert worker.connection.call("LLEN", "lepton:reply:me") == 1
    ((_, fields),) = worker.connection.call("XRANGE", topology.DEAD, "-", "+")
    letter = dict(zip(fields[::2], fields[1::2], strict=True))
    assert (letter[b"job"], letter[b"code"], letter[b"attempts"]) == (job.encode(), b"retries", b"2")
    assert letter[b"trace"].decode() == found.traceback
    assert wire.read_envelope(letter[b"message"]).headers.retries == 1
    assert worker.counters() == {"retried": 1, "accepted": 1, "dead": 1}


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


def test_marks_of_a_wrong_type_hold_no_job_up(worker: Worker) -> None:
    worker.connection.call("SET", topology.CANCELLED, "x")
    (job,) = worker.send(4.0)
    assert worker.double(job) == [8.0]


def test_a_job_whose_follow_ups_cannot_be_made_ends_and_keeps_no_slot(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: Any) -> FollowUps:
        raise OverflowError("int too big to convert")

    monkeypatch.setattr(worker.canvas, "after_success", defect)
    monkeypatch.setattr(worker.canvas, "after_failure", defect)
    job, failing = new_ids(2)
    embed = {"chord": {"task": "theirs.body"}}
    worker.push(followed(job, embed), followed(failing, embed, "no.such.kernel"))
    status, name, reason = worker.failure(job)
    assert (status, name) == ("FAILURE", "InvalidArguments")
    assert "follow" in reason
    assert worker.failure(failing)[:2] == ("FAILURE", "UnknownKernel")
    assert worker.double(worker.send(2.0)[0]) == [4.0]


def test_a_job_whose_follow_ups_want_the_broker_waits_for_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[FollowUps] = [FollowUps((("theirs", b"next"),))]
    failures: list[Exception] = [BrokerUnavailable("away")]

    def after(*_: Any) -> FollowUps:
        if failures:
            raise failures.pop()
        return answers[0]

    monkeypatch.setattr(worker.canvas, "after_success", after)
    (job,) = new_ids(1)
    worker.push(followed(job, {"callbacks": [{"task": "theirs.next"}]}))
    assert worker.double(job) == [2.0]
    assert worker.connection.call("LRANGE", "theirs", 0, -1) == [b"next"]


# -- bundles --------------------------------------------------------------------------------------------------------


def accepted(worker: Worker, jobs: int, messages: int = 1) -> None:
    """What a router notes of a bundle that it places."""
    worker.connection.call("HINCRBY", topology.COUNTERS, "accepted", jobs)
    worker.connection.call("HINCRBY", topology.COUNTERS, "bundled", jobs - messages)


def unaccounted(worker: Worker) -> dict[str, int]:
    """The terms that must be nought once all is done."""
    terms = accounts_of(worker.connection.call(*functions.call("sizes", (), ()))).terms
    return {name: terms[name] for name in ("difference", "bundled", "held", "queued") if terms[name]}


def test_a_bundle_is_run_and_each_of_its_jobs_has_its_result(worker: Worker) -> None:
    accepted(worker, 9)
    jobs = worker.send_bundle(*range(1, 10), reply_to="lepton:reply:me", result="msgpack")
    assert [worker.meta(job).result["y"] for job in jobs] == [[2.0 * at] for at in range(1, 10)]
    assert worker.shop.launches == {9: 1}
    assert [results.read(each).task_id for each in worker.connection.call("LRANGE", "lepton:reply:me", 0, -1)] == jobs
    assert worker.counters() == {"accepted": 9, "bundled": 0, "succeeded": 9}
    assert unaccounted(worker) == {}


def test_bundles_and_single_jobs_are_taken_run_and_committed_together(worker: Worker) -> None:
    worker.warm_up()
    accepted(worker, 11, 4)
    worker.connection.call("HINCRBY", topology.COUNTERS, "accepted", 1)  # the first one
    runs = [run_of(new_id(), count) for count in (5, 4)]
    alone = new_ids(2)
    messages = [bundle_of(run, range(1, len(run) + 1)) for run in runs]
    worker.push(messages[0], message(alone[0], 7.0), messages[1], message(alone[1], 8.0))
    for run in runs:
        assert [worker.double(job) for job in run] == [[2.0 * at] for at in range(1, len(run) + 1)]
    assert [worker.double(job) for job in alone] == [[14.0], [16.0]]
    assert worker.shop.launches[11] == 1
    assert unaccounted(worker) == {}


def test_a_bad_row_of_a_bundle_fails_alone_and_names_its_argument(worker: Worker) -> None:
    accepted(worker, 5)
    jobs = worker.send_bundle(1.0, 2.0, "three", 4.0, 5.0)
    assert worker.failure(jobs[2])[:2] == ("FAILURE", "InvalidArguments")
    assert worker.meta(jobs[2]).lepton.error["field"] == "x"
    assert [worker.double(job) for job in (*jobs[:2], *jobs[3:])] == [[2.0], [4.0], [8.0], [10.0]]
    assert worker.counters() == {"accepted": 5, "bundled": 0, "succeeded": 4, "failed": 1}
    assert unaccounted(worker) == {}


def test_where_the_kernel_raises_for_one_job_of_a_bundle_the_others_succeed(worker: Worker) -> None:
    accepted(worker, 5)
    jobs = worker.send_bundle(1.0, -1.0, 3.0, 4.0, 5.0)
    assert "below zero" in worker.failure(jobs[1])[2]
    assert [worker.double(jobs[at]) for at in (0, 2, 3, 4)] == [[2.0], [6.0], [8.0], [10.0]]
    assert unaccounted(worker) == {}


def test_a_bundle_of_a_kernel_that_the_worker_does_not_have_fails_job_by_job(worker: Worker) -> None:
    accepted(worker, 4)
    jobs = worker.send_bundle(1.0, 2.0, 3.0, 4.0, kernel="test.missing")
    assert [worker.failure(job)[1] for job in jobs] == ["UnknownKernel"] * 4
    assert unaccounted(worker) == {}


@pytest.mark.parametrize("spelled", ['"bundle" : 4', '"\\u0062undle":4'])
def test_a_bundle_is_one_however_its_header_is_spelled(worker: Worker, spelled: str) -> None:
    accepted(worker, 4)
    jobs = run_of(new_id(), 4)
    worker.push(bundle_of(jobs, [1.0, 2.0, 3.0, 4.0]).replace(b'"bundle":4', spelled.encode()))
    assert [worker.double(job) for job in jobs] == [[2.0], [4.0], [6.0], [8.0]]
    assert unaccounted(worker) == {}


@pytest.mark.parametrize("body", ["!", "/w==", "kZCRgKFu"])
def test_each_job_of_a_bundle_that_cannot_be_read_fails(worker: Worker, body: str) -> None:
    accepted(worker, 4)
    jobs = run_of(new_id(), 4)
    found = json.loads(bundle_of(jobs, [1.0, 2.0, 3.0, 4.0]))
    worker.push(json.dumps(found | {"body": body}).encode())
    assert [worker.meta(job).status for job in jobs] == ["FAILURE"] * 4
    assert unaccounted(worker) == {}


def test_two_copies_of_a_bundle_end_once(worker: Worker) -> None:
    worker.warm_up()
    worker.connection.call("HINCRBY", topology.COUNTERS, "accepted", 1)
    accepted(worker, 8, 2)
    jobs = run_of(new_id(), 4)
    worker.push(*[bundle_of(jobs, [1.0, 2.0, 3.0, 4.0], reply_to="lepton:reply:me")] * 2)
    assert [worker.double(job) for job in jobs] == [[2.0], [4.0], [6.0], [8.0]]
    until(lambda: worker.counters().get("duplicate") == 4, "the second copy is counted")
    assert worker.connection.call("LLEN", "lepton:reply:me") == 4
    assert unaccounted(worker) == {}


def test_one_job_of_a_bundle_that_is_to_be_cancelled_is_not_run(worker: Worker) -> None:
    accepted(worker, 4)
    jobs = run_of(new_id(), 4)
    worker.connection.many(cancellation.mark([jobs[2]], "me"))
    worker.push(bundle_of(jobs, [1.0, 2.0, 3.0, 4.0]))
    assert [worker.meta(job).status for job in jobs] == ["SUCCESS", "SUCCESS", "REVOKED", "SUCCESS"]
    assert worker.shop.launches == {3: 1}
    assert unaccounted(worker) == {}


def test_a_job_of_a_bundle_that_is_to_be_run_again_waits_as_a_message_of_its_own(worker: Worker) -> None:
    accepted(worker, 4)
    worker.shop.policy(Retry(times=1, delay_s=1000))
    worker.shop.raising.append(ValueError("not yet"))
    jobs = worker.send_bundle(1.0, 2.0, 3.0, 4.0, kernel="test.tries")
    assert [worker.double(job) for job in jobs[1:]] == [[4.0], [6.0], [8.0]]
    (waiting,) = worker.connection.call("HVALS", topology.ETA_MESSAGES)
    assert unaccounted(worker) == {}
    found = wire.read_envelope(waiting)
    options = wire.read_options(found.headers)
    assert (found.headers.id, found.headers.retries, options.bundle, options.split) == (jobs[0], 1, None, False)
    worker.connection.many([("DEL", topology.ETA, topology.ETA_MESSAGES), ("LPUSH", QUEUE, waiting)])
    until(lambda: worker.meta(jobs[0]).status == "SUCCESS", "it has been run again")
    assert worker.meta(jobs[0]).result["y"] == [2.0]
    assert unaccounted(worker) == {}


def test_a_job_of_a_bundle_that_is_given_up_is_a_dead_letter_which_can_be_replayed(worker: Worker) -> None:
    accepted(worker, 4)
    worker.shop.policy(Retry(times=0))
    worker.shop.raising.append(ValueError("never"))
    jobs = worker.send_bundle(1.0, 2.0, 3.0, 4.0, kernel="test.tries")
    assert worker.meta(jobs[0]).status == "FAILURE"
    ((_, fields),) = worker.connection.call("XRANGE", topology.DEAD, "-", "+")
    letter = dict(zip(fields[::2], fields[1::2], strict=True))
    assert (letter[b"job"], letter[b"kernel"]) == (jobs[0].encode(), b"test.tries")
    assert unaccounted(worker) == {}
    worker.connection.call("DEL", topology.result(jobs[0]))
    accepted(worker, 1)
    worker.push(letter[b"message"])
    assert worker.double(jobs[0]) == [2.0]
    assert unaccounted(worker) == {}


def noted(worker: Worker, jobs: Sequence[str], *, together: bool) -> None:
    """Where these were placed, as a router says it."""
    placements = [
        msgspec.msgpack.encode(Placement(job, "test.double", "placed", "b", time.time(), "router-1", DEVICE))
        for job in jobs
    ]
    pairs = zip(jobs, placements, strict=True)
    fields = (
        [jobs[0][:-3], shared_note(placements[0], len(jobs))] if together else [part for pair in pairs for part in pair]
    )
    worker.connection.call("HSET", topology.jobs(minute_of(jobs[0]) or 0), *fields)


@pytest.mark.parametrize("result", ["json", "msgpack"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0, 4.0), (1.0, "two", 3.0, 4.0)], ids=["good", "one bad"])
def test_how_long_each_job_of_a_bundle_waited_is_known_by_its_placement(
    worker: Worker, result: str, split: bool, values: tuple[Any, ...]
) -> None:
    jobs = run_of(new_id(), 4)
    noted(worker, jobs, together=not split)
    worker.push(bundle_of(jobs, values, result=result, split=split))
    metas = [worker.meta(job) for job in jobs]
    good = [(meta.task_id, meta.lepton.cost.wait_s > 0) for meta in metas if meta.status == "SUCCESS"]
    assert good == [(job, True) for job, value in zip(jobs, values, strict=True) if value != "two"]


def test_a_bundle_in_the_midst_of_a_run_does_not_take_the_note_of_the_first_for_its_own(worker: Worker) -> None:
    run = run_of(new_id(), 8)
    noted(worker, run[:4], together=True)
    worker.push(bundle_of(run[4:], [1.0, 2.0, 3.0, 4.0]))
    assert [worker.meta(job).lepton.placement for job in run[4:]] == [None] * 4


# -- series -----------------------------------------------------------------------------------------------------


def started(worker: Worker) -> list[str]:
    return [job for what, job in worker.books.seen if what == "started"]


def test_quick_jobs_of_a_kernel_that_takes_one_at_a_time_start_together_and_run_one_by_one(worker: Worker) -> None:
    worker.warm_up()
    jobs = worker.send_series(1.0, 2.0, 3.0)
    worker.enters()
    assert started(worker)[-3:] == jobs
    assert [each.jobs for each in worker.slots.running] == [(jobs[0],)]
    worker.shop.gate.set()
    assert [worker.double(job) for job in jobs] == [[2.0], [4.0], [6.0]]


@pytest.mark.parametrize(
    ("run_s", "spread"), [(1e-4, 0.0), (0.006, 0.1), (1.0, 0.1), (math.inf, 0.1), (math.nan, 0.1), (-1.0, 0.1)]
)
def test_slow_jobs_and_those_of_unknown_cost_start_one_by_one(worker: Worker, run_s: float, spread: float) -> None:
    worker.warm_up()
    jobs = new_ids(2)
    worker.predict(run_s, *jobs, spread=spread)
    worker.push(*(message(job, 1.0, "test.gated") for job in jobs))
    worker.enters()
    assert started(worker)[-1] == jobs[0]
    worker.shop.gate.set()
    worker.double(jobs[1])


def test_jobs_that_something_follows_or_that_have_a_limit_start_one_by_one(worker: Worker) -> None:
    worker.warm_up()
    plain, limited, leading = new_ids(3)
    worker.predict(1e-4, plain, limited, leading)
    worker.push(
        message(plain, 1.0, "test.gated"),
        message(limited, 1.0, "test.gated", limit_s=5.0),
        followed(leading, {"callbacks": [{"task": "theirs.next"}]}, "test.gated"),
    )
    worker.enters()
    assert started(worker)[-1] == plain
    worker.shop.gate.set()
    worker.double(leading)


def test_one_of_a_series_fails_the_others_succeed_and_none_runs_twice(worker: Worker) -> None:
    worker.warm_up()
    worker.shop._add("test.single", None, worker.shop._double)
    stream = EventStream(worker.connection)
    jobs = worker.send_series(1.0, -1.0, 3.0, 102.0, 5.0, kernel="test.single")
    assert [worker.double(jobs[at]) for at in (0, 2, 4)] == [[2.0], [6.0], [10.0]]
    assert worker.failure(jobs[1])[1:] == ("KernelFailed", "ValueError: below zero")
    assert worker.failure(jobs[3])[1] == "KernelFailed"
    assert worker.shop.launches == {1: 1 + 5}
    told = [each for _, each in stream.read(5000)]
    (taught,) = [each for each in told if each.type == "job.succeeded"]
    assert taught.jobs == (jobs[0], jobs[2], jobs[4])


def test_a_series_teaches_what_one_of_its_launches_took(worker: Worker) -> None:
    worker.warm_up()
    stream = EventStream(worker.connection)
    jobs = worker.send_series(1.0, 2.0, 3.0, 4.0, kernel="test.tries")
    ((_, told),) = stream.read(5000)
    seen = told.observation
    assert (told.jobs, seen.jobs, seen.flops, seen.bytes, seen.transfer_bytes) == (tuple(jobs), 1, 2.0, 8.0, 8.0)
    costs = [worker.meta(job).lepton.cost for job in jobs]
    assert {(cost.batch, cost.run_s) for cost in costs} == {(1, costs[0].run_s)}
    assert costs[0].run_s == pytest.approx(seen.run_s)


def test_one_of_a_series_is_cancelled_while_it_runs_and_the_others_are_not(worker: Worker) -> None:
    worker.warm_up()
    first, second, third = worker.send_series(1.0, 2.0, 3.0)
    worker.enters()
    worker.books.revoke({first})
    assert worker.shop.contexts[-1].cancelled
    worker.books.revoked.clear()
    worker.shop.gate.set()
    worker.enters()
    assert not worker.shop.contexts[1].cancelled
    assert worker.failure(first)[0] == "REVOKED"
    assert [worker.double(job) for job in (second, third)] == [[4.0], [6.0]]


def test_one_of_a_series_is_cancelled_before_its_turn_and_has_no_result(worker: Worker) -> None:
    worker.warm_up()
    first, second, third = worker.send_series(1.0, 2.0, 3.0)
    worker.enters()
    worker.books.revoke({second})
    worker.shop.gate.set()
    assert worker.failure(second)[0] == "REVOKED"
    assert [worker.double(job) for job in (first, third)] == [[2.0], [6.0]]


def test_a_series_that_is_predicted_to_take_too_long_is_several(worker: Worker) -> None:
    worker.warm_up()
    jobs = worker.send_series(*range(5), run_s=0.004)
    worker.enters()
    assert started(worker)[-2:] == jobs[:2]
    assert jobs[2] not in started(worker)
    worker.shop.gate.set()
    assert worker.double(jobs[4]) == [8.0]


# -- not on this device -----------------------------------------------------------------------------------------


def short_of_memory(
    worker: Worker, most: int, error: type[BaseException] = DeviceOutOfMemory, batch: Any = "concat"
) -> None:
    """Gives a worker the kernel `test.large`, which raises where more than so many values are in a launch."""

    def run(inputs: Inputs, context: Context) -> Outputs:
        worker.shop.launches[len(inputs["x"])] += 1
        if len(inputs["x"]) > most:
            raise error("full")
        return {"y": 2 * inputs["x"]}

    worker.shop._add("test.large", batch, run)


def released(worker: Worker, count: int) -> dict[str, Options]:
    """The options of jobs that were given back, by job, once there are so many."""
    until(lambda: worker.connection.call("HLEN", topology.ETA_MESSAGES) >= count, f"{count} jobs are given back")
    found = worker.connection.call("HGETALL", topology.ETA_MESSAGES)
    return {job.decode(): wire.read_options(wire.read_envelope(each).headers) for job, each in found.items()}


@pytest.mark.parametrize("error", [DeviceOutOfMemory, MemoryError])
def test_a_batch_that_is_too_large_for_the_device_is_halved_until_it_fits(worker: Worker, error: Any) -> None:
    short_of_memory(worker, 2, error)
    worker.warm_up()
    for job in worker.send(*range(1, 9), kernel="test.large"):
        worker.double(job)
    assert worker.shop.launches == {8: 1, 4: 2, 2: 4, 1: 1}
    assert worker.counters() == {"succeeded": 9}


@pytest.mark.parametrize("batch", ["concat", None])
@pytest.mark.parametrize("error", [DeviceOutOfMemory, MemoryError])
def test_a_job_that_is_too_large_alone_goes_elsewhere_and_the_others_succeed(
    worker: Worker, error: Any, batch: Any
) -> None:
    def run(inputs: Inputs, context: Context) -> Outputs:
        if 7.0 in inputs["x"]:
            raise error("full")
        return {"y": 2 * inputs["x"]}

    worker.shop._add("test.large", batch, run)
    worker.warm_up()
    *fitting, large = worker.send(1.0, 2.0, 3.0, 7.0, kernel="test.large")
    for job in fitting:
        worker.double(job)
    (setback,) = released(worker, 1)[large].setbacks or ()
    assert (setback.device, setback.code) == (DEVICE, "device_out_of_memory")
    assert worker.counters() == {"succeeded": 4, "retried": 1, "accepted": 1}
    assert worker.connection.call("GET", topology.result(large)) is None


def test_to_go_elsewhere_uses_up_neither_a_retry_nor_an_attempt_and_is_told(worker: Worker) -> None:
    worker.shop.policy(Retry(times=0))
    worker.shop.raising = [DeviceOutOfMemory("full")]
    (job,) = worker.send(1.0, kernel="test.tries")
    released(worker, 1)
    (message,) = worker.connection.call("HVALS", topology.ETA_MESSAGES)
    assert wire.read_envelope(message).headers.retries == 0
    assert worker.connection.call("HGETALL", topology.ATTEMPTS) == {}
    assert worker.connection.call("XLEN", topology.DEAD) == 0
    told = next(each for each in events(worker) if each.type == "job.released")
    assert (told.jobs, told.data["code"]) == ((job,), "device_out_of_memory")


def test_a_job_of_a_bundle_goes_elsewhere_by_itself(worker: Worker) -> None:
    short_of_memory(worker, 0)
    jobs = worker.send_bundle(*[float(each) for each in range(2, 6)], kernel="test.large")
    assert released(worker, 4).keys() == set(jobs)


def test_a_job_keeps_what_it_was_told_of_other_devices(worker: Worker) -> None:
    short_of_memory(worker, 0)
    before = Setback("gpu.h100", "device_out_of_memory", "full")
    (job,) = worker.send(1.0, kernel="test.large", setbacks=(before,), priority=7)
    options = released(worker, 1)[job]
    assert [each.device for each in options.setbacks or ()] == ["gpu.h100", DEVICE]
    assert options.priority == 7


def test_a_job_of_a_kernel_in_quarantine_is_placed_anew_unrun_once_routers_know(worker: Worker) -> None:
    worker.slots.quarantine.add(Quarantined("test.double", DEVICE, "it differs by 1"))
    before = time.time()
    (job,) = worker.send(1.0)
    assert released(worker, 1)[job].setbacks is None  # it may come here again when that is lifted
    assert not worker.shop.launches
    assert worker.counters() == {"retried": 1, "accepted": 1}
    due_at = float(worker.connection.call("ZSCORE", topology.ETA, job)) / 1000
    assert before + 0.9 * worker.slots.settings.heartbeat_s < due_at <= time.time() + worker.slots.settings.heartbeat_s
    told = next(each for each in events(worker) if each.type == "job.released")
    assert (told.jobs, "it differs by 1" in told.data["message"]) == ((job,), True)


def test_a_bundle_of_a_kernel_in_quarantine_is_placed_anew_job_by_job(worker: Worker) -> None:
    worker.slots.quarantine.add(Quarantined("test.double", DEVICE, "it differs by 1"))
    jobs = worker.send_bundle(*[float(each) for each in range(4)])
    assert released(worker, 4).keys() == set(jobs)


def events(worker: Worker) -> list[Event]:
    return [each for _, each in worker.stream.read(1000)]


def test_outputs_that_no_broker_takes_fail_their_job_and_not_the_slot(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.runner.MOST_OUTPUT_BYTES", 100)
    monkeypatch.setattr("tasks.runner._MOST_LISTED_BYTES", 50)
    jobs = new_ids(4)
    for job, size, form in zip(jobs, (6, 7, 12, 13), (list, list, np.array, np.array), strict=True):
        values = form([float(at) for at in range(size)])
        worker.push(wire.envelope(job, "test.double", {"x": values}, Options(result="msgpack")))
    assert worker.failure(jobs[1])[:2] == worker.failure(jobs[3])[:2] == ("FAILURE", "TooLarge")
    assert "as msgpack" in worker.failure(jobs[1])[2]
    assert len(worker.double(jobs[0])) == 6
    assert len(worker.double(jobs[2])) == 12


def test_results_that_are_too_much_together_are_committed_one_after_the_other(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.runner._MOST_COMMIT_BYTES", 500)
    worker.warm_up()
    gate = worker.send(0.0, kernel="test.gated")
    worker.enters()
    jobs = worker.send(1.0, 2.0, 3.0)
    worker.shop.gate.set()
    worker.meta(gate[0])
    assert worker.double(jobs[0]) == [2.0]
    until(lambda: worker.connection.call("ZCARD", "lepton:eta") > 0, "the others are put off")
    assert worker.held() == {}
    for job in jobs[1:]:
        if (message := worker.connection.call("HGET", "lepton:eta.messages", job)) is not None:
            worker.push(message)  # as a router does once it is due
            worker.double(job)
