"""What Celery's remote control sees of a worker that serves a device, and what it can do to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from celery import Celery

from lepton_ai import Client, results, services, topology
from lepton_ai.handle import JobHandle
from lepton_ai.identity import new_id
from lepton_ai.settings import Settings
from queues.app import make_app
from queues.connection import Connection
from queues.embedded import EmbeddedBroker
from queues.event_stream import EventStream

QUEUE = "lepton.cpu.test"
#: Where `gated_kernels` is.
KERNELS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("consumer")


@pytest.fixture(scope="module")
def url(settings: Settings, place: Path) -> Iterator[str]:
    """A broker with one real worker on it, which all the tests of this file share."""
    with EmbeddedBroker(settings) as broker:
        own = {
            "LEPTON_REDIS_URL": broker.url,
            "LEPTON_KERNELS": "gated_kernels",
            "TEST_GATE": str(place),
            "PYTHONPATH": os.pathsep.join([str(KERNELS), os.environ.get("PYTHONPATH", "")]),
        }
        connection = Connection(broker.url, "consumer-test")
        stream = EventStream(connection)
        arguments = ["-Q", QUEUE, "-P", "threads", "-c", "1", "-n", "one@test", "--without-gossip", "--without-mingle"]
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "tasks.worker", "worker", "-l", "WARNING", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=services.environ(os.environ | own),
                start_new_session=True,
            )
        try:
            while not any(each.type == "device.online" for _, each in stream.read(1000)):
                assert process.poll() is None, (place / "log").read_text()
            with make_app(msgspec.structs.replace(settings, redis_url=broker.url)) as app:
                until(lambda: app.control.ping(timeout=0.2), "the worker answers")
            yield broker.url
        finally:
            process.kill()
            process.wait()
            connection.close()


@pytest.fixture
def app(url: str, settings: Settings) -> Iterator[Celery]:
    with make_app(msgspec.structs.replace(settings, redis_url=url)) as app:
        yield app


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    connection = Connection(url, "test")
    yield connection
    connection.close()


@pytest.fixture
def submit(url: str, connection: Connection) -> Iterator[Callable[[int], JobHandle]]:
    """Puts a job onto the device queue, as a router would."""
    with Client(url) as client:

        def submit(number: int) -> JobHandle:
            job = client.submit("test.gated", {"n": number})
            connection.call("LMOVE", topology.LANE, QUEUE, "RIGHT", "LEFT")
            return job

        yield submit


def until(condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"in {timeout_s} s it did not happen that {what}"
        time.sleep(0.01)
    return found


def ask(app: Celery, what: str) -> Any:
    """One worker's answer to `celery inspect`, as soon as it has come."""
    found = getattr(app.control.inspect(destination=["one@test"], timeout=5, limit=1), what)()
    assert found is not None, f"no answer to {what}"
    return found["one@test"]


def ended(place: Path, *numbers: int) -> None:
    for number in numbers:
        (place / str(number)).touch()


def test_the_worker_answers_a_ping(app: Celery) -> None:
    assert ask(app, "ping") == {"ok": "pong"}


def test_the_device_queue_stays_listed(app: Celery) -> None:
    assert [queue["name"] for queue in ask(app, "active_queues")] == [QUEUE]


def test_a_running_job_is_active_under_its_kernels_name_and_gone_when_it_has_ended(
    app: Celery, submit: Any, place: Path
) -> None:
    job = submit(11)
    (active,) = until(lambda: ask(app, "active"), "the job is active")
    assert (active["id"], active["name"]) == (job.id, "test.gated")
    assert active["delivery_info"]["routing_key"] == QUEUE
    assert abs(active["time_start"] - time.time()) < 30
    assert active["args"] == [] and active["kwargs"] == {}  # noqa: PT018 - what is nobody's business
    ended(place, 11)
    job.result(timeout=5)
    until(lambda: ask(app, "active") == [], "the job is no longer active")
    assert ask(app, "reserved") == []


def test_totals_count_each_kernels_jobs(app: Celery, submit: Any, place: Path) -> None:
    before = ask(app, "stats")["total"].get("test.gated", 0)
    ended(place, 21)
    for _ in range(5):
        submit(21).result(timeout=5)
    assert ask(app, "stats")["total"]["test.gated"] == before + 5


def test_cancel_consumer_pauses_and_add_consumer_resumes(
    app: Celery, submit: Any, connection: Connection, place: Path
) -> None:
    ended(place, 31)
    app.control.cancel_consumer(QUEUE, destination=["one@test"], reply=True, timeout=5, limit=1)
    # A slot that was waiting may still be given one job; after it, nothing is taken.
    submit(31)
    job = submit(31)
    assert ask(app, "active_queues") == []
    submit(31)
    time.sleep(1.2)  # longer than any slot waits for jobs: nothing tells of what does not happen
    assert connection.call("LLEN", QUEUE) >= 1
    app.control.add_consumer(QUEUE, destination=["one@test"], reply=True, timeout=5, limit=1)
    assert job.result(timeout=5)["y"] == [31]
    until(lambda: connection.call("LLEN", QUEUE) == 0, "everything is taken")


def test_a_paused_device_finishes_what_runs(app: Celery, submit: Any, place: Path) -> None:
    job = submit(41)
    until(lambda: ask(app, "active"), "the job is active")
    app.control.cancel_consumer(QUEUE, destination=["one@test"], reply=True, timeout=5, limit=1)
    ended(place, 41)
    assert job.result(timeout=5)["y"] == [41]
    app.control.add_consumer(QUEUE, destination=["one@test"], reply=True, timeout=5, limit=1)


def test_cancelling_a_foreign_queue_does_not_pause_the_device(app: Celery, submit: Any, place: Path) -> None:
    ended(place, 51)
    app.control.cancel_consumer("celery", destination=["one@test"], reply=True, timeout=5, limit=1)
    assert submit(51).result(timeout=5)["y"] == [51]


def test_a_job_that_is_revoked_before_it_runs_never_runs(
    app: Celery, submit: Any, place: Path, connection: Connection
) -> None:
    cancelled = int(connection.call("HGET", topology.COUNTERS, "cancelled") or 0)
    running = submit(61)
    until(lambda: ask(app, "active"), "the first job is active")
    revoked = submit(62)  # would run until the end of the test
    app.control.revoke(revoked.id, destination=["one@test"], reply=True, timeout=5, limit=1)
    ended(place, 61)
    running.result(timeout=5)
    until(lambda: revoked.state == "cancelled", "the job is cancelled")
    stored = results.read(connection.call("GET", topology.result(revoked.id)))
    assert stored.status == "REVOKED"
    assert int(connection.call("HGET", topology.COUNTERS, "cancelled")) == cancelled + 1
    assert connection.call("ZCARD", topology.CANCELLED) == 0


def test_a_running_job_is_told_that_it_is_revoked(app: Celery, submit: Any) -> None:
    job = submit(71)
    until(lambda: ask(app, "active"), "the job is active")
    app.control.revoke(job.id, terminate=True, destination=["one@test"], reply=True, timeout=5, limit=1)
    until(lambda: job.state == "cancelled", "the kernel has seen it and its job is cancelled")


def test_the_worker_does_not_pop_what_celery_would(app: Celery, connection: Connection, submit: Any) -> None:
    """Celery's own consumer takes a message off its list before it is recorded anywhere."""
    taken_by = [
        client
        for client in connection.call("CLIENT", "LIST").decode().splitlines()
        if "cmd=brpop" in client and QUEUE in client
    ]
    assert taken_by == []
    assert connection.call("EXISTS", "unacked") == 0


def test_revoking_an_unknown_job_harms_nobody(app: Celery, submit: Any, place: Path) -> None:
    ended(place, 81)
    app.control.revoke(new_id(), destination=["one@test"], reply=True, timeout=5, limit=1)
    assert submit(81).result(timeout=5)["y"] == [81]
