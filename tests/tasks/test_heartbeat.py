from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lepton_ai import topology
from lepton_ai.device import Announcement, DeviceState, Peaks, ResourceState, read_leases
from lepton_ai.errors import BrokerUnavailable, Fenced
from lepton_ai.event import Event
from lepton_ai.kernel import KernelSpec
from lepton_ai.quarantine import Quarantined, field, read
from lepton_ai.settings import Settings
from queues.broker import Broker
from queues.connection import Connection
from queues.event_stream import EventStream
from queues.steps import Commit
from tasks.heartbeat import Heartbeat
from tasks.host import boot
from tasks.quarantine import Quarantine
from tests.tasks.workshop import until

QUICK = Settings(lease_s=0.5, heartbeat_s=0.05)
INCARNATION = "worker-of-the-test"
ANNOUNCEMENT = Announcement(
    INCARNATION, "cpu@host", "cpu.test", "cpu", 2, False, Peaks(1.0, 1.0, 1.0, 0.0, 0.0), (), 0.0
)
LEASE = topology.lease(INCARNATION)


class Slots(SimpleNamespace):
    """As much of the slots as a heartbeat looks at."""

    busy_s: float
    busy: int
    count: int


@pytest.fixture
def slots() -> Slots:
    return Slots(
        busy_s=0.0,
        busy=1,
        count=2,
        heed=lambda _: None,
        driver=SimpleNamespace(state=DeviceState),
        threads=[],
        quarantine=Quarantine("cpu.test"),
    )


@pytest.fixture
def beat(broker_url: str, slots: Slots) -> Iterator[Callable[..., Heartbeat]]:
    """Starts heartbeats, and ends their threads."""
    beats: list[Heartbeat] = []

    def start(settings: Settings = QUICK, announcement: Announcement = ANNOUNCEMENT) -> Heartbeat:
        beats.append(Heartbeat(settings, broker_url, announcement, slots))  # type: ignore[arg-type]
        beats[-1].start()
        return beats[-1]

    yield start
    for each in beats:
        each._halt()


@pytest.fixture
def stream(broker_url: str) -> Iterator[EventStream]:
    connection = Connection(broker_url, "stream")
    yield EventStream(connection)
    connection.close()


def next_event(stream: EventStream, kind: str) -> Event:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for _, each in stream.read(1000):
            if each.type == kind:
                return each
    raise AssertionError(f"no {kind} came")


def test_a_worker_is_announced_in_its_lease_once_start_returns(beat: Any, connection: Connection) -> None:
    beat()
    assert msgspec.msgpack.decode(connection.call("GET", LEASE), type=Announcement) == ANNOUNCEMENT
    assert connection.call("SISMEMBER", topology.HOLDERS, INCARNATION) == 1


def test_the_fleet_is_told_that_the_device_is_online(beat: Any, stream: EventStream) -> None:
    beat()
    told = next_event(stream, "device.online")
    assert (told.source, told.device, told.data) == (INCARNATION, "cpu.test", {"worker": "cpu@host"})


def test_without_a_broker_start_says_so(slots: Slots, tmp_path: Any) -> None:
    with pytest.raises(BrokerUnavailable):
        Heartbeat(QUICK, f"unix://{tmp_path}/none.sock", ANNOUNCEMENT, slots).start()  # type: ignore[arg-type]


def test_the_lease_is_renewed_beyond_its_term(beat: Any, connection: Connection, stream: EventStream) -> None:
    beat()
    started_s = time.monotonic()
    while time.monotonic() - started_s < 2 * QUICK.lease_s:
        next_event(stream, "device.heartbeat")
        assert connection.call("EXISTS", LEASE) == 1


def test_a_heartbeat_carries_the_state_of_slots_and_host(beat: Any, stream: EventStream, slots: Slots) -> None:
    beat()
    state = msgspec.convert(next_event(stream, "device.heartbeat").data["state"], ResourceState)
    assert state.busy_slots == 1
    assert 0 < state.memory_used_bytes < state.memory_total_bytes
    assert 0 <= state.host_cpu <= 1


def test_utilization_is_the_share_of_the_slots_time_since_the_last_heartbeat(
    beat: Any, stream: EventStream, slots: Slots
) -> None:
    beat()
    first = next_event(stream, "device.heartbeat")
    assert first.data["state"]["utilization"] == 0.0
    slots.busy_s += 1000.0
    seen = [next_event(stream, "device.heartbeat").data["state"]["utilization"] for _ in range(4)]
    assert 1.0 in seen
    assert seen[-1] == 0.0


def test_a_lease_that_lapsed_is_taken_again_and_told(beat: Any, connection: Connection, stream: EventStream) -> None:
    beat()
    next_event(stream, "device.online")
    connection.many([("DEL", LEASE), ("SREM", topology.HOLDERS, INCARNATION)])
    next_event(stream, "device.online")
    assert msgspec.msgpack.decode(connection.call("GET", LEASE), type=Announcement) == ANNOUNCEMENT
    assert connection.call("SISMEMBER", topology.HOLDERS, INCARNATION) == 1


def test_a_broken_connection_is_made_again(beat: Any, connection: Connection) -> None:
    beat()
    connection.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    deadline = time.monotonic() + 3 * QUICK.lease_s
    while time.monotonic() < deadline:
        assert connection.call("EXISTS", LEASE) == 1
        time.sleep(0.01)


@pytest.fixture
def full(connection: Connection) -> Iterator[Callable[[bool], None]]:
    """Fills the broker, or makes room."""

    def fill(is_full: bool) -> None:
        connection.call("CONFIG", "SET", "maxmemory", int(is_full))

    yield fill
    fill(False)


def test_a_full_broker_costs_no_lease(beat: Any, connection: Connection, full: Callable[[bool], None]) -> None:
    beat()
    full(True)
    deadline = time.monotonic() + 2 * QUICK.lease_s
    while time.monotonic() < deadline:
        assert connection.call("EXISTS", LEASE) == 1
        time.sleep(0.01)


def test_a_lease_that_lapsed_while_the_broker_is_full_is_taken_again_all_the_same(
    beat: Any, connection: Connection, stream: EventStream, full: Callable[[bool], None]
) -> None:
    heartbeat = beat()
    next_event(stream, "device.online")
    before = heartbeat._broker.connection
    full(True)
    connection.call("DEL", LEASE)
    deadline = time.monotonic() + 10
    while not connection.call("EXISTS", LEASE):  # no event tells of it: the stream takes none
        assert time.monotonic() < deadline
    assert heartbeat._broker.connection is before


def test_a_kernel_that_computes_does_not_hold_the_heartbeat_up(
    beat: Any, connection: Connection, stream: EventStream
) -> None:
    """Pure Python is the worst that a kernel can do to another thread."""
    beat()
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    busy = threading.Thread(target=compute)
    busy.start()
    try:
        for _ in range(10):
            next_event(stream, "device.heartbeat")
            assert connection.call("PTTL", LEASE) > 0
    finally:
        stop.set()
        busy.join()


def test_stop_gives_the_lease_back_and_says_offline(beat: Any, connection: Connection, stream: EventStream) -> None:
    heartbeat = beat()
    heartbeat.stop()
    assert connection.call("EXISTS", LEASE) == 0
    assert next_event(stream, "device.offline").source == INCARNATION


def test_after_stop_nothing_takes_the_lease_again(beat: Any, connection: Connection) -> None:
    heartbeat = beat()
    heartbeat.stop()
    assert not heartbeat._thread.is_alive()
    assert connection.call("EXISTS", LEASE) == 0


def test_stop_without_a_broker_leaves_the_lease_to_lapse(beat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = beat()
    heartbeat._halt()
    heartbeat._broker.connection.close()
    heartbeat.stop()


def hold(connection: Connection, settings: Settings) -> Broker:
    """Two messages in the first slot of the worker, as if it had taken them."""
    connection.call("LPUSH", topology.held(INCARNATION, 0), b"first", b"second")
    return Broker(connection, INCARNATION, settings)


def test_abandon_gives_back_what_is_held_in_its_order(beat: Any, connection: Connection) -> None:
    heartbeat = beat()
    hold(connection, QUICK)
    heartbeat.abandon()
    assert connection.call("LRANGE", topology.AGAIN, 0, -1) == [b"second", b"first"]
    assert connection.call("EXISTS", topology.held(INCARNATION, 0)) == 0


def test_abandon_refuses_what_the_slots_still_commit(beat: Any, connection: Connection) -> None:
    heartbeat = beat()
    broker = hold(connection, QUICK)
    heartbeat.abandon()
    with pytest.raises(Fenced):
        broker.commit(Commit(0, 2, [], b""))


def test_abandon_says_offline(beat: Any, stream: EventStream) -> None:
    beat().abandon()
    assert next_event(stream, "device.offline").source == INCARNATION


def test_memory_that_nobody_needs_is_given_back_now_and_then(
    beat: Callable[..., Heartbeat], slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = threading.Semaphore(0)
    monkeypatch.setattr("tasks.heartbeat._SWEEP_S", 0.0)
    monkeypatch.setattr("lepton_ai.ring.sweep", lambda: swept.release() or 1)
    slots.ring = SimpleNamespace(sweep=swept.release)
    beat()
    for _ in range(4):
        assert swept.acquire(timeout=5)


# -- the state of the device and its host -----------------------------------------------------------------------


class WithSensors(SimpleNamespace):
    """A driver whose device tells of itself."""

    state: Callable[[], DeviceState]


def states(stream: EventStream) -> Iterator[ResourceState]:
    while True:
        yield msgspec.convert(next_event(stream, "device.heartbeat").data["state"], ResourceState)


def test_a_heartbeat_carries_what_the_driver_says_of_its_device(beat: Any, stream: EventStream, slots: Slots) -> None:
    hot = DeviceState(temperature_c=95.0, temperature_limit_c=90.0)
    slots.driver = WithSensors(state=lambda: hot)
    beat()
    found = next(state for state in states(stream) if state.device is not None)
    assert found.device == hot
    assert (found.share, found.reason) == (0.0, "temperature at 106%, over its limit of 100%")


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_sensor_that_fails_costs_no_lease(
    beat: Any, connection: Connection, stream: EventStream, slots: Slots, fault: str
) -> None:
    going = threading.Event()

    def state() -> DeviceState:
        if fault == "raises":
            raise OSError("the driver has crashed")
        going.wait(10)
        return DeviceState()

    slots.driver = WithSensors(state=state)
    beat()
    started_s = time.monotonic()
    try:
        while time.monotonic() - started_s < 2 * QUICK.lease_s:
            assert next(states(stream)).device is None
            assert connection.call("EXISTS", LEASE) == 1
    finally:
        going.set()


def test_a_failing_sensor_of_the_host_leaves_the_others_in_the_heartbeat(
    beat: Any, stream: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising() -> Any:
        raise PermissionError("/proc/meminfo")

    monkeypatch.setattr("psutil.virtual_memory", raising)
    beat()
    found = next(states(stream))
    assert (found.memory_total_bytes, found.share) == (0, 1.0)
    assert found.busy_slots == 1


def test_the_state_can_be_looked_up_and_lapses_with_the_worker(
    beat: Any, connection: Connection, stream: EventStream
) -> None:
    heartbeat = beat()
    next_event(stream, "device.heartbeat")
    deadline = time.monotonic() + 5
    while (value := connection.call("GET", topology.state(INCARNATION))) is None:
        assert time.monotonic() < deadline
    assert msgspec.msgpack.decode(value, type=ResourceState).busy_slots == 1
    assert 0 < connection.call("PTTL", topology.state(INCARNATION)) <= QUICK.lease_s * 1000
    heartbeat.stop()


def test_what_other_workers_of_the_host_use_is_not_foreign(beat: Any, connection: Connection) -> None:
    heartbeat = beat()
    key = topology.host(boot())
    told = msgspec.msgpack.encode((time.time() + 60, 1.5))
    connection.many(
        [("HSET", key, "worker-beside", told), ("HSET", key, "worker-gone", msgspec.msgpack.encode((0, 9.0)))]
    )
    deadline = time.monotonic() + 5
    while heartbeat._siblings.processors != 1.5 or connection.call("HEXISTS", key, "worker-gone"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert connection.call("HEXISTS", key, INCARNATION) == 1


# -- quarantine -------------------------------------------------------------------------------------------------

SPECS = tuple(KernelSpec(name, {"x": "float32[n]"}, {"y": "float32[n]"}, "n", "n") for name in ("test.a", "test.b"))
WITH_KERNELS = msgspec.structs.replace(ANNOUNCEMENT, kernels=SPECS)


def served(connection: Connection) -> tuple[list[str], dict[str, str]]:
    """What the lease says that the worker runs, and may not run."""
    (found,) = read_leases([connection.call("GET", LEASE)])
    return [spec.name for spec in found.kernels], found.quarantined


def put(connection: Connection, *entries: Quarantined) -> None:
    for each in entries:
        connection.call("HSET", topology.QUARANTINE, field(each.kernel, each.device), msgspec.msgpack.encode(each))


def test_a_worker_that_starts_leaves_out_what_the_fleet_has_quarantined(beat: Any, connection: Connection) -> None:
    put(connection, Quarantined("test.a", "cpu.test", "by 1"), Quarantined("test.b", "cpu.other", "by 2"))
    beat(announcement=WITH_KERNELS)
    assert served(connection) == (["test.b"], {"test.a": "by 1"})


def test_a_quarantine_of_a_kind_holds_for_all_its_devices(beat: Any, connection: Connection) -> None:
    put(connection, Quarantined("test.a", "cpu", "by 1"), Quarantined("test.b", "gpu", "by 2"))
    beat(announcement=WITH_KERNELS)
    assert served(connection) == (["test.b"], {"test.a": "by 1"})


def test_a_heartbeat_takes_a_quarantine_over_and_gives_it_up_where_it_is_lifted(
    beat: Any, connection: Connection, slots: Slots
) -> None:
    beat(announcement=WITH_KERNELS)
    assert served(connection) == (["test.a", "test.b"], {})
    put(connection, Quarantined("test.b", "cpu.test", "by 1"))
    until(lambda: served(connection) == (["test.a"], {"test.b": "by 1"}), "the lease says so")
    assert slots.quarantine.reasons == {"test.b": "by 1"}
    connection.call("HDEL", topology.QUARANTINE, field("test.b", "cpu.test"))
    until(lambda: served(connection) == (["test.a", "test.b"], {}), "the lease says so")


def test_a_difference_that_is_seen_here_is_in_the_lease_and_the_list_at_once(
    beat: Any, connection: Connection, slots: Slots, stream: EventStream
) -> None:
    slow = beat(Settings(lease_s=60, heartbeat_s=30), WITH_KERNELS)
    entry = Quarantined("test.a", "cpu.test", "by 1", 1.0, 0.1, INCARNATION, "job-1", {"x": [3]}, 5.0)
    slots.quarantine.add(entry)
    assert slots.quarantine.reasons == {"test.a": "by 1"}
    slow.wake()
    told = next_event(stream, "device.quarantined")
    assert (told.kernel, told.device, told.data["shapes"], told.data["job"]) == (
        "test.a", "cpu.test", {"x": [3]}, "job-1"
    )  # fmt: skip
    assert served(connection) == (["test.b"], {"test.a": "by 1"})
    assert read(connection.call("HGETALL", topology.QUARANTINE)) == [entry]


def test_what_another_hand_has_put_there_costs_no_lease(beat: Any, connection: Connection) -> None:
    connection.call("SET", topology.QUARANTINE, "nonsense")
    beat()
    assert connection.call("EXISTS", LEASE) == 1
    connection.call("DEL", topology.QUARANTINE)
    connection.call("HSET", topology.QUARANTINE, "test.a cpu.test", "nonsense")
    until(lambda: connection.call("PTTL", LEASE) > 0, "the lease is renewed")
