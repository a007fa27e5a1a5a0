"""One router, or two, on a real broker, with workers that the test plays by hand."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from lepton_ai import blob, bundle, cancellation, event, results, topology, wire
from lepton_ai.device import Announcement, Peaks, ResourceState
from lepton_ai.direct_protocol import look_commands, push, read_look, writer
from lepton_ai.event import Event, Observation
from lepton_ai.identity import ids, minute_of, new_id, new_ids, run_of
from lepton_ai.job import Options, Placement, Setback
from lepton_ai.kernel import KernelSpec
from lepton_ai.parcel import Blobs
from lepton_ai.placement.costs import CostModel
from lepton_ai.settings import Settings
from lepton_ai.terms import Terms
from lepton_ai.topology import PRIORITY_SEPARATOR
from pipeline.deadlines import Backlog
from pipeline.router import Router
from queues import functions
from queues.broker import CLAIM_LIMIT, LISTS_EACH, WAKE, Broker, Kind
from queues.connection import Connection
from queues.event_stream import EventStream
from queues.steps import Commit, Outcome

#: A heartbeat so rare that what wakes the router within a test can only be a push.
PATIENT = Settings(lease_s=60, heartbeat_s=30)
#: Leases short enough to see them lapse.
HASTY = Settings(lease_s=0.4, heartbeat_s=0.1)

#: A job of `n` is predicted to take n milliseconds on a device of SPEED, as long as nothing was learned.
SPEED = 10_000.0
SPIN = KernelSpec("test.spin", {"n": "int64"}, {"y": "int64"}, "n", "0")
OTHER = KernelSpec("test.other", {"n": "int64"}, {"y": "int64"}, "n", "0")
#: As SPIN, but many of them run in one launch.
STACKED = KernelSpec("test.stacked", {"n": "int64"}, {"y": "int64"}, "n", "0", batch="stack")

StartRouter = Callable[..., "RunningRouter"]


class RunningRouter:
    """A router in a thread of its own."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=Router(settings, url).run, args=[self._stop], daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it as SIGTERM does. A router sleeps until it is woken, so a message that nobody can read wakes it."""
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


class PlayedWorker:
    """A worker that the test plays: it takes from its device queue, and commits, when it is told to."""

    def __init__(
        self,
        url: str,
        device: str,
        *,
        speed: float,
        slots: int,
        launch_s: float,
        kernels: tuple[KernelSpec, ...],
        settings: Settings,
    ) -> None:
        self.device = device
        self.connection = Connection(url, device)
        self.broker = Broker(self.connection, f"worker-{device}-{secrets.token_hex(4)}", settings)
        self._slots = slots
        self._kernels = kernels
        self._peaks = Peaks(speed, 1e12, float("inf"), 0.0, launch_s)
        self._held = 0

    def come_online(self) -> None:
        self._announce({}, "device.online")

    def quarantine(self, reasons: dict[str, str]) -> None:
        """May not run these kernels, for these reasons, from here on."""
        self._announce(reasons, "device.quarantined")

    def _announce(self, quarantined: dict[str, str], kind_of_event: str) -> None:
        name, kind = self.broker.incarnation, self.device.partition(".")[0]
        kernels = tuple(spec for spec in self._kernels if spec.name not in quarantined)
        value = Announcement(
            name, name, self.device, kind, self._slots, False, self._peaks, kernels, 0.0, quarantined=quarantined
        )
        self.broker.announce(msgspec.msgpack.encode(value))
        self.broker.emit(event.encode(Event(kind_of_event, name, device=self.device)))

    def go_offline(self) -> None:
        self.broker.resign()
        self.broker.emit(event.encode(Event("device.offline", self.broker.incarnation, device=self.device)))

    def beat(self, share: float = 1.0, reason: str = "", speed: float = 1.0) -> None:
        """Tells the fleet of its state."""
        state = ResourceState(0, 0.0, 0.0, 0, 1, speed=speed, share=share, reason=reason)
        data = {"state": msgspec.to_builtins(state)}
        self.broker.emit(
            event.encode(Event("device.heartbeat", self.broker.incarnation, device=self.device, data=data))
        )

    def take(self, limit: int = 1, timeout_s: float = 5.0, *, alone: bool = False) -> list[str]:
        """The ids of the next jobs, oldest first; [] where none came in time. A bundle counts as one."""
        return [job for message in self.take_messages(limit, timeout_s, alone=alone) for job in jobs_of(message)]

    def take_messages(self, limit: int = 1, timeout_s: float = 5.0, *, alone: bool = False) -> list[bytes]:
        messages = self.broker.take(self.device, 0, limit, 1, timeout_s, alone=alone)
        self._held = len(messages)
        return messages

    def commit(self, jobs: Iterable[str], observation: Observation | None = None) -> None:
        """Ends all that it holds."""
        jobs = tuple(jobs)
        told = Event("job.succeeded", self.broker.incarnation, "test.spin", self.device, jobs, observation)
        outcomes = [Outcome(job, "succeeded", b"") for job in jobs]
        self.broker.commit(Commit(0, self._held, outcomes, event.encode(told), bundled=len(jobs) - self._held))

    def retry(self, job: str, message: bytes, delay_s: float) -> None:
        """Ends what it holds as a kernel that raised and is to be run again."""
        told = Event("job.retried", self.broker.incarnation, "test.spin", self.device, (job,))
        step = Commit(0, 1, [Outcome(job, "retried", b"")], event.encode(told), retries=[(job, delay_s, message)])
        self.broker.commit(step)

    def serve(self, count: int) -> list[str]:
        """Takes and commits, one job after the other."""
        done: list[str] = []
        while len(done) < count and (taken := self.take()):
            self.commit(taken)
            done += taken
        return done

    @property
    def depth(self) -> int:
        return self.broker.depths([self.device])[0]


def jobs_of(message: bytes) -> tuple[str, ...]:
    headers = wire.read_envelope(message).headers
    return bundle.ids_of(message, headers, wire.read_options(headers))


@pytest.fixture
def start_router(broker_url: str) -> Iterator[StartRouter]:
    """Starts routers, and stops those that still run at the end."""
    routers: list[RunningRouter] = []

    def start(settings: Settings = PATIENT) -> RunningRouter:
        routers.append(RunningRouter(broker_url, settings))
        return routers[-1]

    yield start
    for router in routers:
        router._stop.set()
    waker = Connection(broker_url, "waker")
    waker.call("XADD", topology.EVENTS, "*", "e", event.encode())
    waker.close()
    for router in routers:
        router.stop()


@pytest.fixture
def add_worker(broker_url: str) -> Iterator[Callable[..., PlayedWorker]]:
    """Makes workers; each is online unless told otherwise."""
    workers: list[PlayedWorker] = []

    def add(
        device: str = "cpu",
        *,
        speed: float = SPEED,
        slots: int = 1,
        launch_s: float = 0.0,
        kernels: tuple[KernelSpec, ...] = (SPIN, OTHER),
        settings: Settings = PATIENT,
        online: bool = True,
    ) -> PlayedWorker:
        workers.append(
            PlayedWorker(
                broker_url, device, speed=speed, slots=slots, launch_s=launch_s, kernels=kernels, settings=settings
            )
        )
        if online:
            workers[-1].come_online()
        return workers[-1]

    yield add
    for worker in workers:
        worker.connection.close()


class Lane:
    """A producer with direct access, who can also see what has become of its jobs."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._seen_dead = "0"
        self._stream = EventStream(connection)

    def message(self, job_id: str, ms: int = 1, kernel: str = "test.spin", **options: Any) -> bytes:
        return wire.envelope(job_id, kernel, {"n": ms}, Options(**options))

    def send(
        self, count: int = 1, ms: int = 1, suffix: str = "", kernel: str = "test.spin", **options: Any
    ) -> list[str]:
        ids = new_ids(count)
        self.push([self.message(job_id, ms, kernel, **options) for job_id in ids], suffix)
        return ids

    def push(self, messages: Iterable[bytes], suffix: str = "") -> None:
        self.connection.call("LPUSH", topology.LANE + suffix, *messages)

    def send_bundle(self, count: int, ms: int = 1, kernel: str = "test.spin", tenant: str | None = None) -> list[str]:
        """As a client's `submit_many`: so many jobs in one message."""
        jobs = run_of(new_id(), count)
        self.send_rows(jobs, [{"n": ms}] * count, kernel, tenant)
        return list(jobs)

    def send_rows(
        self, jobs: Iterable[str], rows: Iterable[dict[str, Any]], kernel: str = "test.spin", tenant: str | None = None
    ) -> None:
        write = writer(kernel, Terms(), tenant, Blobs(0))
        messages = [write(job, row) for job, row in zip(jobs, rows, strict=True)]
        self.connection.many([("MULTI",), *push(messages, Terms(), tenant).commands, ("EXEC",)])

    def settle(self) -> None:
        """Returns once the router has seen all that was sent before: it has refused two messages since."""
        for _ in range(2):
            self.push([b"unreadable"])
            self.next_dead()

    def next_dead(self) -> dict[bytes, bytes]:
        """The next dead letter, as soon as there is one."""
        found = self.connection.call("XREAD", "BLOCK", 5000, "STREAMS", topology.DEAD, self._seen_dead)
        assert found, "no dead letter came"
        entry_id, fields = found[topology.DEAD.encode()][0]
        self._seen_dead = entry_id.decode()
        return dict(zip(fields[::2], fields[1::2], strict=True))

    def placement(self, job_id: str) -> Placement | None:
        raw = self.connection.call("HGET", topology.jobs(minute_of(job_id) or 0), job_id)
        return msgspec.msgpack.decode(raw, type=Placement) if raw else None

    def wait_for_routers(self, count: int) -> None:
        """Returns once so many routers wait for the next job."""
        until(lambda: self._blocked() >= count, f"{count} routers wait")

    def _blocked(self) -> int:
        clients = self.connection.call("CLIENT", "LIST").decode().splitlines()
        return sum("-wake " in client and "cmd=blmove" in client for client in clients)

    def wait_for(self, kind: str, count: int) -> list[str]:
        """The jobs of the next events of a type, once there are `count`."""
        jobs: list[str] = []
        deadline = time.monotonic() + 10
        while len(jobs) < count:
            assert time.monotonic() < deadline, f"only {len(jobs)} of {count} {kind}"
            jobs += [job for _, each in self._stream.read(1000) if each.type == kind for job in each.jobs]
        return jobs


@pytest.fixture
def lane(connection: Connection) -> Lane:
    return Lane(connection)


def waiting_anywhere(connection: Connection) -> int:
    """Messages in lanes, claims, `again` and the parking: all that no device has been given."""
    patterns = ("lepton.ingest*", "lepton:again*", "lepton:parked*:*", *(f"lepton:{kind}:*" for kind in Kind))
    names = [name for pattern in patterns for name in connection.call("KEYS", pattern)]
    return sum(connection.many([("LLEN", name) for name in names])) if names else 0


def until(condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> None:
    """For what no event tells of."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"in {timeout_s} s it did not happen that {what}"
        time.sleep(0.005)


# -- where a job goes -------------------------------------------------------------------------------------------


def test_a_job_goes_to_the_device_where_it_finishes_first(start_router, add_worker, lane: Lane) -> None:
    add_worker("cpu", speed=SPEED)
    fast = add_worker("gpu", speed=10 * SPEED)
    start_router()
    (sent,) = lane.send(ms=100)
    assert fast.take() == [sent]


def test_a_busy_device_is_passed_over_where_another_finishes_sooner(start_router, add_worker, lane: Lane) -> None:
    slow = add_worker("cpu", speed=SPEED)
    fast = add_worker("gpu", speed=3 * SPEED)
    start_router()
    first = lane.send(2, ms=300)  # the fast one needs 100 ms for each: until 200 ms
    assert [*fast.take(), *fast.take()] != []
    (next_one,) = lane.send(ms=90)  # 230 ms there, 90 ms here
    assert slow.take() == [next_one]
    assert {lane.placement(job).device for job in first} == {"gpu"}


def test_a_device_that_has_reported_its_work_done_is_free_again(start_router, add_worker, lane: Lane) -> None:
    add_worker("cpu", speed=SPEED)
    fast = add_worker("gpu", speed=3 * SPEED)
    start_router()
    lane.send(2, ms=300)
    fast.serve(2)
    lane.settle()
    (next_one,) = lane.send(ms=90)
    assert fast.take() == [next_one]


def test_jobs_of_one_window_are_spread_by_what_was_placed_before_them(start_router, add_worker, lane: Lane) -> None:
    slow, fast = add_worker("cpu", speed=SPEED), add_worker("gpu", speed=1.1 * SPEED)
    lane.send(4, ms=30)  # 27, 55, 82, 109 ms on the fast one: the slow one does it in 30 and 60
    start_router()
    lane.wait_for("job.placed", 4)
    assert (slow.depth, fast.depth) == (2, 2)


def test_a_placement_says_which_devices_were_looked_at_and_why_one_was_chosen(
    start_router, add_worker, lane: Lane
) -> None:
    add_worker("cpu", speed=SPEED)
    fast = add_worker("gpu", speed=10 * SPEED)
    add_worker("fpga", kernels=(OTHER,))
    start_router()
    (sent,) = lane.send(ms=100)
    fast.take()
    placement = lane.placement(sent)
    assert (placement.state, placement.device, placement.policy) == ("placed", "gpu", "externality")
    assert "first of 2" in placement.reason
    looked_at = {candidate.device: candidate for candidate in placement.candidates}
    assert looked_at["cpu"].estimate.run_s == pytest.approx(0.1)
    assert looked_at["gpu"].estimate.run_s == placement.estimate.run_s == pytest.approx(0.01)
    assert "test.spin" in looked_at["fpga"].excluded


@pytest.mark.parametrize("pin", ["cpu.old", "cpu"])
def test_a_pinned_job_goes_where_it_is_pinned_however_slow(start_router, add_worker, lane: Lane, pin: str) -> None:
    slow = add_worker("cpu.old", speed=SPEED)
    add_worker("gpu", speed=100 * SPEED)
    start_router()
    (sent,) = lane.send(ms=100, device=pin)
    assert slow.take() == [sent]


def test_what_was_measured_changes_the_choice(start_router, add_worker, lane: Lane) -> None:
    promising, honest = add_worker("cpu.promising", speed=2 * SPEED), add_worker("cpu.honest", speed=SPEED)
    start_router()
    for _ in range(3):  # predicted 50 ms, measured ten times that
        (sent,) = lane.send(ms=100, device="cpu.promising")
        promising.take()
        promising.commit([sent], Observation("test.spin", "cpu.promising", 1, 100, 0, 0.0, 0.5))
    lane.settle()
    (sent,) = lane.send(ms=100)
    assert honest.take() == [sent]


def test_a_new_router_starts_from_the_model_that_telemetry_keeps(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    from lepton_ai.placement.costs import CostModel

    model = CostModel()
    model.learn(Observation("test.spin", "cpu.promising", 1, 100, 0, 0.0, 0.5), Peaks(2 * SPEED, 1e12, 1e12, 0.0, 0.0))
    connection.call("SET", topology.MODEL, model.snapshot())
    add_worker("cpu.promising", speed=2 * SPEED)
    honest = add_worker("cpu.honest", speed=SPEED)
    start_router()
    (sent,) = lane.send(ms=100)
    assert honest.take() == [sent]


def test_a_job_goes_once_or_twice_where_its_kernel_was_never_measured_and_says_so(
    start_router, add_worker, lane: Lane
) -> None:
    """What was measured on the one is a little quicker than what is announced by the other."""
    known, unknown = add_worker("cpu.known", speed=SPEED), add_worker("cpu.unknown", speed=SPEED)
    start_router()

    def run(worker: PlayedWorker) -> str:
        (sent,) = lane.send(ms=100)
        assert worker.take() == [sent]
        worker.commit([sent], Observation("test.spin", worker.device, 1, 100, 0, 0.0, 0.03))
        lane.settle()
        return lane.placement(sent).reason

    assert [run(known) for _ in range(2)] == ["finishes first of 2 able devices"] * 2
    assert [run(unknown).partition(":")[0] for _ in range(2)] == ["a probe"] * 2
    (sent,) = lane.send(ms=100)
    lane.wait_for("job.placed", 5)
    assert "a probe" not in lane.placement(sent).reason


def test_an_urgent_job_is_no_probe(start_router, add_worker, lane: Lane) -> None:
    known = add_worker("cpu.known", speed=SPEED)
    add_worker("cpu.unknown", speed=SPEED)
    start_router()
    for _ in range(4):
        (sent,) = lane.send(ms=100, priority=9)
        assert known.take() == [sent]
        known.commit([sent], Observation("test.spin", "cpu.known", 1, 100, 0, 0.0, 0.03))
        lane.settle()


def test_a_job_with_a_deadline_is_told_whether_it_makes_it(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker()
    start_router()
    for left_s, told in ((60, "; makes its deadline"), (20, "; may miss its deadline, as on every other device")):
        job = new_id()
        due = datetime.fromtimestamp(time.time() + left_s, UTC).isoformat()
        lane.push([altered(lane.message(job, 30_000), expires=due)])
        assert worker.take() == [job]
        assert lane.placement(job).reason == f"the only device that can run it{told}"
        worker.commit([job])


def test_what_jobs_lost_by_going_where_they_went_is_told_once_a_heartbeat(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    add_worker("cpu", speed=SPEED)
    fast = add_worker("gpu", speed=2 * SPEED)
    start_router(HASTY)
    (sent,) = lane.send(ms=10)
    assert fast.take() == [sent]
    fast.commit([sent], Observation("test.spin", "gpu", 1, 10, 0, 0.0, 0.04))  # 10 ms on the other
    until(lambda: connection.call("HGET", topology.REGRET, "jobs") == b"1", "the regret is told")
    assert float(connection.call("HGET", topology.REGRET, "hindsight_s")) == pytest.approx(0.03, rel=1e-3)
    assert connection.call("HGET", topology.REGRET, "ratio_4") == b"1"


def test_one_small_job_goes_to_the_processor_and_many_that_are_alike_go_to_the_accelerator_together(
    start_router, add_worker, lane: Lane
) -> None:
    """A launch there takes as long as twenty jobs here, and each job a thousandth of what it takes here."""
    small = add_worker("cpu", speed=SPEED, kernels=(STACKED,))
    large = add_worker("gpu", speed=1000 * SPEED, launch_s=0.02, kernels=(STACKED,))
    start_router()
    lane.send(kernel="test.stacked")
    lane.wait_for("job.placed", 1)
    assert (small.depth, large.depth) == (1, 0)
    lane.send(200, kernel="test.stacked")
    jobs = lane.wait_for("job.placed", 200)
    assert large.depth >= 170
    assert any("jobs together" in lane.placement(job).reason for job in jobs)


def test_jobs_that_share_no_launch_go_one_by_one_however_many_there_are(start_router, add_worker, lane: Lane) -> None:
    small = add_worker("cpu", speed=SPEED)
    large = add_worker("gpu", speed=1000 * SPEED, launch_s=0.02)
    start_router()
    lane.send(20)
    lane.wait_for("job.placed", 20)
    assert small.depth >= 18
    assert small.depth + large.depth == 20


# -- credit -----------------------------------------------------------------------------------------------------


def test_a_device_that_nobody_serves_is_given_its_credit_and_no_more(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    lane.send(50, ms=100)
    lane.settle()
    assert worker.depth == 3  # 250 ms are reached with the third
    assert waiting_anywhere(connection) == 47


def test_a_device_of_more_slots_has_more_credit(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker(slots=4)
    start_router()
    lane.send(50, ms=110)
    lane.settle()
    assert worker.depth == 10


def test_jobs_that_are_longer_than_the_credit_still_queue_two_a_slot(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker(slots=2)
    start_router()
    lane.send(50, ms=60_000)
    lane.settle()
    assert worker.depth == 4


def test_jobs_of_no_predicted_time_are_given_two_batches_at_most(start_router, add_worker, lane: Lane) -> None:
    settings = msgspec.structs.replace(PATIENT, batch_jobs=8)
    worker = add_worker()
    start_router(settings)
    lane.send(50, ms=0)
    lane.settle()
    assert worker.depth == 16


def test_the_room_that_a_commit_makes_is_filled_at_once(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker()
    start_router()
    sent = lane.send(20, ms=60_000)
    assert worker.serve(20) == sent


def test_a_device_without_room_does_not_keep_others_idle(start_router, add_worker, lane: Lane) -> None:
    add_worker("cpu")
    free = add_worker("gpu")
    start_router()
    lane.send(1000, ms=60_000, device="cpu")
    lane.settle()
    (sent,) = lane.send(ms=1, device="gpu")
    assert free.take(timeout_s=1) == [sent]


def test_a_window_that_is_full_claims_no_more_and_goes_on_when_there_is_room(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router(msgspec.structs.replace(PATIENT, window=10))
    sent = lane.send(30, ms=60_000)
    lane.wait_for("job.placed", 2)
    until(
        lambda: connection.call("LLEN", topology.LANE) == 30 - 2 - 10, "the window is full and the lane keeps the rest"
    )
    assert worker.serve(30) == sent


# -- priorities -------------------------------------------------------------------------------------------------


def test_every_list_of_the_lane_is_claimed_most_urgent_first(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker()
    lists = [PRIORITY_SEPARATOR + "high", "", *(f"{PRIORITY_SEPARATOR}{step}" for step in (3, 6, 9))]
    sent = {suffix: lane.send(3, ms=60_000, suffix=suffix) for suffix in reversed(lists)}
    start_router()
    assert worker.serve(15) == [job for suffix in lists for job in sent[suffix]]


def test_in_the_window_the_most_urgent_job_goes_first_whenever_it_came(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker()
    start_router()
    busy = lane.send(2, ms=60_000)
    lane.wait_for("job.placed", 2)
    low, mid, high = (
        lane.send(2, ms=60_000, suffix=topology.lane_list(priority).removeprefix(topology.LANE), priority=priority)
        for priority in (1, 5, 9)
    )
    lane.settle()
    assert worker.serve(8) == busy + high + mid + low


def test_in_the_window_a_celery_priority_counts_as_it_did_in_the_lane(start_router, add_worker, lane: Lane) -> None:
    """A Celery client says by list and property, and has no header of ours."""
    worker = add_worker()
    start_router()
    busy = lane.send(2, ms=60_000)
    lane.wait_for("job.placed", 2)
    sent: dict[int, str] = {}
    for step in (9, 6, 3):
        message = json.loads(lane.message(sent.setdefault(step, new_id()), 60_000))
        message["properties"]["priority"] = step
        lane.push([json.dumps(message).encode()], f"{PRIORITY_SEPARATOR}{step}")
        lane.settle()
    (plain,) = lane.send(ms=60_000)
    lane.settle()
    assert worker.serve(6) == [*busy, plain, sent[3], sent[6], sent[9]]


@pytest.mark.parametrize("suffix", ["", *(PRIORITY_SEPARATOR + step for step in ("high", "3", "6", "9"))])
def test_a_push_to_any_list_wakes_an_idle_router(start_router, add_worker, lane: Lane, suffix: str) -> None:
    worker = add_worker()
    start_router()
    lane.settle()
    started_s = time.monotonic()
    (sent,) = lane.send(suffix=suffix)
    assert worker.take(timeout_s=2) == [sent]
    assert time.monotonic() - started_s < 0.5


def test_a_push_that_comes_while_the_router_is_at_work_is_not_slept_over(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker()
    start_router()
    high = PRIORITY_SEPARATOR + "high"
    for _ in range(150):
        first, second = new_ids(2)
        lane.push([lane.message(first)])
        lane.push([lane.message(second)], high)
        taken = worker.serve(2)
        assert sorted(taken) == sorted([first, second])


# -- what cannot run --------------------------------------------------------------------------------------------


def test_a_job_of_an_unknown_kernel_is_parked_and_says_why(start_router, add_worker, lane: Lane) -> None:
    add_worker(kernels=(SPIN,))
    start_router()
    (sent,) = lane.send(kernel="test.other")
    assert lane.wait_for("job.parked", 1) == [sent]
    placement = lane.placement(sent)
    assert (placement.state, placement.device) == ("parked", None)
    assert "test.other" in placement.reason
    assert [candidate.excluded for candidate in placement.candidates] == ["announces no test.other"]


def test_parked_jobs_run_in_their_order_once_a_worker_announces_their_kernel(
    start_router, add_worker, lane: Lane
) -> None:
    start_router()
    sent = lane.send(20, kernel="test.other")
    lane.wait_for("job.parked", 20)
    worker = add_worker()
    assert worker.serve(20) == sent


def test_a_job_pinned_to_a_device_that_is_away_runs_once_it_is_back(start_router, add_worker, lane: Lane) -> None:
    add_worker("cpu")
    start_router()
    (sent,) = lane.send(device="gpu.h100")
    lane.wait_for("job.parked", 1)
    assert "gpu.h100" in lane.placement(sent).reason
    assert add_worker("gpu.h100").take() == [sent]


def test_a_device_that_went_offline_is_given_nothing_more(start_router, add_worker, lane: Lane) -> None:
    leaving, staying = add_worker("gpu", speed=100 * SPEED), add_worker("cpu")
    start_router()
    lane.settle()
    leaving.go_offline()
    lane.settle()
    (sent,) = lane.send(ms=100)
    assert staying.take() == [sent]


# -- deadlines that must be met --------------------------------------------------------------------------------------


def learned(connection: Connection, device: str = "cpu") -> None:
    """What the telemetry service has kept of a device that takes a millisecond for each of `n`."""
    model, peaks = CostModel(), Peaks(SPEED, 1e12, float("inf"), 0.0, 0.0)
    for n in (10, 20, 50, 100, 200) * 50:
        model.learn(Observation("test.spin", device, 1, float(n), 0.0, 1e-6, n / 1e3), peaks)
    connection.call("SET", topology.MODEL, model.snapshot())


def send_to_meet(lane: Lane, ms: int, deadline_s: float, **options: Any) -> str:
    terms = Terms(Options(must_meet=True, **options), deadline_s=deadline_s)
    job = new_id()
    lane.push([wire.envelope(job, "test.spin", {"n": ms}, terms.options, **terms.times())])
    return job


def end_of(connection: Connection, job: str) -> Any:
    until(lambda: connection.call("EXISTS", topology.result(job)), "the job ends")
    return results.read(connection.call("GET", topology.result(job)))


def test_a_job_that_cannot_end_by_the_deadline_that_it_must_meet_fails_with_the_estimate(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    learned(connection)
    worker = add_worker()
    start_router()
    refused, meets = send_to_meet(lane, 10_000, 5.0), send_to_meet(lane, 100, 5.0)
    assert worker.take() == [meets]
    meta = end_of(connection, refused)
    assert meta.status == "FAILURE"
    assert meta.lepton.error["code"] == "deadline_unattainable"
    assert meta.lepton.error["estimate_s"] == pytest.approx(10, rel=0.3)
    assert sizes(connection)["difference"] == 0


def test_what_the_device_was_given_and_what_waits_count_against_a_deadline(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    learned(connection)
    add_worker()
    start_router()
    lane.send(30, ms=1000)
    lane.settle()
    refused = send_to_meet(lane, 100, 10.0)
    assert end_of(connection, refused).lepton.error["code"] == "deadline_unattainable"
    urgent = send_to_meet(lane, 100, 10.0, priority=9)
    lane.settle()
    assert connection.call("EXISTS", topology.result(urgent)) == 0


def test_without_a_measurement_a_job_that_must_meet_its_deadline_is_taken(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker()
    start_router()
    sent = send_to_meet(lane, 10_000, 5.0)
    assert worker.take() == [sent]


def test_a_router_tells_what_is_to_be_done_with_each_of_its_heartbeats(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    add_worker(settings=HASTY)
    start_router(HASTY)
    lane.send(3, ms=1000)
    lane.wait_for("job.placed", 1)

    def told() -> list[Backlog]:
        values = [connection.call("GET", name) for name in connection.call("KEYS", topology.backlog("*"))]
        return [msgspec.msgpack.decode(value, type=Backlog) for value in values if value is not None]

    until(lambda: any(each.seconds.get("cpu", 0.0) > 1 and sum(each.waiting) == 1 for each in told()), "it tells")


# -- devices near and beyond their limits ---------------------------------------------------------------------------

HOT = "temperature at 104%, over its limit of 100%"


def test_a_device_beyond_a_limit_is_passed_over_and_the_placement_says_why(
    start_router, add_worker, lane: Lane
) -> None:
    fast, slow = add_worker("gpu", speed=100 * SPEED), add_worker("cpu")
    start_router()
    lane.settle()
    fast.beat(0.0, HOT)
    lane.settle()
    (sent,) = lane.send(ms=100)
    assert slow.take() == [sent]
    told = {candidate.device: candidate.excluded for candidate in lane.placement(sent).candidates}
    assert told == {"cpu": None, "gpu": HOT}


def test_jobs_that_only_a_device_beyond_its_limits_can_run_wait_with_the_reason_and_run_once_it_is_back(
    start_router, add_worker, lane: Lane
) -> None:
    worker = add_worker("gpu")
    add_worker("cpu", kernels=(OTHER,))
    start_router()
    lane.settle()
    worker.beat(0.0, HOT)
    lane.settle()
    sent = lane.send(3)
    lane.wait_for("job.parked", 3)
    placement = lane.placement(sent[0])
    assert placement.state == "parked"
    assert f"gpu: {HOT}" in placement.reason
    worker.beat(0.4)
    assert worker.serve(3) == sent


def test_a_bundle_that_only_a_device_beyond_its_limits_can_run_waits_too(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker("gpu")
    start_router()
    lane.settle()
    worker.beat(0.0, HOT)
    lane.settle()
    sent = lane.send_bundle(5)
    lane.wait_for("job.parked", 5)
    worker.beat()
    assert sorted(worker.serve(5)) == sorted(sent)


def test_one_worker_beyond_its_limits_does_not_stop_the_device_that_another_serves_too(
    start_router, add_worker, lane: Lane
) -> None:
    ill, well = add_worker("gpu"), add_worker("gpu")
    start_router()
    lane.settle()
    ill.beat(0.0, HOT)
    lane.settle()
    (sent,) = lane.send()
    assert well.take() == [sent]


def test_a_device_near_a_limit_is_given_its_share_of_the_work(start_router, add_worker, lane: Lane) -> None:
    """Two alike: the one of half the share counts as if it had half the slots."""
    near, well = add_worker("gpu", slots=4), add_worker("fpga", slots=4)
    start_router()
    lane.settle()
    near.beat(0.5, "memory at 93%")
    lane.settle()
    lane.send(30, ms=10)
    lane.wait_for("job.placed", 30)
    assert near.depth + well.depth == 30
    assert 5 <= near.depth <= 12


def test_a_device_near_a_limit_has_less_credit(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker("gpu", slots=4)
    start_router(msgspec.structs.replace(PATIENT, credit_s=0.001))
    lane.settle()
    worker.beat(0.25, "memory at 94%")
    lane.settle()
    lane.send(20, ms=100)
    lane.settle()
    assert worker.depth == 2


def test_a_device_that_shares_its_host_with_others_is_predicted_to_be_slower(
    start_router, add_worker, lane: Lane
) -> None:
    shared, alone = add_worker("gpu", speed=3 * SPEED), add_worker("cpu", speed=2 * SPEED)
    start_router()
    lane.settle()
    shared.beat(speed=0.5)
    lane.settle()
    (sent,) = lane.send(ms=60)
    assert alone.take() == [sent]
    run_s = {each.device: each.estimate.run_s for each in lane.placement(sent).candidates}
    assert run_s == {"cpu": pytest.approx(0.03, rel=0.01), "gpu": pytest.approx(0.04, rel=0.01)}


@pytest.mark.parametrize("garbage", [b"", b"\x00", b"{", b"[]", b"null", b'{"body": 3}', b"\xff\xfe", b"[" * 5000])
def test_bytes_that_are_no_message_are_a_dead_letter_with_its_reason_and_harm_nobody(
    start_router, add_worker, lane: Lane, garbage: bytes
) -> None:
    worker = add_worker()
    before = lane.send(2)
    lane.push([garbage])
    after = lane.send(2)
    start_router()
    dead = lane.next_dead()
    assert dead[b"message"] == garbage
    assert dead[b"reason"]
    assert worker.serve(4) == before + after


def test_a_thousand_unreadable_messages_leave_nothing_in_a_claim(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    lane.push([b"", b"x"] * 500)
    (sent,) = lane.send()
    start_router()
    assert worker.take() == [sent]
    assert connection.call("XLEN", topology.DEAD) == 1000
    assert waiting_anywhere(connection) == 0


def altered(message: bytes, **headers: Any) -> bytes:
    envelope = json.loads(message)
    envelope["headers"] |= headers
    return json.dumps(envelope).encode()


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"lepton": {"colour": "red"}}, "colour"),
        ({"lepton": {"priority": 10}}, "priority"),
        ({"lepton": {"priority": "high"}}, "priority"),
        ({"lepton": {"result": "pickle"}}, "result"),
        ({"lepton": [1]}, "lepton"),
        ({"lepton": {"limit_s": 0}}, "limit_s"),
    ],
    ids=["unknown option", "priority", "type", "encoding", "no map", "limit"],
)
def test_a_job_that_asks_for_what_is_not_done_fails_for_its_waiter_and_harms_nobody(
    start_router, add_worker, lane: Lane, connection: Connection, headers: dict[str, Any], named: str
) -> None:
    worker = add_worker()
    start_router()
    refused = new_id()
    lane.push([altered(lane.message(refused), **headers)])
    (fine,) = lane.send()
    assert worker.take() == [fine]
    until(lambda: connection.call("EXISTS", topology.result(refused)), "the refused job has a result")
    record = json.loads(connection.call("GET", topology.result(refused)))
    assert (record["status"], record["result"]["exc_type"]) == ("FAILURE", "OptionNotSupported")
    assert named in record["result"]["exc_message"][0]


def test_a_client_of_celery_that_waits_hears_of_the_refusal(start_router, lane: Lane, broker_url: str) -> None:
    refused = new_id()
    waiter = Connection(broker_url, "waiter")
    waiter.send([("SUBSCRIBE", topology.result(refused))])
    start_router()
    lane.push([altered(lane.message(refused), lepton={"colour": "red"})])
    waiter._fill(5)
    until(lambda: any(push[0] == b"message" for push in waiter.drain_pushes()), "the refusal is published", 5)
    waiter.close()


def test_sizes_beyond_any_number_do_not_stop_the_router(start_router, add_worker, lane: Lane) -> None:
    sizes = KernelSpec("test.array", {"x": "float32[n]"}, {"y": "float32[n]"}, "n", "4*n")
    worker = add_worker(kernels=(SPIN, sizes))
    start_router()
    absurd, fine = new_ids(2)
    header = {"shapes": {"x": [10**400]}}
    envelope = altered(wire.envelope(absurd, "test.array", {"x": [1.0]}, Options()), lepton=header)
    lane.push([envelope, lane.message(fine)])
    assert worker.serve(2) == [absurd, fine]


def test_a_size_beyond_any_number_beside_a_nought_does_not_stop_the_router(
    start_router, add_worker, lane: Lane
) -> None:
    sizes = KernelSpec("test.array", {"x": "float32[m,n]"}, {"y": "float32[m]"}, "m*n", "4*m*n")
    worker = add_worker(kernels=(SPIN, sizes))
    start_router()
    absurd, fine = new_ids(2)
    header = {"shapes": {"x": [10**400, 0]}}
    envelope = altered(wire.envelope(absurd, "test.array", {"x": [[1.0]]}, Options()), lepton=header)
    lane.push([envelope, lane.message(fine)])
    assert worker.serve(2) == [absurd, fine]


@pytest.mark.parametrize(
    "poison",
    [
        ("SET", topology.MODEL, b"no snapshot"),
        ("XADD", topology.EVENTS, "*", "e", b"no event"),
        ("XADD", topology.EVENTS, "*", "x", b"\xc1"),
        ("SADD", topology.HOLDERS, b"\xff\xfe"),
        ("SADD", topology.DEVICES, b"\xff\xfe"),
        ("SADD", topology.PARKED, b"\xff\xfe"),
    ],
    ids=["model", "event", "bytes", "holder", "device", "parked"],
)
def test_one_bad_value_on_the_broker_does_not_stop_the_router(
    start_router, add_worker, lane: Lane, connection: Connection, poison: tuple[object, ...]
) -> None:
    worker = add_worker()
    connection.call(*poison)
    start_router()
    (before,) = lane.send()
    assert worker.serve(1) == [before]
    connection.call(*poison)
    (after,) = lane.send()
    assert worker.serve(1) == [after]


# -- nothing lost, nothing twice --------------------------------------------------------------------------------


def test_a_deep_lane_arrives_whole_once_and_in_order(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker(slots=2)
    sent: dict[str, list[str]] = {"test.spin": [], "test.other": []}
    for block in range(20):
        kernel = "test.other" if block % 2 else "test.spin"
        sent[kernel] += lane.send(500, kernel=kernel)
    start_router()
    taken: list[str] = []
    while len(taken) < 10_000 and (batch := worker.take(256)):
        worker.commit(batch)
        taken += batch
    spins = set(sent["test.spin"])
    assert len(taken) == 10_000
    assert [job for job in taken if job in spins] == sent["test.spin"]
    assert [job for job in taken if job not in spins] == sent["test.other"]
    assert waiting_anywhere(connection) == worker.depth == 0
    assert int(connection.call("HGET", topology.COUNTERS, "placed")) == 10_000


def test_a_router_that_stops_gives_back_what_it_had_claimed_and_the_next_dispatches_it(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    first = start_router()
    sent = lane.send(2, ms=60_000)  # as many as the device may have: none of the others leaves its claim meanwhile
    lane.settle()
    sent += lane.send(598, ms=60_000)
    lane.settle()
    first._stop.set()
    lane.push([b"wake up"])
    first.stop()
    assert worker.depth == 2
    assert waiting_anywhere(connection) >= 598
    assert [connection.call("KEYS", f"lepton:{kind}:*") for kind in Kind] == [[], [], []]
    start_router()
    assert worker.serve(600) == sent


def test_a_router_that_stopped_holds_no_lease_and_says_so(start_router, lane: Lane, connection: Connection) -> None:
    router = start_router()
    lane.settle()
    router._stop.set()
    lane.push([b"wake up"])
    router.stop()
    assert connection.call("KEYS", "lepton:lease:*") == []
    types = [each.type for _, each in EventStream(connection, "0").read(10)]
    assert types[0] == "router.online"
    assert types[-1] == "router.offline"


def test_two_routers_dispatch_each_message_once(start_router, add_worker, lane: Lane, connection: Connection) -> None:
    worker = add_worker(slots=2)
    start_router()
    start_router()
    sent = [job for _ in range(50) for job in lane.send(40)]
    taken: list[str] = []
    while len(taken) < 2000 and (batch := worker.take(64)):
        worker.commit(batch)
        taken += batch
    assert sorted(taken) == sorted(sent)
    lane.settle()
    assert waiting_anywhere(connection) == worker.depth == 0


def test_each_of_two_routers_sees_what_the_other_has_placed_before_it_places(
    start_router, add_worker, lane: Lane
) -> None:
    """Blind to each other they would both send their first job to one device, and their second to the other."""
    devices = add_worker("cpu.a"), add_worker("cpu.b")
    for _ in range(2):
        start_router()
    lane.wait_for_routers(2)
    routers = set()
    for pair in range(8):  # who waits longest is woken next: the routers take turns
        for _ in range(2):
            lane.wait_for("job.placed", len(sent := lane.send(ms=1)))
            routers.add(lane.placement(sent[0]).router)
        assert [device.depth for device in devices] == [pair + 1, pair + 1]
    assert len(routers) == 2


def test_work_that_another_router_placed_is_done_once_its_worker_says_so(start_router, add_worker, lane: Lane) -> None:
    devices = {name: add_worker(name) for name in ("cpu.a", "cpu.b")}
    for _ in range(2):
        start_router()
    lane.wait_for_routers(2)
    for _ in range(6):  # whoever places the second one knows that the device of the first is busy, or free again
        (first,) = lane.send(ms=1)
        lane.wait_for("job.placed", 1)
        device = lane.placement(first).device
        (second,) = lane.send(ms=1)
        lane.wait_for("job.placed", 1)
        assert {device, lane.placement(second).device} == set(devices)
        for job in (first, second):
            devices[lane.placement(job).device].serve(1)


def test_of_two_routers_one_stops_in_the_middle_and_nothing_is_lost_or_doubled(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker(slots=2)
    leaving = start_router()
    start_router()
    sent = [job for _ in range(25) for job in lane.send(40)]
    taken: list[str] = []
    while len(taken) < 1000 and (batch := worker.take(64)):
        worker.commit(batch)
        taken += batch
        leaving._stop.set()
    assert sorted(taken) == sorted(sent)


def incarnations(connection: Connection) -> list[str]:
    found = connection.call("KEYS", "lepton:lease:router-*")
    return [name.decode().removeprefix("lepton:lease:") for name in found]


def test_a_router_whose_claims_were_adopted_ends_and_starts_as_another_and_loses_nothing(
    start_router, add_worker, lane: Lane, connection: Connection, broker: Broker
) -> None:
    """Its lease has lapsed, and another has given back what it held."""
    worker = add_worker()
    start_router()
    sent = lane.send(20, ms=60_000)
    lane.settle()
    (before,) = incarnations(connection)
    connection.call("DEL", topology.lease(before))
    assert broker.recover().messages == 18
    sent += lane.send(5, ms=60_000)
    assert sorted(worker.serve(25)) == sorted(sent)
    assert incarnations(connection) != [before]


def test_a_lapsed_lease_is_noticed_at_the_next_heartbeat(start_router, add_worker, lane: Lane, connection) -> None:
    worker = add_worker()
    start_router(msgspec.structs.replace(PATIENT, heartbeat_s=0.1))
    sent = lane.send(10, ms=60_000)
    lane.settle()
    (before,) = incarnations(connection)
    connection.call("DEL", topology.lease(before))
    until(lambda: [name for name in incarnations(connection) if name != before], "a new incarnation takes a lease")
    assert sorted(worker.serve(10)) == sorted(sent)


def test_a_broken_connection_is_made_again_and_what_was_claimed_comes_back(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker(slots=1)
    start_router(HASTY)
    sent = lane.send(20, ms=60_000)
    lane.settle()
    for client in connection.call("CLIENT", "LIST").decode().splitlines():
        fields = dict(part.partition("=")[::2] for part in client.split())
        if fields["name"].startswith("router-"):
            connection.call("CLIENT", "KILL", "ID", fields["id"])
    sent += lane.send(5, ms=60_000)
    assert sorted(worker.serve(25)) == sorted(sent)


def test_a_router_whose_connection_broke_gives_back_at_once_what_it_had_claimed(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    """And does not have it wait for its lease."""
    worker = add_worker()
    start_router(PATIENT)
    sent = lane.send(20, ms=60_000)
    lane.wait_for("job.placed", 2)
    (before,) = incarnations(connection)
    connection.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    until(lambda: [name for name in incarnations(connection) if name != before], "a new incarnation takes a lease")
    survivor = add_worker("cpu")
    found = [*worker.serve(0), *survivor.serve(20)]
    assert sorted(found) == sorted(sent)
    assert incarnations(connection) != [before]


def test_every_connection_killed_again_and_again_under_load_loses_and_doubles_nothing(
    start_router, add_worker, lane: Lane, broker_url: str
) -> None:
    start_router(HASTY)
    start_router(HASTY)
    worker = add_worker()
    sent: list[str] = []
    for _ in range(5):
        sent += lane.send(200)
        until(lambda: lane.connection.call("LLEN", topology.LANE) == 0, "a router has claimed them")
        lane.connection.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    survivor = Connection(broker_url, "survivor")
    taken: list[str] = []
    while len(taken) < 1000 and (popped := survivor.call("BLMPOP", 5, 1, "lepton.cpu", "RIGHT", "COUNT", 256)):
        ids = [wire.read_envelope(message).headers.id for message in popped[1]]
        told = Event("job.succeeded", worker.broker.incarnation, "test.spin", "cpu", tuple(ids))
        survivor.call("XADD", topology.EVENTS, "*", "e", event.encode(told))
        taken += ids
    survivor.close()
    assert sorted(taken) == sorted(sent)


def test_a_router_whose_host_vanished_swallows_nothing(
    start_router, add_worker, lane: Lane, broker_url: str, connection: Connection
) -> None:
    """No one closes its connections: the broker goes on serving them until the TCP keepalive, minutes later."""
    vanished = Connection(broker_url, "vanished")
    gone = Broker(vanished, "router-vanished", HASTY)
    gone.announce(b"")
    wake = Connection(broker_url, "vanished-wake")
    gone.ask_wake(wake)
    worker = add_worker()
    until(lambda: not connection.call("EXISTS", topology.lease("router-vanished")), "its lease lapses")
    start_router(msgspec.structs.replace(HASTY, lease_s=10.0))
    until(lambda: connection.call("EXISTS", "lepton:empty:router-vanished"), "it has been looked after")
    connection.call("PEXPIRE", "lepton:empty:router-vanished", 20_000)  # as after 40 of the 60 seconds
    until(lambda: not connection.call("SISMEMBER", topology.HOLDERS, "router-vanished"), "it is forgotten")
    (sent,) = lane.send()
    try:
        assert worker.take(timeout_s=3) == [sent]
    finally:
        wake.close()
        vanished.close()


# -- when a job is due, and until when -----------------------------------------------------------------------------


def at(seconds: float, connection: Connection) -> str:
    """A time in so many seconds, by the broker's clock, as Celery writes it."""
    now, microseconds = connection.call("TIME")
    return datetime.fromtimestamp(int(now) + int(microseconds) / 1e6 + seconds, UTC).isoformat()


def sizes(connection: Connection) -> dict[str, int]:
    reply = connection.call(*functions.call("sizes", (), (LISTS_EACH,)))
    return {name.decode(): value for name, value in zip(reply[::2], reply[1::2], strict=True)}


def test_a_job_is_held_back_until_it_is_due_and_says_so(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    early = new_id()
    due_s = time.time() + 0.5
    lane.push([altered(lane.message(early), eta=at(0.5, connection))])
    assert lane.wait_for("job.scheduled", 1) == [early]
    placement = lane.placement(early)
    assert (placement.state, placement.device) == ("scheduled", None)
    (other,) = lane.send()
    assert worker.serve(1) == [other]
    assert sizes(connection)["scheduled_now"] == 1
    assert worker.take(timeout_s=3) == [early]
    assert time.time() >= due_s - 0.05
    assert lane.placement(early).state == "placed"


def test_of_many_that_are_held_back_each_runs_in_its_time(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    jobs = new_ids(3)
    for job, seconds in zip(jobs, (0.6, 0.2, 0.4), strict=True):
        lane.push([altered(lane.message(job), eta=at(seconds, connection))])
    assert worker.serve(3) == [jobs[1], jobs[2], jobs[0]]


def test_a_job_that_is_due_already_is_not_held_back(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker()
    start_router()
    job = new_id()
    lane.push([altered(lane.message(job), eta="2020-01-01T00:00:00+00:00")])
    assert worker.take() == [job]


@pytest.mark.parametrize("eta", ["soon", "in thirty-one days"])
def test_a_time_that_is_none_or_too_far_away_is_refused(
    start_router, lane: Lane, connection: Connection, eta: str
) -> None:
    start_router()
    job = new_id()
    lane.push([altered(lane.message(job), eta=eta if eta == "soon" else at(31 * 86_400, connection))])
    assert lane.wait_for("job.rejected", 1) == [job]
    record = results.read(connection.call("GET", topology.result(job)))
    assert (record.status, record.lepton.error["code"], record.lepton.error["field"]) == (
        "FAILURE",
        "invalid_arguments",
        "eta",
    )


def test_a_scheduled_job_can_be_cancelled(start_router, add_worker, lane: Lane, connection: Connection) -> None:
    add_worker()
    start_router()
    job = new_id()
    lane.push([altered(lane.message(job), eta=at(1000, connection))])
    lane.wait_for("job.scheduled", 1)
    ask_to_cancel(connection, job)
    assert lane.wait_for("job.cancelled", 1) == [job]
    assert stored(connection, job) == "REVOKED"
    assert (sizes(connection)["scheduled_now"], sizes(connection)["difference"]) == (0, 0)


def test_a_job_that_is_marked_before_it_is_claimed_is_not_held_back(
    start_router, lane: Lane, connection: Connection
) -> None:
    job = new_id()
    ask_to_cancel(connection, job)
    lane.push([altered(lane.message(job), eta=at(1000, connection))])
    start_router()
    assert lane.wait_for("job.cancelled", 1) == [job]


def test_a_scheduled_job_whose_message_came_twice_runs_once(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    job = new_id()
    lane.push([altered(lane.message(job), eta=at(0.3, connection))] * 2)
    assert worker.serve(1) == [job]
    assert worker.take(timeout_s=0.3) == []
    assert connection.call("HGET", topology.COUNTERS, "duplicate") == b"1"
    assert sizes(connection)["difference"] == 0


def test_a_retry_runs_when_it_is_due_however_rare_the_heartbeat(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker()
    start_router()
    (job,) = lane.send()
    assert worker.take() == [job]
    (message,) = worker.broker.held(0)
    worker.retry(job, wire.retried(message), 0.2)
    assert worker.take(timeout_s=3) == [job]


def expired(connection: Connection, job: str) -> bool:
    meta = results.read(connection.call("GET", topology.result(job)))
    return (meta.status, meta.lepton.error["code"]) == ("REVOKED", "expired")


def test_a_job_that_comes_too_late_is_expired_and_its_waiter_told(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    late, fine = new_ids(2)
    message = altered(lane.message(late, reply_to=topology.reply("me"), result="msgpack"), expires=at(-1, connection))
    lane.push([message, altered(lane.message(fine), expires=at(100, connection))])
    assert lane.wait_for("job.expired", 1) == [late]
    assert worker.take() == [fine]
    assert expired(connection, late)
    _, told = connection.call("BLPOP", topology.reply("me"), 5)
    assert results.read(told).task_id == late
    assert connection.call("HGET", topology.COUNTERS, "expired") == b"1"
    assert sizes(connection)["difference"] == 0


def test_a_job_that_waits_too_long_in_the_window_is_expired_with_the_next_heartbeat(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router(msgspec.structs.replace(PATIENT, heartbeat_s=0.1))
    busy = lane.send(2, ms=60_000)
    lane.wait_for("job.placed", 2)
    late, fine = new_ids(2)
    lane.push([altered(lane.message(late, 60_000), expires=at(0.3, connection)), lane.message(fine, 60_000)])
    assert lane.wait_for("job.expired", 1) == [late]
    assert expired(connection, late)
    assert worker.serve(3) == [*busy, fine]


def test_a_parked_job_ends_with_its_deadline_and_the_others_stay_parked(
    start_router, lane: Lane, connection: Connection
) -> None:
    start_router(msgspec.structs.replace(PATIENT, heartbeat_s=0.1))
    first, late, last = new_ids(3)
    lane.push([lane.message(first), altered(lane.message(late), expires=at(0.3, connection)), lane.message(last)])
    lane.wait_for("job.parked", 3)
    started_s = time.monotonic()
    assert lane.wait_for("job.expired", 1) == [late]
    assert time.monotonic() - started_s < 2
    until(lambda: connection.call("LLEN", topology.parked("test.spin")) == 2, "the others are parked again")
    parked = connection.call("LRANGE", topology.parked("test.spin"), 0, -1)
    assert [wire.read_envelope(message).headers.id for message in parked[::-1]] == [first, last]
    assert sizes(connection)["difference"] == 0


def test_a_deadline_that_is_no_time_is_refused(start_router, lane: Lane, connection: Connection) -> None:
    start_router()
    job = new_id()
    lane.push([altered(lane.message(job), expires="soon")])
    assert lane.wait_for("job.rejected", 1) == [job]
    assert results.read(connection.call("GET", topology.result(job))).lepton.error["field"] == "expires"


# -- suspects -------------------------------------------------------------------------------------------------------


def test_suspects_go_to_the_devices_list_for_those_who_run_alone(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    suspect, innocent = new_ids(2)
    connection.call("LPUSH", topology.ALONE, lane.message(suspect))
    connection.call("LPUSH", topology.AGAIN, lane.message(innocent))
    assert worker.take(alone=True) == [suspect]
    worker.commit([suspect])
    assert worker.take() == [innocent]
    assert lane.placement(suspect).device == "cpu"


def test_a_suspect_that_no_live_device_can_run_is_one_still_when_it_is_unparked(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    """The usual death: of the only worker, which takes its time to come back."""
    start_router()
    suspects = new_ids(3)
    connection.call("LPUSH", topology.ALONE, *map(lane.message, suspects))
    lane.wait_for("job.parked", 3)
    (innocent,) = lane.send()
    lane.wait_for("job.parked", 1)
    assert lane.placement(suspects[0]).state == "parked"
    assert sizes(connection)["parked_now"] == 4
    worker = add_worker()
    found = []
    for _ in suspects:
        found += (taken := worker.take(10, alone=True))
        worker.commit(taken)
    assert found == suspects
    assert worker.take() == [innocent]


def test_a_suspect_stays_one_when_its_device_goes_away_before_it_ran(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    leaving, staying = add_worker("gpu", speed=100 * SPEED), add_worker("cpu")
    start_router(msgspec.structs.replace(PATIENT, heartbeat_s=0.1))
    (suspect,) = new_ids(1)
    connection.call("LPUSH", topology.ALONE, lane.message(suspect, 100))
    until(lambda: connection.call("LLEN", topology.alone_queue("gpu")), "it is placed")
    leaving.go_offline()
    assert staying.take(alone=True) == [suspect]


def test_a_suspect_in_the_window_of_a_router_that_stops_stays_one(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    add_worker()
    router = start_router()
    suspects = new_ids(10)
    connection.call("LPUSH", topology.ALONE, *(lane.message(job, 60_000) for job in suspects))
    lane.wait_for("job.placed", 2)
    router._stop.set()
    lane.push([b"wake up"])
    router.stop()
    assert connection.call("LLEN", topology.ALONE) == 8


# -- tenants --------------------------------------------------------------------------------------------------------


def test_a_small_tenant_does_not_wait_behind_a_large_one(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    small, large = (topology.lane(tenant).removeprefix(topology.LANE) for tenant in ("small", "large"))
    connection.call("SADD", topology.LANES, topology.lane("small"), topology.lane("large"))
    many = lane.send(300, ms=60_000, suffix=large)
    few = lane.send(5, ms=60_000, suffix=small)
    start_router(msgspec.structs.replace(PATIENT, window=8))
    done = worker.serve(40)
    assert [job for job in done if job in few] == few
    assert [job for job in done if job not in few] == many[:35]


def test_tenants_and_the_default_lane_share_what_there_is_room_for(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    suffixes = ["", ".one", ".two"]
    connection.call("SADD", topology.LANES, topology.lane("one"), topology.lane("two"))
    sent = {suffix: lane.send(100, ms=60_000, suffix=suffix) for suffix in suffixes}
    start_router(msgspec.structs.replace(PATIENT, window=6))
    done = set(worker.serve(60))
    counts = [len(done.intersection(jobs)) for jobs in sent.values()]
    assert sum(counts) == 60
    assert max(counts) - min(counts) <= 6


def test_the_first_job_of_a_new_tenant_wakes_an_idle_router(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    lane.settle()
    job = new_id()
    own = topology.lane("new")
    words = (own, job, "", "", "", lane.message(job))
    connection.call(*functions.call("accept", (), (60, 100, 10, 0, 10, 0, own, "", 1, *words)))
    assert worker.take(timeout_s=2) == [job]


# -- a full broker --------------------------------------------------------------------------------------------------


@pytest.fixture
def fill(connection: Connection) -> Iterator[Callable[[], None]]:
    before = connection.call("CONFIG", "GET", "maxmemory")[b"maxmemory"]
    yield lambda: connection.call("CONFIG", "SET", "maxmemory", 1)
    connection.call("CONFIG", "SET", "maxmemory", before)


@pytest.mark.parametrize("started", ["before", "after"])
def test_a_broker_without_memory_drains(
    start_router, add_worker, lane: Lane, connection: Connection, fill: Callable[[], None], started: str
) -> None:
    worker = add_worker()
    sent = lane.send(200)
    refused, late = new_ids(2)
    lane.push([altered(lane.message(refused), eta="soon"), altered(lane.message(late), eta=at(1000, connection))])
    lane.push([b"unreadable"])
    if started == "before":
        start_router(msgspec.structs.replace(PATIENT, window=50))
        lane.wait_for("job.placed", 10)
    fill()
    if started == "after":
        start_router()
    done: list[str] = []
    until(lambda: done.extend(worker.serve(1)) or len(done) == 200, "all are done")  # a full broker wakes nobody
    assert done == sent
    until(lambda: connection.call("EXISTS", topology.result(refused)), "the refusal is told")
    until(lambda: connection.call("HEXISTS", topology.ETA_MESSAGES, late), "the later one is scheduled")
    until(lambda: connection.call("XLEN", topology.DEAD), "what nobody can read is kept")
    assert sizes(connection)["difference"] == 0


# -- cancelling -----------------------------------------------------------------------------------------------------


def ask_to_cancel(connection: Connection, *jobs: str) -> None:
    connection.many([("MULTI",), *cancellation.mark(jobs, "test"), ("EXEC",)])


def stored(connection: Connection, job: str) -> str:
    found = connection.call("GET", topology.result(job))
    return results.read(found).status if found else "none"


def test_a_job_that_waits_in_the_window_is_ended_at_once_and_the_others_stay(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    slow = add_worker()
    start_router()
    first, second, gone, last = lane.send(4, ms=60_000)  # a slot is given two of them
    assert sorted(lane.wait_for("job.placed", 2)) == sorted([first, second])
    ask_to_cancel(connection, gone)
    assert lane.wait_for("job.cancelled", 1) == [gone]
    assert stored(connection, gone) == "REVOKED"
    assert slow.serve(3) == [first, second, last]
    assert connection.call("HGET", topology.COUNTERS, "cancelled") == b"1"
    assert connection.call("ZCARD", topology.CANCELLED) == 0


def test_a_job_that_was_cancelled_in_its_lane_is_ended_when_it_is_claimed(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    jobs = lane.send(300)
    ask_to_cancel(connection, *jobs[::3])
    start_router()
    assert sorted(lane.wait_for("job.cancelled", 100)) == sorted(jobs[::3])
    assert worker.serve(200) == [job for at, job in enumerate(jobs) if at % 3]
    assert waiting_anywhere(connection) == 0


def test_a_parked_job_is_ended_and_the_others_stay_parked(start_router, lane: Lane, connection: Connection) -> None:
    start_router()
    one, two, three = lane.send(3)
    lane.wait_for("job.parked", 3)
    ask_to_cancel(connection, two)
    assert lane.wait_for("job.cancelled", 1) == [two]
    lane.settle()
    parked = connection.call("LRANGE", topology.parked("test.spin"), 0, -1)
    assert [wire.read_envelope(message).headers.id for message in parked[::-1]] == [one, three]


def test_to_cancel_a_parked_job_leaves_the_others_parked_and_untold(
    start_router, lane: Lane, connection: Connection
) -> None:
    start_router()
    jobs = lane.send(300)
    lane.wait_for("job.parked", 300)
    ask_to_cancel(connection, *jobs[::100])
    assert sorted(lane.wait_for("job.cancelled", 3)) == sorted(jobs[::100])
    assert connection.call("LLEN", topology.parked("test.spin")) == 297
    assert connection.call("HGET", topology.COUNTERS, "parked") == b"300"


def test_a_client_that_waits_hears_of_the_cancelling_on_its_reply_list(
    start_router, lane: Lane, connection: Connection
) -> None:
    start_router()
    (job,) = lane.send(reply_to=topology.reply("me"), result="msgpack")
    lane.wait_for("job.parked", 1)
    ask_to_cancel(connection, job)
    _, told = connection.call("BLPOP", topology.reply("me"), 5)
    assert (results.read(told).task_id, results.read(told).status) == (job, "REVOKED")


def test_marks_of_jobs_that_nobody_has_harm_nobody(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    ask_to_cancel(connection, new_id(), "not an id", "")
    jobs = lane.send(3)
    assert worker.serve(3) == jobs
    assert "cancelled" not in connection.call("HGETALL", topology.COUNTERS)


def test_a_parked_job_of_a_foreign_id_is_found_however_long_ago_it_was_parked(
    start_router, lane: Lane, connection: Connection
) -> None:
    start_router()
    foreign = str(uuid.uuid4())
    lane.push([lane.message(foreign)])
    lane.wait_for("job.parked", 1)
    connection.call("DEL", *connection.call("KEYS", "lepton:jobs:*"))  # as if an hour had passed
    ask_to_cancel(connection, foreign)
    assert lane.wait_for("job.cancelled", 1) == [foreign]
    assert stored(connection, foreign) == "REVOKED"


def test_a_job_that_came_twice_and_has_its_result_is_not_ended_again(
    start_router, lane: Lane, connection: Connection
) -> None:
    start_router()
    (job,) = lane.send(reply_to=topology.reply("me"))
    lane.wait_for("job.parked", 1)
    record = results.encode(results.success(job, {"y": 1}, None), "json")
    connection.call("SET", topology.result(job), record)  # its other message has been run
    ask_to_cancel(connection, job)
    until(lambda: connection.call("HGET", topology.COUNTERS, "duplicate") == b"1", "the second message is counted")
    assert stored(connection, job) == "SUCCESS"
    assert connection.call("EXISTS", topology.reply("me")) == 0
    assert int(connection.call("HGET", topology.COUNTERS, "cancelled") or 0) == 0
    assert waiting_anywhere(connection) == 0


def test_marks_of_a_wrong_type_hold_no_job_up(start_router, add_worker, lane: Lane, connection: Connection) -> None:
    connection.call("SET", topology.CANCELLED, "x")
    worker = add_worker()
    start_router()
    jobs = lane.send(3)
    assert worker.serve(3) == jobs


def test_a_result_key_of_a_wrong_type_does_not_stop_the_router(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker(kernels=(OTHER,))
    start_router()
    (job,) = lane.send()
    lane.wait_for("job.parked", 1)
    connection.call("LPUSH", topology.result(job), "no result")
    ask_to_cancel(connection, job)
    assert lane.wait_for("job.cancelled", 1) == [job]
    others = lane.send(2, kernel="test.other")
    assert worker.serve(2) == others


# -- floods and copies ------------------------------------------------------------------------------------------------


def test_thousands_of_scheduled_jobs_do_not_keep_an_urgent_one_waiting(
    start_router, add_worker, lane: Lane, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.router._CLAIM_S", 0.0)
    worker = add_worker()
    later = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 3600))
    scheduled = [altered(lane.message(job), eta=later) for job in new_ids(2000)]
    lane.push(scheduled)
    (urgent,) = lane.send(suffix=PRIORITY_SEPARATOR + "high", priority=9)
    start_router()
    assert worker.take() == [urgent]
    until(lambda: connection.call("HLEN", topology.ETA_MESSAGES) == 2000, "all of them are put aside")
    entries = connection.call("XRANGE", topology.EVENTS, "-", "+")
    kinds = [each.type for _, fields in entries for each in event.decode(fields[1])]
    assert kinds.count("job.scheduled") == 2000
    assert kinds[: kinds.index("job.placed")].count("job.scheduled") <= 2 * CLAIM_LIMIT


def test_two_copies_that_are_refused_in_one_step_send_their_follow_up_once(
    start_router, lane: Lane, connection: Connection, broker_url: str
) -> None:
    job = new_id()
    refused = json.loads(altered(lane.message(job), lepton={"colour": "red"}))
    body = wire.pack(([], {"n": 1}, {"errbacks": [{"task": "theirs.alarm", "args": [], "kwargs": {}, "options": {}}]}))
    refused["body"] = base64.b64encode(body).decode()
    lane.push([json.dumps(refused).encode()] * 2)
    start_router(msgspec.structs.replace(PATIENT, redis_url=broker_url))
    lane.settle()
    assert stored(connection, job) == "FAILURE"
    (alarm,) = connection.call("LRANGE", "celery", 0, -1)
    assert json.loads(alarm)["headers"]["task"] == "theirs.alarm"
    counted = {name: int(count) for name, count in connection.call("HGETALL", topology.COUNTERS).items()}
    assert (counted[b"failed"], counted[b"duplicate"]) == (1, 1)


# -- bundles --------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(connection: Connection) -> None:
    """Jobs of `test.spin` are known to take as long as they are predicted to."""
    model = CostModel()
    for _ in range(3):
        seen = Observation("test.spin", "cpu", 1, 100, 0, 0.0, 0.11)
        model.learn(seen, Peaks(SPEED, 1e12, float("inf"), 0.0, 0.0))
    connection.call("SET", topology.MODEL, model.snapshot())


def bundled(connection: Connection) -> tuple[int, int]:
    """How many jobs there are beyond messages: in lanes and first claims, and behind those."""
    lanes = connection.call("HVALS", topology.BUNDLED)
    return sum(map(int, lanes)), int(connection.call("HGET", topology.COUNTERS, "bundled") or 0)


def is_balanced(connection: Connection) -> bool:
    """Nothing is unaccounted for, and nothing is left."""
    found = sizes(connection)
    assert (found["difference"], found["waiting"], found["in_flight"]) == (0, 0, 0)
    return bundled(connection) == (0, 0)


def where(connection: Connection, job: str) -> Placement | None:
    """The placement of a job as a client finds it."""
    return read_look(job, connection.many(look_commands(job)))[1]


@pytest.mark.usefixtures("measured")
def test_a_bundle_of_a_quick_kernel_that_was_measured_stays_whole(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    jobs = lane.send_bundle(9)
    assert lane.wait_for("job.placed", 9) == jobs
    found = sizes(connection)
    assert (found["accepted"], found["in_flight"], found["waiting"], found["difference"]) == (9, 9, 0, 0)
    (message,) = worker.take_messages()
    assert jobs_of(message) == tuple(jobs)
    assert bundled(connection) == (0, 8)
    worker.commit(jobs)
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_each_job_of_a_bundle_says_where_it_was_placed_and_how_it_waits(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    add_worker()
    start_router()
    jobs = lane.send_bundle(9)
    lane.wait_for("job.placed", 9)
    assert connection.call("HLEN", topology.jobs(minute_of(jobs[0]) or 0)) == 1
    found = [where(connection, job) for job in jobs]
    assert [placement.job for placement in found] == jobs
    assert {(each.state, each.device, each.kernel) for each in found} == {("placed", "cpu", "test.spin")}


@pytest.mark.usefixtures("measured")
def test_messages_of_one_run_of_ids_each_say_where_their_own_jobs_are(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    """A push ends in the midst of a run, or one of its rows differs."""
    add_worker()
    start_router()
    run = run_of(new_id(), 40)
    lane.send_rows(run[:9], [{"n": 1}] * 9)
    lane.wait_for("job.placed", 9)
    assert [where(connection, job) is not None for job in run] == [True] * 9 + [False] * 31
    lane.send_rows(run[9:18], [{"n": 1}] * 9, kernel="test.other")
    lane.wait_for("job.placed", 9)
    kernels = [placement and placement.kernel for placement in (where(connection, job) for job in run)]
    assert kernels == ["test.spin"] * 9 + ["test.other"] * 9 + [None] * 22


@pytest.mark.usefixtures("measured")
def test_a_bundle_that_would_keep_a_slot_long_is_split_into_parts(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    jobs = lane.send_bundle(100)  # of a millisecond and a little each
    taken: list[bytes] = []
    while sum(len(jobs_of(each)) for each in taken) < 100 and (more := worker.take_messages()):
        assert sizes(connection)["difference"] == 0
        taken += more
        worker.commit(jobs_of(more[0]))
    parts = list(map(jobs_of, taken))
    assert [job for part in parts for job in part] == jobs
    assert {len(part) for part in parts[:-1]} == {20}  # five of them, of 25 ms at most
    assert all(wire.read_options(wire.read_envelope(each).headers).split for each in taken[:-1])
    assert [where(connection, job).job for job in jobs] == jobs
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_a_bundle_of_slow_jobs_is_split_into_single_ones(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    jobs = lane.send_bundle(20, ms=60_000)
    lane.settle()
    assert worker.depth == 2
    assert sizes(connection)["difference"] == sizes(connection)["bundled"] == 0
    assert worker.serve(20) == jobs
    assert is_balanced(connection)


def test_the_jobs_of_a_kernel_that_nobody_has_measured_are_dispatched_one_by_one(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    jobs = lane.send_bundle(50)
    found = []
    for _ in jobs:
        (message,) = worker.take_messages()
        found += jobs_of(message)
        worker.commit(jobs_of(message))
    assert found == jobs
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_a_bundle_wakes_an_idle_router(start_router, add_worker, lane: Lane, connection: Connection) -> None:
    worker = add_worker()
    start_router()
    for count in (4, 128, 5):
        lane.settle()
        jobs = lane.send_bundle(count)
        found: list[str] = []
        while len(found) < count and (taken := worker.take(timeout_s=2)):
            worker.commit(taken)
            found += taken
        assert found == jobs
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_bundles_of_tenants_are_counted_in_their_own_lanes(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    sent = lane.send_bundle(7) + lane.send_bundle(8, tenant="ann") + lane.send_bundle(9, tenant="bob")
    assert bundled(connection) == (21, 0)
    assert (sizes(connection)["lanes"], sizes(connection)["accepted"]) == (24, 24)
    start_router()
    found: list[str] = []
    while len(found) < 24 and (taken := worker.take(10)):
        worker.commit(taken)
        found += taken
    assert sorted(found) == sorted(sent)
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_the_jobs_of_a_bundle_are_dispatched_one_by_one_while_somebody_is_shown_each(
    start_router, add_worker, lane: Lane, connection: Connection, broker_url: str
) -> None:
    flower = Connection(broker_url, "flower")
    flower.send([("PSUBSCRIBE", "*celeryev*")])
    assert flower.call("PING")
    worker = add_worker()
    start_router()
    lane.settle()
    jobs = lane.send_bundle(9)
    found = []
    for _ in jobs:
        taken = worker.take()
        assert len(taken) == 1
        worker.commit(taken)
        found += taken
    assert found == jobs
    assert is_balanced(connection)
    flower.close()


@pytest.mark.usefixtures("measured")
def test_one_job_of_a_bundle_that_was_cancelled_in_its_lane_ends_and_the_others_run(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    jobs = lane.send_bundle(9)
    ask_to_cancel(connection, jobs[4])
    start_router()
    assert lane.wait_for("job.cancelled", 1) == [jobs[4]]
    assert worker.serve(8) == [*jobs[:4], *jobs[5:]]
    assert stored(connection, jobs[4]) == "REVOKED"
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("at", [0, 5, 8])
def test_one_job_of_a_bundle_that_is_cancelled_in_the_window_ends_and_the_others_run(
    start_router, add_worker, lane: Lane, connection: Connection, at: int
) -> None:
    worker = add_worker()
    start_router()
    busy = lane.send(2, ms=60_000)
    lane.wait_for("job.placed", 2)
    jobs = lane.send_bundle(9)
    lane.settle()
    ask_to_cancel(connection, jobs[at])
    assert lane.wait_for("job.cancelled", 1) == [jobs[at]]
    assert sizes(connection)["difference"] == 0
    assert worker.serve(10) == [*busy, *jobs[:at], *jobs[at + 1 :]]
    assert is_balanced(connection)


def test_the_jobs_of_a_bundle_that_no_device_can_run_are_parked_one_by_one_and_run_later(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    start_router()
    jobs = lane.send_bundle(20)
    assert lane.wait_for("job.parked", 20) == jobs
    assert {where(connection, job).state for job in jobs} == {"parked"}
    assert (sizes(connection)["parked_now"], sizes(connection)["difference"]) == (20, 0)
    assert bundled(connection) == (0, 0)
    ask_to_cancel(connection, jobs[3])
    assert lane.wait_for("job.cancelled", 1) == [jobs[3]]
    assert add_worker().serve(19) == [*jobs[:3], *jobs[4:]]
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_a_bundle_whose_last_device_goes_away_while_it_waits_is_parked_one_by_one(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    leaving = add_worker()
    start_router()
    busy = lane.send(2, ms=60_000)
    lane.wait_for("job.placed", 2)
    jobs = lane.send_bundle(9)
    lane.settle()
    assert leaving.serve(0) == []
    leaving.go_offline()
    lane.wait_for("job.parked", 9)
    assert {where(connection, job).state for job in jobs} == {"parked"}
    assert sizes(connection)["difference"] == 0
    assert sorted(add_worker().serve(11)) == sorted(busy + jobs)
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_the_suspects_of_a_bundle_run_one_by_one(start_router, add_worker, lane: Lane, connection: Connection) -> None:
    worker = add_worker()
    start_router()
    jobs = lane.send_bundle(9)
    assert worker.take() == jobs
    worker.broker.release(0, worker.broker.held(0), "!")
    lane.connection.call("XADD", topology.EVENTS, "*", "e", event.encode(Event("device.heartbeat", "it")))
    lane.settle()
    found: list[str] = []
    for _ in jobs:
        taken = worker.take(alone=True)
        assert len(taken) == 1
        worker.commit(taken)
        found += taken
    assert found == jobs
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_a_bundle_that_comes_back_from_a_dead_router_is_dispatched_whole(
    start_router, add_worker, lane: Lane, connection: Connection, broker_url: str
) -> None:
    dead = Connection(broker_url, "dead")
    gone = Broker(dead, "router-dead", PATIENT)
    gone.announce(b"")
    jobs = lane.send_bundle(9)
    assert len(gone.claim(Kind.NEW, 0, 0, 10)) == 1
    connection.call("DEL", topology.lease("router-dead"))
    worker = add_worker()
    start_router(HASTY)
    assert worker.take() == jobs
    assert bundled(connection) == (0, 8)
    worker.commit(jobs)
    assert is_balanced(connection)
    dead.close()


@pytest.mark.usefixtures("measured")
def test_an_urgent_job_goes_before_the_bundles_that_wait_in_the_window(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    busy = lane.send(2, ms=60_000)
    lane.wait_for("job.placed", 2)
    many = [job for _ in range(5) for job in lane.send_bundle(9)]
    lane.settle()
    (urgent,) = lane.send(suffix=PRIORITY_SEPARATOR + "9", priority=9)
    lane.settle()
    assert worker.serve(3) == [*busy, urgent]
    assert worker.serve(45) == many
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_two_routers_dispatch_each_job_of_many_bundles_once(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker(slots=2)
    start_router()
    start_router()
    sent = [job for at in range(60) for job in lane.send_bundle(4 + at)]
    taken: list[str] = []
    while len(taken) < len(sent) and (more := worker.take(64)):
        worker.commit(more)
        taken += more
    assert sorted(taken) == sorted(sent)
    lane.settle()
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_a_router_that_ends_with_split_bundles_in_its_window_loses_none_of_their_jobs(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    first = start_router()
    jobs = [job for _ in range(5) for job in lane.send_bundle(128, ms=3)]
    lane.settle()
    first._stop.set()
    lane.push([b"wake up"])
    first.stop()
    assert sizes(connection)["difference"] == 0
    start_router()
    assert sorted(worker.serve(len(jobs))) == sorted(jobs)
    assert is_balanced(connection)


@pytest.mark.usefixtures("measured")
def test_bundles_drain_and_are_split_where_the_broker_has_no_memory(
    start_router, add_worker, lane: Lane, connection: Connection, fill: Callable[[], None]
) -> None:
    worker = add_worker()
    sent = lane.send_bundle(9) + lane.send_bundle(100) + lane.send_bundle(20, ms=100)
    fill()
    start_router()
    done: list[str] = []
    until(lambda: done.extend(worker.serve(1)) or len(done) == len(sent), "all are done")
    assert done == sent
    assert is_balanced(connection)


@pytest.mark.parametrize("seen", ["measured", "unknown"])
@pytest.mark.parametrize("shapes", [{"n": 10**400}, {"n": 2**63}, {"n": -1}, {"n": "x"}, {"n": None}, {}, {"m": [1]}])
def test_whatever_shapes_a_bundle_declares_do_not_stop_the_router(
    start_router, add_worker, lane: Lane, connection: Connection, request, shapes: dict[str, Any], seen: str
) -> None:
    if seen == "measured":
        request.getfixturevalue("measured")
    worker = add_worker()
    jobs = lane.send_bundle(5)
    (message,) = connection.call("LRANGE", topology.LANE, 0, -1)
    found = json.loads(message)
    found["headers"]["lepton"]["shapes"] = shapes
    connection.call("LSET", topology.LANE, 0, json.dumps(found))
    start_router()
    assert worker.serve(5) == jobs
    assert is_balanced(connection)


def mangled(message: bytes, how: str) -> bytes:
    """A bundle whose headers are as they should be, and its body none."""
    found = json.loads(message)
    found["body"] = {"no base64": "!", "no msgpack": "/w==", "JSON": found["body"], "fewer": ""}[how]
    if how == "JSON":
        found["content-type"] = wire.JSON
    if how == "fewer":
        found["body"] = base64.b64encode(wire.pack(([], [{"n": 1}], None))).decode()
    return json.dumps(found).encode()


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("how", ["no base64", "no msgpack", "JSON", "fewer"])
@pytest.mark.parametrize("when", ["at once", "after it was parked", "cancelled"])
def test_a_bundle_that_nobody_can_read_is_the_workers_to_refuse_whole(
    start_router, add_worker, lane: Lane, connection: Connection, how: str, when: str
) -> None:
    jobs = lane.send_bundle(5, ms=100)
    (message,) = connection.call("LRANGE", topology.LANE, 0, -1)
    connection.call("LSET", topology.LANE, 0, mangled(message, how))
    (fine,) = lane.send()
    if when == "cancelled":
        ask_to_cancel(connection, jobs[0], jobs[2])
    if when != "after it was parked":
        worker = add_worker()
        start_router()
    else:
        start_router()
        lane.wait_for("job.parked", 2)
        assert sizes(connection)["difference"] == 0
        worker = add_worker()
    assert worker.serve(6) == [*jobs, fine]
    assert is_balanced(connection)


@pytest.mark.parametrize("beside", [b'"x":1e999,', b'"x":"\xff",'])
def test_a_bundle_that_could_not_be_written_again_is_refused(
    start_router, add_worker, lane: Lane, connection: Connection, beside: bytes
) -> None:
    """Its jobs could not be told apart where one of them ended its worker."""
    worker = add_worker()
    (first, *_) = lane.send_bundle(5)
    (message,) = connection.call("LRANGE", topology.LANE, 0, -1)
    connection.call("DEL", topology.BUNDLED)
    connection.call("LSET", topology.LANE, 0, message.replace(b'"properties":{', b'"properties":{' + beside))
    (fine,) = lane.send()
    start_router()
    assert lane.wait_for("job.rejected", 1) == [first]
    assert worker.serve(1) == [fine]
    assert is_balanced(connection)


# -- blobs ----------------------------------------------------------------------------------------------------------

BLOB = "redis:0123456789abcdef:1"


def blob_of(connection: Connection, job: str) -> str:
    (key,) = blob.keys(job, [BLOB])
    connection.call("SET", key, "bytes")
    return key


@pytest.mark.parametrize("end", ["job.cancelled", "job.expired", "job.rejected"])
def test_the_blobs_of_a_job_that_a_router_ends_are_left_to_themselves(
    start_router, lane: Lane, connection: Connection, end: str
) -> None:
    start_router(HASTY)
    jobs = new_ids(2)
    keys = [blob_of(connection, job) for job in jobs]
    one, other = (lane.message(job, blobs=(BLOB,)) for job in jobs)
    if end == "job.expired":
        one = altered(one, expires=at(0.2, connection))
    elif end == "job.rejected":
        one = altered(one, lepton={"blobs": [BLOB], "colour": "red"})
    lane.push([other])
    lane.wait_for("job.parked", 1)
    lane.push([one])
    if end == "job.cancelled":
        lane.wait_for("job.parked", 1)
        ask_to_cancel(connection, jobs[0])
    assert lane.wait_for(end, 1) == [jobs[0]]
    assert 0 < connection.call("TTL", keys[0]) <= blob.DROPPED_S
    assert connection.call("TTL", keys[1]) == -1


def test_a_bundle_that_is_alone_goes_from_its_wake_up_to_its_device_and_is_counted(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    model = CostModel()
    for _ in range(3):
        seen = Observation("test.spin", "cpu", 1, 100, 0, 0.0, 0.11)
        model.learn(seen, Peaks(SPEED, 1e12, float("inf"), 0.0, 0.0))
    connection.call("SET", topology.MODEL, model.snapshot())
    add_worker()
    start_router()
    lane.send()
    lane.wait_for("job.placed", 1)
    connection.call("CONFIG", "RESETSTAT")
    for count in (4, 9, 130):  # the last is more than one message: it is claimed as ever
        write = writer("test.spin", Terms(), None, Blobs(0))
        messages = [write(job, {"n": 1}) for job, _ in zip(ids(), range(count), strict=False)]
        connection.many([("MULTI",), *push(messages, Terms(), None).commands, ("EXEC",)])
        lane.wait_for("job.placed", count)
        if count == 9:
            assert b"cmdstat_fcall:" not in connection.call("INFO", "commandstats")  # nor by `transact`
    found = sizes(connection)
    assert (found["in_flight"], found["difference"]) == (144, 0)


def test_a_bundle_that_is_alone_and_has_to_be_split_leaves_the_wake_claim_to_the_next(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker = add_worker()
    start_router()
    (first,) = lane.send()
    assert worker.serve(1) == [first]
    write = writer("test.spin", Terms(), None, Blobs(0))
    rows = [write(job, {"n": 60_000}) for job, _ in zip(ids(), range(5), strict=False)]
    connection.many([("MULTI",), *push(rows, Terms(), None).commands, ("EXEC",)])
    until(lambda: worker.depth >= 2, "it is placed as far as there is room")
    assert connection.call("KEYS", topology.claim("*", WAKE)) == []
    lane.send(3)
    assert len(worker.serve(8)) == 8
    assert sizes(connection)["difference"] == 0


def test_a_lone_job_whose_device_another_router_has_just_filled_waits_in_the_window(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    """Not in the wake claim: the next to be woken by would be taken for it."""
    worker = add_worker()
    start_router()
    lane.wait_for_routers(1)
    connection.call("XADD", topology.EVENTS, "*", "e", event.encode(Event("router.online", "router-other")))
    lane.settle()
    theirs, (ours, next_one) = new_ids(600), new_ids(2)
    placed = Event("job.placed", "router-other", device="cpu", jobs=tuple(theirs), data={"seconds": [1.0] * 600})
    connection.many(
        [
            ("MULTI",),
            ("XADD", topology.EVENTS, "*", "e", event.encode(placed)),
            ("LPUSH", topology.LANE, lane.message(ours)),
            ("EXEC",),
        ]
    )
    until(lambda: waiting_anywhere(connection) == 1 and connection.call("LLEN", topology.LANE) == 0, "it is claimed")
    lane.push([lane.message(next_one)])
    until(lambda: waiting_anywhere(connection) == 2 and connection.call("LLEN", topology.LANE) == 0, "it is claimed")
    ended = Event("job.succeeded", "worker-other", "test.spin", "cpu", tuple(theirs))
    connection.call("XADD", topology.EVENTS, "*", "e", event.encode(ended))
    assert worker.serve(2) == [ours, next_one]
    assert connection.call("KEYS", topology.claim("*", WAKE)) == []


def test_a_device_beyond_its_limits_does_not_cost_jobs_for_the_others_their_short_way(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    worker, hot = add_worker("cpu"), add_worker("gpu")
    start_router()
    lane.wait_for_routers(1)
    hot.beat(share=0.0, reason="hot")
    lane.send()  # which is the first on its device: that is noted in another way
    lane.wait_for("job.placed", 1)
    connection.call("CONFIG", "RESETSTAT")
    (sent,) = lane.send()
    assert lane.wait_for("job.placed", 1) == [sent]
    assert b"cmdstat_fcall:" not in connection.call("INFO", "commandstats")
    (pinned,) = lane.send(device="gpu")
    assert lane.wait_for("job.parked", 1) == [pinned]
    assert connection.call("KEYS", topology.claim("*", WAKE)) == []
    assert len(worker.serve(2)) == 2


# -- back from a device -----------------------------------------------------------------------------------------


def give_back(worker: PlayedWorker, code: str = "device_out_of_memory") -> str:
    """The next job of a worker, which cannot run it and says so."""
    (message,) = worker.take_messages()
    (job,) = jobs_of(message)
    setback = Setback(worker.device, code, "it needs 90 GB")
    told = Event("job.released", worker.broker.incarnation, "test.spin", worker.device, (job,))
    step = Commit(
        0, 1, [Outcome(job, "retried", b"")], event.encode(told), retries=[(job, 0.0, wire.set_back(message, setback))]
    )
    worker.broker.commit(step)
    return job


def failed(connection: Connection, job: str) -> dict[str, Any]:
    """The error with which a job has ended, once it has."""
    until(lambda: connection.call("EXISTS", topology.result(job)), "it has a result")
    record = results.read(connection.call("GET", topology.result(job))).record
    assert record is not None
    assert record.error is not None
    return record.error


def test_a_job_that_its_device_cannot_run_goes_to_another_and_says_why(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    fast, slow = add_worker("gpu.test", speed=100 * SPEED), add_worker("cpu.test")
    start_router()
    (job,) = lane.send(ms=50)
    assert give_back(fast) == job
    assert slow.take() == [job]
    placement = lane.placement(job)
    assert placement is not None
    told = {each.device: each.excluded for each in placement.candidates}
    assert told == {
        "cpu.test": None,
        "gpu.test": "the job has been there, and it came back: device_out_of_memory",
    }
    slow.commit([job])
    assert sizes(connection)["difference"] == 0


def test_a_job_without_a_device_left_fails_with_the_last_error(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    fast, slow = add_worker("gpu.test", speed=100 * SPEED), add_worker("cpu.test")
    start_router()
    (job,) = lane.send(ms=50)
    give_back(fast)
    give_back(slow)
    error = failed(connection, job)
    assert error["code"] == "device_out_of_memory"
    assert "gpu.test, cpu.test" in error["message"]
    assert "it needs 90 GB" in error["message"]
    assert sizes(connection)["difference"] == 0


def test_a_pinned_job_that_its_device_cannot_run_fails(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    fast, _ = add_worker("gpu.test", speed=100 * SPEED), add_worker("cpu.test")
    start_router()
    (job,) = lane.send(ms=50, device="gpu")
    give_back(fast)
    assert failed(connection, job)["code"] == "device_out_of_memory"


def test_while_nobody_is_alive_where_it_has_been_it_waits_as_any_other(
    start_router, add_worker, lane: Lane, connection: Connection
) -> None:
    add_worker("tpu.test", kernels=(OTHER,))
    start_router()
    setback = Setback("gpu.test", "device_out_of_memory", "full")
    (job,) = lane.send(setbacks=(setback,))
    assert lane.wait_for("job.parked", 1) == [job]
    worker = add_worker("cpu.test")
    assert worker.take() == [job]


def test_a_device_whose_kernel_is_quarantined_is_passed_over_and_says_so(start_router, add_worker, lane: Lane) -> None:
    fast, slow = add_worker("gpu.test", speed=100 * SPEED), add_worker("cpu.test")
    start_router()
    (before,) = lane.send(ms=50)
    assert fast.take() == [before]
    fast.commit([before])
    fast.quarantine({"test.spin": "it differs by 1"})
    until(lambda: lane.send(ms=50) and slow.depth > 0, "jobs go to the other", 10)
    (job,) = lane.send(ms=50)
    until(lambda: lane.placement(job) is not None, "it is placed")
    placement = lane.placement(job)
    assert placement is not None
    told = {each.device: each.excluded for each in placement.candidates}
    assert told["gpu.test"] == "its test.spin is quarantined: it differs by 1"


def test_a_job_whose_kernel_is_quarantined_everywhere_waits_and_says_so(start_router, add_worker, lane: Lane) -> None:
    worker = add_worker("gpu.test", online=False)
    worker.quarantine({"test.spin": "it differs by 1"})
    start_router()
    (job,) = lane.send()
    assert lane.wait_for("job.parked", 1) == [job]
    placement = lane.placement(job)
    assert placement is not None
    assert "gpu.test: its test.spin is quarantined: it differs by 1" in placement.reason
    worker.come_online()
    assert worker.take() == [job]


@pytest.mark.parametrize("pin", [None, "gpu"])
def test_a_job_that_was_queued_where_its_kernel_is_quarantined_waits_until_that_is_lifted(
    start_router, add_worker, lane: Lane, connection: Connection, pin: str | None
) -> None:
    worker = add_worker("gpu.test")
    start_router()
    (job,) = lane.send(device=pin)
    (message,) = worker.take_messages()
    worker.retry(job, message, 0.0)  # before the router knows
    (message,) = worker.take_messages()
    worker.quarantine({"test.spin": "it differs by 1"})
    worker.retry(job, message, 0.1)
    assert lane.wait_for("job.parked", 1) == [job]
    placement = lane.placement(job)
    assert placement is not None
    assert "gpu.test: its test.spin is quarantined: it differs by 1" in placement.reason
    assert connection.call("EXISTS", topology.result(job)) == 0
    worker.come_online()
    assert worker.take() == [job]
    worker.commit([job])
    assert sizes(connection)["difference"] == 0
