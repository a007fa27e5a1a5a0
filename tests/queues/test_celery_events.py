from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.events import EventReceiver
from celery.events.state import State
from hypothesis import given
from hypothesis import strategies as st

from queues.addresses import celery_addresses
from queues.celery_events import Audience, EventMessage, task_event, worker_event
from queues.connection import Connection


class Listener:
    """Celery's own receiver, in a thread, until as many events as were wanted have come."""

    def __init__(self, url: str) -> None:
        broker, _ = celery_addresses(url)
        self.app = Celery("listener", broker=broker, set_as_current=False)
        self.events: list[dict[str, Any]] = []
        self.came = threading.Condition()
        self.receiver: Any = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with self.app.connection_for_read() as connection:
            self.receiver = EventReceiver(connection, handlers={"*": self._take}, app=self.app)
            self.receiver.capture(limit=None, timeout=None, wakeup=False)

    def stop(self) -> None:
        self.receiver.should_stop = True
        self.thread.join(10)
        assert not self.thread.is_alive()

    def _take(self, event: dict[str, Any]) -> None:
        with self.came:
            self.events.append(event)
            self.came.notify_all()

    def wait(self, count: int) -> list[dict[str, Any]]:
        with self.came:
            assert self.came.wait_for(lambda: len(self.events) >= count, 20), self.events
            return self.events[:count]


@pytest.fixture
def listener(broker_url: str, connection: Connection) -> Iterator[Listener]:
    listener = Listener(broker_url)
    pause = threading.Event()
    while not connection.call(*EventMessage(broker_url, "nobody@host").tasks([])):
        pause.wait(0.01)
    yield listener
    listener.stop()


def test_celery_reads_what_we_tell_and_makes_one_task_of_it(
    listener: Listener, connection: Connection, broker_url: str
) -> None:
    router, worker = EventMessage(broker_url, "router@host"), EventMessage(broker_url, "cpu@host")
    heard = connection.call(
        *router.tasks([task_event("sent", "one", 1000.0, name="a.b", queue="lepton.ingest", args="", kwargs="{}")])
    )
    assert heard == 1
    connection.call(
        *worker.tasks(
            [
                task_event("received", "one", 1001.0, name="a.b"),
                task_event("started", "one", 1002.0),
                task_event("succeeded", "one", 1003.0, result="c=[1]", runtime=0.5),
            ]
        )
    )
    connection.call(*router.worker(worker_event("heartbeat", 1004.0, freq=1.0, active=2, processed=7)))
    state = State()
    for event in listener.wait(5):
        state.event(event)
    task = state.tasks["one"]
    assert (task.name, task.state, task.worker.hostname, task.client) == ("a.b", "SUCCESS", "cpu@host", "router@host")
    assert (task.sent, task.received, task.started, task.succeeded) == (1000.0, 1001.0, 1002.0, 1003.0)
    assert (task.runtime, task.result) == (0.5, "c=[1]")
    assert (state.workers["router@host"].active, state.workers["router@host"].processed) == (2, 7)


def test_a_database_has_events_of_its_own(listener: Listener, connection: Connection, broker_url: str) -> None:
    assert connection.call(*EventMessage(f"{broker_url}?db=3", "router@host").tasks([])) == 0
    assert connection.call(*EventMessage(broker_url, "router@host").tasks([])) == 1


def test_nobody_is_told_anything_until_somebody_listens() -> None:
    audience = Audience(rate_hz=100)
    assert audience.room(0.0, 5) == 0
    assert audience.should_ask(0.0)
    audience.heard_by(0, 0.0)
    assert not audience.should_ask(0.5), "asked just now"
    assert audience.should_ask(1.0)
    audience.heard_by(2, 1.0)
    assert audience.room(1.0, 5) == 5
    audience.heard_by(0, 1.5)
    assert audience.room(1.5, 5) == 0


def test_a_rate_of_nought_never_asks() -> None:
    assert not Audience(0).should_ask(100.0)


def test_there_is_room_for_all_of_so_many_or_for_as_many_as_there_ever_is() -> None:
    audience = Audience(rate_hz=100)
    audience.heard_by(1, 0.0)
    assert audience.room(0.0, 90) == 90
    assert (audience.has_room(0.0, 10), audience.has_room(0.0, 11)) == (True, False)
    assert (audience.has_room(0.5, 200), audience.has_room(1.0, 200)) == (False, True)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 300)), max_size=40))
def test_no_more_jobs_are_shown_than_the_rate_and_a_second_beforehand(steps: list[tuple[float, int]]) -> None:
    audience, now, shown = Audience(rate_hz=50), 1000.0, 0
    audience.heard_by(1, now)
    for pause, wanted in steps:
        now += pause
        room = audience.room(now, wanted)
        assert 0 <= room <= wanted
        shown += room
    assert shown <= 50 + 50 * (now - 1000.0) + 1
