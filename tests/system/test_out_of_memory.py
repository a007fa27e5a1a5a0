"""A whole Lepton whose broker is full, is killed, or is away: nobody exits, and all go on once it is back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import redis
from celery import Celery

from lepton_ai import Client, topology
from lepton_ai.errors import BrokerUnavailable
from lepton_ai.settings import Settings
from pipeline.supervisor import Fleet, run_fleet
from queues.app import celery_addresses
from queues.broker import announcements
from queues.connection import Connection

DEVICE = "cpu.full"
LEASE_S = 1.5
JOB: dict[str, Any] = {"a": [[1.0, 2.0], [3.0, 4.0]], "b": [[5.0, 6.0], [7.0, 8.0]]}
BODY = {"kernel": "linalg.matmul", "arguments": JOB}


@pytest.fixture(scope="module")
def fleet(settings: Settings) -> Iterator[Fleet]:
    """One of this file's own, with short leases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEPTON_LEASE_S", str(LEASE_S))
        patch.setenv("LEPTON_HEARTBEAT_S", "0.5")
        with run_fleet(settings, {DEVICE: 1}, print) as fleet:
            yield fleet


@pytest.fixture(autouse=True)
def _all_go_on_afterwards(fleet: Fleet) -> Iterator[None]:
    yield
    eventually(lambda: has_room(fleet.broker_url), "the broker is there")
    works(fleet)


def has_room(url: str) -> bool:
    with (
        contextlib.suppress(BrokerUnavailable),
        contextlib.closing(Connection(url, "room")) as connection,
    ):
        connection.many([("CONFIG", "SET", "maxmemory", 0), ("CONFIG", "REWRITE")])
        return True
    return False


def works(fleet: Fleet) -> None:
    """Everybody does what they are for: a job goes all the way, and both nodes answer to remote control."""
    deadline = time.monotonic() + 20
    eventually(lambda: computes(fleet), "a job is done", deadline)
    eventually(lambda: len(answers(fleet.broker_url)) == 2, "both nodes answer", deadline)
    fleet.check()


def computes(fleet: Fleet) -> bool:
    answer = httpx.post(f"{fleet.http_url}/v1/jobs", json=BODY, params={"wait_s": 10}, timeout=20)
    return answer.status_code == 200 and answer.json()["result"] == {"c": [[19.0, 22.0], [43.0, 50.0]]}


def answers(url: str) -> list[Any]:
    """Who answers a ping."""
    with Celery(broker=celery_addresses(url)[0], set_as_current=False) as app:
        try:
            return app.control.ping(timeout=0.5) or []
        except redis.RedisError:
            return []


def eventually(found: Callable[[], Any], what: str, deadline: float | None = None) -> Any:
    deadline = deadline or time.monotonic() + 20
    while not (answer := found()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return answer


def said(fleet: Fleet, name: str, event: str, before: int = 0) -> int:
    """How often a process has logged an event, less so many times."""
    return (fleet.logs / name).read_text("utf-8", "replace").count(event) - before


def pid_of_server(url: str) -> int:
    with contextlib.closing(Connection(url, "pid")) as connection:
        return int(connection.call("INFO", "server").decode().partition("process_id:")[2].split()[0])


def lease(fleet: Fleet) -> str:
    with contextlib.closing(Connection(fleet.broker_url, "lease")) as connection:
        (worker,) = announcements(connection)
    return topology.lease(worker.incarnation)


def ping_that_never_expires(url: str) -> tuple[bytes, bytes]:
    """A remote control message, as it is published; where to, and what."""
    with redis.Redis.from_url(url) as client, client.pubsub() as heard:
        heard.psubscribe("*celery.pidbox")
        answers(url)
        messages = iter(lambda: heard.get_message(timeout=5), None)
        message = next(each for each in messages if each["type"] == "pmessage")
    envelope = json.loads(message["data"])
    envelope["headers"]["expires"] = time.time() + 3600
    return message["channel"], json.dumps(envelope).encode()


def test_a_full_broker_ends_nobody_and_costs_no_lease(fleet: Fleet) -> None:
    where, ping = ping_that_never_expires(fleet.broker_url)
    held = lease(fleet)
    with contextlib.closing(Connection(fleet.broker_url, "full")) as connection:
        connection.call("CONFIG", "SET", "maxmemory", 1)
        for _ in range(3):
            connection.call("PUBLISH", where, ping)
        refused = httpx.post(f"{fleet.http_url}/v1/jobs", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "memory is full" in refused.json()["detail"]
        assert "LPUSH" not in refused.json()["detail"]
        with Client(fleet.broker_url) as client, pytest.raises(BrokerUnavailable, match="maxmemory"):
            client.submit("linalg.matmul", JOB)
        until = time.monotonic() + 2 * LEASE_S
        while time.monotonic() < until:
            assert connection.call("EXISTS", held) == 1
            time.sleep(0.05)
    fleet.check()


def test_a_broker_that_comes_back_full_ends_nobody(fleet: Fleet) -> None:
    worker = f"worker-{DEVICE}"
    before = said(fleet, worker, "celery_refused")
    server = pid_of_server(fleet.broker_url)
    with contextlib.closing(Connection(fleet.broker_url, "full")) as connection:
        connection.many([("CONFIG", "SET", "maxmemory", 1), ("CONFIG", "REWRITE")])
    os.kill(server, signal.SIGKILL)
    eventually(lambda: said(fleet, worker, "celery_refused", before) >= 3, "Celery is refused and tries again")
    fleet.check()


def test_a_broker_that_is_killed_again_and_again_ends_nobody(fleet: Fleet) -> None:
    for _ in range(3):
        server = pid_of_server(fleet.broker_url)
        os.kill(server, signal.SIGKILL)
        eventually(lambda server=server: alive_and_other_than(fleet.broker_url, server), "the server is back")
        fleet.check()


def alive_and_other_than(url: str, server: int) -> bool:
    with contextlib.suppress(BrokerUnavailable):
        return pid_of_server(url) != server
    return False


@pytest.mark.parametrize("away_s", [2 * LEASE_S, pytest.param(30.0, marks=pytest.mark.slow)])
def test_a_broker_that_is_away_ends_nobody(fleet: Fleet, away_s: float) -> None:
    guardian = int((Path(urlsplit(fleet.broker_url).path).parent / "broker.lock").read_text())
    os.kill(guardian, signal.SIGSTOP)  # or it would start another at once
    try:
        os.kill(pid_of_server(fleet.broker_url), signal.SIGKILL)
        until = time.monotonic() + away_s
        while time.monotonic() < until:
            fleet.check()
            time.sleep(0.1)
    finally:
        os.kill(guardian, signal.SIGCONT)
