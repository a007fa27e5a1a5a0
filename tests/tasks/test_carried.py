"""State that jobs carry by key, on a worker: each job counts once, in whatever order and however often it runs."""

from __future__ import annotations

import secrets
import time
from typing import Any

import numpy as np
import pytest

from lepton_ai import Client, carried, topology, wire
from lepton_ai.identity import new_ids
from lepton_ai.job import Options
from queues.connection import Connection
from tests.tasks.workshop import SETTINGS, MakeWorker, Worker

BEFORE = {"total": np.array([3.0]), "seen": np.ones(1)}
KEY = topology.carried(topology.LANE, "test.count", "k")


def count(worker: Worker, *values: float, key: str = "k", **options: Any) -> list[str]:
    """Jobs of one state key, in one push."""
    jobs = new_ids(len(values))
    worker.push(*(message(job, value, key, **options) for job, value in zip(jobs, values, strict=True)))
    return list(jobs)


def message(job: str, value: float, key: str | None = "k", **options: Any) -> bytes:
    return wire.envelope(job, "test.count", {"x": [value]}, Options(state_key=key, **options))


def state(worker: Worker, key: str = KEY) -> dict[str, list[float]]:
    value = worker.connection.call("HGET", key, "value")
    found = carried.decode(value, worker.shop.repertoire.kernels["test.count"].signature)
    return {name: array.tolist() for name, array in found.items()}


def bring_back(worker: Worker) -> None:
    """What was put off, because another slot was first three times: at once, where a router waits until it is due."""
    for job in worker.connection.call("ZRANGE", "lepton:eta", 0, -1):
        late = worker.connection.call("HGET", "lepton:eta.messages", job)
        worker.connection.call("ZREM", "lepton:eta", job)
        worker.connection.call("HDEL", "lepton:eta.messages", job)
        worker.push(late)


def test_each_job_goes_on_with_what_the_last_one_left(worker: Worker) -> None:
    totals = [worker.double(count(worker, value)[0]) for value in (1.0, 2.0, 4.0)]
    assert totals == [[1.0], [3.0], [7.0]]
    assert state(worker) == {"total": [7.0], "seen": [1.0, 2.0, 4.0]}


def test_keys_have_states_of_their_own_and_a_job_without_one_begins_anew(worker: Worker) -> None:
    (a,), (b,) = count(worker, 1.0), count(worker, 2.0, key="other")
    (c,) = new_ids(1)
    worker.push(message(c, 5.0, None))
    assert [worker.double(job) for job in (a, b, c)] == [[1.0], [2.0], [5.0]]
    assert state(worker)["total"] == [1.0]


def test_what_is_carried_is_no_part_of_the_result(worker: Worker) -> None:
    (job,) = count(worker, 1.0)
    assert worker.meta(job).result == {"y": [1.0]}


def test_jobs_of_one_batch_hand_it_on(worker: Worker) -> None:
    worker.warm_up()
    gate = worker.send(0.0, kernel="test.gated")
    worker.enters()
    jobs = count(worker, *map(float, range(1, 11)))
    worker.shop.gate.set()
    worker.meta(gate[0])
    assert sorted(worker.double(job)[0] for job in jobs) == np.cumsum(range(1, 11)).tolist()
    assert state(worker)["total"] == [55.0]


def test_one_that_fails_leaves_nothing(worker: Worker) -> None:
    worker.warm_up()
    first, bad, last = count(worker, 1.0, -1.0, 4.0)
    assert [worker.double(first), worker.double(last)] == [[1.0], [5.0]]
    assert worker.failure(bad)[0] == "FAILURE"
    assert state(worker) == {"total": [5.0], "seen": [1.0, 4.0]}


@pytest.mark.parametrize("result", ["json", "msgpack"])
def test_a_second_message_of_a_job_counts_once(worker: Worker, result: str) -> None:
    (job,) = count(worker, 1.0, result=result)
    worker.double(job)
    worker.push(message(job, 1.0), message(job, 1.0))
    (last,) = count(worker, 2.0)
    assert worker.double(last) == [3.0]
    assert worker.counters()["duplicate"] == 2


def test_where_another_has_carried_it_on_meanwhile_the_job_runs_again(worker: Worker, broker_url: str) -> None:
    others = [3.0, 30.0]
    another = Connection(broker_url, "another")

    def intrude() -> None:
        if others:
            left = {"total": np.array([others.pop()]), "seen": np.ones(1)}
            another.call("HSET", KEY, "version", f"of another {len(others)}", "value", carried.encode(left, 999))

    worker.shop.between = intrude
    (job,) = count(worker, 1.0)
    assert worker.double(job) == [4.0]
    assert worker.shop.launches[1] == 3
    assert state(worker) == {"total": [4.0], "seen": [1.0, 1.0]}
    assert worker.counters()["succeeded"] == 1
    assert worker.held() == {}
    another.close()


def test_where_it_is_forgotten_meanwhile_the_job_runs_again_from_nothing(worker: Worker, broker_url: str) -> None:
    worker.double(count(worker, 5.0)[0])
    forgotten: list[bool] = []

    def forget() -> None:
        if not forgotten:
            with Client(broker_url) as client:
                forgotten.append(client.forget("test.count", "k"))

    worker.shop.between = forget
    (job,) = count(worker, 1.0)
    assert worker.double(job) == [1.0]
    assert forgotten == [True]
    assert state(worker) == {"total": [1.0], "seen": [1.0]}


def test_on_a_key_that_never_rests_a_job_is_put_off_and_holds_up_no_other(worker: Worker, broker_url: str) -> None:
    another = Connection(broker_url, "another")
    busy = [True]

    def intrude() -> None:
        if busy:
            another.call("HSET", KEY, "version", secrets.token_hex(4), "value", carried.encode(BEFORE, 999))

    worker.shop.between = intrude
    worker.warm_up()
    gate = worker.send(0.0, kernel="test.gated")
    worker.enters()
    (job,), (beside,) = count(worker, 1.0), worker.send(21.0)
    worker.shop.gate.set()
    worker.meta(gate[0])
    assert worker.double(beside) == [42.0]
    assert worker.connection.call("ZCARD", "lepton:eta") == 1
    assert worker.connection.call("GET", topology.result(job)) is None
    busy.clear()
    worker.push(worker.connection.call("HGET", "lepton:eta.messages", job))  # as a router does once it is due
    assert worker.double(job) == [4.0]
    another.close()


def test_two_slots_lose_nothing_of_one_key(make_worker: MakeWorker) -> None:
    worker = make_worker(slots=2)
    worker.warm_up()
    jobs = [job for at in range(40) for job in count(worker, float(at))]
    deadline = time.monotonic() + 30
    for job in jobs:
        while worker.connection.call("GET", topology.result(job)) is None:
            assert time.monotonic() < deadline, f"job {job} has no result"
            bring_back(worker)
            worker.stream.read(50)
    found = sorted(worker.double(job)[0] for job in jobs)
    assert state(worker)["total"] == [780.0]
    assert sorted(state(worker)["seen"]) == list(map(float, range(40)))
    assert found[-1] == 780.0


def test_it_lasts_as_long_as_it_is_to_after_its_last_job(make_worker: MakeWorker) -> None:
    worker = make_worker(settings=type(SETTINGS)(lease_s=60, heartbeat_s=30, state_ttl_s=500.0))
    worker.double(count(worker, 1.0)[0])
    assert 495 < worker.connection.call("TTL", KEY) <= 500


def test_one_that_takes_too_much_fails_its_job_and_stays_as_it_was(make_worker: MakeWorker) -> None:
    worker = make_worker(settings=type(SETTINGS)(lease_s=60, heartbeat_s=30, state_bytes=200))
    jobs = [count(worker, float(at))[0] for at in range(20)]
    found = [worker.meta(job).status for job in jobs]
    assert found[0] == "SUCCESS"
    assert worker.failure(jobs[-1])[:2] == ("FAILURE", "TooLarge")
    assert len(state(worker)["seen"]) == found.count("SUCCESS")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(b"\xc1", "string"), (carried.encode({"total": np.ones(2)}, 99), "fields"), (b"", "empty")],
    ids=["no msgpack", "another kernel's", "nothing"],
)
def test_one_that_does_not_fit_fails_the_jobs_and_not_the_worker(worker: Worker, value: bytes, kind: str) -> None:
    worker.connection.call("HSET", KEY, "version", "1", "value", value)
    (job,) = count(worker, 1.0)
    assert worker.failure(job)[:2] == ("FAILURE", "InvalidArguments")
    (other,) = count(worker, 1.0, key="other")
    assert worker.double(other) == [1.0]


def test_a_key_that_holds_something_else_costs_no_slot(worker: Worker) -> None:
    worker.connection.call("SET", KEY, b"text")
    (job,) = count(worker, 1.0)
    assert worker.failure(job)[0] == "FAILURE"
    (other,) = count(worker, 1.0, key="other")
    assert worker.double(other) == [1.0]


def test_a_state_key_is_for_kernels_that_carry_state(worker: Worker) -> None:
    (job, both) = new_ids(2)
    worker.push(wire.envelope(job, "test.double", {"x": [1.0]}, Options(state_key="k")))
    worker.push(wire.envelope(both, "test.count", {"x": [1.0], "total": [1.0]}, Options(state_key="k")))
    assert worker.failure(job)[:2] == ("FAILURE", "OptionNotSupported")
    assert worker.failure(both)[:2] == ("FAILURE", "InvalidArguments")
