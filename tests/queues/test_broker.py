"""The message path on a real broker: every step is all or nothing, fenced, and keeps the order."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError

from lepton_ai import results, topology
from lepton_ai.errors import Fenced, InvalidArguments, JobCancelled, JobExpired, LeptonError
from lepton_ai.job import Placement
from lepton_ai.settings import Settings
from queues import functions
from queues.app import celery_addresses
from queues.broker import CLAIM_LIMIT, LISTS_EACH, WAKE, Broker, Kind
from queues.connection import CommandError, Connection
from queues.recovery import Recovered
from queues.steps import Commit, DeadLetter, Dispatch, Outcome

TTL_S = round(Settings().result_ttl_s)


@pytest.fixture
def another(broker_url: str, settings: Settings) -> Iterator[Callable[[str], Broker]]:
    """Another incarnation, with a lease and a connection of its own."""
    opened: list[Connection] = []

    def open_broker(incarnation: str) -> Broker:
        connection = Connection(broker_url, incarnation)
        opened.append(connection)
        found = Broker(connection, incarnation, settings)
        found.announce(b"")
        return found

    yield open_broker
    for connection in opened:
        connection.close()


def push(connection: Connection, key: str, *messages: bytes) -> None:
    if messages:
        connection.call("LPUSH", key, *messages)


def oldest_first(connection: Connection, key: str) -> list[bytes]:
    found: list[bytes] = connection.call("LRANGE", key, 0, -1)
    return found[::-1]


def numbered(count: int) -> list[bytes]:
    return [b"m%d" % at for at in range(count)]


def lapse(connection: Connection, broker: Broker) -> None:
    """What time does to the lease of a process that was killed or frozen."""
    assert connection.call("DEL", topology.lease(broker.incarnation)) == 1


def everything(connection: Connection) -> dict[bytes, bytes | None]:
    """The whole broker, to see that nothing was written."""
    return {key: connection.call("DUMP", key) for key in connection.call("KEYS", "*")}


def counters(connection: Connection) -> dict[str, int]:
    return {name.decode(): int(count) for name, count in connection.call("HGETALL", topology.COUNTERS).items()}


def dead_letters(connection: Connection) -> list[DeadLetter]:
    found = []
    for _, fields in connection.call("XRANGE", topology.DEAD, "-", "+"):
        kept = {name.decode(): value for name, value in zip(fields[::2], fields[1::2], strict=True)}
        message = kept.pop("message")
        text = {name: value.decode() for name, value in kept.items()}
        found.append(msgspec.convert(text | {"message": b""}, DeadLetter, strict=False))
        found[-1] = msgspec.structs.replace(found[-1], message=message)
    return found


# -- leases -----------------------------------------------------------------------------------------------------------


def test_a_lease_holds_what_was_announced_and_expires(connection: Connection, broker: Broker) -> None:
    broker.announce(b"who I am")
    key = topology.lease(broker.incarnation)
    assert connection.call("GET", key) == b"who I am"
    assert 0 < connection.call("PTTL", key) <= Settings().lease_s * 1000
    assert broker.incarnation.encode() in connection.call("SMEMBERS", topology.HOLDERS)


def test_a_lease_is_prolonged_with_its_value(connection: Connection, broker: Broker) -> None:
    broker.announce(b"who I am")
    key = topology.lease(broker.incarnation)
    connection.call("PEXPIRE", key, 1000)
    assert broker.renew() is True
    assert connection.call("PTTL", key) > 1000
    assert connection.call("GET", key) == b"who I am"


def test_a_lapsed_lease_is_not_prolonged(connection: Connection, broker: Broker) -> None:
    lapse(connection, broker)
    assert broker.renew() is False
    assert connection.call("EXISTS", topology.lease(broker.incarnation)) == 0


def test_one_who_resigned_holds_no_lease_and_is_only_remembered(connection: Connection, broker: Broker) -> None:
    broker.resign()
    assert set(everything(connection)) == {b"lepton:holders", f"lepton:empty:{broker.incarnation}".encode()}


def test_one_who_resigns_gives_back_what_a_lost_reply_left_with_it(connection: Connection, broker: Broker) -> None:
    held_batch(connection, broker, 2)
    broker.resign()
    assert connection.call("LLEN", topology.AGAIN) == 2


def test_one_who_was_forgotten_and_takes_again_is_looked_after_again(
    connection: Connection, broker: Broker, another: Callable[[str], Broker]
) -> None:
    thawed = another("thawed")
    lapse(connection, thawed)
    connection.call("SREM", topology.HOLDERS, "thawed")
    held_batch(connection, thawed, 1)
    assert broker.recover().messages == 1


def test_a_reply_goes_to_no_key_but_a_reply_list(connection: Connection, broker: Broker) -> None:
    push(connection, topology.AGAIN, b"precious")
    held_batch(connection, broker, 1)
    broker.commit(Commit(0, 1, [Outcome("job", "succeeded", b"record", topology.AGAIN)], b"\x90"))
    assert oldest_first(connection, topology.AGAIN) == [b"precious"]
    assert connection.call("TTL", topology.AGAIN) == -1


# -- claim ------------------------------------------------------------------------------------------------------------


def test_a_claim_takes_the_oldest_first(connection: Connection, broker: Broker) -> None:
    push(connection, topology.LANE, *numbered(10))
    assert broker.claim(Kind.NEW, 0, 0, 4) == numbered(10)[:4]
    assert broker.claim(Kind.NEW, 0, 4, 100) == numbered(10)[4:]
    assert oldest_first(connection, topology.claim(broker.incarnation, 0)) == numbered(10)


def test_a_claim_takes_the_most_urgent_first(connection: Connection, broker: Broker) -> None:
    sources = topology.lane_lists()
    for source in reversed(sources):
        push(connection, source, source.encode() + b"1", source.encode() + b"2")
    expected = [source.encode() + number for source in sources for number in (b"1", b"2")]
    assert broker.claim(Kind.NEW, 0, 0, 7) == expected[:7]
    assert broker.claim(Kind.NEW, 1, 0, 100) == expected[7:]


def test_what_came_back_is_claimed_apart_and_finds_room(connection: Connection, broker: Broker) -> None:
    push(connection, topology.LANE, *numbered(10))
    push(connection, topology.AGAIN, b"again")
    push(connection, topology.ALONE, b"suspect")
    assert broker.claim(Kind.NEW, 0, 0, 5) == numbered(3)
    assert broker.back == {Kind.ALONE: 1, Kind.AGAIN: 1}
    assert broker.claim(Kind.AGAIN, 0, 0, 5) == [b"again"]
    assert broker.claim(Kind.ALONE, 0, 0, 5) == [b"suspect"]
    for kind, expected in ((Kind.NEW, numbered(3)), (Kind.AGAIN, [b"again"]), (Kind.ALONE, [b"suspect"])):
        assert oldest_first(connection, topology.claim(broker.incarnation, 0, kind)) == expected


def test_the_lanes_of_tenants_are_claimed_in_equal_shares(connection: Connection, broker: Broker) -> None:
    for tenant, count in (("big", 100), ("small", 3)):
        push(connection, topology.lane(tenant), *(f"{tenant}{at}".encode() for at in range(count)))
        connection.call("SADD", topology.LANES, topology.lane(tenant))
    push(connection, topology.LANE, *numbered(100))
    found = broker.claim(Kind.NEW, 1, 0, 23)
    per_lane = Counter(message.rstrip(b"0123456789") for message in found)
    assert per_lane == {b"big": 10, b"small": 3, b"m": 10}


def test_every_lane_has_its_turn_even_where_there_is_room_for_one(connection: Connection, broker: Broker) -> None:
    depths = {"deep": 500, "shallow": 20, "empty": 0, "bare": 0}
    connection.call("SADD", topology.LANES, *map(topology.lane, depths))
    for tenant, count in depths.items():
        push(connection, topology.lane(tenant), *[tenant.encode()] * count)
    push(connection, topology.LANE, *[b"default"] * 100)
    broker.claim(Kind.NEW, 0, 0, 1)
    found = [message for at in range(30) for message in broker.claim(Kind.NEW, 1, at, 1)]
    assert Counter(found) == {b"deep": 10, b"shallow": 10, b"default": 10}


def test_a_lane_is_claimed_from_as_soon_as_it_is_there(connection: Connection, broker: Broker) -> None:
    push(connection, topology.claim(broker.incarnation, WAKE), b"woken")
    for tenant in ("one", "two"):
        connection.call("SADD", topology.LANES, topology.lane(tenant))
        push(connection, topology.lane(tenant), tenant.encode())
        expected = [b"woken", b"one"] if tenant == "one" else [b"two"]
        assert broker.claim(Kind.NEW, 0, 0 if tenant == "one" else 2, 10) == expected
    assert oldest_first(connection, topology.claim(broker.incarnation, 0)) == [b"woken", b"one", b"two"]


def test_an_urgent_job_of_one_tenant_goes_before_the_others_of_all(connection: Connection, broker: Broker) -> None:
    connection.call("SADD", topology.LANES, topology.lane("one"))
    push(connection, topology.LANE, *numbered(5))
    push(connection, topology.lane_list(9, topology.lane("one")), b"urgent")
    assert broker.claim(Kind.NEW, 1, 0, 2)[0] == b"urgent"


def test_a_claim_of_an_empty_lane_is_empty(connection: Connection, broker: Broker) -> None:
    assert broker.claim(Kind.NEW, 0, 0, CLAIM_LIMIT) == []


@pytest.mark.parametrize("have", [0, 2])
def test_a_claim_that_holds_another_number_than_we_know_is_fenced(
    connection: Connection, broker: Broker, have: int
) -> None:
    push(connection, topology.claim(broker.incarnation, 0), b"old")
    push(connection, topology.LANE, b"new")
    with pytest.raises(Fenced, match="claim"):
        broker.claim(Kind.NEW, 0, have, 10)


def woken(broker: Broker, wake: Connection) -> bool:
    """Whether the wake-up that was asked for comes."""
    return broker.woke(wake).message is not None


@pytest.fixture
def wake(broker_url: str) -> Iterator[Connection]:
    wake = Connection(broker_url, "wake")
    yield wake
    wake.close()


def test_a_wake_up_is_a_durable_claim(connection: Connection, broker: Broker, wake: Connection) -> None:
    broker.ask_wake(wake)
    push(connection, topology.LANE, b"m")
    assert broker.woke(wake) == (b"m", True)
    assert oldest_first(connection, topology.claim(broker.incarnation, WAKE)) == [b"m"]


@pytest.mark.parametrize(
    "other",
    [
        ("LPUSH", topology.LANE, "n"),
        ("LPUSH", topology.lane_list(9), "n"),
        ("LPUSH", topology.AGAIN, "n"),
        ("LPUSH", topology.ALONE, "n"),
        ("ZADD", topology.CANCELLED, 1, "job"),
        ("SADD", topology.LANES, topology.lane("tenant")),
        ("SET", topology.LANES, "no set"),
        ("SET", topology.lane_list(9), "no list"),
    ],
)
def test_a_wake_up_tells_whether_there_is_more_to_do(
    connection: Connection, broker: Broker, wake: Connection, other: tuple[str, ...]
) -> None:
    broker.ask_wake(wake)
    connection.many([("MULTI",), other, ("LPUSH", topology.LANE, "m"), ("EXEC",)])
    assert not broker.woke(wake).is_all


def test_the_message_that_woke_us_is_claimed_before_all_others(
    connection: Connection, broker: Broker, wake: Connection
) -> None:
    broker.ask_wake(wake)
    push(connection, topology.LANE, *numbered(3))
    assert woken(broker, wake)
    assert broker.claim(Kind.NEW, 0, 0, 2) == numbered(2)
    assert oldest_first(connection, topology.claim(broker.incarnation, 0)) == numbered(2)
    assert connection.call("LLEN", topology.claim(broker.incarnation, WAKE)) == 0


def test_a_wake_up_whose_message_a_claim_took_before_its_answer_was_read_brings_nothing(
    connection: Connection, broker: Broker, wake: Connection
) -> None:
    broker.ask_wake(wake)
    push(connection, topology.LANE, b"m0")
    assert broker.claim(Kind.NEW, 0, 0, 10) == [b"m0"]
    assert broker.woke(wake) == (None, False)
    wake_with(connection, broker, wake, b"m1")


def test_a_wait_without_a_message_ends_before_the_lease_can_lapse(broker_url: str, connection: Connection) -> None:
    quick = Broker(connection, "quick", Settings(lease_s=0.2, heartbeat_s=0.1))
    wake = Connection(broker_url, "wake")
    quick.ask_wake(wake)
    start = time.monotonic()
    assert quick.woke(wake) == (None, False)
    assert time.monotonic() - start < 0.2
    assert quick.claim(Kind.NEW, 0, 0, 10) == []
    wake.close()


def test_what_a_frozen_router_was_woken_with_after_it_was_forgotten_is_given_back(
    connection: Connection, broker: Broker, wake: Connection, another: Callable[[str], Broker]
) -> None:
    frozen = another("frozen")
    frozen.ask_wake(wake)
    lapse(connection, frozen)
    assert broker.recover().messages == 0
    push(connection, topology.LANE, b"m")
    assert woken(frozen, wake)
    assert frozen.recover().messages == 1  # what it does when it thaws
    assert oldest_first(connection, topology.AGAIN) == [b"m"]


# -- a message that is alone ------------------------------------------------------------------------------------------


def lone(broker: Broker, message: bytes, job: str = "one", device: str = "cpu") -> Dispatch:
    """What sends the message of a wake-up to a device."""
    note = msgspec.msgpack.encode(Placement(job, "a.b", "placed", "", 0.0, ""))
    claim = topology.claim(broker.incarnation, WAKE)
    told = {"placements": {7: {job: note}}, "counts": {"placed": 1}, "event": b"event"}
    return Dispatch({claim: 1}, {claim: []}, queued={device: [message]}, **told)


def wake_with(connection: Connection, broker: Broker, wake: Connection, message: bytes) -> None:
    if not broker.is_waking:
        broker.ask_wake(wake)
    push(connection, topology.LANE, message)
    assert broker.woke(wake) == (message, True)


@pytest.fixture
def used(connection: Connection, broker: Broker, wake: Connection) -> Broker:
    """A broker that has sent a job to the cpu before."""
    wake_with(connection, broker, wake, b"before")
    broker.dispatch(lone(broker, b"before", "before"))
    connection.call("DEL", "lepton.cpu", topology.COUNTERS, topology.EVENTS)
    return broker


def test_a_message_that_is_alone_goes_to_its_device_and_the_next_one_is_waited_for(
    connection: Connection, used: Broker, wake: Connection
) -> None:
    for message in numbered(3):
        wake_with(connection, used, wake, message)
        used.dispatch(lone(used, message))
        assert used.is_waking
    assert oldest_first(connection, "lepton.cpu") == numbered(3)
    assert connection.call("LLEN", topology.claim(used.incarnation, WAKE)) == 0
    assert counters(connection) == {"placed": 3}
    assert connection.call("XLEN", topology.EVENTS) == 3


def test_the_next_message_may_be_there_already_when_one_that_is_alone_leaves(
    connection: Connection, used: Broker, wake: Connection
) -> None:
    wake_with(connection, used, wake, b"m0")
    push(connection, topology.LANE, b"m1", b"m2")
    used.dispatch(lone(used, b"m0"))
    assert used.woke(wake) == (b"m1", False)
    assert oldest_first(connection, topology.claim(used.incarnation, WAKE)) == [b"m1"]


def test_a_message_that_is_alone_and_was_adopted_by_another_is_not_dispatched(
    connection: Connection, used: Broker, wake: Connection, another: Callable[[str], Broker]
) -> None:
    wake_with(connection, used, wake, b"m")
    lapse(connection, used)
    another("other").recover()
    with pytest.raises(Fenced, match="changed"):
        used.dispatch(lone(used, b"m"))
    assert oldest_first(connection, topology.AGAIN) == [b"m"]
    assert connection.call("EXISTS", "lepton.cpu", topology.EVENTS) == 0
    assert counters(connection) == {"accepted": 1}  # by the recovery


def test_a_message_that_is_alone_goes_to_no_queue_of_another_type(
    connection: Connection, used: Broker, wake: Connection
) -> None:
    connection.call("SET", "lepton.cpu", "no list")
    wake_with(connection, used, wake, b"m")
    before = everything(connection)
    with pytest.raises(CommandError, match="WRONGTYPE"):
        used.dispatch(lone(used, b"m"))
    assert everything(connection) == before


def test_a_wake_up_that_was_claimed_otherwise_does_not_stand_in_the_way_of_the_next(
    connection: Connection, used: Broker, wake: Connection
) -> None:
    wake_with(connection, used, wake, b"m0")
    assert used.claim(Kind.NEW, 0, 0, 10) == [b"m0"]
    wake_with(connection, used, wake, b"m1")
    used.dispatch(lone(used, b"m1"))
    assert oldest_first(connection, "lepton.cpu") == [b"m1"]


def test_the_placement_of_a_lone_job_comes_with_its_message(connection: Connection, broker: Broker) -> None:
    claim, (message,) = claimed(connection, broker, 1)
    step = lone(broker, message)
    step.claims, step.rests = {claim: 1}, {claim: []}
    broker.dispatch(step)
    assert take(broker) == [message]
    connection.call("DEL", topology.jobs(7))  # nobody asks there
    assert broker.known(["one"], [7]) == (step.placements[7], set())
    assert broker.known(["one"], [7]) == ({}, set())


def test_a_placement_that_came_with_another_jobs_message_is_left_alone(connection: Connection, broker: Broker) -> None:
    claim, messages = claimed(connection, broker, 2)
    step = lone(broker, messages[0])
    step.claims, step.rests = {claim: 2}, {claim: messages[1:]}
    broker.dispatch(step)
    several = {7: {"two": b"p2", "three": b"p3"}}
    broker.dispatch(Dispatch({claim: 1}, {}, queued={"cpu": messages[1:]}, placements=several))
    assert take(broker) == messages
    assert broker.known(["two"], [7]) == ({"two": b"p2"}, set())


@pytest.mark.parametrize("value", [("SET", b"no placement"), ("LPUSH", b"of another type")])
def test_what_is_no_placement_holds_no_job_up(connection: Connection, broker: Broker, value: tuple[str, bytes]) -> None:
    connection.call(value[0], topology.placed("cpu"), value[1])
    connection.call("HSET", topology.jobs(7), "one", b"p1")
    push(connection, "lepton.cpu", b"m")
    assert take(broker) == [b"m"]
    assert broker.known(["one"], [7]) == ({"one": b"p1"}, set())


def test_a_lone_job_that_is_to_be_cancelled_is_known_to_be(connection: Connection, broker: Broker) -> None:
    claim, (message,) = claimed(connection, broker, 1)
    step = lone(broker, message)
    step.claims, step.rests = {claim: 1}, {claim: []}
    broker.dispatch(step)
    broker.cancel(["one"])
    assert take(broker) == [message]
    assert broker.known(["one"], [7]) == (step.placements[7], {"one"})


# -- dispatch ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2])
def trips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatches in one round trip, as few messages are, and in two."""
    if request.param == 2:
        monkeypatch.setattr("queues.broker._FEW", 0)


def claimed(connection: Connection, broker: Broker, count: int, number: int = 0) -> tuple[str, list[bytes]]:
    """A claim that holds `count` messages."""
    messages = [b"c%d-" % number + each for each in numbered(count)]
    push(connection, topology.LANE, *messages)
    assert broker.claim(Kind.NEW, number, 0, count) == messages
    return topology.claim(broker.incarnation, number), messages


@pytest.mark.usefixtures("trips")
def test_messages_leave_their_claim_for_where_they_go_in_order(connection: Connection, broker: Broker) -> None:
    claim, messages = claimed(connection, broker, 6)
    broker.dispatch(
        Dispatch(
            {claim: 6},
            {claim: messages[4:]},
            queued={"cpu": messages[:2], "gpu.h100": messages[2:3]},
            parked={"a.b": messages[3:4]},
        )
    )
    assert oldest_first(connection, "lepton.cpu") == messages[:2]
    assert oldest_first(connection, "lepton.gpu.h100") == messages[2:3]
    assert oldest_first(connection, topology.parked("a.b")) == messages[3:4]
    assert broker.parked_kernels() == {"a.b"}
    assert oldest_first(connection, claim) == messages[4:]


@pytest.mark.usefixtures("trips")
def test_a_device_queue_keeps_what_it_had(connection: Connection, broker: Broker) -> None:
    push(connection, "lepton.cpu", b"older")
    claim, messages = claimed(connection, broker, 2)
    broker.dispatch(Dispatch({claim: 2}, {}, queued={"cpu": messages}))
    assert oldest_first(connection, "lepton.cpu") == [b"older", *messages]
    assert broker.depths(["cpu", "gpu"]) == [3, 0]


@pytest.mark.usefixtures("trips")
def test_several_claims_are_dispatched_in_one_step(connection: Connection, broker: Broker) -> None:
    one, first = claimed(connection, broker, 2, 0)
    two, second = claimed(connection, broker, 2, 1)
    step = Dispatch({one: 2, two: 2}, {one: first[1:], two: second[1:]}, queued={"cpu": [first[0], second[0]]})
    broker.dispatch(step)
    assert oldest_first(connection, "lepton.cpu") == [first[0], second[0]]
    assert (oldest_first(connection, one), oldest_first(connection, two)) == (first[1:], second[1:])


@pytest.mark.usefixtures("trips")
def test_what_is_told_of_a_dispatch_is_stored_with_it(connection: Connection, broker: Broker) -> None:
    claim, messages = claimed(connection, broker, 2)
    broker.dispatch(
        Dispatch(
            {claim: 2},
            {},
            queued={"cpu": messages},
            placements={7: {"one": b"p1"}, 8: {"two": b"p2"}},
            counts={"placed": 2, "parked": 0},
            event=b"event",
        )
    )
    assert counters(connection) == {"placed": 2}  # of nothing nothing is written
    placements, marked = broker.known(["one", "two", "three"], [7, 8, 9])
    assert (placements, marked) == ({"one": b"p1", "two": b"p2"}, set())
    assert 0 < connection.call("TTL", topology.jobs(7)) <= TTL_S
    assert [fields for _, fields in connection.call("XRANGE", topology.EVENTS, "-", "+")] == [[b"e", b"event"]]


def test_a_message_that_nobody_can_read_goes_to_the_dead_letters_with_its_reason(
    connection: Connection, broker: Broker
) -> None:
    claim, messages = claimed(connection, broker, 1)
    letter = DeadLetter("j", "a.b", "unreadable", "it is no message", 2, messages[0], "trace")
    broker.dispatch(Dispatch({claim: 1}, {}, dead=[letter]))
    assert dead_letters(connection) == [letter]
    assert counters(connection) == {"dead": 1}
    assert connection.call("EXISTS", claim) == 0


@pytest.mark.parametrize("reply_to", ["", "lepton:reply:me"])
def test_a_rejected_job_is_answered(
    connection: Connection, broker: Broker, heard: Callable[[str], list[bytes]], reply_to: str
) -> None:
    claim, _ = claimed(connection, broker, 1)
    listen = heard(topology.result("j"))
    broker.dispatch(Dispatch({claim: 1}, {}, rejected=[Outcome("j", "failed", b"record", reply_to)]))
    assert connection.call("GET", topology.result("j")) == b"record"
    assert connection.call("TTL", topology.result("j")) > 0
    assert listen() == ([] if reply_to else [b"record"])
    assert oldest_first(connection, "lepton:reply:me") == ([b"record"] if reply_to else [])


@pytest.mark.usefixtures("trips")
@pytest.mark.parametrize("change", ["one more", "one less", "gone"])
def test_a_claim_that_is_not_as_we_left_it_is_fenced_and_nothing_dispatched(
    connection: Connection, broker: Broker, change: str
) -> None:
    claim, messages = claimed(connection, broker, 2)
    connection.call(*{"one more": ("LPUSH", claim, "x"), "one less": ("RPOP", claim), "gone": ("DEL", claim)}[change])
    before = everything(connection)
    with pytest.raises(Fenced):
        broker.dispatch(Dispatch({claim: 2}, {}, queued={"cpu": messages}, counts={"placed": 2}, event=b"e"))
    assert everything(connection) == before


class Between(Connection):
    """A connection that lets something happen just before a transaction begins."""

    def __init__(self, url: str, act: Callable[[], object]) -> None:
        super().__init__(url, "between")
        self._act = act

    def send(self, commands: Any) -> int:
        if commands[0] == ("MULTI",):
            self._act()
        return super().send(commands)


def test_a_claim_that_another_adopts_in_between_is_fenced_and_nothing_dispatched(
    connection: Connection, broker_url: str, settings: Settings, another: Callable[[str], Broker]
) -> None:
    other = another("other")
    link = Between(broker_url, lambda: (lapse(connection, slow), other.recover()))
    slow = Broker(link, "slow", settings)
    slow.announce(b"")
    claim, messages = claimed(connection, slow, 20)
    with pytest.raises(Fenced, match="changed"):
        slow.dispatch(Dispatch({claim: 20}, {}, queued={"cpu": messages}, counts={"placed": 20}, event=b"e"))
    assert oldest_first(connection, topology.AGAIN) == messages
    assert connection.call("EXISTS", "lepton.cpu", topology.EVENTS) == 0
    assert counters(connection) == {"accepted": 20}  # by the recovery
    link.close()


@pytest.mark.usefixtures("trips")
@pytest.mark.parametrize("key", ["lepton.cpu", "lepton:parked:a.b"])
def test_a_queue_of_another_type_is_refused_before_anything_is_dispatched(
    connection: Connection, broker: Broker, key: str
) -> None:
    claim, messages = claimed(connection, broker, 2)
    connection.call("SET", key, "not a list")
    before = everything(connection)
    with pytest.raises(CommandError, match="WRONGTYPE"):
        broker.dispatch(Dispatch({claim: 2}, {}, queued={"cpu": messages[:1]}, parked={"a.b": messages[1:]}))
    assert everything(connection) == before


@pytest.mark.usefixtures("trips")
def test_a_dispatch_after_a_refused_one_goes_through(connection: Connection, broker: Broker) -> None:
    claim, messages = claimed(connection, broker, 2)
    connection.call("SET", "lepton.cpu", "not a list")
    with pytest.raises(CommandError):
        broker.dispatch(Dispatch({claim: 2}, {}, queued={"cpu": messages}))
    push(connection, topology.LANE, b"next")
    broker.claim(Kind.NEW, 0, 2, 10)
    broker.dispatch(Dispatch({claim: 3}, {}, queued={"gpu": [*messages, b"next"]}))
    assert oldest_first(connection, "lepton.gpu") == [*messages, b"next"]


# -- unpark -----------------------------------------------------------------------------------------------------------


def test_parked_jobs_go_to_again_in_order_and_no_others(connection: Connection, broker: Broker) -> None:
    claim, messages = claimed(connection, broker, 5)
    broker.dispatch(Dispatch({claim: 5}, {}, parked={"a.b": messages[:3], "c.d": messages[3:]}))
    assert broker.unpark("a.b") == 3
    assert oldest_first(connection, topology.AGAIN) == messages[:3]
    assert broker.parked_kernels() == {"c.d"}
    assert broker.unpark("a.b") == 0


# -- take -------------------------------------------------------------------------------------------------------------

NOW = 0.001


def take(broker: Broker, limit: int = 256, *, slot: int = 0, slots: int = 1) -> list[bytes]:
    return broker.take("cpu", slot, limit, slots, NOW)


def test_a_batch_is_the_oldest_messages_in_order(connection: Connection, broker: Broker) -> None:
    push(connection, "lepton.cpu", *numbered(10))
    assert take(broker, 4) == numbered(4)
    assert broker.held(0) == numbered(4)
    assert oldest_first(connection, "lepton.cpu") == numbered(10)[4:]


def test_no_messages_are_an_empty_batch(broker: Broker) -> None:
    assert take(broker) == []


@pytest.mark.parametrize(("slots", "share"), [(1, 9), (2, 5), (4, 3), (64, 2)])
def test_a_slot_leaves_the_others_their_share(connection: Connection, broker: Broker, slots: int, share: int) -> None:
    push(connection, "lepton.cpu", *numbered(9))
    assert take(broker, slots=slots) == numbered(share)


def test_a_single_message_may_be_taken_alone(connection: Connection, broker: Broker) -> None:
    push(connection, "lepton.cpu", *numbered(2))
    assert take(broker, 1) == [b"m0"]


def test_a_slot_waits_for_a_message(connection: Connection, broker: Broker, broker_url: str) -> None:
    sender = Connection(broker_url, "sender")
    sender.send([("LPUSH", "lepton.cpu", "m")])
    assert broker.take("cpu", 0, 10, 1, 5) == [b"m"]
    sender.close()


def test_slots_take_apart_from_each_other(connection: Connection, broker: Broker) -> None:
    push(connection, "lepton.cpu", *numbered(4))
    assert (take(broker, 2, slot=0), take(broker, 2, slot=1)) == (numbered(4)[:2], numbered(4)[2:])
    assert (broker.held(0), broker.held(1)) == (numbered(4)[:2], numbered(4)[2:])


@pytest.mark.parametrize("waiting", [0, 1, 5])
def test_what_a_lost_reply_left_is_handed_out_again_first(
    connection: Connection, broker: Broker, another: Callable[[str], Broker], waiting: int
) -> None:
    lost = numbered(3)
    push(connection, "lepton.cpu", *lost)
    take(broker, 3)  # the reply is lost, and the slot connects again
    push(connection, "lepton.cpu", *[b"w%d" % at for at in range(waiting)])
    again = take(another(broker.incarnation), 256)
    assert again[:3] == lost
    assert broker.held(0) == again


# -- commit -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard(broker_url: str) -> Iterator[Callable[[str], Callable[[], list[bytes]]]]:
    """Listens on a channel; the function that comes back says what was published there."""
    link = Connection(broker_url, "listener")

    def listen(channel: str) -> Callable[[], list[bytes]]:
        link.send([("SUBSCRIBE", channel), ("PING",)])
        link.receive(1)

        def said() -> list[bytes]:
            link.receive(link.send([("PING",)]))  # what was published before has arrived by now
            return [push[2] for push in link.pushes if push[0] == b"message"]

        return said

    yield listen
    link.close()


def held_batch(connection: Connection, broker: Broker, count: int = 1) -> None:
    push(connection, "lepton.cpu", *numbered(count))
    assert len(take(broker, count)) == count


def commit(broker: Broker, *outcomes: Outcome, event: bytes = b"event") -> list[str]:
    return broker.commit(Commit(0, len(outcomes), outcomes, event))


def succeeded(job: str, reply_to: str = "", record: bytes = b"") -> Outcome:
    return Outcome(job, "succeeded", record or b'{"status":"SUCCESS","job":"%s"}' % job.encode(), reply_to)


def test_a_commit_stores_each_result_and_ends_the_batch(connection: Connection, broker: Broker) -> None:
    held_batch(connection, broker, 2)
    assert commit(broker, succeeded("one"), Outcome("two", "failed", b'{"status":"FAILURE"}')) == []
    assert connection.call("GET", topology.result("one")) == b'{"status":"SUCCESS","job":"one"}'
    assert connection.call("GET", topology.result("two")) == b'{"status":"FAILURE"}'
    assert broker.held(0) == []
    assert counters(connection) == {"succeeded": 1, "failed": 1}
    assert [fields for _, fields in connection.call("XRANGE", topology.EVENTS, "-", "+")] == [[b"e", b"event"]]


def test_a_result_and_a_reply_list_expire(connection: Connection, broker: Broker) -> None:
    held_batch(connection, broker)
    commit(broker, succeeded("one", "lepton:reply:me"))
    for key in (topology.result("one"), "lepton:reply:me"):
        assert TTL_S - 5 < connection.call("TTL", key) <= TTL_S


def test_placements_are_kept_as_long_as_the_results_of_their_jobs_and_never_less(
    connection: Connection, broker: Broker
) -> None:
    kept = {1: TTL_S // 2, 2: 2 * TTL_S, 3: TTL_S // 2}
    for minute, ttl_s in kept.items():
        connection.many([("HSET", topology.jobs(minute), "one", b"p"), ("EXPIRE", topology.jobs(minute), ttl_s)])
    held_batch(connection, broker)
    broker.commit(Commit(0, 1, [succeeded("one")], b"", minutes={1, 2, 7}))
    found = {minute: connection.call("TTL", topology.jobs(minute)) for minute in (*kept, 7)}
    assert TTL_S - 5 < found[1] <= TTL_S
    assert 2 * TTL_S - 5 < found[2] <= 2 * TTL_S
    assert found[3] <= TTL_S // 2
    assert found[7] == -2


def test_results_reach_each_clients_reply_list_in_order(connection: Connection, broker: Broker) -> None:
    outcomes = [succeeded(f"j{at}", f"lepton:reply:{at % 2}") for at in range(6)]
    held_batch(connection, broker, 6)
    commit(broker, *outcomes)
    for client in (0, 1):
        found = connection.call("LRANGE", f"lepton:reply:{client}", 0, -1)
        assert found == [each.record for each in outcomes[client::2]]


def test_a_full_batch_reaches_one_reply_list(connection: Connection, broker: Broker) -> None:
    held_batch(connection, broker, 256)
    commit(broker, *(succeeded(f"j{at}", "lepton:reply:me") for at in range(256)))
    assert connection.call("LLEN", "lepton:reply:me") == 256


def test_a_result_without_a_reply_list_is_published(
    connection: Connection, broker: Broker, heard: Callable[[str], Callable[[], list[bytes]]]
) -> None:
    said = heard(topology.result("one"))
    held_batch(connection, broker)
    commit(broker, succeeded("one"))
    assert said() == [b'{"status":"SUCCESS","job":"one"}']


def test_a_result_with_a_reply_list_is_not_published(
    connection: Connection, broker: Broker, heard: Callable[[str], Callable[[], list[bytes]]]
) -> None:
    said = heard(topology.result("one"))
    held_batch(connection, broker)
    commit(broker, succeeded("one", "lepton:reply:me"))
    assert said() == []


def test_an_ignored_result_is_counted_and_not_stored(
    connection: Connection, broker: Broker, heard: Callable[[str], Callable[[], list[bytes]]]
) -> None:
    said = heard(topology.result("one"))
    held_batch(connection, broker)
    assert commit(broker, Outcome("one", "succeeded", b"", "lepton:reply:me")) == []
    assert connection.call("EXISTS", topology.result("one"), "lepton:reply:me") == 0
    assert (said(), counters(connection)) == ([], {"succeeded": 1})


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_the_first_final_result_is_kept_and_the_second_counted_as_a_duplicate(
    connection: Connection, broker: Broker, heard: Callable[[str], Callable[[], list[bytes]]], encoding: str
) -> None:
    first = results.encode(results.success("one", {"x": 1}, None), encoding)
    second = results.encode(results.success("one", {"x": 2}, None), encoding)
    held_batch(connection, broker)
    commit(broker, succeeded("one", record=first))
    said = heard(topology.result("one"))
    held_batch(connection, broker, 2)
    assert commit(broker, succeeded("one", record=second), succeeded("one", "lepton:reply:me", second)) == ["one"] * 2
    assert connection.call("GET", topology.result("one")) == first
    assert counters(connection) == {"succeeded": 1, "duplicate": 2}
    assert (said(), connection.call("EXISTS", "lepton:reply:me")) == ([], 0)
    assert broker.held(0) == []


def test_one_job_twice_in_a_batch_has_one_result(connection: Connection, broker: Broker) -> None:
    held_batch(connection, broker, 2)
    assert commit(broker, succeeded("one"), succeeded("one")) == ["one"]
    assert counters(connection) == {"succeeded": 1, "duplicate": 1}


def celerys_record(broker_url: str, encoding: str, state: str, value: Any) -> None:
    """The record that a Celery program stores for the task `one`."""
    address, backend = celery_addresses(broker_url)
    app = Celery("program", broker=address, backend=backend, set_as_current=False)
    app.conf.update(result_serializer=encoding, accept_content=["json", "msgpack"])
    app.backend.store_result("one", value, state)
    app.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("state", "value"),
    [
        ("STARTED", {"pid": 1, "hostname": "SUCCESS"}),
        ("RETRY", ValueError("status SUCCESS")),
        ("PENDING", None),
        ("PROGRESS", "FAILURE"),
    ],
)
def test_a_state_that_is_not_final_is_overwritten(
    connection: Connection, broker: Broker, broker_url: str, encoding: str, state: str, value: Any
) -> None:
    celerys_record(broker_url, encoding, state, value)
    held_batch(connection, broker)
    assert commit(broker, succeeded("one")) == []
    assert connection.call("GET", topology.result("one")) == succeeded("one").record
    assert connection.call("TTL", topology.result("one")) > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize(("state", "value"), [("SUCCESS", {"status": "STARTED"}), ("FAILURE", ValueError("no"))])
def test_a_final_state_that_celery_stored_is_kept(
    connection: Connection, broker: Broker, broker_url: str, encoding: str, state: str, value: Any
) -> None:
    celerys_record(broker_url, encoding, state, value)
    before = connection.call("GET", topology.result("one"))
    held_batch(connection, broker)
    assert commit(broker, succeeded("one")) == ["one"]
    assert connection.call("GET", topology.result("one")) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("reason", ["revoked", "lepton", '"lepton":'])
def test_a_revoke_that_a_celery_worker_noted_ends_nothing_and_what_follows_is_not_lost(
    connection: Connection, broker: Broker, broker_url: str, encoding: str, reason: str
) -> None:
    """Every Celery worker that hears of it writes that into the result of a job that it does not know."""
    celerys_record(broker_url, encoding, "REVOKED", TaskRevokedError(reason))
    assert broker.ended(["one"]) == set()
    held_batch(connection, broker)
    ours = results.encode(results.failure("one", JobCancelled("cancelled while it ran")), encoding)
    assert broker.commit(Commit(0, 1, [Outcome("one", "cancelled", ours)], b"", chord_parts=[("one", b"part")])) == []
    assert connection.call("GET", topology.result("one")) == ours
    assert connection.call("HGET", topology.CHORD_PARTS, "one") == b"part"
    assert counters(connection) == {"cancelled": 1}


@pytest.mark.parametrize("error", [JobCancelled("cancelled"), JobExpired("its deadline passed")])
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_a_revoke_of_ours_is_final(connection: Connection, broker: Broker, encoding: str, error: LeptonError) -> None:
    held_batch(connection, broker)
    commit(broker, Outcome("one", "cancelled", results.encode(results.failure("one", error), encoding)))
    assert broker.ended(["one", "two"]) == {"one"}
    held_batch(connection, broker)
    assert commit(broker, succeeded("one")) == ["one"]


@pytest.mark.parametrize("error", [InvalidArguments("argument 'b' is missing")])
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_a_failure_of_ours_is_final_too(
    connection: Connection, broker: Broker, encoding: str, error: InvalidArguments
) -> None:
    held_batch(connection, broker)
    commit(broker, Outcome("one", "failed", results.encode(results.failure("one", error), encoding)))
    held_batch(connection, broker)
    assert commit(broker, succeeded("one")) == ["one"]


def test_a_commit_after_the_lease_has_lapsed_is_fenced_and_nothing_written(
    connection: Connection, broker: Broker
) -> None:
    held_batch(connection, broker)
    lapse(connection, broker)
    before = everything(connection)
    with pytest.raises(Fenced):
        commit(broker, succeeded("one"))
    assert everything(connection) == before


@pytest.mark.parametrize("known", [0, 1, 3])
def test_a_commit_of_another_number_than_is_held_is_fenced_and_nothing_written(
    connection: Connection, broker: Broker, known: int
) -> None:
    held_batch(connection, broker, 2)
    before = everything(connection)
    with pytest.raises(Fenced):
        broker.commit(Commit(0, known, [succeeded("one")], b"event"))
    assert everything(connection) == before


def test_a_commit_that_is_sent_again_is_fenced_and_changes_nothing(connection: Connection, broker: Broker) -> None:
    held_batch(connection, broker)
    commit(broker, succeeded("one"))
    before = everything(connection)
    with pytest.raises(Fenced):
        commit(broker, succeeded("one"))
    assert everything(connection) == before


@pytest.mark.parametrize("key", [topology.EVENTS, topology.COUNTERS, "held"])
def test_a_commit_over_a_key_of_another_type_is_refused_before_the_first_write(
    connection: Connection, broker: Broker, key: str
) -> None:
    held_batch(connection, broker)
    connection.call("SET", topology.held(broker.incarnation, 0) if key == "held" else key, "something else")
    before = everything(connection)
    with pytest.raises(CommandError, match="WRONGTYPE"):
        commit(broker, succeeded("one"))
    assert everything(connection) == before


@pytest.mark.parametrize("key", ["lepton:reply:me", topology.result("one")])
def test_a_clients_key_of_another_type_keeps_nobody_elses_result_back(
    connection: Connection, broker: Broker, key: str
) -> None:
    connection.call("HSET", key, "a", "b")
    held_batch(connection, broker, 2)
    commit(broker, succeeded("one", "lepton:reply:me"), succeeded("two", "lepton:reply:you"))
    assert connection.call("LLEN", "lepton:reply:you") == 1
    assert broker.held(0) == []


def test_old_events_go(broker_url: str) -> None:
    connection = Connection(broker_url, "events")
    few = Broker(connection, "few", Settings(events_kept=100))
    for at in range(500):
        few.emit(b"%d" % at)
    assert 100 <= connection.call("XLEN", topology.EVENTS) <= 300
    connection.close()


# -- release ----------------------------------------------------------------------------------------------------------


def test_a_released_batch_goes_to_again_in_order(connection: Connection, broker: Broker) -> None:
    held_batch(connection, broker, 3)
    broker.release(0, numbered(3), "...")
    assert oldest_first(connection, topology.AGAIN) == numbered(3)
    assert broker.held(0) == []


def test_what_is_released_goes_where_its_flag_says_and_what_stays_keeps_its_order(
    connection: Connection, broker: Broker
) -> None:
    held_batch(connection, broker, 6)
    broker.release(0, numbered(6), "=!.=!.")
    assert broker.held(0) == [b"m0", b"m3"]
    assert oldest_first(connection, topology.ALONE) == [b"m1", b"m4"]
    assert oldest_first(connection, topology.AGAIN) == [b"m2", b"m5"]


def test_a_release_after_the_lease_has_lapsed_is_fenced_and_nothing_moved(
    connection: Connection, broker: Broker
) -> None:
    held_batch(connection, broker, 3)
    lapse(connection, broker)
    with pytest.raises(Fenced):
        broker.release(0, numbered(3), "...")
    assert broker.held(0) == numbered(3)


@pytest.mark.parametrize("known", [0, 2, 4])
def test_a_release_of_another_number_than_is_held_is_fenced_and_nothing_moved(
    connection: Connection, broker: Broker, known: int
) -> None:
    held_batch(connection, broker, 3)
    with pytest.raises(Fenced):
        broker.release(0, numbered(known), "." * known)
    assert broker.held(0) == numbered(3)


def test_a_release_onto_a_key_of_another_type_is_refused_and_nothing_moved(
    connection: Connection, broker: Broker
) -> None:
    held_batch(connection, broker, 3)
    connection.call("SET", topology.AGAIN, "something else")
    with pytest.raises(CommandError, match="WRONGTYPE"):
        broker.release(0, numbered(3), "...")
    assert broker.held(0) == numbered(3)


# -- recover ----------------------------------------------------------------------------------------------------------


def test_a_batch_of_a_lapsed_holder_comes_back_as_suspects_once_and_in_order(
    connection: Connection, broker: Broker, another: Callable[[str], Broker]
) -> None:
    dead = another("dead")
    held_batch(connection, dead, 3)
    lapse(connection, dead)
    assert [broker.recover().messages, broker.recover().messages] == [3, 0]
    assert oldest_first(connection, topology.ALONE) == numbered(3)
    assert connection.call("EXISTS", topology.AGAIN, topology.ATTEMPTS) == 0


@pytest.mark.parametrize("number", [0, 1, WAKE - 1, WAKE])
def test_every_claim_of_a_lapsed_holder_goes_to_again(
    connection: Connection, broker: Broker, another: Callable[[str], Broker], number: int
) -> None:
    dead = another("dead")
    _, messages = claimed(connection, dead, 3, number)
    lapse(connection, dead)
    assert broker.recover().messages == 3
    assert oldest_first(connection, topology.AGAIN) == messages


def test_every_slot_of_a_lapsed_holder_is_looked_at(
    connection: Connection, broker: Broker, another: Callable[[str], Broker]
) -> None:
    dead = another("dead")
    for slot in range(LISTS_EACH):
        push(connection, topology.held("dead", slot), b"m%d" % slot)
    lapse(connection, dead)
    assert broker.recover().messages == LISTS_EACH
    assert sorted(oldest_first(connection, topology.ALONE)) == sorted(numbered(LISTS_EACH))


def test_what_a_live_holder_holds_is_never_touched(
    connection: Connection, broker: Broker, another: Callable[[str], Broker]
) -> None:
    alive = another("alive")
    held_batch(connection, alive, 2)
    claim, messages = claimed(connection, alive, 2)
    assert broker.recover() == alive.recover() == Recovered()
    assert (alive.held(0), oldest_first(connection, claim)) == (numbered(2), messages)


def test_a_holder_that_took_the_lease_again_is_not_recovered(
    connection: Connection, broker: Broker, broker_url: str, settings: Settings, another: Callable[[str], Broker]
) -> None:
    thawed = another("thawed")
    held_batch(connection, thawed, 2)
    lapse(connection, thawed)

    class Slow(Connection):
        def many(self, commands: Any) -> list[Any]:
            commands = list(commands)
            if commands and commands[0][0] == "FCALL":
                thawed.announce(b"")  # between the look at its lease and the recovery
            return super().many(commands)

    link = Slow(broker_url, "slow")
    assert Broker(link, "slow", settings).recover() == Recovered()
    assert thawed.held(0) == numbered(2)
    link.close()


def test_what_a_lapsed_holder_took_after_it_was_recovered_is_recovered_too(
    connection: Connection, broker: Broker, another: Callable[[str], Broker]
) -> None:
    thawed = another("thawed")
    held_batch(connection, thawed, 1)
    lapse(connection, thawed)
    assert broker.recover().messages == 1
    held_batch(connection, thawed, 2)
    assert broker.recover().messages == 2


def test_a_lapsed_holder_that_holds_nothing_is_forgotten(
    connection: Connection, broker: Broker, another: Callable[[str], Broker]
) -> None:
    dead = another("dead")
    lapse(connection, dead)
    broker.recover()
    assert connection.call("SISMEMBER", topology.HOLDERS, "dead")  # a move that it asked for may still be served
    connection.call("PEXPIRE", "lepton:empty:dead", 20_000)  # as after 40 of the 60 seconds
    broker.recover()
    assert set(connection.call("SMEMBERS", topology.HOLDERS)) == {broker.incarnation.encode()}


def test_one_whose_messages_were_recovered_can_do_nothing_with_them(
    connection: Connection, broker: Broker, another: Callable[[str], Broker]
) -> None:
    frozen = another("frozen")
    held_batch(connection, frozen, 2)
    claim, messages = claimed(connection, frozen, 2)
    lapse(connection, frozen)
    assert broker.recover().messages == 4
    before = everything(connection)
    with pytest.raises(Fenced):
        commit(frozen, succeeded("one"), succeeded("two"))
    with pytest.raises(Fenced):
        frozen.dispatch(Dispatch({claim: 2}, {}, queued={"cpu": messages}))
    assert everything(connection) == before


@pytest.mark.parametrize("key", [topology.AGAIN, topology.HOLDERS])
def test_a_recovery_over_a_key_of_another_type_is_refused_and_nothing_moved(
    connection: Connection, broker: Broker, another: Callable[[str], Broker], key: str
) -> None:
    dead = another("dead")
    held_batch(connection, dead, 2)
    lapse(connection, dead)
    connection.call("DEL", key)
    connection.call("SET", key, "something else")
    with pytest.raises(CommandError, match="WRONGTYPE"):
        broker.recover()
    assert dead.held(0) == numbered(2)


# -- functions --------------------------------------------------------------------------------------------------------


def test_functions_may_be_loaded_by_everybody_who_starts(connection: Connection, broker: Broker) -> None:
    functions.load(connection)
    libraries = connection.call("FUNCTION", "LIST", "LIBRARYNAME", "lepton_*")
    assert len(libraries) == 1


def test_a_held_batch_can_be_committed_while_the_broker_is_full(
    connection: Connection, broker: Broker, another: Callable[[str], Broker]
) -> None:
    held_batch(connection, broker)
    before = connection.call("CONFIG", "GET", "maxmemory")[b"maxmemory"]
    connection.call("CONFIG", "SET", "maxmemory", 1)
    try:
        with pytest.raises(CommandError, match="OOM"):
            push(connection, "lepton.cpu", b"more")
        assert commit(broker, succeeded("one", "lepton:reply:me")) == []
    finally:
        connection.call("CONFIG", "SET", "maxmemory", before)
    assert connection.call("EXISTS", topology.result("one"), "lepton:reply:me") == 2
