from __future__ import annotations

import json
import select
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import pytest

from lepton_ai import topology
from lepton_ai.event import Event, decode
from lepton_ai.settings import Settings
from queues.celery_events import task_event
from queues.connection import Connection
from tasks.teller import Teller

TOPIC = "/0.celeryev/task.multi"


@pytest.fixture
def teller(broker_url: str, settings: Settings) -> Iterator[Teller]:
    teller = Teller(settings, broker_url, "worker-1", "cpu@host")
    yield teller
    teller.close()


@pytest.fixture
def listener(broker_url: str) -> Iterator[Connection]:
    listener = Connection(broker_url, "listener")
    listener.send([("SUBSCRIBE", TOPIC)])  # answered by a push, which comes first
    yield listener
    listener.close()


def heard(listener: Connection, count: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    while len(events) < count:
        select.select([listener], [], [], 5.0)
        for push in listener.drain_pushes():
            if push[0] == b"message":
                events += json.loads(b64decode(json.loads(push[2])["body"]))
    return events


def test_celerys_listeners_are_told_in_order(teller: Teller, listener: Connection) -> None:
    for number in range(50):
        teller.tell([task_event("received", f"{number}", 1.0), task_event("started", f"{number}", 2.0)])
    events = heard(listener, 100)
    assert [event["uuid"] for event in events] == [f"{at // 2}" for at in range(100)]
    assert [event["clock"] for event in events] == sorted({event["clock"] for event in events})
    assert {event["hostname"] for event in events} == {"cpu@host"}


def test_our_own_events_go_to_the_stream(teller: Teller, connection: Connection) -> None:
    told = Event("job.progressed", "worker-1", "a.b", "cpu", ("one",), data={"fraction": 0.5})
    teller.tell([told, task_event("started", "one", 1.0)])
    ((_, fields),) = connection.call("XREAD", "BLOCK", 5000, "STREAMS", topology.EVENTS, "0")[topology.EVENTS.encode()]
    assert decode(fields[1]) == (told,)


def test_what_still_waits_is_told_at_the_end(broker_url: str, settings: Settings, connection: Connection) -> None:
    teller = Teller(settings, broker_url, "worker-1", "cpu@host")
    teller.tell([Event("job.progressed", "worker-1", jobs=("one",))] * 100)
    teller.close()
    assert connection.call("XLEN", topology.EVENTS) == 100


def test_a_broken_connection_is_made_again(
    teller: Teller, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.teller._RETRY_S", 0.01)
    teller.tell([Event("job.progressed", "worker-1", jobs=("one",))])
    connection.call("XREAD", "BLOCK", 5000, "STREAMS", topology.EVENTS, "0")
    connection.call("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")
    found = None
    while not found:
        teller.tell([Event("job.progressed", "worker-1", jobs=("two",))])
        found = connection.call("XREAD", "BLOCK", 20, "STREAMS", topology.EVENTS, "$")


def test_a_broker_that_is_away_holds_nobody_up(settings: Settings) -> None:
    teller = Teller(settings, "redis://127.0.0.1:1/0", "worker-1", "cpu@host")
    for _ in range(10):
        teller.tell([task_event("started", "one", 1.0)] * 10_000)
    teller.close()
    assert len(teller._waiting) <= 20_000
