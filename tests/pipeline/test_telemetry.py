from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import structlog

from lepton_ai import event, topology
from lepton_ai.device import Announcement, Peaks, ResourceState
from lepton_ai.event import Event, Observation
from lepton_ai.placement.costs import CostModel, Size
from lepton_ai.settings import Settings
from pipeline import telemetry
from pipeline.cluster import Cluster
from pipeline.telemetry import Telemetry, learn
from queues.connection import Connection

PEAKS = Peaks(1e9, 1e9, math.inf, 0.0, 0.0)
#: A launch that took a thousand times as long as the device's peaks would have it.
SLOW = Observation("test.kernel", "cpu", 1, 1e6, 0.0, 0.0, 1.0)
QUICK = msgspec.structs.replace(SLOW, run_s=0.01)
WORKER = Announcement("worker-1", "one", "cpu", "cpu", 1, False, PEAKS, (), 0.0)


def predicted_s(model: CostModel) -> float:
    return model.predict("test.kernel", "cpu", Size(1e6, 0.0), PEAKS).run_s


def expected_s(*observations: Observation) -> Any:
    """What a model that has learned these predicts."""
    model = CostModel()
    for each in observations:
        model.learn(each, PEAKS)
    return pytest.approx(predicted_s(model))


def succeeded(*jobs: str, observation: Observation | None = None) -> Event:
    return Event("job.succeeded", "worker-1", "test.kernel", "cpu", jobs, observation)


# -- learn ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Cluster:
    found = Cluster()
    found.refresh([WORKER])
    return found


@pytest.mark.parametrize("ended", ["job.succeeded", "job.failed", "job.cancelled"])
def test_a_job_that_ended_is_outstanding_no_longer(cluster: Cluster, ended: str) -> None:
    cluster.dispatched("a", "cpu", 1.0)
    cluster.dispatched("b", "cpu", 2.0)
    learn(Event(ended, "worker-1", jobs=("a",)), cluster, CostModel())
    assert cluster.outstanding_s("cpu") == 2.0


@pytest.mark.parametrize("kind", ["job.placed", "job.parked", "device.heartbeat", "something.new"])
def test_other_events_leave_the_work_outstanding(cluster: Cluster, kind: str) -> None:
    cluster.dispatched("a", "cpu", 1.0)
    learn(Event(kind, "worker-1", jobs=("a",)), cluster, CostModel())
    assert cluster.outstanding_s("cpu") == 1.0


def heartbeat(**state: Any) -> Event:
    told = msgspec.to_builtins(ResourceState(0, 0.0, 0.0, 0, 1, **state))
    return Event("device.heartbeat", "worker-1", device="cpu", data={"state": told})


def test_a_heartbeat_tells_the_state_of_its_device(cluster: Cluster) -> None:
    learn(heartbeat(share=0.25, speed=0.5), cluster, CostModel())
    assert (cluster.share("cpu"), cluster.devices[0].speed) == (0.25, 0.5)


@pytest.mark.parametrize("state", [None, {"load": 0.5}, {"busy_slots": "many"}])
def test_a_heartbeat_of_another_release_changes_nothing(cluster: Cluster, state: Any) -> None:
    learn(Event("device.heartbeat", "worker-1", device="cpu", data={"state": state}), cluster, CostModel())
    assert cluster.share("cpu") == 1.0


def test_what_is_learned_is_the_speed_of_the_device_without_others_load(cluster: Cluster) -> None:
    model = CostModel()
    learn(heartbeat(speed=0.5), cluster, model)
    learn(succeeded("a", observation=msgspec.structs.replace(SLOW, run_s=2 * SLOW.run_s)), cluster, model)
    assert predicted_s(model) == expected_s(SLOW)


def test_an_observation_teaches_the_cost_model(cluster: Cluster) -> None:
    model = CostModel()
    learn(succeeded("a", observation=SLOW), cluster, model)
    assert predicted_s(model) == expected_s(SLOW) != predicted_s(CostModel())


def test_an_observation_of_a_device_that_is_gone_teaches_nothing(cluster: Cluster) -> None:
    model = CostModel()
    cluster.refresh([])
    learn(succeeded("a", observation=SLOW), cluster, model)
    assert predicted_s(model) == predicted_s(CostModel())


# -- the service ------------------------------------------------------------------------------------------------


@pytest.fixture
def start(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Callable[[], None]]]:
    """Starts the service, which keeps its model after each look at the stream; gives what stops it."""
    monkeypatch.setattr(telemetry, "_REPORT_S", 0.0)
    running: list[tuple[threading.Event, threading.Thread]] = []
    waker = Connection(broker_url, "waker")

    def start() -> Callable[[], None]:
        stop = threading.Event()
        thread = threading.Thread(target=Telemetry(Settings(), broker_url).run, args=[stop], daemon=True)
        thread.start()
        running.append((stop, thread))
        until(lambda: b"name=telemetry-events" in waker.call("CLIENT", "LIST"), "telemetry follows the stream")

        def end() -> None:
            stop.set()
            thread.join(5)
            assert not thread.is_alive()

        return end

    yield start
    for stop, _ in running:
        stop.set()
    for _, thread in running:
        thread.join(5)
    waker.close()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"in {timeout_s} s it did not happen that {what}"
        time.sleep(0.005)


def come_online(connection: Connection) -> None:
    lease = topology.lease(WORKER.incarnation)
    connection.many([("SET", lease, msgspec.msgpack.encode(WORKER)), ("SADD", topology.HOLDERS, WORKER.incarnation)])
    tell(connection, Event("device.online", WORKER.incarnation, device="cpu"))


def tell(connection: Connection, *told: Event) -> None:
    connection.call("XADD", topology.EVENTS, "*", "e", event.encode(*told))


def kept_s(connection: Connection) -> float:
    """What the kept model predicts."""
    model = CostModel()
    if snapshot := connection.call("GET", topology.MODEL):
        model.restore(snapshot)
    return predicted_s(model)


def test_what_was_observed_is_kept_on_the_broker(start: Any, connection: Connection) -> None:
    start()
    come_online(connection)
    tell(connection, succeeded("a", observation=SLOW))
    until(lambda: kept_s(connection) == expected_s(SLOW), "the model is kept")


def test_the_model_is_kept_when_the_service_stops(
    start: Any, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_REPORT_S", 1000.0)
    end = start()
    end()
    assert connection.call("EXISTS", topology.MODEL) == 1


def test_where_no_model_is_kept_it_is_learned_again_from_what_the_stream_still_has(
    start: Any, connection: Connection
) -> None:
    come_online(connection)
    tell(connection, succeeded("a", observation=SLOW))
    start()
    until(lambda: kept_s(connection) == expected_s(SLOW), "the model is kept")


def test_a_drift_is_logged(start: Any, connection: Connection) -> None:
    start()
    come_online(connection)
    with structlog.testing.capture_logs() as logged:
        tell(connection, *[succeeded("a", observation=QUICK) for _ in range(50)])
        tell(connection, *[succeeded("a", observation=SLOW) for _ in range(20)])
        until(lambda: any(each["event"] == "device_drifted" for each in logged), "the drift is logged")


def test_a_new_service_goes_on_from_the_kept_model(start: Any, connection: Connection) -> None:
    model = CostModel()
    model.learn(SLOW, PEAKS)
    connection.call("SET", topology.MODEL, model.snapshot())
    start()
    come_online(connection)
    tell(connection, succeeded("a", observation=QUICK))
    until(lambda: kept_s(connection) == expected_s(SLOW, QUICK), "what both taught is kept")


def test_a_worker_that_is_there_before_the_service_is_learned_from(start: Any, connection: Connection) -> None:
    come_online(connection)
    start()
    tell(connection, succeeded("a", observation=SLOW))
    until(lambda: kept_s(connection) == expected_s(SLOW), "the model is kept")


def test_a_broken_connection_is_made_again_and_nothing_in_between_is_missed(start: Any, connection: Connection) -> None:
    start()
    come_online(connection)
    tell(connection, succeeded("a", observation=SLOW))
    until(lambda: kept_s(connection) == expected_s(SLOW), "the model is kept")
    connection.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    tell(connection, succeeded("b", observation=QUICK))
    until(lambda: kept_s(connection) == expected_s(SLOW, QUICK), "what happened meanwhile is learned")


def test_a_broker_that_refuses_to_keep_the_model_does_not_end_the_service(start: Any, connection: Connection) -> None:
    start()
    come_online(connection)
    connection.call("CONFIG", "SET", "maxmemory", "1")
    try:
        time.sleep(0.7)  # longer than a look at the stream: the refusal leaves no trace that could be waited for
    finally:
        connection.call("CONFIG", "SET", "maxmemory", "0")
    tell(connection, succeeded("a", observation=SLOW))
    until(lambda: kept_s(connection) == expected_s(SLOW), "the model is kept")
