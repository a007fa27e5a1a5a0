"""A broker without memory: it takes nothing new, and all that is there drains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from lepton_ai import results, topology
from lepton_ai.errors import Fenced
from lepton_ai.settings import Settings
from queues import functions
from queues.broker import WAKE, Broker, Kind, event_command
from queues.connection import Command, CommandError, Connection
from queues.steps import Commit, DeadLetter, Dispatch, Outcome

NOW = 0.001


@pytest.fixture
def fill(connection: Connection) -> Iterator[Callable[[], None]]:
    """Fills the broker: from then on nobody else's write finds room."""
    before = connection.call("CONFIG", "GET", "maxmemory")[b"maxmemory"]

    def fill() -> None:
        connection.call("CONFIG", "SET", "maxmemory", 1)
        with pytest.raises(CommandError, match="OOM"):
            connection.call("RPUSH", "more", "than there is room for")

    yield fill
    connection.call("CONFIG", "SET", "maxmemory", before)


def numbered(count: int) -> list[bytes]:
    return [b"m%d" % at for at in range(count)]


def oldest_first(connection: Connection, key: str) -> list[bytes]:
    found: list[bytes] = connection.call("LRANGE", key, 0, -1)
    return found[::-1]


def counters(connection: Connection) -> dict[str, int]:
    return {name.decode(): int(count) for name, count in connection.call("HGETALL", topology.COUNTERS).items()}


def claimed(connection: Connection, broker: Broker, count: int) -> tuple[str, list[bytes]]:
    connection.call("LPUSH", topology.LANE, *numbered(count))
    return topology.claim(broker.incarnation, 0), broker.claim(Kind.NEW, 0, 0, count)


def test_a_full_broker_refuses_to_accept_and_says_that_it_is_full(connection: Connection, broker: Broker, fill) -> None:
    fill()
    job = (topology.LANE, "job", "", "", "", "message")
    with pytest.raises(CommandError, match=r"^OOM"):
        connection.call(*functions.call("accept", (), (60, 100, 10, 0, 10, 0, topology.LANE, "", 1, *job)))
    assert connection.call("LLEN", topology.LANE) == 0


def test_what_waits_in_every_lane_is_claimed(connection: Connection, broker: Broker, fill) -> None:
    connection.call("SADD", topology.LANES, topology.lane("t"))
    lists = [*topology.lane_lists(), *topology.lane_lists(topology.lane("t"))]
    for name in lists:
        connection.call("LPUSH", name, f"{name}1", f"{name}2")
    broker.claim(Kind.NEW, 0, 0, 1)
    fill()
    found = broker.claim(Kind.NEW, 0, 1, 5)
    assert (len(found), broker.is_full) == (5, True)
    found += broker.claim(Kind.NEW, 0, 6, 100)
    held = oldest_first(connection, topology.claim(broker.incarnation, 0))
    assert held[1:] == found
    assert sorted(held) == sorted(f"{name}{at}".encode() for name in lists for at in (1, 2))


def test_what_a_wake_up_brought_before_is_claimed_first(connection: Connection, broker: Broker, fill) -> None:
    connection.call("LPUSH", topology.claim(broker.incarnation, WAKE), "woken")
    connection.call("LPUSH", topology.LANE, *numbered(2))
    fill()
    assert broker.claim(Kind.NEW, 0, 0, 2) == [b"woken", b"m0"]


@pytest.mark.parametrize(("kind", "source"), [(Kind.AGAIN, topology.AGAIN), (Kind.ALONE, topology.ALONE)])
def test_what_came_back_is_claimed(
    connection: Connection, broker: Broker, fill: Callable[[], None], kind: Kind, source: str
) -> None:
    connection.call("LPUSH", source, *numbered(5))
    fill()
    broker.claim(Kind.NEW, 0, 0, 100)
    assert broker.back[kind] == 5
    assert broker.claim(kind, 0, 0, 3) == numbered(5)[:3]
    assert broker.claim(kind, 0, 3, 3) == numbered(5)[3:]


def test_a_router_does_not_sleep_where_the_broker_refuses_to_wake_it(
    broker_url: str, connection: Connection, broker: Broker, fill: Callable[[], None]
) -> None:
    wake = Connection(broker_url, "wake")
    connection.call("LPUSH", topology.LANE, "m")
    fill()
    broker.ask_wake(wake)
    assert (broker.woke(wake).message, broker.is_full) == (None, True)
    assert broker.claim(Kind.NEW, 0, 0, 10) == [b"m"]
    wake.close()


def test_a_message_that_is_alone_goes_to_its_device(
    broker_url: str, connection: Connection, broker: Broker, fill: Callable[[], None]
) -> None:
    wake = Connection(broker_url, "wake")
    claim = topology.claim(broker.incarnation, WAKE)
    for message in (b"m0", b"m1"):  # the device is known from the first one on
        if not broker.is_waking:
            broker.ask_wake(wake)
        connection.call("LPUSH", topology.LANE, message)
        assert broker.woke(wake) == (message, True)
        if message == b"m1":
            fill()
        told = {"placements": {7: {"one": b"p1"}}, "counts": {"placed": 1}}
        broker.dispatch(Dispatch({claim: 1}, {claim: []}, queued={"cpu": [message]}, **told))
    assert connection.call("LRANGE", "lepton.cpu", 0, -1) == [b"m1", b"m0"]
    assert connection.call("HGET", topology.COUNTERS, "placed") == b"2"
    assert broker.woke(wake) == (None, False)
    assert broker.is_full
    wake.close()


@pytest.mark.parametrize("at_once", [8, 0])
def test_messages_are_dispatched_to_where_they_go(
    connection: Connection, broker: Broker, fill, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("queues.broker._FEW", at_once)
    claim, messages = claimed(connection, broker, 8)
    fill()
    broker.dispatch(
        Dispatch(
            {claim: 8},
            {claim: messages[7:]},
            queued={"cpu": messages[:2]},
            alone={"cpu": messages[2:3]},
            parked={"a.b": messages[3:4]},
            parked_alone={"c.d": messages[6:7]},
            deadlines={"a.b": 5.0},
            placements={7: {"one": b"p1"}},
            counts={"accepted": 7},
            event=b"event",
        )
    )
    assert broker.is_full == (at_once == 0)  # in one round trip it never finds out
    assert oldest_first(connection, "lepton.cpu") == messages[:2]
    assert oldest_first(connection, "lepton.cpu.alone") == messages[2:3]
    assert oldest_first(connection, topology.parked("a.b")) == messages[3:4]
    assert oldest_first(connection, claim) == messages[7:]
    assert oldest_first(connection, topology.parked_alone("c.d")) == messages[6:7]
    assert (broker.parked_kernels(), broker.overdue()) == ({"a.b", "c.d"}, ["a.b"])
    assert broker.known(["one"], [7])[0] == {"one": b"p1"}
    assert counters(connection) == {"accepted": 7}
    assert connection.call("XLEN", topology.EVENTS) == 1


def test_what_ends_in_a_router_ends_for_those_who_wait(connection: Connection, broker: Broker, fill) -> None:
    claim, messages = claimed(connection, broker, 3)
    record = results.encode(results.success("refused", {"y": 1}, None), "json")
    fill()
    broker.dispatch(
        Dispatch(
            {claim: 3},
            {},
            scheduled=[("later", 4e9, messages[0])],
            dead=[DeadLetter("gone", "a.b", "unreadable", "it is no message", 0, messages[1])],
            rejected=[Outcome("refused", "failed", record, "lepton:reply:me")],
            event=b"event",
        )
    )
    assert connection.call("HGETALL", topology.ETA_MESSAGES) == {b"later": messages[0]}
    assert connection.call("ZSCORE", topology.ETA, "later") == 4e12
    ((_, letter),) = connection.call("XRANGE", topology.DEAD, "-", "+")
    assert letter[-1] == messages[1]
    assert connection.call("GET", topology.result("refused")) == record
    assert oldest_first(connection, "lepton:reply:me") == [record]
    assert counters(connection) == {"dead": 1, "failed": 1}
    assert connection.call("EXISTS", claim) == 0


def test_a_claim_that_is_not_as_we_left_it_is_fenced(connection: Connection, broker: Broker, fill) -> None:
    claim, messages = claimed(connection, broker, 20)
    fill()
    send = broker.connection.send

    def adopted_in_between(commands: object) -> int:
        if commands[0] == ("MULTI",):
            connection.call("RPOP", claim)
        return send(commands)

    broker.connection.send = adopted_in_between
    with pytest.raises(Fenced, match="changed"):
        broker.dispatch(Dispatch({claim: 20}, {}, queued={"cpu": messages}, event=b"e"))
    assert connection.call("EXISTS", "lepton.cpu", topology.EVENTS) == 0


@pytest.mark.parametrize("alone", [False, True])
def test_a_slot_takes_what_waits(connection: Connection, broker: Broker, fill, alone: bool) -> None:
    connection.call("LPUSH", topology.alone_queue("cpu") if alone else "lepton.cpu", *numbered(5))
    fill()
    assert broker.take("cpu", 0, 3, 1, NOW, alone=alone) == numbered(3)
    assert broker.held(0) == numbered(3)
    assert broker.take("cpu", 1, 3, 1, NOW, alone=alone) == numbered(5)[3:]
    assert broker.take("cpu", 2, 3, 1, NOW, alone=alone) == []


def test_what_a_lost_reply_left_is_handed_out_again(connection: Connection, broker: Broker, fill) -> None:
    connection.call("LPUSH", "lepton.cpu", *numbered(5))
    fill()
    broker.take("cpu", 0, 3, 1, NOW)
    assert broker.take("cpu", 0, 3, 1, NOW) == numbered(3)


def test_a_batch_is_committed_with_all_that_it_sets_off(connection: Connection, broker: Broker, fill) -> None:
    connection.call("LPUSH", "lepton.cpu", *numbered(3))
    fill()
    broker.take("cpu", 0, 3, 1, NOW)
    records = [results.encode(results.success(job, {"y": 1}, None), "json") for job in ("one", "two")]
    step = Commit(
        0,
        3,
        [Outcome("one", "succeeded", records[0], "lepton:reply:me"), Outcome("two", "dead", records[1])],
        b"event",
        pushes=[("one", topology.LANE, b"follow-up")],
        retries=[("three", 60.0, b"m2")],
        dead=[DeadLetter("two", "a.b", "retries", "failed", 3, b"m1")],
    )
    assert broker.commit(step) == []
    assert connection.call("GET", topology.result("one")) == records[0]
    assert oldest_first(connection, "lepton:reply:me") == records[:1]
    assert oldest_first(connection, topology.LANE) == [b"follow-up"]
    assert connection.call("HKEYS", topology.ETA_MESSAGES) == [b"three"]
    assert connection.call("XLEN", topology.DEAD) == 1


def test_a_refused_commit_is_still_counted(connection: Connection, broker: Broker, fill) -> None:
    fill()
    broker.count_fenced()
    assert counters(connection) == {"fenced": 1}


def test_leases_are_taken_given_back_and_recovered(
    broker_url: str, connection: Connection, broker: Broker, settings: Settings, fill: Callable[[], None]
) -> None:
    fill()
    link = Connection(broker_url, "late")
    late = Broker(link, "late", settings)  # the functions are there already
    late.announce(b"who I am")
    assert late.renew()
    connection.call("CONFIG", "SET", "maxmemory", 0)
    connection.call("LPUSH", topology.held("late", 0), *numbered(2))
    connection.call("CONFIG", "SET", "maxmemory", 1)
    connection.call("DEL", topology.lease("late"))
    assert broker.recover().messages == 2
    assert oldest_first(connection, topology.ALONE) == numbered(2)
    assert broker.resign() == 0
    link.close()


def test_what_is_due_or_parked_comes_back(connection: Connection, broker: Broker, fill) -> None:
    claim, messages = claimed(connection, broker, 2)
    step = Dispatch({claim: 2}, {}, scheduled=[("early", 1.0, messages[0])], parked={"a.b": messages[1:]})
    broker.dispatch(step)
    fill()
    assert broker.due()[0] == 1
    assert broker.unpark("a.b") == 1
    assert oldest_first(connection, topology.AGAIN) == messages


def test_what_waits_for_a_device_that_is_gone_is_taken_back(connection: Connection, broker: Broker, fill) -> None:
    claim, messages = claimed(connection, broker, 4)
    broker.dispatch(Dispatch({claim: 4}, {}, queued={"cpu": messages[:3]}, alone={"cpu": messages[3:]}))
    fill()
    assert broker.take_back([]) == 4
    assert oldest_first(connection, topology.AGAIN) == messages[:3]
    assert oldest_first(connection, topology.ALONE) == messages[3:]


def test_a_broker_with_room_again_is_worked_with_as_always(connection: Connection, broker: Broker, fill) -> None:
    claim, messages = claimed(connection, broker, 2)
    fill()
    broker.dispatch(Dispatch({claim: 2}, {}, queued={"cpu": messages}))
    connection.call("CONFIG", "SET", "maxmemory", 0)
    connection.call("LPUSH", topology.LANE, "next")
    assert broker.claim(Kind.NEW, 0, 0, 10) == [b"next"]
    broker.dispatch(Dispatch({claim: 1}, {}, queued={"cpu": [b"next"]}))
    assert broker.take("cpu", 0, 10, 1, NOW) == [*messages, b"next"]


class Edge(Connection):
    """A connection to a broker that becomes full when part of what was sent is done."""

    def __init__(self, url: str, other: Connection, after: Command) -> None:
        self._other, self._after = other, after
        self._first: list[Any] = []
        super().__init__(url, "edge")

    def send(self, commands: Iterable[Command]) -> int:
        commands = list(commands)
        if self._after not in commands:
            return super().send(commands)
        at = commands.index(self._after) + 1
        self._first = super().receive(super().send(commands[:at]))
        self._other.call("CONFIG", "SET", "maxmemory", 1)
        return at + super().send(commands[at:])

    def receive(self, count: int, *timeout_s: float) -> list[Any]:
        first, self._first = self._first, []
        return first + super().receive(count - len(first), *timeout_s)


@pytest.mark.parametrize("count", [9_000, 20_000])
def test_a_full_broker_loses_nothing_of_a_step_with_more_messages_than_lua_can_hand_on_at_once(
    connection: Connection, broker: Broker, fill: Callable[[], None], count: int
) -> None:
    claim, messages = claimed(connection, broker, count)
    fill()
    job = "0198a000-0000-7000-8000-000000000000"
    notes = {f"{job}{at}": b"note" for at in range(count)}
    broker.dispatch(
        Dispatch({claim: count}, {claim: messages[1::2]}, queued={"cpu": messages[::2]}, placements={1: notes})
    )
    assert oldest_first(connection, claim) == messages[1::2]
    assert oldest_first(connection, "lepton.cpu") == messages[::2]
    assert connection.call("HLEN", topology.jobs(1)) == count


def test_a_command_that_lua_cannot_hand_on_is_refused_before_anything_is_done(connection: Connection) -> None:
    connection.call("LPUSH", "lepton:test", "kept")
    words = ["LPUSH", "lepton:test", *map(str, range(9000))]
    with pytest.raises(CommandError, match="TOOLONG a command of 9002 words"):
        connection.call(*functions.call("transact", (), (2, "DEL", "lepton:test", len(words), *words)))
    assert oldest_first(connection, "lepton:test") == [b"kept"]


EVENT = event_command(b"event", Settings().events_kept)


@pytest.mark.parametrize("after", [("MULTI",), ("DEL", "lepton:claim:edge:0"), EVENT], ids=["first", "second", "last"])
def test_a_broker_that_becomes_full_within_a_transaction_does_it_all_the_same(
    broker_url: str, connection: Connection, settings: Settings, fill: Callable[[], None], after: Command
) -> None:
    link = Edge(broker_url, connection, after)
    edge = Broker(link, "edge", settings)
    edge.announce(b"")
    claim, messages = claimed(connection, edge, 2)
    edge.dispatch(Dispatch({claim: 2}, {}, queued={"cpu": messages}, event=b"event"))
    assert oldest_first(connection, "lepton.cpu") == messages
    assert connection.call("EXISTS", claim) == 0
    assert connection.call("XLEN", topology.EVENTS) == 1
    link.close()


@pytest.mark.parametrize("moved", [False, True], ids=["before", "after"])
def test_a_broker_that_becomes_full_within_a_claim_gives_what_it_moved(
    broker_url: str, connection: Connection, settings: Settings, fill: Callable[[], None], moved: bool
) -> None:
    wake = topology.claim("edge", WAKE)
    step = ("LMOVE", wake, topology.claim("edge", 0), "RIGHT", "LEFT")
    link = Edge(broker_url, connection, step if moved else ("SADD", topology.HOLDERS, "edge"))
    edge = Broker(link, "edge", settings)
    edge.announce(b"")
    connection.call("LPUSH", wake, "woken")
    connection.call("LPUSH", topology.LANE, *numbered(3))
    assert edge.claim(Kind.NEW, 0, 0, 3) == [b"woken", b"m0", b"m1"]
    link.close()


def test_a_broker_that_becomes_full_within_a_take_gives_what_it_moved(
    broker_url: str, connection: Connection, settings: Settings, fill: Callable[[], None]
) -> None:
    link = Edge(broker_url, connection, ("LMOVE", "lepton.cpu", topology.held("edge", 0), "RIGHT", "LEFT"))
    edge = Broker(link, "edge", settings)
    edge.announce(b"")
    connection.call("LPUSH", "lepton.cpu", *numbered(9))
    assert edge.take("cpu", 0, 5, 1, NOW) == numbered(2)
    link.close()
