"""Real Celery workers as processes: how they refuse to start, how they end, and what is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lepton_ai import Client, services, topology
from lepton_ai.handle import JobHandle
from lepton_ai.settings import Settings
from pipeline.router import Router
from queues.connection import Connection
from queues.embedded import EmbeddedBroker
from queues.event_stream import EventStream
from queues.server import address
from tasks.loss import EXIT_CODE

QUEUE = "lepton.cpu.test"
HASTY = {"LEPTON_LEASE_S": "1", "LEPTON_HEARTBEAT_S": "0.25"}
#: A user's kernel, which says that it runs and in which process, and ends once the test lets it.
GATED = """
import os, time
from pathlib import Path
from lepton_ai.kernel import Kernel

gated = Kernel("test.gated", inputs={"n": "int64"}, outputs={"y": "int64[k]"}, flops="n", bytes="n")
gated.reference(lambda n: {"y": __import__("numpy").array([n])})
gated.samples(lambda: [{"n": 0}])

@gated.on("cpu")
def build(device):
    import numpy as np
    place = Path(os.environ["TEST_GATE"])
    def run(inputs, context):
        if inputs["n"]:
            (place / f"started-{os.getpid()}-{time.monotonic_ns()}").touch()
            while not (place / "go").exists():
                time.sleep(0.005)
        return {"y": np.array([inputs["n"]])}
    return run
"""


class Processes:
    """Starts workers on one broker, and kills what is left of them."""

    def __init__(self, url: str, place: Path) -> None:
        self.place = place
        self._running: list[subprocess.Popen[bytes]] = []
        (place / "gated_kernels.py").write_text(GATED)
        own = {
            "LEPTON_REDIS_URL": url,
            "LEPTON_KERNELS": "gated_kernels",
            "TEST_GATE": str(place),
            "PYTHONPATH": os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]),
        }
        self._environ = services.environ(os.environ | own)

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "celery", "-A", "tasks.worker", "worker", "--without-gossip"]
        log = (self.place / f"log-{len(self._running)}").open("wb")
        with log:
            process = subprocess.Popen(
                [*command, "--without-mingle", "--loglevel", "WARNING", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ | environ,
                start_new_session=True,
            )
        self._running.append(process)
        return process

    def log(self, process: subprocess.Popen[bytes]) -> str:
        return (self.place / f"log-{self._running.index(process)}").read_text()

    def started(self) -> list[int]:
        """The processes in which the gated kernel has begun a job, in their order."""
        found = sorted((path.name.split("-") for path in self.place.glob("started-*")), key=lambda name: int(name[2]))
        return [int(pid) for _, pid, _ in found]

    def end(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def processes(broker_url: str, tmp_path: Path) -> Iterator[Processes]:
    found = Processes(broker_url, tmp_path)
    yield found
    found.end()


@pytest.fixture
def start_worker(processes: Processes, connection: Connection) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts a worker of one slot and returns once it is online."""

    def start(**environ: str) -> subprocess.Popen[bytes]:
        stream = EventStream(connection)
        process = processes.start("-Q", QUEUE, "-P", "threads", "-c", "1", "-n", "one@%h", **environ)
        await_online(processes, [process], stream)
        return process

    return start


def await_online(processes: Processes, waited: list[subprocess.Popen[bytes]], stream: EventStream) -> None:
    online = 0
    while online < len(waited):
        for process in waited:
            assert process.poll() is None, processes.log(process)
        online += sum(each.type == "device.online" for _, each in stream.read(1000))


@pytest.fixture
def client(broker_url: str) -> Iterator[Client]:
    with Client(broker_url) as client:
        yield client


@pytest.fixture
def router(broker_url: str) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=Router(Settings(lease_s=1, heartbeat_s=0.25), broker_url).run, args=[stop])
    thread.start()
    yield
    stop.set()
    thread.join()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"in {timeout_s} s it did not happen that {what}"
        time.sleep(0.01)


def keys(connection: Connection) -> list[bytes]:
    return sorted(connection.call("KEYS", "lepton*"))


# -- a command line that cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-Q", QUEUE, "-P", "prefork", "-c", "1"], "-P threads, not prefork"),
        (["-Q", f"{QUEUE},lepton.gpu", "-P", "threads"], "one device queue"),
        (["-Q", "celery", "-P", "threads"], "one device queue"),
        (["-P", "threads"], "one device queue"),
        (["-Q", QUEUE, "-P", "threads", "--autoscale", "4,1"], "--autoscale"),
        (["-Q", "lepton.abacus", "-P", "threads"], "abacus"),
        (["-Q", QUEUE, "-P", "threads", "-c", "64"], "1 to 63 slots, not 64"),
    ],
    ids=["prefork", "two queues", "a foreign queue", "the lane", "autoscale", "an unknown kind", "too many slots"],
)
def test_a_worker_that_cannot_be_ends_soon_with_the_reason_and_leaves_nothing(
    processes: Processes, connection: Connection, arguments: list[str], reason: str
) -> None:
    process = processes.start(*arguments)
    assert process.wait(10) != 0
    assert reason in processes.log(process)
    assert keys(connection) == []


def test_without_a_broker_named_a_worker_says_which_setting_is_missing(processes: Processes) -> None:
    process = processes.start("-Q", QUEUE, "-P", "threads", LEPTON_REDIS_URL="")
    assert process.wait(10) != 0
    assert "LEPTON_REDIS_URL" in processes.log(process)


# -- how a worker ends ------------------------------------------------------------------------------------------


def submit(client: Client, connection: Connection, processes: Processes) -> JobHandle:
    """A job that runs by the time this returns."""
    before = len(processes.started())
    job = client.submit("test.gated", {"n": 7})
    connection.call("LMOVE", topology.LANE, QUEUE, "RIGHT", "LEFT")  # as a router would
    until(lambda: len(processes.started()) > before, "the kernel runs")
    return job


def go(processes: Processes) -> None:
    (processes.place / "go").touch()


def test_sigterm_lets_the_running_job_end_and_commits_it(
    processes: Processes, start_worker: Any, client: Client, connection: Connection
) -> None:
    process = start_worker()
    job = submit(client, connection, processes)
    waiting = client.submit("test.gated", {"n": 8})
    connection.call("LMOVE", topology.LANE, QUEUE, "RIGHT", "LEFT")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    go(processes)
    assert job.result(timeout=5)["y"] == [7]
    assert process.wait(10) == 0, processes.log(process)
    assert waiting.state == "waiting"
    assert connection.call("LLEN", QUEUE) == 1
    assert connection.call("KEYS", "lepton:held:*") == connection.call("KEYS", "lepton:lease:*") == []


def test_sigquit_gives_the_running_job_back_at_once(
    processes: Processes, start_worker: Any, client: Client, connection: Connection
) -> None:
    process = start_worker()
    submit(client, connection, processes)
    process.send_signal(signal.SIGQUIT)
    until(lambda: connection.call("LLEN", topology.AGAIN) == 1, "the batch is given back")
    assert connection.call("KEYS", "lepton:lease:*") == []
    process.wait(10)
    assert connection.call("HGETALL", topology.COUNTERS) == {}


def test_the_job_of_a_killed_worker_runs_on_another_and_succeeds_once(
    processes: Processes, router: None, client: Client, connection: Connection
) -> None:
    stream = EventStream(connection)
    arguments = ("-Q", QUEUE, "-P", "threads", "-c", "1", "-n")
    both = [processes.start(*arguments, f"{name}@%h", **HASTY) for name in ("one", "two")]
    await_online(processes, both, stream)
    job = client.submit("test.gated", {"n": 7})
    until(processes.started, "the kernel runs")
    (first,) = processes.started()
    os.kill(first, signal.SIGKILL)
    until(lambda: len(processes.started()) == 2, "the job runs again", 5)
    assert processes.started()[1] != first
    go(processes)
    assert job.result(timeout=5)["y"] == [7]
    counted = {name.decode(): int(count) for name, count in connection.call("HGETALL", topology.COUNTERS).items()}
    assert counted["succeeded"] == 1
    assert "duplicate" not in counted


def test_a_frozen_worker_that_thaws_commits_nothing_of_what_another_has_done(
    processes: Processes, start_worker: Any, router: None, client: Client, connection: Connection
) -> None:
    process = start_worker(**HASTY)
    job = client.submit("test.gated", {"n": 7})
    until(processes.started, "the kernel runs")
    process.send_signal(signal.SIGSTOP)
    until(lambda: not connection.call("KEYS", "lepton:lease:worker-*"), "its lease lapses")
    until(lambda: not connection.call("KEYS", "lepton:held:*"), "its batch is taken back")
    go(processes)
    process.send_signal(signal.SIGCONT)
    assert job.result(timeout=10)["y"] == [7]  # it is online again by now, and the job came back to it
    counted = {name.decode(): int(count) for name, count in connection.call("HGETALL", topology.COUNTERS).items()}
    assert counted["succeeded"] == 1
    assert len(processes.started()) == 2


def test_a_users_kernel_is_announced_beside_ours(start_worker: Any, client: Client) -> None:
    start_worker()
    (device,) = client.devices()
    names = {spec.name for spec in device.kernels}
    assert {"test.gated", "linalg.matmul"} <= names
    assert msgspec.to_builtins(device)["device"] == "cpu.test"


def test_a_worker_serves_only_the_kernels_that_it_is_allowed(start_worker: Any, client: Client) -> None:
    start_worker(LEPTON_KERNELS_ALLOWED="linalg.*,test.*,!test.gated")
    (device,) = client.devices()
    assert [spec.name for spec in device.kernels] == ["linalg.matmul"]


def test_a_worker_that_is_allowed_no_kernel_at_all_says_so(processes: Processes) -> None:
    process = processes.start("-Q", QUEUE, "-P", "threads", LEPTON_KERNELS_ALLOWED="linalgebra.*")
    assert process.wait(10) != 0
    assert "allows none of the kernels: 'linalgebra.*'" in processes.log(process)


# -- what differs, and what is lost ---------------------------------------------------------------------------------

#: Its variant is right for its samples alone, and loses the device where it is asked to.
ODD = """
import numpy as np
from lepton_ai.errors import DeviceLost
from lepton_ai.kernel import Kernel

odd = Kernel("test.odd", inputs={"x": "float64[n]"}, outputs={"y": "float64[n]"}, flops="n", bytes="8*n")
odd.reference(lambda x: {"y": 2 * x})
odd.samples(lambda: [{"x": np.zeros(1)}])

@odd.on("cpu")
def build(device):
    def run(inputs, context):
        if inputs["x"][0] < 0:
            raise DeviceLost("it does not answer any more")
        return {"y": 3 * inputs["x"]}
    return run
"""


def odd(processes: Processes) -> dict[str, str]:
    (processes.place / "odd_kernels.py").write_text(ODD)
    return {"LEPTON_KERNELS": "gated_kernels,odd_kernels"}


@pytest.mark.usefixtures("router")
def test_a_kernel_that_differs_from_its_reference_is_quarantined_until_that_is_lifted(
    start_worker: Any, processes: Processes, client: Client, connection: Connection
) -> None:
    start_worker(**odd(processes), LEPTON_PARITY_SHARE="1", **HASTY)
    assert client.submit("test.odd", {"x": [1.0]}).result(timeout=10)["y"] == [3.0]
    sent = []
    until(lambda: sent.append(client.submit("test.odd", {"x": [1.0]})) or client.quarantined(), "differences are seen")
    (entry,) = client.quarantined()
    assert (entry.kernel, entry.device, entry.difference) == ("test.odd", "cpu.test", pytest.approx(0.5))
    until(lambda: "test.odd" not in client.kernels(), "the worker announces it no more")
    (worker,) = client.devices()
    assert worker.quarantined == {"test.odd": entry.reason}
    assert "linalg.matmul" in client.kernels()
    held_up = client.submit("test.odd", {"x": [2.0]})
    until(lambda: "quarantined" in str(held_up.why()), "the job says what it waits for")
    assert client.lift("test.odd", "cpu.test")
    assert held_up.result(timeout=10)["y"] == [6.0]
    assert all(each.result(timeout=10)["y"] == [3.0] for each in sent)  # also those that were queued there


@pytest.mark.usefixtures("router")
def test_a_worker_that_loses_its_device_gives_back_what_it_holds_and_ends_with_a_code_of_its_own(
    start_worker: Any, processes: Processes, client: Client, connection: Connection
) -> None:
    process = start_worker(**odd(processes), **HASTY)
    client.submit("test.odd", {"x": [-1.0]})
    assert process.wait(10) == EXIT_CODE
    until(lambda: not connection.call("KEYS", "lepton:held:*"), "nothing is held")
    assert connection.call("KEYS", "lepton:lease:worker-*") == []
    assert connection.call("HGETALL", topology.ATTEMPTS) == {}
    assert "device_lost" in processes.log(process)


# -- a broker that is not there yet -----------------------------------------------------------------------------------


@pytest.fixture
def early(processes: Processes, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A worker that waits for its broker."""
    url = address(tmp_path / "broker")
    process = processes.start("-Q", QUEUE, "-P", "threads", "-c", "1", LEPTON_REDIS_URL=url)
    until(lambda: "lease_not_given" in processes.log(process), "it waits", 30)
    return process


def test_a_worker_waits_for_a_broker_that_comes_later(
    early: subprocess.Popen[bytes], processes: Processes, tmp_path: Path
) -> None:
    with EmbeddedBroker(Settings(), tmp_path / "broker"):
        until(lambda: "worker_online" in processes.log(early), "it is online")


def test_a_worker_that_waits_for_its_broker_can_be_told_to_stop(
    early: subprocess.Popen[bytes], processes: Processes
) -> None:
    early.terminate()
    assert early.wait(10) == 0, processes.log(early)
