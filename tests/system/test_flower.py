"""Flower, the package as it is: every job is one row with its real states, and a revoke reaches it at every stage."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from celery import Celery

from lepton_ai import Client, services
from lepton_ai.errors import JobCancelled, LeptonError
from lepton_ai.settings import Settings
from pipeline.supervisor import Fleet, run_fleet
from queues.addresses import celery_addresses
from queues.connection import Connection

#: Where `gated_kernels` is.
KERNELS = Path(__file__).parents[1]
DEVICE = "cpu.gate"


def until(found: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return value


class Flower:
    def __init__(self, port: int) -> None:
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def rows(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.http.get("/api/tasks", params={"limit": 5000}).json()
        return found

    def state(self, job: str) -> str | None:
        row = self.rows().get(job)
        return None if row is None else row["state"]

    def revoke(self, job: str, *, terminate: bool = False) -> None:
        asked = {"terminate": "true"} if terminate else {}
        self.http.post(f"/api/task/revoke/{job}", params=asked).raise_for_status()


@contextmanager
def flower_on(broker_url: str, log: Path) -> Iterator[Flower]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = services.environ(os.environ | {"LEPTON_REDIS_URL": broker_url, "FLOWER_UNAUTHENTICATED_API": "1"})
    arguments = ["-m", "celery", "-A", "queues.monitor", "flower", "--address=127.0.0.1", f"--port={port}"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
    flower = Flower(port)
    try:

        def is_up() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return flower.http.get("/api/tasks").is_success
            except httpx.HTTPError:
                return False

        until(is_up, "Flower answers", 60)
        yield flower
    finally:
        flower.http.close()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def flower(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """Flower on the session's fleet, once the router has noticed that it listens."""
    with (
        flower_on(fleet.broker_url, tmp_path_factory.mktemp("flower") / "log") as flower,
        Client(fleet.broker_url) as client,
    ):

        def is_shown() -> bool:
            job = client.submit("monitor.anomaly", {"series": [1.0, 2.0, 3.0], "window": 2})
            job.result(timeout=20)
            return job.id in flower.rows()

        until(is_shown, "the router shows jobs to Flower")
        yield flower


def submit_two_hundred(fleet: Fleet) -> tuple[list[str], list[str]]:
    """Through the three doors, one in ten with arguments that do not fit; the ids of those that fit and that do not."""
    square = np.eye(8, dtype=np.float32)
    right: list[str] = []
    wrong: list[str] = []
    with Client(fleet.broker_url) as direct, Client(fleet.http_url) as remote:
        handles = direct.submit_many("linalg.matmul", [{"a": square, "b": square}] * 100)
        handles += remote.submit_many("vision.ndvi", [{"red": square, "nir": square}] * 60)
        failing = direct.submit_many("linalg.matmul", [{"a": square, "b": square[:3]}] * 20)
        broker, backend = celery_addresses(fleet.broker_url)
        with Celery("producer", broker=broker, backend=backend) as app:
            results = [
                app.send_task("linalg.matmul", kwargs={"a": [[1.0]], "b": [[2.0]]}, queue="lepton.ingest")
                for _ in range(20)
            ]
            for result in results:
                result.get(timeout=30)
        for handle in handles:
            handle.result(timeout=30)
        for handle in failing:
            with pytest.raises(LeptonError):
                handle.result(timeout=30)
        right += [handle.id for handle in handles] + [result.id for result in results]
        wrong += [handle.id for handle in failing]
    return right, wrong


def test_two_hundred_jobs_are_two_hundred_rows_with_their_real_states(fleet: Fleet, flower: Flower) -> None:
    before = set(flower.rows())
    right, wrong = submit_two_hundred(fleet)

    def ended() -> dict[str, dict[str, Any]] | None:
        rows = {job: row for job, row in flower.rows().items() if job not in before}
        return (
            rows if all(row["state"] in ("SUCCESS", "FAILURE") for row in rows.values()) and len(rows) >= 200 else None
        )

    rows = until(ended, "every row has ended")
    assert rows.keys() == {*right, *wrong}
    assert len(rows) == 200
    assert {rows[job]["state"] for job in right} == {"SUCCESS"}
    assert {rows[job]["state"] for job in wrong} == {"FAILURE"}
    assert {row["name"] for row in rows.values()} == {"linalg.matmul", "vision.ndvi"}
    assert {row["worker"].partition("@")[0] for row in rows.values()} <= {"cpu.big", "cpu.little"}
    for job in right:
        row = rows[job]
        assert row["sent"] - 0.1 <= row["received"] <= row["started"] <= row["succeeded"]
        assert row["runtime"] > 0
        assert row["routing_key"] in ("lepton.cpu.big", "lepton.cpu.little")
    for job in wrong:
        assert rows[job]["received"] <= rows[job]["failed"]
        assert "InvalidArguments" in rows[job]["exception"]


def test_the_broker_page_has_the_length_of_the_lane_and_of_every_device_queue(flower: Flower) -> None:
    wanted = {"lepton.ingest", "lepton.cpu.big", "lepton.cpu.little"}

    def lengths() -> dict[str, int]:
        # The page asks the workers for their queues in the background, when it is told to refresh.
        flower.http.get("/api/workers", params={"refresh": "true"})
        found = flower.http.get("/api/queues/length").json()["active_queues"]
        return {each["name"]: each["messages"] for each in found}

    until(lambda: wanted <= lengths().keys(), "every queue is listed")
    assert {lengths()[name] for name in wanted} == {0}
    assert all(name in flower.http.get("/broker").text for name in wanted)


def test_the_workers_page_tells_what_the_workers_are(flower: Flower) -> None:
    workers = until(lambda: flower.http.get("/api/workers", params={"refresh": "true"}).json(), "workers are listed")
    (big,) = [info for name, info in workers.items() if name.startswith("cpu.big@")]
    assert big["stats"]["lepton"]["device"] == "cpu.big"
    assert big["stats"]["lepton"]["slots"] == 2
    assert "linalg.matmul" in big["registered"]
    assert [queue["name"] for queue in big["active_queues"]] == ["lepton.cpu.big"]


def test_no_password_is_shown(fleet: Fleet, flower: Flower) -> None:
    found = re.search(r":([^:@]+)@", fleet.broker_url)
    assert found is not None
    workers = flower.http.get("/api/workers", params={"refresh": "true"}).text
    assert found[1] not in workers
    assert found[1] not in flower.http.get("/broker").text


# -- revoke ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Flower, Path]]:
    """A fleet of one slot whose kernel runs until it is let go, and Flower on it.

    Its slot takes a job at a time, and its device has one more, however short they are predicted to be: the third waits
    in the router.
    """
    place = tmp_path_factory.mktemp("gated")
    path = os.pathsep.join([str(KERNELS), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEPTON_BATCH_JOBS", "1")
        for name, value in (("LEPTON_KERNELS", "gated_kernels"), ("TEST_GATE", str(place)), ("PYTHONPATH", path)):
            patch.setenv(name, value)
        with run_fleet(settings, {DEVICE: 1}, print) as fleet, flower_on(fleet.broker_url, place / "log") as flower:
            with Client(fleet.broker_url) as client:

                def is_shown() -> bool:
                    job = client.submit("test.gated", {"n": 0})
                    job.result(timeout=20)
                    return job.id in flower.rows()

                until(is_shown, "the router shows jobs to Flower")
            yield fleet, flower, place


def test_a_job_can_be_revoked_while_it_runs_while_it_is_placed_and_while_it_waits(
    gated: tuple[Fleet, Flower, Path],
) -> None:
    fleet, flower, place = gated
    with Client(fleet.broker_url) as client:
        running, placed, waiting, kept = (client.submit("test.gated", {"n": number}) for number in (1, 2, 3, 4))
        until(lambda: flower.state(running.id) == "STARTED", "the first runs")
        until(lambda: placed.state == "placed", "the second is placed behind it")
        until(lambda: flower.state(waiting.id) == "PENDING", "the third waits in the window")
        assert waiting.state == "waiting"

        flower.revoke(waiting.id)
        with pytest.raises(JobCancelled):
            waiting.result(timeout=10)
        assert flower.state(running.id) == "STARTED", "the others are left alone"
        flower.revoke(placed.id)
        flower.revoke(running.id, terminate=True)
        with pytest.raises(JobCancelled):
            running.result(timeout=10)
        (place / "4").touch()  # the slot may have taken it together with the one before, and then commits both at once
        with pytest.raises(JobCancelled):
            placed.result(timeout=10)
        assert kept.result(timeout=20)["y"] == [4]
        until(lambda: flower.state(kept.id) == "SUCCESS", "the fourth has its row")
        rows = flower.rows()
    assert [rows[job.id]["state"] for job in (running, placed, waiting)] == ["REVOKED"] * 3
    assert [rows[job.id]["name"] for job in (running, placed, waiting)] == ["test.gated"] * 3
    assert not (place / "2").exists()


def test_a_parked_job_can_be_revoked(gated: tuple[Fleet, Flower, Path]) -> None:
    fleet, flower, _ = gated
    with Client(fleet.broker_url) as client:
        job = client.submit("test.gated", {"n": 5}, device="gpu")
        until(lambda: job.state == "parked", "it is parked")
        flower.revoke(job.id)
        with pytest.raises(JobCancelled):
            job.result(timeout=10)
        until(lambda: flower.state(job.id) == "REVOKED", "Flower knows")


def test_inspect_tells_the_truth(gated: tuple[Fleet, Flower, Path]) -> None:
    fleet, flower, place = gated
    broker, backend = celery_addresses(fleet.broker_url)
    with (
        Celery("watcher", broker=broker, backend=backend) as app,
        Client(fleet.broker_url) as client,
        closing(Connection(fleet.broker_url, "watcher")) as connection,
    ):

        def asked(method: str) -> dict[str, Any]:
            replies = app.control.inspect(timeout=2).__getattribute__(method)() or {}
            return {name.partition("@")[0]: reply for name, reply in replies.items()}

        assert asked("ping") == {DEVICE: {"ok": "pong"}, "router": {"ok": "pong"}}
        before = asked("stats")[DEVICE]["total"].get("test.gated", 0)
        jobs = [client.submit("test.gated", {"n": number}) for number in (6, 7, 8)]
        until(lambda: flower.state(jobs[0].id) == "STARTED", "the first runs")
        until(lambda: flower.state(jobs[2].id) == "PENDING", "the third is known")
        (active,) = asked("active")[DEVICE]
        assert (active["id"], active["name"]) == (jobs[0].id, "test.gated")
        assert abs(time.time() - active["time_start"]) < 30
        reserved = asked("reserved")
        taken = [each["id"] for each in reserved[DEVICE]]
        # The second is the slot's already, or still in the queue of its device.
        assert (taken, connection.call("LLEN", f"lepton.{DEVICE}")) in (([jobs[1].id], 0), ([], 1))
        assert [each["id"] for each in reserved["router"]] == [jobs[2].id]
        for number in (6, 7, 8):
            (place / str(number)).touch()
        for job in jobs:
            job.result(timeout=20)
        assert asked("stats")[DEVICE]["total"]["test.gated"] == before + 3
        assert asked("active")[DEVICE] == []
