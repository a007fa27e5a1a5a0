"""What becomes of a worker's jobs when its device is lost, and that the process ends for it."""

from __future__ import annotations

from typing import Any

import pytest

from lepton_ai import topology
from lepton_ai.device import Announcement, Peaks
from lepton_ai.errors import BrokerUnavailable, DeviceLost
from lepton_ai.kernel import Context, Inputs, Outputs
from tasks.heartbeat import Heartbeat
from tasks.loss import EXIT_CODE, Loss
from tests.tasks.test_watchdog import End, attempts, has_lease, held, id_of, oldest_first, send
from tests.tasks.workshop import DEVICE, MakeWorker, Worker, until

PEAKS = Peaks(1.0, 1.0, 1.0, 0.0, 0.0)


@pytest.fixture
def end() -> End:
    return End()


def expose(worker: Worker, url: str, end: End, batch: Any = "concat") -> None:
    """Gives a worker the kernel `test.loses`, in which the device is lost, and whoever ends its process for that."""

    def run(inputs: Inputs, context: Context) -> Outputs:
        raise DeviceLost("the device does not answer")

    worker.shop._add("test.loses", batch, run)
    told = Announcement(worker.incarnation, "cpu@host", DEVICE, "cpu", 1, False, PEAKS, (), 0.0)
    worker.slots.lost = Loss(worker.slots, Heartbeat(worker.slots.settings, url, told, worker.slots), end)


def test_what_was_in_the_launch_comes_back_as_suspects_and_the_rest_as_it_was(
    worker: Worker, broker_url: str, end: End
) -> None:
    expose(worker, broker_url, end)
    worker.warm_up()
    messages = send(worker, "test.double", "test.loses", "test.loses", "test.double")
    assert end.wait() == EXIT_CODE
    assert not has_lease(worker)
    assert oldest_first(worker, topology.ALONE) == messages[1:3]
    assert oldest_first(worker, topology.AGAIN) == [messages[0], messages[3]]
    assert held(worker) == []
    worker.lease.recover()
    assert attempts(worker) == {}


def test_what_other_slots_run_is_given_back_unsuspected_and_its_commit_refused(
    make_worker: MakeWorker, broker_url: str, end: End
) -> None:
    worker = make_worker(slots=2)
    expose(worker, broker_url, end)
    (running,) = send(worker, "test.gated")
    worker.enters()
    (broken,) = send(worker, "test.loses")
    assert end.wait() == EXIT_CODE
    assert oldest_first(worker, topology.AGAIN) == [running]
    assert oldest_first(worker, topology.ALONE) == [broken]
    worker.shop.gate.set()
    until(lambda: not worker.slots.holding.get(0) or not worker.slots.holding.get(1), "the other slot has tried")
    assert worker.connection.call("GET", topology.result(id_of(running))) is None


def test_only_a_job_that_ran_alone_counts_an_attempt(worker: Worker, broker_url: str, end: End) -> None:
    expose(worker, broker_url, end)
    (job,) = worker.suspect(1.0, kernel="test.loses")
    assert end.wait() == EXIT_CODE
    worker.lease.recover()
    assert attempts(worker) == {job.encode(): b"1"}
    assert len(oldest_first(worker, topology.ALONE)) == 1


def test_the_fleet_is_told_and_the_process_ends_once(make_worker: MakeWorker, broker_url: str, end: End) -> None:
    worker = make_worker(slots=3)
    expose(worker, broker_url, end, batch=None)
    send(worker, "test.loses", "test.loses", "test.loses")
    assert end.wait() == EXIT_CODE
    until(lambda: not any(slot.busy for slot in worker.slots._slots), "all slots have found out")
    found = [each for _, each in worker.stream.read(1000)]
    (lost,) = [each for each in found if each.type == "device.lost"]
    assert (lost.device, lost.data["reason"]) == (DEVICE, "the device does not answer")
    assert end.codes == [EXIT_CODE]


def test_the_process_ends_even_where_the_broker_is_away(
    worker: Worker, broker_url: str, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    expose(worker, broker_url, end)

    def away(number: Any) -> Any:
        raise BrokerUnavailable("away")

    (message,) = send(worker, "test.double")
    worker.meta(id_of(message))
    monkeypatch.setattr(worker.slots, "connect", away)
    send(worker, "test.loses")
    assert end.wait() == EXIT_CODE
    assert len(held(worker)) == 1
