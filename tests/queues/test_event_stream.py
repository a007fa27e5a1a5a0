from __future__ import annotations

import select
from collections.abc import Iterator

import pytest

from lepton_ai import event, topology
from lepton_ai.event import Event
from queues.broker import Broker, event_command
from queues.connection import Connection
from queues.event_stream import EventStream


@pytest.fixture
def link(broker_url: str) -> Iterator[Connection]:
    link = Connection(broker_url, "follower")
    yield link
    link.close()


def happened(name: str) -> Event:
    return Event(name, "source")


def emit(broker: Broker, *names: str) -> None:
    broker.emit(event.encode(*map(happened, names)))


def names(seen: list[tuple[str, Event]]) -> list[str]:
    return [each.type for _, each in seen]


def test_what_happened_before_is_not_told(broker: Broker, link: Connection) -> None:
    emit(broker, "before")
    stream = EventStream(link)
    emit(broker, "after")
    assert names(stream.read(5000)) == ["after"]


def test_the_first_event_ever_is_told(broker: Broker, link: Connection) -> None:
    stream = EventStream(link)
    emit(broker, "first")
    assert names(stream.read(5000)) == ["first"]


def test_events_are_told_once_and_in_order(broker: Broker, link: Connection) -> None:
    stream = EventStream(link)
    emit(broker, "one", "two")
    emit(broker, "three")
    assert names(stream.read(5000)) == ["one", "two", "three"]
    emit(broker, "four")
    assert names(stream.read(5000)) == ["four"]


def test_events_of_one_step_share_the_id_of_their_entry(
    broker: Broker, link: Connection, connection: Connection
) -> None:
    stream = EventStream(link)
    emit(broker, "one", "two")
    ((newest, _),) = connection.call("XREVRANGE", topology.EVENTS, "+", "-", "COUNT", 1)
    assert [entry for entry, _ in stream.read(5000)] == [newest.decode()] * 2
    assert stream.position == newest.decode()


def test_whoever_knows_where_it_stopped_goes_on_there(broker: Broker, link: Connection) -> None:
    first = EventStream(link)
    emit(broker, "seen")
    first.read(5000)
    emit(broker, "missed")
    assert names(EventStream(link, first.position).read(5000)) == ["missed"]


def test_more_than_one_reading_are_told_in_order(broker: Broker, link: Connection) -> None:
    stream = EventStream(link)
    expected = [f"e{at}" for at in range(1300)]
    broker.connection.many([event_command(event.encode(happened(name)), 20_000) for name in expected])
    found: list[str] = []
    while len(found) < len(expected):
        found += names(stream.read(5000))
    assert found == expected


def test_when_nothing_happens_nothing_is_told(link: Connection) -> None:
    assert EventStream(link).read(1) == []


def test_an_answer_makes_the_connection_readable(broker: Broker, link: Connection) -> None:
    stream = EventStream(link)
    stream.ask()
    assert select.select([link], [], [], 0)[0] == []
    emit(broker, "one")
    assert select.select([link], [], [], 5)[0] == [link]
    assert names(stream.answer()) == ["one"]


def test_asking_again_before_the_answer_asks_once(broker: Broker, link: Connection) -> None:
    stream = EventStream(link)
    stream.ask()
    stream.ask()
    emit(broker, "one")
    assert names(stream.answer()) == ["one"]
    assert link.call("PING") == b"PONG"


def test_what_has_come_is_caught_up_with_while_the_stream_is_waited_on_and_is_not_told_again(
    broker: Broker, link: Connection, connection: Connection
) -> None:
    stream = EventStream(link)
    stream.ask()
    assert stream.catch_up(connection) == []
    emit(broker, "first")
    emit(broker, "second", "third")
    assert names(stream.catch_up(connection)) == ["first", "second", "third"]
    assert stream.answer() == []  # the first woke it
    stream.ask()
    emit(broker, "fourth")
    assert names(stream.answer()) == ["fourth"]
    assert stream.catch_up(connection) == []


def test_what_came_after_the_catching_up_is_told_by_the_answer(
    broker: Broker, link: Connection, connection: Connection
) -> None:
    stream = EventStream(link)
    emit(broker, "first")
    stream.catch_up(connection)
    stream.ask()
    emit(broker, "second")
    assert names(stream.answer()) == ["second"]


def test_thousands_of_entries_are_caught_up_with_at_once(
    broker: Broker, link: Connection, connection: Connection
) -> None:
    stream = EventStream(link)
    connection.many([event_command(event.encode(happened(str(number))), 10_000) for number in range(1500)])
    assert names(stream.catch_up(connection)) == [str(number) for number in range(1500)]
