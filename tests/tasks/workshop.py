"""A worker for tests: slots on a real broker, with a device and kernels that are made here and observed from inside."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_ai import results, topology, wire
from lepton_ai.bundle import bundled
from lepton_ai.device import DeviceState, Peaks
from lepton_ai.direct_protocol import writer
from lepton_ai.identity import minute_of, new_id, new_ids, run_of
from lepton_ai.job import Estimate, Meta, Options, Placement
from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Retry, Run
from lepton_ai.parcel import Blobs
from lepton_ai.settings import Settings
from lepton_ai.succession import FollowUps, Sequel
from lepton_ai.terms import Terms
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
    model = "tiny"
    stream = None

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def peaks(self) -> Peaks:
        return Peaks(1.0, 1.0, 1.0, 0.0, 0.0)

    def upload(self, array: np.ndarray) -> np.ndarray:
        return array

    def download(self, value: Any) -> np.ndarray:
        return np.asarray(value)

    def launch(self, run: Run, inputs: Inputs, context: Context) -> Outputs:
        return run(inputs, context)

    def synchronize(self) -> None: ...

    def state(self) -> DeviceState:
        return DeviceState()

    def close(self) -> None: ...


class NoCanvas:
    """A Canvas that lets nothing follow."""

    def after_success(self, sequel: Sequel, outputs: Any) -> FollowUps:
        return FollowUps()

    def after_failure(self, sequel: Sequel, failure: Meta) -> FollowUps:
        return FollowUps()

    def finish(self, part: bytes) -> bool:
        return True


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
        self.gates: dict[float, threading.Event] = {}
        """Gates of their own for inputs that must wait longer, or go first."""
        self.contexts: list[Context] = []
        self.between: Callable[[], object] = lambda: None
        """Called by `test.count` before it returns."""
        self.raising: list[BaseException] = []
        """What `test.tries` raises, one a launch, before it succeeds."""
        self.repertoire = Repertoire({}, {}, {})
        self._add("test.double", "concat", self._double)
        self._add("test.gated", None, self._gated)
        self._add("test.joined", "concat", self._gated)
        self._add_counter()
        self.policy()

    def _add_counter(self) -> None:
        """`test.count` adds what it is given to what it carries."""
        kernel = Kernel(
            "test.count",
            inputs={"x": "float64[n]", "total": "float64[1]", "seen": "float64[s]"},
            outputs={"y": "float64[1]", "total": "float64[1]", "seen": "float64[t]"},
            flops="n",
            bytes="8*n + 8*s",
            carries=("total", "seen"),
        )
        self.repertoire.kernels[kernel.name] = kernel
        self.repertoire.runs[kernel.name] = self._count

    def _count(self, inputs: Inputs, context: Context) -> Outputs:
        self.launches[len(inputs["x"])] += 1
        for value in inputs["x"]:
            if value in RAISES:
                raise RAISES[value]
        self.between()
        total = np.nan_to_num(inputs["total"]) + inputs["x"].sum()
        return {"y": total.copy(), "total": total, "seen": np.concatenate([inputs["seen"], inputs["x"]])}

    def policy(self, retry: Retry | None = None) -> None:
        """How `test.tries` is retried."""
        self._add("test.tries", None, self._tries, retry=retry)

    def limit(self, name: str, limit_s: float) -> None:
        """How long a kernel may run."""
        batch = self.repertoire.kernels[name].spec.batch
        self._add(name, batch, self.repertoire.runs[name], limit_s=limit_s)

    def _add(self, name: str, batch: Any, run: Callable[[Inputs, Context], Outputs], **spec: Any) -> None:
        kernel = Kernel(
            name, inputs={"x": "float64[n]"}, outputs={"y": "float64[n]"}, flops="2*n", bytes="8*n", batch=batch, **spec
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
        assert self.gates.get(float(inputs["x"][0]), self.gate).wait(20)
        return {"y": 2 * inputs["x"]}

    def _tries(self, inputs: Inputs, context: Context) -> Outputs:
        self.launches[len(inputs["x"])] += 1
        if self.raising:
            raise self.raising.pop(0)
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
        self.canvas = NoCanvas()
        self.slots = Slots(
            settings, url, self.incarnation, DEVICE, TinyDriver(slots), self.shop.repertoire, self.books, self.canvas
        )

    def send(self, *values: float, kernel: str = "test.double", **options: Any) -> list[str]:
        """One job a value, in one push, so that a slot which is idle takes them at once."""
        ids = new_ids(len(values))
        self.push(*(message(job_id, value, kernel, **options) for job_id, value in zip(ids, values, strict=True)))
        return ids

    def send_bundle(self, *values: Any, kernel: str = "test.double", **options: Any) -> list[str]:
        """As `send`, in one message."""
        jobs = run_of(new_id(), len(values))
        self.push(bundle_of(jobs, values, kernel, **options))
        return list(jobs)

    def suspect(self, *values: float, kernel: str = "test.gated", **options: Any) -> list[str]:
        """As `send`, of jobs whose worker died."""
        ids = new_ids(len(values))
        messages = [message(job_id, value, kernel, **options) for job_id, value in zip(ids, values, strict=True)]
        self.push(*messages, alone=True)
        return ids

    def enters(self, count: int = 1) -> None:
        """Returns once so many launches of a gated kernel have begun."""
        for _ in range(count):
            assert self.shop.entered.acquire(timeout=5), "no kernel runs"

    def held(self) -> dict[int, list[bytes]]:
        """What each slot holds on the broker, oldest first."""
        prefix = topology.held(self.incarnation, 0)[:-1]
        return {
            int(key.decode().removeprefix(prefix)): self.connection.call("LRANGE", key, 0, -1)[::-1]
            for key in self.connection.call("KEYS", f"{prefix}*")
        }

    def predict(self, run_s: float, *jobs: str, kernel: str = "test.gated", spread: float = 0.1) -> None:
        """Notes that a router placed these jobs, and how long it thought that each would run."""
        for job in jobs:
            estimate = Estimate(0.0, 0.0, run_s, spread)
            note = Placement(job, kernel, "placed", "it is free", time.time(), "router-1", DEVICE, estimate)
            self.connection.call("HSET", topology.jobs(minute_of(job) or 0), job, msgspec.msgpack.encode(note))

    def send_series(self, *values: float, kernel: str = "test.gated", run_s: float = 1e-4) -> list[str]:
        """As `send`, of jobs that were predicted to be so quick."""
        jobs = new_ids(len(values))
        self.predict(run_s, *jobs, kernel=kernel)
        self.push(*(message(job, value, kernel) for job, value in zip(jobs, values, strict=True)))
        return jobs

    def push(self, *messages: bytes, alone: bool = False) -> None:
        """Messages for the device, as a router places them; `alone` as suspects."""
        self.connection.call("LPUSH", topology.alone_queue(DEVICE) if alone else QUEUE, *messages)

    def warm_up(self) -> None:
        """A first job, after which a slot knows how long jobs take and takes more than one."""
        self.double(self.send(1.0)[0])

    def meta(self, job_id: str, timeout_s: float = 5.0) -> Meta:
        """The job's record, as soon as there is one."""
        deadline = time.monotonic() + timeout_s
        while (raw := self.connection.call("GET", topology.result(job_id))) is None:
            assert time.monotonic() < deadline, f"job {job_id} has no result after {timeout_s} s"
            self.stream.read(50)  # a commit emits an event
        return results.read(raw)

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


def bundle_of(jobs: Sequence[str], values: Sequence[Any], kernel: str = "test.double", **options: Any) -> bytes:
    """The message of these jobs."""
    write = writer(kernel, Terms(Options(**options)), None, Blobs(0))
    ((found, _),) = bundled([write(job, {"x": [value]}) for job, value in zip(jobs, values, strict=True)])  # type: ignore[misc]
    return found


def followed(job_id: str, embed: dict[str, Any], kernel: str = "test.double", **options: Any) -> bytes:
    """A job that something is to follow, as Celery writes it into the body."""
    found = json.loads(message(job_id, 1.0, kernel, **options))
    found["body"] = base64.b64encode(wire.pack(([], {"x": [1.0]}, embed))).decode()
    return json.dumps(found).encode()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 5.0) -> None:
    """For what no event tells of."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


MakeWorker = Callable[..., Worker]
