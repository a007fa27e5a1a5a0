"""The server functions on a real broker: what each does all at once, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from lepton_ai import event, results, topology, wire
from lepton_ai.accounts import accounts_of
from lepton_ai.bundle import bundled, split
from lepton_ai.direct_protocol import push_commands, writer
from lepton_ai.errors import Fenced, JobFailed
from lepton_ai.event import Event
from lepton_ai.identity import minute_of, new_id, run_of
from lepton_ai.job import Meta, Options
from lepton_ai.parcel import Blobs
from lepton_ai.settings import Settings
from lepton_ai.succession import FollowUps
from lepton_ai.terms import Terms
from queues import functions
from queues.broker import LISTS_EACH, Broker, Kind
from queues.connection import CommandError, Connection
from queues.recovery import Recovered
from queues.steps import GOES_ON, Commit, DeadLetter, Dispatch, Outcome

TENANT = topology.lane("t")
#: The id of a job that was made from a key: a UUID of version 5.
KEYED = "12345678-1234-5234-9234-123456789012"


def call(connection: Connection, function: str, *arguments: Any, keys: tuple[str, ...] = ()) -> Any:
    return connection.call(*functions.call(function, keys, arguments))


def accept(connection: Connection, *jobs: tuple[str, ...], lane: str = topology.LANE, told: str = "", **limits: int):
    """Jobs are (id, fingerprint, message), with what else there is behind that: list, note, event."""
    most = {"waiting_jobs": 1000, "waiting_bytes": 0, "tenant_jobs": 1000, "tenant_bytes": 0} | limits
    words: list[Any] = []
    for job in jobs:
        name, fingerprint, message, target, note, each_told = (*job, *(lane, "", "")[len(job) - 3 :])
        words += [target, name, fingerprint, note, each_told, message]
    return call(connection, "accept", 60, 100, *most.values(), lane, told, len(jobs), *words)


def oldest_first(connection: Connection, key: str) -> list[bytes]:
    found: list[bytes] = connection.call("LRANGE", key, 0, -1)
    return found[::-1]


def everything(connection: Connection) -> dict[bytes, Any]:
    return {key: connection.call("DUMP", key) for key in connection.call("KEYS", "*")}


def counters(connection: Connection) -> dict[str, int]:
    return {name.decode(): int(count) for name, count in connection.call("HGETALL", topology.COUNTERS).items()}


def letters(connection: Connection) -> list[dict[str, str]]:
    entries = connection.call("XRANGE", topology.DEAD, "-", "+")
    words = [[word.decode() for word in fields] for _, fields in entries]
    return [dict(zip(each[::2], each[1::2], strict=True)) for each in words]


def told(connection: Connection) -> list[Event]:
    entries = connection.call("XRANGE", topology.EVENTS, "-", "+")
    return [each for _, fields in entries for each in event.decode(fields[1])]


def difference(connection: Connection) -> int:
    return accounts_of(call(connection, "sizes")).difference


@cache
def record(job: str, value: int = 1) -> bytes:
    return results.encode(results.success(job, {"y": value}, None), "json")


@pytest.fixture(autouse=True)
def loaded(connection: Connection) -> None:
    functions.load(connection)


@pytest.fixture
def another(broker_url: str, settings: Settings) -> Iterator[Callable[[str], Broker]]:
    """Another incarnation, with a lease and a connection of its own."""
    opened: list[Connection] = []

    def open_broker(incarnation: str) -> Broker:
        opened.append(Connection(broker_url, incarnation))
        found = Broker(opened[-1], incarnation, settings)
        found.announce(b"")
        return found

    yield open_broker
    for each in opened:
        each.close()


@pytest.fixture(autouse=True)
def balanced(connection: Connection) -> Iterator[None]:
    """Whatever a test has done, nothing of it is unaccounted for."""
    yield
    types = {name: connection.call("TYPE", name) for name in (topology.COUNTERS, topology.ETA_MESSAGES)}
    if set(types.values()) <= {b"hash", b"none", "hash", "none"}:
        assert difference(connection) == 0


# -- accept ---------------------------------------------------------------------------------------------------------


def test_jobs_are_pushed_in_their_order_each_to_its_list(connection: Connection) -> None:
    urgent = topology.lane_list(9)
    assert accept(connection, ("a", "", "m1"), ("b", "", "m2", urgent), ("c", "", "m3")) == [1, 1, 1]
    assert oldest_first(connection, topology.LANE) == [b"m1", b"m3"]
    assert oldest_first(connection, urgent) == [b"m2"]
    assert connection.call("EXISTS", topology.LANES) == 0


def test_a_tenants_lane_is_known_once_something_was_accepted_onto_it(connection: Connection) -> None:
    accept(connection, ("a", "", "m1"), lane=TENANT)
    assert connection.call("SMEMBERS", topology.LANES) in ([TENANT.encode()], {TENANT.encode()})
    assert oldest_first(connection, TENANT) == [b"m1"]


def test_nothing_of_a_list_is_accepted_where_one_job_of_it_cannot_be(connection: Connection) -> None:
    accept(connection, (KEYED, "print", "m1"))
    before = everything(connection)
    with pytest.raises(CommandError, match=r"^KEYCONFLICT 1$"):
        accept(connection, ("a", "", "m2"), (KEYED, "another", "m3"), told="event")
    with pytest.raises(CommandError, match=r"^QUOTA jobs 1 2$"):
        accept(connection, ("a", "", "m2"), ("b", "", "m3"), tenant_jobs=2, told="event")
    assert everything(connection) == before


def test_a_job_whose_fingerprint_is_known_is_not_pushed_again(connection: Connection) -> None:
    assert accept(connection, (KEYED, "print", "m1")) == [1]
    assert accept(connection, (KEYED, "print", "m1"), ("b", "", "m2")) == [0, 1]
    assert oldest_first(connection, topology.LANE) == [b"m1", b"m2"]
    assert 0 < connection.call("TTL", topology.key(KEYED)) <= 31 * 86_400


def test_a_known_job_is_answered_however_full_it_is(connection: Connection) -> None:
    accept(connection, (KEYED, "print", "m1"))
    assert accept(connection, (KEYED, "print", "m1"), tenant_jobs=0, waiting_jobs=0) == [0]


def test_the_same_key_twice_in_a_list_is_one_job(connection: Connection) -> None:
    assert accept(connection, (KEYED, "print", "m1"), (KEYED, "print", "m1")) == [1, 0]
    assert oldest_first(connection, topology.LANE) == [b"m1"]


def test_the_same_key_twice_in_a_list_with_different_arguments_is_a_conflict(connection: Connection) -> None:
    with pytest.raises(CommandError, match=r"^KEYCONFLICT 1$"):
        accept(connection, (KEYED, "print", "m1"), (KEYED, "another", "m2"))
    assert everything(connection) == {}


def test_a_waiting_job_is_noted_in_its_minute_and_told_of(connection: Connection) -> None:
    ours, foreign = new_id(), "no id of ours"
    accept(
        connection,
        (ours, "", "m1", topology.LANE, "note1", "event1"),
        (foreign, "", "m2", topology.LANE, "note2", "event2"),
        told="event3",
    )
    key = topology.jobs(minute_of(ours) or 0)
    assert connection.call("HGET", key, ours) == b"note1"
    assert 0 < connection.call("TTL", key) <= 60
    now = int(connection.call("TIME")[0]) // 60
    assert b"note2" in [connection.call("HGET", topology.jobs(minute), foreign) for minute in (now, now - 1)]
    entries = connection.call("XRANGE", topology.EVENTS, "-", "+")
    assert [fields[1] for _, fields in entries] == [b"event1", b"event2", b"event3"]


def test_a_note_does_not_replace_what_a_router_has_noted(connection: Connection) -> None:
    job = new_id()
    connection.call("HSET", topology.jobs(minute_of(job) or 0), job, "placed")
    accept(connection, (job, "", "m1", topology.LANE, "waiting", ""))
    assert connection.call("HGET", topology.jobs(minute_of(job) or 0), job) == b"placed"


@pytest.mark.parametrize("lane", [topology.LANE, TENANT])
def test_a_tenants_quota_counts_what_waits_in_its_own_lane_only(connection: Connection, lane: str) -> None:
    other = TENANT if lane == topology.LANE else topology.LANE
    accept(connection, *((f"o{at}", "", "m") for at in range(5)), lane=other)
    accept(connection, ("a", "", "m1"), ("b", "", "m2", topology.lane_list(1, lane)), lane=lane, tenant_jobs=2)
    with pytest.raises(CommandError, match=r"^QUOTA jobs 2 2$"):
        accept(connection, ("c", "", "m3"), lane=lane, tenant_jobs=2)


def test_a_tenants_quota_of_bytes(connection: Connection) -> None:
    accept(connection, ("a", "", "x" * 5000), tenant_bytes=10_000)
    with pytest.raises(CommandError, match=r"^QUOTA bytes 5\d\d\d 10000$"):
        accept(connection, ("b", "", "x" * 5000), tenant_bytes=10_000)
    accept(connection, ("b", "", "x" * 5000), lane=TENANT, tenant_bytes=10_000)


def test_the_ingest_is_overloaded_by_what_waits_anywhere(connection: Connection) -> None:
    accept(connection, ("a", "", "m"))
    accept(connection, ("b", "", "m"), lane=TENANT)
    connection.call("LPUSH", topology.parked("a.b"), "m")
    connection.call("SADD", topology.PARKED, "a.b")
    call(connection, "schedule", "later", 4_000_000_000_000, "m")
    with pytest.raises(CommandError, match=r"^OVERLOADED jobs 4 4$"):
        accept(connection, ("c", "", "m"), waiting_jobs=4)
    accept(connection, ("c", "", "m"), waiting_jobs=5)
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 2)  # what was parked and scheduled by hand


def test_the_ingest_is_overloaded_by_bytes(connection: Connection) -> None:
    accept(connection, ("a", "", "x" * 5000), lane=TENANT)
    with pytest.raises(CommandError, match=r"^OVERLOADED bytes 5\d\d\d 10000$"):
        accept(connection, ("b", "", "x" * 5000), waiting_bytes=10_000)


def test_overload_is_told_before_the_quota_of_one_tenant(connection: Connection) -> None:
    with pytest.raises(CommandError, match=r"^OVERLOADED jobs 0 0$"):
        accept(connection, ("a", "", "m"), waiting_jobs=0, tenant_jobs=0)


@pytest.fixture
def limited(connection: Connection) -> Iterator[Callable[[float], None]]:
    """Sets the broker's limit to so many times what it uses."""

    def limit(times: float) -> None:
        used = int(connection.call("INFO", "memory").split(b"used_memory:")[1].split()[0])
        connection.call("CONFIG", "SET", "maxmemory", round(used * times))

    before = connection.call("CONFIG", "GET", "maxmemory")[b"maxmemory"]
    yield limit
    connection.call("CONFIG", "SET", "maxmemory", before)


def test_nothing_is_accepted_from_four_fifths_of_the_brokers_memory_on(connection: Connection, limited) -> None:
    limited(1.2)
    with pytest.raises(CommandError, match=r"^OVERLOADED memory \d+ \d+$"):
        accept(connection, ("a", "", "m"))
    limited(2)
    assert accept(connection, ("a", "", "m")) == [1]


@pytest.mark.parametrize(
    "key", [topology.EVENTS, topology.LANES, topology.ETA_MESSAGES, topology.PARKED, topology.LANE]
)
def test_a_wrong_type_refuses_an_acceptance_and_changes_nothing(connection: Connection, key: str) -> None:
    connection.call("SET", key, "something else")
    before = everything(connection)
    with pytest.raises(CommandError, match=f"^WRONGTYPE {key} "):
        accept(connection, ("a", "", "m", topology.LANE), told="event")
    assert everything(connection) == before


# -- finish ---------------------------------------------------------------------------------------------------------


def finish(connection: Connection, job: str, value: bytes, *follow_ups: str, status: str = "failed", reply: str = ""):
    return call(connection, "finish", 60, job, status, value, reply, 10**6, b"", *follow_ups)


def test_what_ends_outside_a_batch_is_stored_told_counted_and_followed(connection: Connection) -> None:
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 1)
    assert finish(connection, "a", record("a"), "theirs", "f1", "theirs", "f2", reply="lepton:reply:me") == 1
    assert connection.call("GET", topology.result("a")) == record("a")
    assert oldest_first(connection, "lepton:reply:me") == [record("a")]
    assert oldest_first(connection, "theirs") == [b"f1", b"f2"]
    assert counters(connection) == {"accepted": 1, "failed": 1}


def test_what_has_ended_already_is_counted_as_a_duplicate_and_nothing_follows(connection: Connection) -> None:
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 2)
    finish(connection, "a", record("a"))
    assert finish(connection, "a", record("a", 2), "theirs", "f1", reply="lepton:reply:me") == 0
    assert connection.call("GET", topology.result("a")) == record("a")
    assert connection.call("EXISTS", "theirs", "lepton:reply:me") == 0
    assert counters(connection) == {"accepted": 2, "failed": 1, "duplicate": 1}


def test_an_ignored_result_that_ends_twice_is_a_duplicate_and_is_followed_once(connection: Connection) -> None:
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 2)
    assert [finish(connection, "a", b"", "theirs", f"f{at}") for at in (1, 2)] == [1, 0]
    assert connection.call("EXISTS", topology.result("a")) == 0
    assert oldest_first(connection, "theirs") == [b"f1"]
    assert counters(connection) == {"accepted": 2, "failed": 1, "duplicate": 1}


def test_an_end_forgets_a_jobs_attempts_and_in_time_its_key(connection: Connection) -> None:
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 1)
    connection.call("HSET", topology.ATTEMPTS, KEYED, 2, "another", 1)
    connection.call("SET", topology.key(KEYED), "print")
    finish(connection, KEYED, record(KEYED))
    assert connection.call("HKEYS", topology.ATTEMPTS) == [b"another"]
    assert 0 < connection.call("TTL", topology.key(KEYED)) <= 60


def test_a_follow_up_whose_queue_is_none_is_a_dead_letter(connection: Connection) -> None:
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 1)
    connection.call("SET", "theirs", "something else")
    assert finish(connection, "a", record("a"), "theirs", "f1") == 1
    (letter,) = letters(connection)
    assert (letter["job"], letter["code"], letter["message"]) == ("a", "unreadable", "f1")


# -- commit ---------------------------------------------------------------------------------------------------------


def hold(connection: Connection, broker: Broker, *messages: bytes) -> None:
    """Messages that have come all the way to slot 0."""
    connection.call("LPUSH", "lepton.cpu", *messages)
    connection.call("SADD", topology.DEVICES, "cpu")
    connection.call("HINCRBY", topology.COUNTERS, "accepted", len(messages))
    assert broker.take("cpu", 0, len(messages), 1, 0.001) == list(messages)


def test_an_ignored_result_that_is_committed_twice_is_a_duplicate(connection: Connection, broker: Broker) -> None:
    for expected in ([], ["a"]):
        hold(connection, broker, b"m")
        assert broker.commit(Commit(0, 1, [Outcome("a", "succeeded", b"")], b"")) == expected
    assert counters(connection) == {"accepted": 2, "succeeded": 1, "duplicate": 1}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "ignored"])
def test_of_an_end_that_is_ignored_and_one_that_is_kept_the_first_counts(
    connection: Connection, broker: Broker, kept: bool
) -> None:
    for value in (record("a"), b"") if kept else (b"", record("a")):
        hold(connection, broker, b"m")
        broker.commit(Commit(0, 1, [Outcome("a", "succeeded", value)], b""))
    assert counters(connection) == {"accepted": 2, "succeeded": 1, "duplicate": 1}
    assert connection.call("EXISTS", topology.result("a")) == int(kept)


def test_nothing_of_what_a_duplicate_would_have_set_off_happens(connection: Connection, broker: Broker) -> None:
    hold(connection, broker, b"m1", b"m2")
    connection.call("SET", topology.result("twice"), record("twice"))
    news = event.encode(
        Event("job.succeeded", "w", "a.b", "cpu", ("twice", "once")), Event("job.dead", "w", "a.b", "cpu", ("twice",))
    )
    step = Commit(
        0,
        2,
        [Outcome("twice", "succeeded", record("twice", 2)), Outcome("once", "succeeded", record("once"))],
        news,
        [("twice", "theirs", b"no"), ("once", "theirs", b"yes")],
        [("twice", 60.0, b"no")],
        [("twice", b"no"), ("once", b"yes")],
        [DeadLetter("twice", "a.b", "retries", "no", 1, b"no")],
    )
    assert broker.commit(step) == ["twice"]
    assert oldest_first(connection, "theirs") == [b"yes"]
    assert connection.call("HGETALL", topology.CHORD_PARTS) == {b"once": b"yes"}
    assert connection.call("EXISTS", topology.ETA, topology.ETA_MESSAGES, topology.DEAD) == 0
    assert [(each.type, each.jobs) for each in told(connection)] == [("job.succeeded", ("once",))]
    assert counters(connection) == {"accepted": 2, "succeeded": 1, "duplicate": 1}


def test_a_second_copy_in_a_batch_is_counted_and_the_firsts_follow_ups_happen(
    connection: Connection, broker: Broker
) -> None:
    hold(connection, broker, b"m1", b"m2")
    outcomes = [Outcome("a", "duplicate", b""), Outcome("a", "succeeded", record("a"))]
    assert broker.commit(Commit(0, 2, outcomes, b"", [("a", "theirs", b"yes")])) == []
    assert oldest_first(connection, "theirs") == [b"yes"]
    assert counters(connection) == {"accepted": 2, "succeeded": 1, "duplicate": 1}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "ignored"])
def test_a_retry_is_held_until_its_time_and_accepted_again(connection: Connection, broker: Broker, kept: bool) -> None:
    hold(connection, broker, b"m1")
    retrying = results.encode(results.retrying("a", JobFailed("once more"), None), "json") if kept else b""
    broker.commit(Commit(0, 1, [Outcome("a", "retried", retrying)], b"", retries=[("a", 60.0, b"m2")]))
    assert connection.call("HGETALL", topology.ETA_MESSAGES) == {b"a": b"m2"}
    due_s = float(connection.call("ZSCORE", topology.ETA, "a")) / 1000 - int(connection.call("TIME")[0])
    assert 55 < due_s <= 61
    assert counters(connection) == {"accepted": 2, "retried": 1}
    assert difference(connection) == 0
    assert broker.due(["a"])[0] == 1
    assert oldest_first(connection, topology.AGAIN) == [b"m2"]
    connection.call("LMOVE", topology.AGAIN, topology.held(broker.incarnation, 0), "RIGHT", "LEFT")
    assert broker.commit(Commit(0, 1, [Outcome("a", "succeeded", record("a") if kept else b"")], b"")) == []
    assert counters(connection) == {"accepted": 2, "retried": 1, "succeeded": 1}


def test_two_retries_of_one_job_wait_as_one(connection: Connection, broker: Broker) -> None:
    for message in (b"m1", b"m2"):
        hold(connection, broker, message)
        broker.commit(Commit(0, 1, [Outcome("a", "retried", b"")], b"", retries=[("a", 60.0, message)]))
        assert difference(connection) == 0
    assert connection.call("HVALS", topology.ETA_MESSAGES) == [b"m1"]
    assert counters(connection) == {"accepted": 4, "retried": 2, "duplicate": 1}


@pytest.mark.parametrize(
    "key", [topology.ETA, topology.ETA_MESSAGES, topology.ATTEMPTS, topology.DEAD, topology.CHORD_PARTS]
)
def test_a_wrong_type_refuses_a_commit_and_changes_nothing(connection: Connection, broker: Broker, key: str) -> None:
    hold(connection, broker, b"m1")
    connection.call("SET", key, "something else")
    before = everything(connection)
    with pytest.raises(CommandError, match=f"^WRONGTYPE {key} "):
        broker.commit(Commit(0, 1, [Outcome("a", "succeeded", record("a"))], b"event"))
    assert everything(connection) == before


# -- sweep ----------------------------------------------------------------------------------------------------------


def sweep(connection: Connection, gap_ms: int = 3000, lease_ms: int = 60_000) -> list[Any]:
    found: list[Any] = call(connection, "sweep", gap_ms, lease_ms, LISTS_EACH, "me")
    return found


def test_a_sweep_finds_who_has_no_lease_and_what_they_hold(connection: Connection) -> None:
    connection.call("SET", topology.lease("alive"), "")
    connection.call("SADD", topology.HOLDERS, "alive", "one", "two")
    connection.call("LPUSH", topology.held("alive", 0), "m")
    connection.call("LPUSH", topology.held("one", 7), "m")
    connection.call("LPUSH", topology.held("two", 0), "m")
    connection.call("LPUSH", topology.held("two", 1), "m")
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 4)
    held = topology.held("one", 7).encode()
    assert sorted(sweep(connection)) == [[b"me", 0, b""], [b"one", 1, held], [b"two", 2, b""]]


def test_after_a_time_without_a_sweep_every_holder_has_a_whole_lease_to_come_back(connection: Connection) -> None:
    connection.call("SADD", topology.HOLDERS, "one")
    before = int(connection.call("TIME")[0]) * 1000 - 10_000
    connection.call("SET", topology.SWEPT, before)
    assert sweep(connection) == []
    assert 50_000 < connection.call("PTTL", "lepton:hold") <= 60_000
    assert sweep(connection) == []  # the others heed it too
    connection.call("DEL", "lepton:hold")  # as after the lease
    assert [name for name, *_ in sweep(connection)] == [b"one", b"me"]


def test_a_sweep_over_a_wrong_type_changes_nothing(connection: Connection) -> None:
    connection.call("SET", topology.HOLDERS, "something else")
    before = everything(connection)
    with pytest.raises(CommandError, match=r"^WRONGTYPE"):
        sweep(connection)
    assert everything(connection) == before


# -- recover --------------------------------------------------------------------------------------------------------


def job_message(job: str, **options: Any) -> bytes:
    return wire.envelope(job, "a.b", {"x": 1}, Options(**options))


def die(connection: Connection, dead: Broker, *messages: bytes) -> None:
    """A worker that dies while it holds these."""
    dead.announce(b"")
    hold(connection, dead, *messages)
    connection.call("DEL", topology.lease(dead.incarnation))


def follow_ups(message: bytes, meta: Meta) -> FollowUps:
    return FollowUps((("theirs", b"follow-up"),), chord_part=b"part")


def test_who_died_alone_has_an_attempt_and_comes_back_alone(connection: Connection, broker: Broker, another) -> None:
    message = job_message("a")
    die(connection, another("dead"), message)
    assert broker.recover(follow_ups) == Recovered(1, 0)
    assert connection.call("HGETALL", topology.ATTEMPTS) == {b"a": b"1"}
    assert oldest_first(connection, topology.ALONE) == [message]
    assert connection.call("EXISTS", topology.result("a"), "theirs", topology.CHORD_PARTS) == 0


def test_who_died_with_others_comes_back_alone_without_an_attempt(
    connection: Connection, broker: Broker, another
) -> None:
    messages = [job_message("a"), job_message("b")]
    die(connection, another("dead"), *messages)
    assert broker.recover(follow_ups) == Recovered(2, 0)
    assert connection.call("EXISTS", topology.ATTEMPTS) == 0
    assert oldest_first(connection, topology.ALONE) == messages


def test_with_the_last_attempt_a_job_is_a_dead_letter_and_all_is_told_at_once(
    connection: Connection, broker: Broker, another, settings: Settings
) -> None:
    message = job_message("a", reply_to="lepton:reply:me")
    dead = another("dead")
    for attempt in range(1, settings.attempts + 1):
        die(connection, dead, message)
        assert broker.recover(follow_ups) == Recovered(1, int(attempt == settings.attempts))
        assert difference(connection) == 0
        if attempt < settings.attempts:
            connection.call("DEL", topology.ALONE)
            connection.call("HINCRBY", topology.COUNTERS, "accepted", -1)  # it is the same one that goes on
    assert connection.call("EXISTS", topology.ALONE, topology.ATTEMPTS, topology.held("dead", 0)) == 0
    found = results.read(connection.call("GET", topology.result("a")))
    assert (found.status, found.result["exc_type"]) == ("FAILURE", "JobDead")
    assert [results.read(each) for each in oldest_first(connection, "lepton:reply:me")] == [found]
    assert [(each.type, each.jobs) for each in told(connection)] == [("job.dead", ("a",))]
    assert oldest_first(connection, "theirs") == [b"follow-up"]
    assert connection.call("HGETALL", topology.CHORD_PARTS) == {b"a": b"part"}
    (letter,) = letters(connection)
    assert (letter["job"], letter["kernel"], letter["code"], letter["attempts"]) == ("a", "a.b", "poison", "3")
    assert letter["message"].encode() == message
    assert counters(connection) == {"accepted": 1, "dead": 1}


def test_a_copy_of_a_job_that_has_ended_dies_without_a_dead_letter(
    connection: Connection, broker: Broker, another, settings: Settings
) -> None:
    connection.call("SET", topology.result("a"), record("a"))
    connection.call("HSET", topology.ATTEMPTS, "a", settings.attempts - 1)
    die(connection, another("dead"), job_message("a"))
    assert broker.recover(follow_ups) == Recovered(1, 0)
    assert connection.call("GET", topology.result("a")) == record("a")
    assert connection.call("EXISTS", topology.DEAD, topology.EVENTS, "theirs") == 0
    assert counters(connection) == {"accepted": 1, "duplicate": 1}


def recover(connection: Connection, how: str, held: str, message: bytes) -> list[int]:
    """As a router would, that has seen this message alone in this list."""
    told_of = event.encode(Event("job.dead", "me", jobs=("a",)))
    words = (held, message, 1, 60, 100, 10**6, "a", "a.b", "reason", record("a"), "", told_of, 9, 0, b"")
    found: list[int] = call(connection, "recover", "dead", LISTS_EACH, how, *words)
    return found


def test_where_the_list_holds_another_message_by_now_nobody_is_to_blame(connection: Connection, another) -> None:
    die(connection, another("dead"), b"another")
    assert recover(connection, "died", topology.held("dead", 0), b"m") == [1, 0]
    assert connection.call("EXISTS", topology.ATTEMPTS, topology.DEAD, topology.result("a")) == 0
    assert oldest_first(connection, topology.ALONE) == [b"another"]


def test_what_two_routers_recover_at_once_counts_once(connection: Connection, another) -> None:
    die(connection, another("dead"), b"m")
    found = [recover(connection, "died", topology.held("dead", 0), b"m") for _ in range(2)]
    assert found == [[1, 1], [0, 0]]
    assert len(letters(connection)) == 1
    assert counters(connection) == {"accepted": 1, "dead": 1}


def test_who_left_in_good_order_gives_back_unsuspected(connection: Connection, another) -> None:
    die(connection, another("dead"), b"m")
    assert recover(connection, "left", topology.held("dead", 0), b"m") == [1, 0]
    assert oldest_first(connection, topology.AGAIN) == [b"m"]
    assert connection.call("EXISTS", topology.ATTEMPTS, topology.ALONE) == 0


def test_a_claim_that_comes_back_is_counted_once_and_each_kind_goes_where_it_belongs(
    connection: Connection, broker: Broker, another
) -> None:
    dead = another("dead")
    accept(connection, ("a", "", "new"))
    connection.call("LPUSH", topology.AGAIN, "again")
    connection.call("LPUSH", topology.ALONE, "suspect")
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 2)
    for kind in Kind:
        assert len(dead.claim(kind, 0, 0, 3)) == 1
    assert difference(connection) == 0
    connection.call("DEL", topology.lease("dead"))
    assert broker.recover() == Recovered(3, 0)
    assert sorted(oldest_first(connection, topology.AGAIN)) == [b"again", b"new"]
    assert oldest_first(connection, topology.ALONE) == [b"suspect"]
    assert counters(connection) == {"accepted": 3}


@pytest.mark.parametrize("key", [topology.ALONE, topology.ATTEMPTS, topology.DEAD, topology.CHORD_PARTS])
def test_a_wrong_type_refuses_a_recovery_and_changes_nothing(connection: Connection, another, key: str) -> None:
    die(connection, another("dead"), b"m")
    connection.call("SET", key, "something else")
    before = everything(connection)
    with pytest.raises(CommandError, match=f"^WRONGTYPE {key} "):
        recover(connection, "died", topology.held("dead", 0), b"m")
    assert everything(connection) == before


# -- due, unpark, sizes ---------------------------------------------------------------------------------------------


@pytest.fixture
def scheduled(connection: Connection) -> None:
    """Two jobs that are due and one that is not."""
    for job, due_ms in (("second", 2), ("first", 1), ("later", 4_000_000_000_000)):
        assert call(connection, "schedule", job, due_ms, job) == 1
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 3)


def test_what_is_due_comes_back_the_earliest_first_and_the_rest_says_when(connection: Connection, scheduled) -> None:
    moved, next_ms = call(connection, "due", 100)
    assert moved == 2
    assert next_ms > 10**12
    assert oldest_first(connection, topology.AGAIN) == [b"first", b"second"]
    assert connection.call("HKEYS", topology.ETA_MESSAGES) == [b"later"]


def test_no_more_comes_back_at_once_than_was_asked_for(connection: Connection, scheduled) -> None:
    assert call(connection, "due", 1) == [1, 0]
    assert difference(connection) == 0
    assert call(connection, "due", 1)[0] == 1


def test_a_job_that_is_named_comes_back_before_its_time_and_others_do_not(connection: Connection, scheduled) -> None:
    assert call(connection, "due", 100, "later", "nobody") == [1, 0]
    assert oldest_first(connection, topology.AGAIN) == [b"later"]


def test_where_nothing_waits_nothing_is_due(connection: Connection) -> None:
    assert call(connection, "due", 100) == [0, -1]


def test_suspects_that_were_parked_stay_suspects(connection: Connection, broker: Broker) -> None:
    accept(connection, *((f"j{at}", "", f"m{at}") for at in range(4)))
    claim = topology.claim(broker.incarnation, 0)
    messages = broker.claim(Kind.NEW, 0, 0, 4)
    step = Dispatch({claim: 4}, {}, parked={"a.b": messages[:2]}, parked_alone={"a.b": messages[2:]})
    step.deadlines, step.counts = {"a.b": 1.0}, {"accepted": 4}
    broker.dispatch(step)
    assert difference(connection) == 0
    assert call(connection, "unpark", "a.b", 3) == 3
    assert (broker.parked_kernels(), difference(connection)) == ({"a.b"}, 0)
    assert call(connection, "unpark", "a.b", 3) == 1
    assert oldest_first(connection, topology.AGAIN) == messages[:2]
    assert oldest_first(connection, topology.ALONE) == messages[2:]
    assert connection.call("EXISTS", topology.PARKED, topology.DEADLINES) == 0


@pytest.mark.parametrize(
    ("function", "words", "key"),
    [
        ("due", (100,), topology.AGAIN),
        ("due", (100,), topology.ETA),
        ("unpark", ("a.b", 100), topology.AGAIN),
        ("unpark", ("a.b", 100), topology.ALONE),
    ],
)
def test_a_wrong_type_moves_nothing(connection: Connection, function: str, words: Any, key: str) -> None:
    call(connection, "schedule", "first", 1, "m")
    connection.call("LPUSH", topology.parked("a.b"), "m")
    connection.call("LPUSH", topology.parked_alone("a.b"), "m")
    connection.call("SADD", topology.PARKED, "a.b")
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 3)
    connection.call("DEL", key)
    connection.call("SET", key, "something else")
    before = everything(connection)
    with pytest.raises(CommandError, match=f"^WRONGTYPE {key} "):
        call(connection, function, *words)
    assert everything(connection) == before


def test_the_accounts_say_where_everything_is(connection: Connection, broker: Broker) -> None:
    accept(connection, *((f"j{at}", "", f"m{at}") for at in range(3)))
    accept(connection, ("t", "", "mt", topology.lane_list(1, TENANT)), lane=TENANT)
    broker.claim(Kind.NEW, 0, 0, 1)
    hold(connection, broker, b"held")
    connection.call("LPUSH", topology.alone_queue("cpu"), "queued")
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 1)
    found = accounts_of(call(connection, "sizes"))
    assert (found.accepted, found.waiting, found.in_flight, found.difference) == (6, 4, 2, 0)
    assert (found.terms["lanes"], found.terms["claimed"]) == (3, 1)


def test_what_was_lost_shows_as_a_difference(connection: Connection, broker: Broker) -> None:
    hold(connection, broker, b"m")
    connection.call("DEL", topology.held(broker.incarnation, 0))
    assert difference(connection) == 1
    connection.call("HINCRBY", topology.COUNTERS, "accepted", -1)


# -- blobs ----------------------------------------------------------------------------------------------------------


def blob_of(connection: Connection, job: str) -> str:
    key = f"lepton-blob:{job}:0123456789abcdef:0"
    connection.call("SET", key, "bytes")
    return key


def test_a_commit_ends_the_blobs_of_its_jobs_each_in_its_way(connection: Connection, broker: Broker) -> None:
    jobs = ["done", "dead", "open", "twice", "letter"]
    hold(connection, broker, *(job.encode() for job in jobs))
    keys = {job: blob_of(connection, job) for job in jobs}
    connection.call("EXPIRE", keys["letter"], 500)
    for job in ("twice", "letter"):
        connection.call("SET", topology.result(job), record(job))
    statuses = ("succeeded", "dead", "retried", "succeeded", "retried")
    outcomes = [Outcome(job, status, record(job, 2)) for job, status in zip(jobs, statuses, strict=True)]
    kept = [("done", 0), ("dead", 700), ("open", GOES_ON), ("twice", 0), ("letter", GOES_ON)]
    retries = [("open", 60.0, b"m")]
    broker.commit(Commit(0, 5, outcomes, b"", retries=retries, blobs=[(job, s, keys[job]) for job, s in kept]))
    assert {job: connection.call("TTL", key) for job, key in keys.items()} == {
        "done": -2,
        "dead": 700,
        "open": -1,
        "twice": 60,
        "letter": 500,
    }


def test_a_commit_that_is_refused_leaves_the_blobs_as_they_are(connection: Connection, broker: Broker) -> None:
    hold(connection, broker, b"m")
    key = blob_of(connection, "a")
    with pytest.raises(Fenced):
        broker.commit(Commit(0, 2, [Outcome("a", "succeeded", record("a"))], b"", blobs=[("a", 0, key)]))
    assert connection.call("TTL", key) == -1


@pytest.mark.parametrize("ended", [False, True], ids=["a letter", "a copy"])
def test_a_poison_jobs_blobs_last_as_long_as_its_letter(
    connection: Connection, broker: Broker, another, settings: Settings, ended: bool
) -> None:
    key = blob_of(connection, "a")
    if ended:
        connection.call("SET", topology.result("a"), record("a"))
    connection.call("HSET", topology.ATTEMPTS, "a", settings.attempts - 1)
    die(connection, another("dead"), job_message("a", blobs=("redis:0123456789abcdef:1",)))
    assert broker.recover(follow_ups) == Recovered(1, int(not ended))
    assert oldest_first(connection, "theirs") == ([] if ended else [b"follow-up"])
    assert connection.call("TTL", key) == (60 if ended else 7 * 86_400)


def test_a_suspect_that_comes_back_keeps_its_blobs(connection: Connection, broker: Broker, another) -> None:
    key = blob_of(connection, "a")
    die(connection, another("dead"), job_message("a", blobs=("redis:0123456789abcdef:1",)))
    assert broker.recover(follow_ups) == Recovered(1, 0)
    assert connection.call("TTL", key) == -1


# -- bundles --------------------------------------------------------------------------------------------------------


def bundle_message(count: int, tenant: str | None = None, kernel: str = "a.b") -> bytes:
    write = writer(kernel, Terms(), tenant, Blobs(0))
    ((found, _),) = bundled([write(job, {"x": 1}) for job in run_of(new_id(), count)])  # type: ignore[misc]
    return found


def push_bundle(connection: Connection, count: int, tenant: str | None = None) -> bytes:
    """As a client pushes it."""
    message = bundle_message(count, tenant)
    connection.many([("MULTI",), *push_commands([message], Terms(), tenant, count - 1), ("EXEC",)])
    return message


def in_lanes(connection: Connection) -> dict[str, int]:
    return {lane.decode(): int(count) for lane, count in connection.call("HGETALL", topology.BUNDLED).items()}


def placed(connection: Connection, broker: Broker, *bundles: int) -> list[bytes]:
    """Bundles that have come to the device, as a router moves them."""
    messages = [push_bundle(connection, count) for count in bundles]
    claim, extra = topology.claim(broker.incarnation, 0), sum(bundles) - len(bundles)
    assert broker.claim(Kind.NEW, 0, 0, 100) == messages
    counts = {"accepted": sum(bundles), "bundled": extra}
    step = Dispatch({claim: len(messages)}, {}, queued={"cpu": messages}, counts=counts)
    step.bundled = {topology.LANE: extra}
    broker.dispatch(step)
    return messages


def test_the_accounts_count_the_jobs_of_bundles_wherever_they_are(connection: Connection, broker: Broker) -> None:
    def seen(*names: str) -> list[int]:
        found = accounts_of(call(connection, "sizes"))
        assert (found.accepted, found.difference) == (17, 0)
        return [found.waiting, found.in_flight, *(found.terms[name] for name in names)]

    placed(connection, broker, 9)
    push_bundle(connection, 4, "ann")
    push_bundle(connection, 4, "ann")
    assert seen("lanes", "queued", "bundled") == [8, 9, 8, 1, 8]
    assert len(broker.claim(Kind.NEW, 1, 0, 1)) == 1
    assert seen("lanes", "claimed") == [8, 9, 7, 1]
    assert len(broker.take("cpu", 0, 1, 1, 0.001)) == 1
    assert seen("queued", "held", "bundled") == [8, 9, 0, 1, 8]


def test_a_commit_ends_as_many_jobs_as_its_messages_held(connection: Connection, broker: Broker) -> None:
    messages = placed(connection, broker, 9, 4, 5)
    assert broker.take("cpu", 0, 2, 1, 0.001) == messages[:2]
    jobs = [*run_of(job_in(messages[0]), 9), *run_of(job_in(messages[1]), 4)]
    step = Commit(0, 2, [Outcome(job, "succeeded", record(job)) for job in jobs], b"", bundled=11)
    assert broker.commit(step) == []
    assert counters(connection) == {"accepted": 18, "bundled": 4, "succeeded": 13}
    with pytest.raises(Fenced):
        broker.commit(step)
    assert counters(connection)["bundled"] == 4


def job_in(message: bytes) -> str:
    return wire.read_envelope(message).headers.id


def test_many_results_of_bundles_reach_their_reply_list_in_order(connection: Connection, broker: Broker) -> None:
    messages = placed(connection, broker, *[128] * 40)
    assert broker.take("cpu", 0, 40, 1, 0.001) == messages
    jobs = [job for message in messages for job in run_of(job_in(message), 128)]
    outcomes = [Outcome(job, "succeeded", record(job), topology.reply("me")) for job in jobs]
    assert broker.commit(Commit(0, 40, outcomes, b"", bundled=127 * 40)) == []
    replies = connection.call("LRANGE", topology.reply("me"), 0, -1)
    assert [results.read(each).task_id for each in replies] == jobs
    assert counters(connection)["bundled"] == 0


@pytest.mark.parametrize("tenant", [None, "ann"])
def test_the_bundles_in_the_first_claims_of_the_dead_are_counted_once(
    connection: Connection, broker: Broker, another, tenant: str | None
) -> None:
    dead, lane = another("dead"), topology.lane(tenant)
    claimed = push_bundle(connection, 9, tenant)
    assert dead.claim(Kind.NEW, 0, 0, 1) == [claimed]
    push_bundle(connection, 4, tenant)
    assert in_lanes(connection) == {lane: 11}
    connection.call("DEL", topology.lease("dead"))
    assert broker.recover() == Recovered(1, 0)
    assert in_lanes(connection) == {lane: 3}
    assert counters(connection) == {"accepted": 9, "bundled": 8}
    assert oldest_first(connection, topology.AGAIN) == [claimed]
    assert broker.claim(Kind.AGAIN, 0, 0, 1) == [claimed]
    found = accounts_of(call(connection, "sizes"))
    assert (found.accepted, found.difference, found.terms["lanes"]) == (13, 0, 4)


def test_bundles_that_come_back_from_a_later_claim_or_a_batch_are_not_counted_again(
    connection: Connection, broker: Broker, another
) -> None:
    dead = another("dead")
    (held,) = placed(connection, broker, 9)
    assert dead.take("cpu", 0, 1, 1, 0.001) == [held]
    connection.call("LPUSH", topology.AGAIN, again := bundle_message(5))
    connection.call("HINCRBY", topology.COUNTERS, "accepted", 5)
    connection.call("HINCRBY", topology.COUNTERS, "bundled", 4)
    assert dead.claim(Kind.AGAIN, 0, 0, 1) == [again]
    connection.call("DEL", topology.lease("dead"))
    assert broker.recover() == Recovered(2, 0)
    assert counters(connection) == {"accepted": 14, "bundled": 12}
    assert oldest_first(connection, topology.ALONE) == [held]
    assert connection.call("EXISTS", topology.ATTEMPTS) == 0, "none of its jobs ran alone"


@pytest.mark.parametrize(
    "message",
    [
        b'{"headers":{"lepton":{"bundle":300}}}',
        b'{"headers":{"lepton":{"bundle":1}}}',
        b'{"headers":{"lepton":{"bundle":-5}}}',
        b'{"headers":{"lepton":{"bundle":2.5}}}',
        b'{"headers":{"lepton":{"bundle":"9"}}}',
        b'{"headers":{"lepton":{"bundle":null}}}',
        b'{"headers":{"lepton":["bundle"]}}',
        b'{"headers":"bundle"}',
        b'["bundle"]',
        b'"bundle"',
        b'"bundle"' + b"[" * 5000,
        b'{"bundle":9}',
    ],
)
def test_what_is_no_bundle_in_the_claim_of_the_dead_is_one_job(
    connection: Connection, broker: Broker, another, message: bytes
) -> None:
    dead = another("dead")
    connection.call("LPUSH", topology.LANE, message)
    dead.claim(Kind.NEW, 0, 0, 1)
    connection.call("DEL", topology.lease("dead"))
    assert broker.recover() == Recovered(1, 0)
    assert counters(connection) == {"accepted": 1}
    assert in_lanes(connection) == {}


def test_a_bundle_that_names_no_lane_of_ours_is_counted_in_the_default_one(
    connection: Connection, broker: Broker, another
) -> None:
    dead = another("dead")
    message = push_bundle(connection, 4).replace(b'"routing_key":"lepton.ingest"', b'"routing_key":"elsewhere"')
    assert wire.lane_of(message) == topology.LANE
    connection.call("LSET", topology.LANE, 0, message)
    dead.claim(Kind.NEW, 0, 0, 1)
    connection.call("DEL", topology.lease("dead"))
    broker.recover()
    assert in_lanes(connection) == {topology.LANE: 0}


def test_a_sweep_forgets_what_was_counted_in_a_lane_that_was_purged(connection: Connection, broker: Broker) -> None:
    push_bundle(connection, 9, "ann")
    push_bundle(connection, 5)
    connection.call("DEL", topology.lane("ann"))
    sweep(connection)
    assert in_lanes(connection) == {topology.LANE: 4}
    assert accounts_of(call(connection, "sizes")).accepted == 5
    assert len(broker.claim(Kind.NEW, 0, 0, 1)) == 1
    sweep(connection)
    assert in_lanes(connection) == {topology.LANE: 4}, "it is in a claim"
    connection.call("DEL", topology.claim(broker.incarnation, 0))
    sweep(connection)
    assert in_lanes(connection) == {}


def test_the_jobs_of_a_bundle_are_counted_in_a_claim_whose_lane_is_forgotten(
    connection: Connection, broker: Broker
) -> None:
    push_bundle(connection, 9, "ann")
    broker.claim(Kind.NEW, 0, 0, 1)
    sweep(connection)
    assert connection.call("EXISTS", topology.LANES) == 0
    assert accounts_of(call(connection, "sizes")).accepted == 9


def test_counts_beyond_what_the_messages_can_hold_are_not_believed(connection: Connection) -> None:
    accept(connection, ("a", "", "m"), ("b", "", "m"))
    for told, believed in ((10**9, 2 * 256), (-7, 2)):
        connection.call("HSET", topology.BUNDLED, topology.LANE, told)
        assert accounts_of(call(connection, "sizes")).accepted == believed
    connection.call("DEL", topology.BUNDLED)


def test_a_quota_counts_the_jobs_of_bundles(connection: Connection) -> None:
    push_bundle(connection, 9, "t")
    accept(connection, ("a", "", "m"), lane=TENANT, tenant_jobs=10)
    with pytest.raises(CommandError, match=r"^QUOTA jobs 10 10"):
        accept(connection, ("b", "", "m"), lane=TENANT, tenant_jobs=10)
    with pytest.raises(CommandError, match=r"^OVERLOADED jobs 10 10"):
        accept(connection, ("c", "", "m"), waiting_jobs=10)


def test_a_split_of_a_claim_that_another_has_adopted_is_fenced_and_nothing_counted(
    connection: Connection, broker: Broker, another
) -> None:
    mine = another("mine")
    message = push_bundle(connection, 9)
    assert mine.claim(Kind.NEW, 0, 0, 1) == [message]
    connection.call("DEL", topology.lease("mine"))
    broker.recover()
    before = everything(connection)
    step = Dispatch({topology.claim("mine", 0): 1}, {topology.claim("mine", 0): split(message, 4)})
    step.bundled = {topology.LANE: 2}
    with pytest.raises(Fenced):
        mine.dispatch(step)
    assert everything(connection) == before


def test_two_routers_that_split_what_was_pushed_twice_count_it_twice(
    connection: Connection, broker: Broker, another
) -> None:
    """A client whose answer was lost has pushed it again."""
    other, message = another("other"), push_bundle(connection, 9)
    connection.many([("MULTI",), *push_commands([message], Terms(), None, 8), ("EXEC",)])
    for each in (broker, other):
        claim = topology.claim(each.incarnation, 0)
        assert each.claim(Kind.NEW, 0, 0, 1) == [message]
        parts = split(message, 4)
        step = Dispatch({claim: 1}, {claim: parts})
        step.bundled = {topology.LANE: len(parts) - 1}
        each.dispatch(step)
    assert in_lanes(connection) == {topology.LANE: 12}
    found = accounts_of(call(connection, "sizes"))
    assert (found.accepted, found.terms["claimed"], found.difference) == (18, 6, 0)
