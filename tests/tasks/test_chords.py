"""Parts of chords on a real broker: who counts them, and that each is counted, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from lepton_ai import topology
from lepton_ai.errors import BrokerUnavailable
from lepton_ai.settings import Settings
from queues.broker import Broker
from queues.connection import Connection
from tasks import chords
from tasks.chords import ChordParts
from tests.tasks.workshop import until

Finish = Callable[[bytes], bool]


class Counter:
    """A `finish` that remembers; what it does with a part may be set."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.does: dict[bytes, list[bool | Exception]] = {}

    def __call__(self, part: bytes) -> bool:
        self.calls.append(part)
        answers = self.does.get(part)
        answer = answers.pop(0) if answers else True
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chords, "_LOOK_S", 0.1)
    monkeypatch.setattr(chords, "_AGAIN_S", 0.02)


@pytest.fixture
def make(broker_url: str) -> Iterator[Callable[[Finish], ChordParts]]:
    made: list[ChordParts] = []

    def connect(name: int | str) -> Broker:
        return Broker(Connection(broker_url, f"test-{name}"), "worker-test", Settings())

    def start(finish: Finish) -> ChordParts:
        made.append(ChordParts(connect, finish))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        each.close()


def leave(connection: Connection, *jobs: str) -> None:
    connection.call("HSET", topology.CHORD_PARTS, *[word for job in jobs for word in (job, f"part of {job}")])


def none_left(connection: Connection) -> None:
    until(lambda: connection.call("HLEN", topology.CHORD_PARTS) == 0, "parts are left")


def part(job: str) -> bytes:
    return f"part of {job}".encode()


def test_a_part_is_counted_by_who_committed_it_and_taken_away(connection: Connection, make, monkeypatch) -> None:
    monkeypatch.setattr(chords, "_LOOK_S", 60.0)
    counter = Counter()
    parts = make(counter)
    leave(connection, "one", "two", "another's")
    parts.committed(["one", "two"])
    until(lambda: connection.call("HKEYS", topology.CHORD_PARTS) == [b"another's"], "not counted")
    assert counter.calls == [part("one"), part("two")]


def test_parts_that_a_dead_worker_left_are_found(connection: Connection, make) -> None:
    leave(connection, "one", "two")
    counter = Counter()
    make(counter)
    none_left(connection)
    assert sorted(counter.calls) == [part("one"), part("two")]


def test_what_others_left_is_found_by_a_worker_that_is_never_idle(connection: Connection, make) -> None:
    counter = Counter()
    counter.does[part("stuck")] = [False] * 10_000
    parts = make(counter)
    leave(connection, "stuck", "left")
    parts.committed(["stuck"])
    until(lambda: part("left") in counter.calls, "not found")
    connection.call("DEL", topology.CHORD_PARTS)


def test_a_part_that_asks_for_it_is_called_again_and_the_others_do_not_wait(connection: Connection, make) -> None:
    counter = Counter()
    counter.does[part("a")] = [False, False]
    parts = make(counter)
    leave(connection, "a", "b")
    parts.committed(["a", "b"])
    none_left(connection)
    assert counter.calls == [part("a"), part("b"), part("a"), part("a")]


def test_a_part_that_fails_keeps_none_of_the_others(connection: Connection, make) -> None:
    counter = Counter()
    counter.does[part("a")] = [ValueError("a defect")] * 10_000
    parts = make(counter)
    leave(connection, "a", "b")
    parts.committed(["a", "b"])
    until(lambda: part("b") in counter.calls, "the other waits")
    until(lambda: counter.calls.count(part("a")) > 1, "it is not tried again")
    assert connection.call("HKEYS", topology.CHORD_PARTS) == [b"a"]


def test_while_the_broker_is_away_the_rest_waits_and_is_counted_then(connection: Connection, make) -> None:
    counter = Counter()
    counter.does[part("b")] = [BrokerUnavailable("away")]
    parts = make(counter)
    leave(connection, "a", "b", "c")
    parts.committed(["a", "b", "c"])
    none_left(connection)
    assert counter.calls == [part("a"), part("b"), part("b"), part("c")]


def test_a_connection_that_broke_is_made_again(connection: Connection, broker_url: str) -> None:
    counter = Counter()
    tries: list[str] = []

    def connect(name: int | str) -> Broker:
        tries.append(str(name))
        if len(tries) < 3:
            raise BrokerUnavailable("away")
        return Broker(Connection(broker_url, "test"), "worker-test", Settings())

    parts = ChordParts(connect, counter)
    parts.start()
    leave(connection, "one")
    parts.committed(["one"])
    none_left(connection)
    parts.close()
    assert counter.calls == [part("one")]


def test_what_is_known_is_counted_before_it_ends(connection: Connection, make, monkeypatch) -> None:
    monkeypatch.setattr(chords, "_LOOK_S", 60.0)
    counter = Counter()
    counter.does[part("one")] = [False, False]
    parts = make(counter)
    leave(connection, "one")
    parts.committed(["one"])
    parts.close()
    assert counter.calls == [part("one")] * 3
    assert connection.call("HLEN", topology.CHORD_PARTS) == 0


def test_it_ends_although_the_broker_is_away() -> None:
    def connect(_: int | str) -> Broker:
        raise BrokerUnavailable("away")

    parts = ChordParts(connect, Counter())
    parts.start()
    parts.committed(["one"])
    parts.close()
    assert not parts._thread.is_alive()
