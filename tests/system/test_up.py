"""`lepton up`: what dies comes back and loses nothing, Ctrl-C drains, and nothing is left behind however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest

from lepton_ai import Client, JobHandle, topology
from lepton_ai.errors import ResultTimeout, Unavailable
from pipeline.supervisor import free_port
from queues.connection import CommandError, Connection

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills processes by Linux's rules")

MARK = "UP_TEST_MARK"
ROOT = Path(__file__).parents[2]
BACK_S = 5.0
#: A user's kernel, which takes as long as its argument says.
NAP = """
import time
import numpy as np
from lepton_ai import Kernel

kernel = Kernel("test.nap", inputs={"seconds": "float64"}, outputs={"slept": "float64[k]"}, flops="1", bytes="8")
kernel.reference(lambda seconds: {"slept": np.array([seconds])})
kernel.samples(lambda: [{"seconds": 0.0}])

@kernel.on("cpu")
def build(device):
    def run(inputs, context):
        time.sleep(inputs["seconds"])
        return {"slept": np.array([inputs["seconds"]])}
    return run
"""


class Up:
    """A `lepton up` of the test's own, which can tell its processes and its log from everybody else's."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mark = secrets.token_hex(8)
        self.entries: list[dict[str, Any]] = []
        self._grown = threading.Condition()
        self.http_url = f"http://127.0.0.1:{free_port()}"
        port = self.http_url.rpartition(":")[2]
        # It is started in somebody's folder: their kernels are found, and their `tasks` does not get in the way.
        project = folder / "project"
        project.mkdir(exist_ok=True)
        (project / "naps.py").write_text(NAP)
        for name in ("pipeline", "queues", "tasks"):
            (project / f"{name}.py").write_text("raise SystemExit('this is not the module that was meant')")
        own = {"TMPDIR": str(folder), MARK: self.mark, "LEPTON_KERNELS": "naps", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lepton_ai.cli", "up", "--log", "json", "--http-port", port, *arguments],
            cwd=project,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                entry = json.loads(line)  # every line is one, whoever wrote it
                with self._grown:
                    self.entries.append(entry)
                    self._grown.notify_all()
        with self._grown:
            self._grown.notify_all()

    def wait_for(self, event: str, timeout_s: float = 60, after: int = 0, **fields: Any) -> dict[str, Any]:
        """The first such entry of the log from position `after` on."""

        def found() -> dict[str, Any] | None:
            wanted = {"event": event, **fields}
            return next((each for each in self.entries[after:] if wanted.items() <= each.items()), None)

        with self._grown:
            if not self._grown.wait_for(lambda: found() or not self._reader.is_alive(), timeout_s) or not found():
                pytest.fail(f"no {event} {fields} in {timeout_s} s: {self.told(after)}")
            return found() or {}

    def told(self, after: int = 0) -> str:
        return "\n".join(json.dumps(each) for each in self.entries[after:][-60:])

    def pid(self, name: str) -> int:
        """Of the process that was started last under this name."""
        return next(
            each["pid"]
            for each in reversed(self.entries)
            if each["event"] == "process_started" and each["name"] == name
        )

    def end(self, *signals: int, timeout_s: float = 30) -> int:
        """Sends signals, a moment apart, and waits for the end."""
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.3)
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code

    def left(self) -> list[str]:
        """The command lines of what still runs of it."""
        running = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    running.append(" ".join(process.cmdline()))
        return running


@pytest.fixture
def folder() -> Iterator[Path]:
    # Short, because a socket's path has at most 107 characters.
    short = Path(f"/tmp/up-{secrets.token_hex(4)}")
    short.mkdir()
    yield short
    subprocess.run(["rm", "-r", str(short)], check=True)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*arguments: str) -> Up:
        started.append(Up(folder, *arguments))
        return started[-1]

    yield start
    for up in started:
        up.process.kill()
        up.end()
    for up in started:
        eventually(lambda up=up: not up.left())  # type: ignore[misc]


def broker_url(data: Path) -> str:
    return (data / "broker" / "broker.url").read_text().strip()


def eventually(check: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(Unavailable, CommandError, httpx.HTTPError):
            if found := check():
                return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)


class Feeder:
    """Submits small jobs without a pause, each with a result of its own, whatever happens to the broker."""

    def __init__(self, url: str) -> None:
        self.confirmed: list[tuple[JobHandle, float]] = []
        self.unconfirmed = 0
        """Submissions that failed: their jobs may or may not have been accepted."""
        self.client = Client(url)
        self.paused = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        one = np.ones((1, 1), np.float32)
        while not self._stopping.wait(0.01):
            number = float(len(self.confirmed))
            with self.paused:
                try:
                    handle = self.client.submit("linalg.matmul", {"a": one * number, "b": one})
                except Unavailable:
                    self.unconfirmed += 1
                    continue
            self.confirmed.append((handle, number))

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()


def result_of(handle: JobHandle) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        with contextlib.suppress(ResultTimeout):
            return handle.result(timeout=1)
        return None

    found: dict[str, Any] = eventually(look, 30)
    return found


def command(url: str, *words: str | int) -> Any:
    with contextlib.closing(Connection(url, "test")) as connection:
        return connection.call(*words)


def serves(url: str, device: str, since: float) -> bool:
    """Whether a worker that started later than `since` serves a device."""
    with Client(url) as client:
        return any(each.device == device and each.started_at > since for each in client.devices())


@pytest.mark.slow
def test_whatever_is_killed_is_back_within_seconds_and_every_job_has_one_result(
    folder: Path, start: Callable[..., Up]
) -> None:
    data, flower = folder / "data", free_port()
    up = start("--data", str(data), "--workers", "cpu:1,cpu.little:1", "--flower", "--flower-port", str(flower))
    up.wait_for("up_ready")
    url = broker_url(data)
    page = f"http://127.0.0.1:{flower}/broker"

    def lists_every_queue() -> bool:
        listed = set(re.findall(r"lepton\.[a-z.]+", httpx.get(page).text))
        return listed >= {"lepton.ingest", "lepton.cpu", "lepton.cpu.little"}

    eventually(lists_every_queue, 30)
    checks: dict[str, Callable[[int, float], Any]] = {
        "router": lambda after, _: up.wait_for("router_online", BACK_S, after),
        "telemetry": lambda after, _: up.wait_for("telemetry_online", BACK_S, after),
        "ingest": lambda *_: httpx.get(f"{up.http_url}/readyz").is_success,
        "flower": lambda *_: httpx.get(f"http://127.0.0.1:{flower}/healthcheck").is_success,
        "worker-cpu": lambda _, since: serves(url, "cpu", since),
        "worker-cpu.little": lambda _, since: serves(url, "cpu.little", since),
        "broker-server": lambda *_: command(url, "PING"),
        "broker": lambda *_: command(url, "PING"),
    }
    took_s: dict[str, float] = {}
    feeder = Feeder(url)
    try:
        for name, is_back in checks.items():
            time.sleep(0.3)
            with feeder.paused:
                # A broker that is killed loses nothing that has reached its log; with `everysec` that may take a second
                # where the disk is slow, and this test is not about it (README, "What it is not yet").
                command(url, "WAITAOF", 1, 0, 10_000)
                position, pid, since = len(up.entries), up.pid(name), time.time()
                os.kill(pid, signal.SIGKILL)
            assert up.wait_for("process_started", BACK_S, position, name=name)["pid"] != pid
            eventually(lambda is_back=is_back, at=(position, since): is_back(*at))  # type: ignore[misc]
            took_s[name] = round(time.time() - since, 2)
    finally:
        feeder.stop()
    eventually(lists_every_queue, 30)
    print(took_s, len(feeder.confirmed), "jobs,", feeder.unconfirmed, "not confirmed")

    for handle, number in feeder.confirmed:
        assert float(result_of(handle)["c"][0, 0]) == number
    feeder.client.close()
    # Counted where results are committed: each job once, however often it ran.
    succeeded = int(command(url, "HGET", topology.COUNTERS, "succeeded"))
    assert len(command(url, "KEYS", topology.result("*"))) == succeeded
    assert len(feeder.confirmed) <= succeeded <= len(feeder.confirmed) + feeder.unconfirmed
    # Within seconds; where not even the first start of a worker is that quick, it takes about as long again.
    first_s = max(each["seconds"] for each in up.entries if each["event"] == "device_ready")
    limits_s = {name: max(BACK_S, 1.5 * first_s) if name.startswith("worker") else BACK_S for name in took_s}
    assert all(took_s[name] < limits_s[name] for name in took_s), took_s

    assert up.end(signal.SIGINT) == 0, up.told()
    assert up.left() == []
    assert urlsplit(url).password not in json.dumps(up.entries)


def nap(client: Client, seconds: float) -> JobHandle:
    return client.submit("test.nap", {"seconds": seconds})


def test_jobs_that_wait_at_ctrl_c_are_run_after_the_next_start(folder: Path, start: Callable[..., Up]) -> None:
    arguments = ("--data", str(folder / "data"), "--workers", "cpu:1")
    up = start(*arguments)
    up.wait_for("up_ready")
    with Client(broker_url(folder / "data")) as client:
        jobs = client.submit_many("test.nap", [{"seconds": 0.5}] * 8)
        assert result_of(jobs[0])["slept"] == [0.5]
        assert up.end(signal.SIGINT) == 0, up.told()
        assert up.left() == []
        stopped = up.wait_for("up_stopped")
        assert 1 <= stopped["jobs_waiting"] <= 7
        assert stopped["kept_in"] == str(folder / "data")

        again = start(*arguments)
        assert [result_of(job)["slept"] for job in jobs] == [[0.5]] * 8
    # Not even when it is killed itself does it leave anybody behind.
    again.end(signal.SIGKILL)
    eventually(lambda: not again.left())


def test_a_second_ctrl_c_quits_at_once_and_leaves_a_broker_of_ones_own_alone(
    broker_url: str, start: Callable[..., Up]
) -> None:
    up = start("--broker", broker_url, "--workers", "cpu:1")
    up.wait_for("up_ready")
    with Client(broker_url) as client:
        job = nap(client, 30)
        eventually(lambda: command(broker_url, "KEYS", "lepton:held:*"))
        assert job.state != "succeeded"
    up.process.send_signal(signal.SIGINT)
    up.wait_for("process_ended", name="router")
    # It waits for what runs, and says so.
    assert up.wait_for("draining", jobs_in_hand={"worker-cpu": 1})
    began = time.monotonic()
    assert up.end(signal.SIGINT) == 130
    assert time.monotonic() - began < 5
    assert up.left() == []
    assert command(broker_url, "PING") == b"PONG"


def test_ctrl_c_while_it_starts_ends_it_at_once(folder: Path, start: Callable[..., Up]) -> None:
    up = start("--data", str(folder / "data"), "--workers", "cpu:1")
    up.wait_for("process_started", name="worker-cpu")
    began = time.monotonic()
    assert up.end(signal.SIGTERM) == 0
    assert time.monotonic() - began < 10
    assert up.left() == []
