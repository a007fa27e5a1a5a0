from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from lepton_ai import topology
from lepton_ai.identity import new_id
from lepton_ai.job import Options
from lepton_ai.settings import Settings
from pipeline.node import RemoteControl
from pipeline.window import Window
from queues.addresses import celery_addresses
from queues.broker import Kind
from queues.connection import Connection
from queues.event_stream import EventStream

ROUTER = f"router@{socket.gethostname()}"


@pytest.fixture
def window() -> Window:
    return Window("router-1", 100, 1_000_000)


@pytest.fixture
def app(broker_url: str, window: Window, settings: Settings) -> Iterator[Celery]:
    """A Celery program on the same broker as a router whose window the test fills."""
    control = RemoteControl(broker_url, settings, window, "router-1")
    broker, backend = celery_addresses(broker_url)
    with Celery("watcher", broker=broker, backend=backend, set_as_current=False) as app:
        deadline = time.monotonic() + 10
        while not app.control.ping(timeout=0.2):
            assert time.monotonic() < deadline, "the router does not answer"
        yield app
    control.close()


def ask(app: Celery, method: str) -> Any:
    (reply,) = app.control.broadcast(method, reply=True, limit=1, timeout=5)
    return reply[ROUTER]


def test_a_router_answers_a_ping_and_says_what_it_is(app: Celery) -> None:
    assert ask(app, "ping") == {"ok": "pong"}
    assert ask(app, "stats")["lepton"] == {"router": "router-1", "window": 0}


def test_the_lane_is_the_queue_that_it_reads(app: Celery) -> None:
    assert [queue["name"] for queue in ask(app, "active_queues")] == [topology.LANE]


def test_what_waits_in_the_window_is_reserved(app: Celery, window: Window) -> None:
    claim, _ = window.open_claim(Kind.NEW)
    window.hold(claim, [b"message"])
    window.add(("one",), "a.b", Options(), b"message", claim)
    assert [(each["id"], each["name"]) for each in ask(app, "reserved")] == [("one", "a.b")]


def test_what_it_does_not_do_it_says(app: Celery) -> None:
    assert "error" in ask(app, "pool_grow")


@pytest.mark.parametrize("several", [False, True])
def test_a_revoke_leaves_a_mark_where_no_worker_lives(
    app: Celery, broker_url: str, connection: Connection, several: bool
) -> None:
    stream = EventStream(Connection(broker_url, "follower"))
    jobs = [new_id(), new_id()] if several else [new_id()]
    app.control.revoke(jobs if several else jobs[0], reply=True, timeout=5, limit=1)
    told = [each for _, each in stream.read(5000)]
    assert [(each.type, each.source, sorted(each.jobs)) for each in told] == [
        ("job.cancel_asked", "router-1", sorted(jobs))
    ]
    assert connection.call("ZCARD", topology.CANCELLED) == len(jobs)
    stream.connection.close()


def test_a_second_revoke_tells_nobody_again(app: Celery, connection: Connection) -> None:
    job = new_id()
    for _ in range(2):
        app.control.revoke(job, reply=True, timeout=5, limit=1)
    assert connection.call("XLEN", topology.EVENTS) == 1
