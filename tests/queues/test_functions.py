"""Every server function on a real broker, called as what it is: keys and words in, one step or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import pytest

from lepton_ai import topology, wire
from lepton_ai.errors import JobDead
from lepton_ai.event import decode
from lepton_ai.identity import minute_of, new_id, new_ids
from lepton_ai.job import Options
from lepton_ai.settings import Settings
from queues import functions
from queues.broker import LISTS_EACH, Broker
from queues.connection import CommandError, Connection
from queues.recovery import Recovered

TTL_S = 1000
KEPT = 100
DEAD_BYTES = 10**6
BAND = 10**9
HELD, LEASE = topology.held("w", 0), topology.lease("w")


@pytest.fixture(autouse=True)
def _loaded(connection: Connection) -> None:
    functions.load(connection)


def call(connection: Connection, name: str, *arguments: Any, keys: Iterable[str] = ()) -> Any:
    return connection.call(*functions.call(name, tuple(keys), arguments))


def push(connection: Connection, key: str, *messages: bytes | str) -> None:
    connection.call("LPUSH", key, *messages)


def oldest_first(connection: Connection, key: str) -> list[bytes]:
    found: list[bytes] = connection.call("LRANGE", key, 0, -1)
    return found[::-1]


def everything(connection: Connection) -> dict[bytes, bytes | None]:
    """The whole broker, to see that nothing was written."""
    return {key: connection.call("DUMP", key) for key in connection.call("KEYS", "*")}


def counters(connection: Connection) -> dict[str, int]:
    return {name.decode(): int(count) for name, count in connection.call("HGETALL", topology.COUNTERS).items()}


def events(connection: Connection) -> list[bytes]:
    return [fields[1] for _, fields in connection.call("XRANGE", topology.EVENTS, "-", "+")]


def letters(connection: Connection) -> list[dict[str, bytes]]:
    return [
        {name.decode(): value for name, value in zip(fields[::2], fields[1::2], strict=True)}
        for _, fields in connection.call("XRANGE", topology.DEAD, "-", "+")
    ]


def sizes(connection: Connection) -> dict[str, int]:
    reply = call(connection, "sizes", LISTS_EACH)
    return {name.decode(): value for name, value in zip(reply[::2], reply[1::2], strict=True)}


def record(job: str, status: str = "SUCCESS") -> bytes:
    return b'{"status":"%s","task_id":"%s"}' % (status.encode(), job.encode())


# -- accept -----------------------------------------------------------------------------------------------------------


class Limits(msgspec.Struct, frozen=True):
    """What may wait; by default everything."""

    waiting_jobs: int = BAND
    waiting_bytes: int = BAND
    tenant_jobs: int = BAND
    tenant_bytes: int = BAND


def accept(
    connection: Connection,
    *jobs: tuple[str | bytes, ...],
    lane: str = topology.LANE,
    limits: Limits = Limits(),  # noqa: B008
    event: str = "",
) -> list[int]:
    """Jobs are (list, id, fingerprint, note, event, message), or the first two of these."""
    filled = [(*job, "", "", "", b"message of " + str(job[1]).encode())[:6] if len(job) == 2 else job for job in jobs]
    words = [word for job in filled for word in job]
    found: list[int] = call(
        connection, "accept", TTL_S, KEPT, *msgspec.structs.astuple(limits), lane, event, len(jobs), *words
    )
    return found


def keyed(job: str, fingerprint: str) -> tuple[str, ...]:
    return (topology.LANE, job, fingerprint, "", "", "message of " + job)


def test_accepted_jobs_wait_in_their_lists_in_order(connection: Connection) -> None:
    high = topology.lane_list(9)
    assert accept(connection, (topology.LANE, "a"), (high, "b"), (topology.LANE, "c")) == [1, 1, 1]
    assert oldest_first(connection, topology.LANE) == [b"message of a", b"message of c"]
    assert oldest_first(connection, high) == [b"message of b"]


def test_what_is_accepted_is_told_once_for_all_and_for_each(connection: Connection) -> None:
    accept(connection, (topology.LANE, "a", "", "", "event of a", "m"), (topology.LANE, "b"), event="event of all")
    assert events(connection) == [b"event of a", b"event of all"]


def test_a_job_with_a_key_is_accepted_once(connection: Connection) -> None:
    assert accept(connection, keyed("a", "one")) == [1]
    assert accept(connection, keyed("a", "one"), keyed("b", "two")) == [0, 1]
    assert oldest_first(connection, topology.LANE) == [b"message of a", b"message of b"]
    assert connection.call("GET", topology.key("a")) == b"one"
    assert 30 * 86_400 < connection.call("TTL", topology.key("a")) <= 31 * 86_400


def test_a_key_twice_in_one_call_is_one_job(connection: Connection) -> None:
    assert accept(connection, keyed("a", "one"), keyed("b", "two"), keyed("a", "one")) == [1, 1, 0]
    assert connection.call("LLEN", topology.LANE) == 2


@pytest.mark.parametrize("before", [True, False], ids=["earlier", "in the same call"])
def test_a_key_that_stands_for_another_job_refuses_all_and_names_it(connection: Connection, before: bool) -> None:
    jobs = [keyed("a", "one")]
    if before:
        accept(connection, *jobs)
        jobs = [keyed("b", "two")]
    left = everything(connection)
    with pytest.raises(CommandError, match=r"KEYCONFLICT 1"):
        accept(connection, *jobs, keyed("a", "other"), event="told")
    assert everything(connection) == left


def test_a_note_stands_in_the_minute_of_its_job_and_never_over_another(connection: Connection) -> None:
    ours, foreign = new_id(), "foreign"
    key = topology.jobs(minute_of(ours) or 0)
    connection.call("HSET", key, "noted", "earlier")
    accept(
        connection,
        (topology.LANE, ours, "", "note", "", "m"),
        (topology.LANE, foreign, "", "note of a foreign id", "", "m"),
        (topology.LANE, "noted", "", "later", "", "m"),
    )
    seconds, _ = connection.call("TIME")
    this_minute = topology.jobs(int(seconds) // 60)
    assert connection.call("HGET", key, ours) == b"note"
    assert b"note of a foreign id" in (connection.call("HGET", name, foreign) for name in {key, this_minute})
    if key == this_minute:
        assert connection.call("HGET", key, "noted") == b"earlier"
    assert 0 < connection.call("TTL", key) <= TTL_S


def test_a_tenants_lane_is_known_from_its_first_job_on(connection: Connection) -> None:
    lane = topology.lane("tenant")
    accept(connection, (topology.lane_list(9, lane), "a"), lane=lane)
    accept(connection, (topology.LANE, "b"))
    assert set(connection.call("SMEMBERS", topology.LANES)) == {lane.encode()}
    assert sizes(connection)["lanes"] == 2


@pytest.mark.parametrize("lane", [topology.LANE, topology.lane("tenant")])
def test_a_lane_with_its_quota_of_jobs_takes_no_more_and_says_how_many_wait(connection: Connection, lane: str) -> None:
    limits = Limits(tenant_jobs=3)
    for priority in (1, 9):
        accept(connection, (topology.lane_list(priority, lane), f"p{priority}"), lane=lane, limits=limits)
    left = everything(connection)
    with pytest.raises(CommandError, match=r"QUOTA jobs 2 3"):
        accept(connection, (lane, "a"), (lane, "b"), lane=lane, limits=limits)
    assert everything(connection) == left
    assert accept(connection, (lane, "a"), lane=lane, limits=limits) == [1]


def test_one_lanes_quota_is_not_anothers(connection: Connection) -> None:
    limits, lane = Limits(tenant_jobs=1), topology.lane("tenant")
    accept(connection, (topology.LANE, "a"), limits=limits)
    assert accept(connection, (lane, "b"), lane=lane, limits=limits) == [1]


@pytest.mark.parametrize("lane", [topology.LANE, topology.lane("tenant")])
def test_a_lane_with_its_quota_of_bytes_takes_no_more(connection: Connection, lane: str) -> None:
    limits = Limits(tenant_bytes=50_000)
    accept(connection, (lane, "a", "", "", "", bytes(30_000)), lane=lane, limits=limits)
    left = everything(connection)
    with pytest.raises(CommandError, match=r"QUOTA bytes \d+ 50000"):
        accept(connection, (lane, "b", "", "", "", bytes(30_000)), lane=lane, limits=limits)
    assert everything(connection) == left
    assert accept(connection, (lane, "c", "", "", "", bytes(10_000)), lane=lane, limits=limits) == [1]


def test_all_lanes_together_have_their_limit_of_jobs(connection: Connection) -> None:
    limits, lane = Limits(waiting_jobs=2), topology.lane("tenant")
    accept(connection, (topology.LANE, "a"), limits=limits)
    accept(connection, (lane, "b"), lane=lane, limits=limits)
    left = everything(connection)
    with pytest.raises(CommandError, match=r"OVERLOADED jobs 2 2"):
        accept(connection, (topology.LANE, "c"), limits=limits)
    assert everything(connection) == left


def test_all_lanes_together_have_their_limit_of_bytes(connection: Connection) -> None:
    limits, lane = Limits(waiting_bytes=50_000), topology.lane("tenant")
    accept(connection, (lane, "a", "", "", "", bytes(30_000)), lane=lane, limits=limits)
    left = everything(connection)
    with pytest.raises(CommandError, match=r"OVERLOADED bytes \d+ 50000"):
        accept(connection, (topology.LANE, "b", "", "", "", bytes(30_000)), limits=limits)
    assert everything(connection) == left


def test_what_is_known_already_needs_no_room(connection: Connection) -> None:
    accept(connection, keyed("a", "one"))
    assert accept(connection, keyed("a", "one"), limits=Limits(waiting_jobs=1, tenant_jobs=1)) == [0]


@pytest.fixture
def maxmemory(connection: Connection) -> Iterator[Callable[[float], int]]:
    """Sets the broker's memory limit to so many times what it uses now."""

    def set_to(times: float) -> int:
        used = int(connection.call("INFO", "memory").split(b"used_memory:")[1].split(b"\r")[0])
        connection.call("CONFIG", "SET", "maxmemory", round(times * used))
        return round(times * used)

    before = connection.call("CONFIG", "GET", "maxmemory")[b"maxmemory"]
    yield set_to
    connection.call("CONFIG", "SET", "maxmemory", before)


def test_a_broker_that_is_four_fifths_full_takes_no_more(
    connection: Connection, maxmemory: Callable[[float], int]
) -> None:
    left = everything(connection)
    maxmemory(1.2)
    with pytest.raises(CommandError, match=r"OVERLOADED memory \d+ \d+"):
        accept(connection, (topology.LANE, "a"))
    assert everything(connection) == left
    maxmemory(1.4)
    assert accept(connection, (topology.LANE, "a")) == [1]


@pytest.mark.parametrize(("limits", "share"), [(Limits(waiting_bytes=0), 4), (Limits(tenant_bytes=0), 10)])
def test_without_a_limit_of_bytes_it_is_a_share_of_the_brokers_memory(
    connection: Connection, maxmemory: Callable[[float], int], limits: Limits, share: int
) -> None:
    most = maxmemory(16)
    half = bytes(int(0.6 * most / share))
    assert accept(connection, (topology.LANE, "a", "", "", "", half), limits=limits) == [1]
    with pytest.raises(CommandError, match=r"(QUOTA|OVERLOADED) bytes"):
        accept(connection, (topology.LANE, "b", "", "", "", half), limits=limits)


def test_a_broker_without_a_memory_limit_has_no_share_of_it(connection: Connection) -> None:
    limits = Limits(waiting_bytes=0, tenant_bytes=0)
    assert accept(connection, (topology.LANE, "a", "", "", "", bytes(10**6)), limits=limits) == [1]


# -- commit -----------------------------------------------------------------------------------------------------------


def hold(connection: Connection, *messages: str, lease: bool = True) -> None:
    """A batch that the worker `w` holds in its first slot."""
    connection.call("DEL", HELD)
    push(connection, HELD, *messages)
    connection.call("SADD", topology.HOLDERS, "w")
    if lease:
        connection.call("SET", LEASE, "")


def section(rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    found = list(rows)
    return [len(found), *(word for row in found for word in row)]


def commit(
    connection: Connection,
    n: int,
    *outcomes: tuple[Any, ...],
    pushes: Iterable[tuple[Any, ...]] = (),
    retries: Iterable[tuple[Any, ...]] = (),
    parts: Iterable[tuple[Any, ...]] = (),
    dead: Iterable[tuple[Any, ...]] = (),
) -> list[str]:
    sections = [*section(outcomes), *section(pushes), *section(retries), *section(parts), *section(dead)]
    found = call(connection, "commit", n, TTL_S, KEPT, DEAD_BYTES, "event", *sections, keys=(HELD, LEASE))
    return [job.decode() for job in found]


def won(job: str, reply: str = "") -> tuple[Any, ...]:
    return (job, "succeeded", record(job), reply)


def test_a_commit_does_all_that_a_batch_sets_off(connection: Connection) -> None:
    hold(connection, "m0", "m1", "m2")
    connection.call("HSET", topology.ATTEMPTS, "a", 1, "b", 1, "c", 1)
    duplicates = commit(
        connection,
        3,
        won("a", "lepton:reply:me"),
        ("b", "retried", record("b", "RETRY"), ""),
        ("c", "dead", record("c", "FAILURE"), "lepton:reply:me"),
        pushes=[("a", topology.LANE, "follow-up"), ("a", "lepton:again", "another")],
        retries=[("b", 60_000, "m1 once more")],
        parts=[("a", "part of a")],
        dead=[("c", "a.b", "retries", "it failed 4 times", 4, "Traceback", "m2")],
    )
    assert duplicates == []
    assert connection.call("EXISTS", HELD) == 0
    assert [connection.call("GET", topology.result(job)) for job in "abc"] == [
        record("a"),
        record("b", "RETRY"),
        record("c", "FAILURE"),
    ]
    assert connection.call("LRANGE", "lepton:reply:me", 0, -1) == [record("a"), record("c", "FAILURE")]
    assert oldest_first(connection, topology.LANE) == [b"follow-up"]
    assert oldest_first(connection, topology.AGAIN) == [b"another"]
    assert connection.call("HGETALL", topology.ETA_MESSAGES) == {b"b": b"m1 once more"}
    assert connection.call("HGETALL", topology.CHORD_PARTS) == {b"a": b"part of a"}
    assert connection.call("HGETALL", topology.ATTEMPTS) == {b"b": b"1"}
    (letter,) = letters(connection)
    assert (letter["job"], letter["code"], letter["attempts"], letter["trace"], letter["message"]) == (
        b"c",
        b"retries",
        b"4",
        b"Traceback",
        b"m2",
    )
    assert counters(connection) == {"succeeded": 1, "retried": 1, "dead": 1, "accepted": 1}
    assert events(connection) == [b"event"]


def test_a_retry_is_due_after_its_delay_by_the_servers_clock(connection: Connection) -> None:
    hold(connection, "m")
    seconds, _ = connection.call("TIME")
    commit(connection, 1, ("a", "retried", b"", ""), retries=[("a", 60_000, "m")])
    assert 60_000 <= float(connection.call("ZSCORE", topology.ETA, "a")) - 1000 * int(seconds) < 70_000


def test_a_retry_tells_nobody_who_waits(connection: Connection) -> None:
    hold(connection, "m")
    commit(connection, 1, ("a", "retried", record("a", "RETRY"), "lepton:reply:me"), retries=[("a", 0, "m")])
    assert connection.call("EXISTS", "lepton:reply:me") == 0


def test_a_record_that_is_not_final_is_overwritten(connection: Connection) -> None:
    hold(connection, "m")
    commit(connection, 1, ("a", "retried", record("a", "RETRY"), ""), retries=[("a", 0, "m")])
    hold(connection, "m")
    assert commit(connection, 1, won("a")) == []
    assert connection.call("GET", topology.result("a")) == record("a")
    assert 0 < connection.call("TTL", topology.result("a")) <= TTL_S


def test_nothing_of_what_a_duplicate_would_have_set_off_happens(connection: Connection) -> None:
    connection.call("SET", topology.result("a"), record("a"))
    hold(connection, "m0", "m1")
    left = everything(connection)
    duplicates = commit(
        connection,
        2,
        ("a", "failed", record("a", "FAILURE"), "lepton:reply:me"),
        won("b"),
        pushes=[("a", topology.LANE, "follow-up"), ("b", "lepton.other", "follow-up of b")],
        retries=[("a", 0, "m0")],
        parts=[("a", "part")],
        dead=[("a", "a.b", "retries", "it failed", 4, "", "m0")],
    )
    assert duplicates == ["a"]
    new = everything(connection).keys() - left.keys()
    assert new == {b"celery-task-meta-b", b"lepton.other", b"lepton:counters", b"lepton:events"}
    assert connection.call("GET", topology.result("a")) == record("a")
    assert counters(connection) == {"duplicate": 1, "succeeded": 1}


def test_a_second_retry_of_a_job_that_waits_for_its_first_is_a_duplicate(connection: Connection) -> None:
    hold(connection, "m0", "m1")
    outcomes = [("a", "retried", record("a", "RETRY"), "")] * 2
    commit(connection, 2, *outcomes, retries=[("a", 60_000, "first"), ("a", 0, "second")])
    assert connection.call("HGETALL", topology.ETA_MESSAGES) == {b"a": b"first"}
    assert counters(connection) == {"retried": 2, "accepted": 2, "duplicate": 1}


def test_a_follow_up_onto_a_key_of_another_type_becomes_a_dead_letter(connection: Connection) -> None:
    connection.call("SET", "lepton.other", "no list")
    hold(connection, "m")
    commit(connection, 1, won("a"), pushes=[("a", "lepton.other", "lost?"), ("a", topology.LANE, "second")])
    (letter,) = letters(connection)
    assert (letter["job"], letter["code"], letter["message"]) == (b"a", b"unreadable", b"lost?")
    assert b"lepton.other" in letter["reason"]
    assert oldest_first(connection, topology.LANE) == [b"second"]
    assert connection.call("GET", "lepton.other") == b"no list"


@pytest.mark.parametrize("why", ["lease", "one more", "one less", "gone"])
def test_a_fenced_commit_writes_nothing(connection: Connection, why: str) -> None:
    hold(connection, "m0", "m1", lease=why != "lease")
    if why == "gone":
        connection.call("DEL", HELD)
    left = everything(connection)
    with pytest.raises(CommandError, match="FENCED"):
        commit(
            connection,
            {"one more": 1, "one less": 3}.get(why, 2),
            won("a"),
            pushes=[("a", topology.LANE, "follow-up")],
            retries=[("b", 0, "m")],
            parts=[("a", "part")],
            dead=[("c", "", "", "", 0, "", "m")],
        )
    assert everything(connection) == left


def test_a_key_of_a_job_is_kept_as_long_as_its_result(connection: Connection) -> None:
    job = "2c1de8b4-5f3e-5b6f-8b6e-3f6c2f0f8f6b"
    connection.call("SET", topology.key(job), "fingerprint", "EX", 31 * 86_400)
    hold(connection, "m")
    commit(connection, 1, ("x", "retried", b"", ""))
    assert connection.call("TTL", topology.key(job)) > TTL_S
    hold(connection, "m")
    commit(connection, 1, won(job))
    assert 0 < connection.call("TTL", topology.key(job)) <= TTL_S


# -- finish and bury --------------------------------------------------------------------------------------------------


def test_a_job_is_finished_once_and_its_waiter_told_once(connection: Connection) -> None:
    connection.call("HSET", topology.ATTEMPTS, "a", 2)
    first, second = record("a", "REVOKED"), record("a", "FAILURE")
    assert call(connection, "finish", TTL_S, "a", "expired", first, "lepton:reply:me") == 1
    assert call(connection, "finish", TTL_S, "a", "failed", second, "lepton:reply:me") == 0
    assert connection.call("GET", topology.result("a")) == first
    assert connection.call("LRANGE", "lepton:reply:me", 0, -1) == [first]
    assert counters(connection) == {"expired": 1, "duplicate": 1}
    assert connection.call("EXISTS", topology.ATTEMPTS) == 0


def test_an_ignored_result_is_only_counted(connection: Connection) -> None:
    assert call(connection, "finish", TTL_S, "a", "cancelled", b"", "lepton:reply:me") == 1
    assert everything(connection).keys() == {b"lepton:counters"}
    assert counters(connection) == {"cancelled": 1}


def bury(connection: Connection, job: str, message: bytes, most: int = DEAD_BYTES) -> None:
    call(connection, "bury", most, job, "a.b", "poison", "it killed", 3, "", message)


def test_a_dead_letter_says_whose_it_is_and_why(connection: Connection) -> None:
    bury(connection, "a", b"message")
    assert letters(connection) == [
        {
            "job": b"a",
            "kernel": b"a.b",
            "code": b"poison",
            "reason": b"it killed",
            "attempts": b"3",
            "trace": b"",
            "message": b"message",
        }
    ]
    assert counters(connection) == {"dead": 1}


@pytest.mark.parametrize(
    ("first", "then"), [((0, 0), (100, 10_000)), ((500, 100), (20, 50_000)), ((10, 50_000), (500, 100))]
)
def test_dead_letters_take_no_more_than_their_cap_and_the_oldest_go(
    connection: Connection, first: tuple[int, int], then: tuple[int, int]
) -> None:
    for count, size in (first, then):
        for at in range(count):
            bury(connection, f"{size}-{at}", bytes(size), 300_000)
    assert 50_000 < connection.call("MEMORY", "USAGE", topology.DEAD, "SAMPLES", 0) < 330_000
    assert letters(connection)[-1]["job"] == f"{then[1]}-{then[0] - 1}".encode()
    assert 0 < connection.call("XLEN", topology.DEAD) < first[0] + then[0]


def test_one_dead_letter_is_kept_however_large(connection: Connection) -> None:
    for job in ("a", "b"):
        bury(connection, job, bytes(10_000), 1000)
    assert [letter["job"] for letter in letters(connection)] == [b"b"]


def test_letters_that_somebody_deleted_make_room(connection: Connection) -> None:
    for at in range(25):
        bury(connection, f"old-{at}", bytes(10_000), 300_000)
    connection.call("XTRIM", topology.DEAD, "MAXLEN", 0)
    for at in range(25):
        bury(connection, f"new-{at}", bytes(10_000), 300_000)
    assert connection.call("XLEN", topology.DEAD) == 25


# -- release ----------------------------------------------------------------------------------------------------------


def test_what_is_released_goes_where_its_flag_says_in_its_order(connection: Connection) -> None:
    hold(connection, *"abcdef")
    assert call(connection, "release", 6, "!.=.!=", keys=(HELD, LEASE)) == 6
    assert oldest_first(connection, topology.ALONE) == [b"a", b"e"]
    assert oldest_first(connection, topology.AGAIN) == [b"b", b"d"]
    assert oldest_first(connection, HELD) == [b"c", b"f"]


@pytest.mark.parametrize("why", ["lease", "number"])
def test_a_fenced_release_moves_nothing(connection: Connection, why: str) -> None:
    hold(connection, *"ab", lease=why != "lease")
    left = everything(connection)
    with pytest.raises(CommandError, match="FENCED"):
        call(connection, "release", 2 if why == "lease" else 3, "...", keys=(HELD, LEASE))
    assert everything(connection) == left


# -- sweep ------------------------------------------------------------------------------------------------------------

GAP_MS, LEASE_MS = 3000, 5000


def sweep(connection: Connection, own: str = "w") -> dict[str, tuple[int, str]]:
    found = call(connection, "sweep", GAP_MS, LEASE_MS, LISTS_EACH, own)
    return {name.decode(): (total, only.decode()) for name, total, only in found}


def last_swept(connection: Connection, ms_ago: int) -> None:
    seconds, microseconds = connection.call("TIME")
    connection.call("SET", topology.SWEPT, 1000 * int(seconds) + int(microseconds) // 1000 - ms_ago)


def test_a_sweep_finds_who_has_no_lease_and_what_he_holds(connection: Connection) -> None:
    connection.call("SADD", topology.HOLDERS, "alive", "bare", "lone", "many", "claiming")
    connection.call("SET", topology.lease("alive"), "")
    push(connection, topology.held("alive", 0), "m")
    push(connection, topology.held("lone", 7), "m")
    push(connection, topology.held("many", 0), "m")
    push(connection, topology.held("many", 1), "m", "m")
    push(connection, topology.claim("claiming", 0), "m")
    assert sweep(connection, "bare") == {
        "bare": (0, ""),
        "lone": (1, topology.held("lone", 7)),
        "many": (3, ""),
        "claiming": (0, ""),
    }


def test_one_who_sweeps_is_looked_after_even_if_he_was_forgotten(connection: Connection) -> None:
    push(connection, topology.held("me", 0), "m")
    assert sweep(connection, "me") == {"me": (1, topology.held("me", 0))}


def test_after_a_time_without_a_sweep_everybody_has_a_lease_to_come_back(connection: Connection) -> None:
    connection.call("SADD", topology.HOLDERS, "w")
    last_swept(connection, GAP_MS - 1000)
    assert sweep(connection).keys() == {"w"}
    last_swept(connection, GAP_MS + 1000)
    assert sweep(connection) == {}
    assert 0 < connection.call("PTTL", "lepton:hold") <= LEASE_MS
    assert sweep(connection) == {}, "and for as long as that lasts"
    connection.call("DEL", "lepton:hold")  # as when the lease is over
    assert sweep(connection).keys() == {"w"}


def test_the_first_sweep_of_all_holds_nothing_back(connection: Connection) -> None:
    connection.call("SADD", topology.HOLDERS, "w")
    assert sweep(connection).keys() == {"w"}


def test_sweeping_goes_by_the_servers_clock(connection: Connection) -> None:
    before = time.time()
    sweep(connection)
    seconds, _ = connection.call("TIME")
    swept = int(connection.call("GET", topology.SWEPT)) / 1000
    assert int(seconds) - 5 < swept < int(seconds) + 1
    assert before - 60 < swept


def test_a_note_of_the_last_sweep_that_is_none_harms_nobody(connection: Connection) -> None:
    connection.call("SADD", topology.HOLDERS, "w")
    push(connection, topology.SWEPT, "no time")
    assert sweep(connection).keys() == {"w"}


# -- recover ----------------------------------------------------------------------------------------------------------


def recover(connection: Connection, how: str, *suspect: Any) -> tuple[int, int]:
    moved, dead = call(connection, "recover", "w", LISTS_EACH, how, *(suspect or ("",)))
    return moved, dead


def suspect(
    list_: str = HELD, *, limit: int = 3, job: str = "a", reply: str = "", message: str = "m"
) -> tuple[Any, ...]:
    told = record(job, "FAILURE")
    return (list_, limit, TTL_S, KEPT, DEAD_BYTES, job, "a.b", "it killed 3 workers", told, reply, "event", message)


def claims(connection: Connection) -> None:
    """A claim of each kind."""
    for kind in ("claim", "reclaim", "suspects"):
        push(connection, topology.claim("w", 0, kind), f"{kind}0", f"{kind}1")


@pytest.mark.parametrize("how", ["died", "left"])
def test_claims_go_back_to_where_what_came_back_waits(connection: Connection, how: str) -> None:
    claims(connection)
    assert recover(connection, how) == (6, 0)
    assert oldest_first(connection, topology.AGAIN) == [b"claim0", b"claim1", b"reclaim0", b"reclaim1"]
    assert oldest_first(connection, topology.ALONE) == [b"suspects0", b"suspects1"]
    assert counters(connection) == {"accepted": 2}, "what comes from a lane is counted when it leaves its claim"


@pytest.mark.parametrize(("how", "target"), [("died", topology.ALONE), ("left", topology.AGAIN)])
def test_a_batch_is_suspected_where_its_worker_died_and_not_where_it_left(
    connection: Connection, how: str, target: str
) -> None:
    hold(connection, *"abc", lease=False)
    assert recover(connection, how) == (3, 0)
    assert oldest_first(connection, target) == [b"a", b"b", b"c"]
    assert connection.call("EXISTS", topology.ATTEMPTS) == 0


def test_one_that_was_alone_counts_an_attempt_and_is_tried_again(connection: Connection) -> None:
    for attempts in (1, 2):
        hold(connection, "m", lease=False)
        assert recover(connection, "died", *suspect()) == (1, 0)
        assert connection.call("HGETALL", topology.ATTEMPTS) == {b"a": b"%d" % attempts}
        assert connection.call("RPOP", topology.ALONE) == b"m"
    assert connection.call("EXISTS", topology.DEAD, topology.result("a")) == 0


@pytest.mark.parametrize("reply", ["", "lepton:reply:me"])
def test_after_its_last_attempt_it_is_a_dead_letter_and_its_waiter_is_told(connection: Connection, reply: str) -> None:
    connection.call("HSET", topology.ATTEMPTS, "a", 2)
    hold(connection, "m", lease=False)
    assert recover(connection, "died", *suspect(reply=reply)) == (1, 1)
    (letter,) = letters(connection)
    assert (letter["job"], letter["kernel"], letter["code"]) == (b"a", b"a.b", b"poison")
    assert (letter["reason"], letter["attempts"], letter["message"]) == (b"it killed 3 workers", b"3", b"m")
    assert connection.call("GET", topology.result("a")) == record("a", "FAILURE")
    assert connection.call("LRANGE", "lepton:reply:me", 0, -1) == ([record("a", "FAILURE")] if reply else [])
    assert (counters(connection), events(connection)) == ({"dead": 1}, [b"event"])
    assert connection.call("EXISTS", topology.ATTEMPTS, topology.ALONE, topology.AGAIN, HELD) == 0


def test_one_that_has_its_result_already_is_no_dead_letter(connection: Connection) -> None:
    connection.call("SET", topology.result("a"), record("a"))
    hold(connection, "m", lease=False)
    assert recover(connection, "died", *suspect(limit=1)) == (1, 1)
    assert counters(connection) == {"duplicate": 1}
    assert connection.call("GET", topology.result("a")) == record("a")
    assert connection.call("EXISTS", topology.DEAD, topology.ATTEMPTS, topology.EVENTS, HELD) == 0


def test_who_left_counts_no_attempt_even_if_he_held_one(connection: Connection) -> None:
    hold(connection, "m", lease=False)
    assert recover(connection, "left", *suspect(limit=1)) == (1, 0)
    assert connection.call("EXISTS", topology.ATTEMPTS, topology.DEAD) == 0


@pytest.mark.parametrize("change", ["one more", "another", "gone", "a lease"])
def test_what_has_changed_since_the_sweep_counts_no_attempt(connection: Connection, change: str) -> None:
    hold(connection, "m", lease=change == "a lease")
    if change == "one more":
        push(connection, HELD, "n")
    if change in ("another", "gone"):
        connection.call("DEL", HELD)
    if change == "another":
        push(connection, HELD, "n")
    recover(connection, "died", *suspect(limit=1))
    assert connection.call("EXISTS", topology.ATTEMPTS, topology.DEAD, topology.result("a")) == 0


def test_a_holder_with_a_lease_is_left_alone(connection: Connection) -> None:
    hold(connection, "m")
    claims(connection)
    left = everything(connection)
    assert recover(connection, "died", *suspect(limit=1)) == (0, 0)
    assert everything(connection) == left


def test_a_death_is_recovered_once_however_many_do_it(connection: Connection, broker_url: str) -> None:
    hold(connection, "m", lease=False)
    claims(connection)
    others = [Connection(broker_url, f"router-{at}") for at in range(8)]
    command = functions.call("recover", (), ("w", LISTS_EACH, "died", *suspect()))
    for other in others:
        other.send([command] * 5)
    replies = [tuple(reply) for other in others for reply in other.receive(5)]
    assert max(replies) == (7, 0)
    assert sum(moved for moved, _ in replies) == 7
    assert connection.call("HGETALL", topology.ATTEMPTS) == {b"a": b"1"}
    for other in others:
        other.close()


def test_every_list_that_one_may_have_is_looked_at(connection: Connection) -> None:
    for number in range(LISTS_EACH):
        push(connection, topology.held("w", number), f"h{number}")
        for kind in ("claim", "reclaim", "suspects"):
            push(connection, topology.claim("w", number, kind), f"{kind}{number}")
    assert recover(connection, "died") == (4 * LISTS_EACH, 0)
    assert connection.call("LLEN", topology.AGAIN) == connection.call("LLEN", topology.ALONE) == 2 * LISTS_EACH


def test_a_held_list_that_is_none_keeps_nothing_else_back(connection: Connection) -> None:
    connection.call("SET", topology.held("w", 3), "no list")
    hold(connection, *"ab", lease=False)
    assert recover(connection, "died") == (2, 0)


def test_a_holder_is_forgotten_once_he_was_found_empty_for_a_while(connection: Connection) -> None:
    hold(connection, "m", lease=False)
    recover(connection, "died")
    recover(connection, "died")
    assert connection.call("SISMEMBER", topology.HOLDERS, "w")
    connection.call("PEXPIRE", "lepton:empty:w", 20_000)  # as after 40 of the 60 seconds
    recover(connection, "died")
    assert not connection.call("SISMEMBER", topology.HOLDERS, "w")


def test_a_router_knows_from_the_message_how_to_end_a_suspect_for_good(
    connection: Connection, broker: Broker, settings: Settings
) -> None:
    job = new_id()
    message = wire.envelope(job, "a.b", {"n": 1}, Options(reply_to="lepton:reply:me", result="msgpack"))
    for attempt in range(1, settings.attempts + 1):
        hold(connection, message, lease=False)
        found = broker.recover()
        assert found == Recovered(1, int(attempt == settings.attempts))
        connection.call("DEL", topology.ALONE)
    meta = wire.read_meta(connection.call("RPOP", "lepton:reply:me"))
    assert (meta.task_id, meta.status, meta.lepton.error["code"]) == (job, "FAILURE", JobDead.code)
    (letter,) = letters(connection)
    assert (letter["job"], letter["kernel"], letter["message"]) == (job.encode(), b"a.b", message)
    (told,) = decode(events(connection)[-1])
    assert (told.type, told.jobs, told.kernel) == ("job.dead", (job,), "a.b")
    assert (told.data["code"], told.data["attempts"]) == ("dead", settings.attempts)


def test_what_is_no_job_counts_no_attempt_and_is_not_lost(connection: Connection, broker: Broker) -> None:
    hold(connection, "no message", lease=False)
    assert broker.recover() == Recovered(1, 0)
    assert oldest_first(connection, topology.ALONE) == [b"no message"]
    assert connection.call("EXISTS", topology.ATTEMPTS) == 0


def test_a_job_whose_options_cannot_be_read_still_counts_its_attempts(
    connection: Connection, broker: Broker, settings: Settings
) -> None:
    message = wire.envelope("a", "a.b", {"n": 1}, Options()).replace(b'"lepton":{', b'"lepton":{"colour":"red",')
    connection.call("HSET", topology.ATTEMPTS, "a", settings.attempts - 1)
    hold(connection, message, lease=False)
    assert broker.recover() == Recovered(1, 1)
    assert wire.read_meta(connection.call("GET", topology.result("a"))).status == "FAILURE"


# -- move and transact ------------------------------------------------------------------------------------------------


def test_messages_are_moved_from_the_first_lists_first_and_looked_after(connection: Connection) -> None:
    push(connection, "one", *"ab")
    push(connection, "two", *"cd")
    assert call(connection, "move", 3, "w", keys=("target", "one", "none", "two")) == [b"a", b"b", b"c"]
    assert oldest_first(connection, "target") == [b"a", b"b", b"c"]
    assert oldest_first(connection, "two") == [b"d"]
    assert connection.call("SISMEMBER", topology.HOLDERS, "w")


def transact(connection: Connection, lengths: dict[str, int], *commands: tuple[Any, ...]) -> int:
    words = [word for command in commands for word in (len(command), *command)]
    found: int = call(connection, "transact", *lengths.values(), *words, keys=lengths)
    return found


def test_a_transaction_does_its_commands_and_those_of_ours_among_them(connection: Connection) -> None:
    push(connection, "one", "a")
    done = transact(
        connection,
        {"one": 1, "none": 0},
        ("DEL", "one"),
        ("LPUSH", "two", "a", "b"),
        functions.call("schedule", (), ("j", 5, "later")),
        functions.call("finish", (), (TTL_S, "k", "failed", record("k", "FAILURE"), "lepton:reply:me")),
        functions.call("bury", (), (DEAD_BYTES, "l", "", "unreadable", "it is none", 0, "", "bytes")),
        ("HSET", "three", "x", "y"),
    )
    assert done == 6
    assert oldest_first(connection, "two") == [b"a", b"b"]
    assert connection.call("HGETALL", topology.ETA_MESSAGES) == {b"j": b"later"}
    assert connection.call("LRANGE", "lepton:reply:me", 0, -1) == [record("k", "FAILURE")]
    assert [letter["message"] for letter in letters(connection)] == [b"bytes"]
    assert counters(connection) == {"failed": 1, "dead": 1}
    assert connection.call("HGETALL", "three") == {b"x": b"y"}


def test_a_transaction_over_lists_that_have_changed_does_nothing(connection: Connection) -> None:
    push(connection, "one", *"ab")
    left = everything(connection)
    assert transact(connection, {"none": 0, "one": 1}, ("DEL", "one")) == -1
    assert everything(connection) == left


def test_a_command_of_a_transaction_that_fails_keeps_no_other_back(connection: Connection) -> None:
    connection.call("SET", "text", "no list")
    connection.call("SET", topology.ETA, "no zset")
    schedule = functions.call("schedule", (), ("j", 5, "later"))
    transact(connection, {}, ("LPUSH", "text", "a"), schedule, ("NOCOMMAND",), ("LPUSH", "list", "b"))
    assert oldest_first(connection, "list") == [b"b"]


# -- announce, schedule, due, unpark ----------------------------------------------------------------------------------


def test_a_lease_is_announced_with_its_holder(connection: Connection) -> None:
    call(connection, "announce", "who I am", 5000, "w", keys=(LEASE,))
    assert connection.call("GET", LEASE) == b"who I am"
    assert 0 < connection.call("PTTL", LEASE) <= 5000
    assert connection.call("SISMEMBER", topology.HOLDERS, "w")


def schedule(connection: Connection, job: str, due_ms: float, message: str = "") -> int:
    found: int = call(connection, "schedule", job, due_ms, message or f"message of {job}")
    return found


def now_ms(connection: Connection) -> int:
    seconds, microseconds = connection.call("TIME")
    return 1000 * int(seconds) + int(microseconds) // 1000


def test_what_is_due_comes_back_in_the_order_in_which_it_was_due(connection: Connection) -> None:
    now = now_ms(connection)
    for job, due_ms in (("late", now - 10), ("early", now - 20), ("never", now + 10**9), ("later", now + 60_000)):
        assert schedule(connection, job, due_ms) == 1
    moved, next_ms = call(connection, "due", 10)
    assert moved == 2
    assert 50_000 < next_ms <= 60_000
    assert oldest_first(connection, topology.AGAIN) == [b"message of early", b"message of late"]
    assert set(connection.call("HKEYS", topology.ETA_MESSAGES)) == {b"never", b"later"}
    assert connection.call("ZRANGE", topology.ETA, 0, -1) == [b"later", b"never"]


def test_no_more_than_asked_for_are_due_at_once_and_the_rest_at_once_after(connection: Connection) -> None:
    for at in range(5):
        schedule(connection, f"j{at}", at)
    assert [call(connection, "due", 3) for _ in range(3)] == [[3, 0], [2, -1], [0, -1]]
    assert oldest_first(connection, topology.AGAIN) == [b"message of j%d" % at for at in range(5)]


def test_a_second_message_of_a_scheduled_job_is_a_duplicate(connection: Connection) -> None:
    assert schedule(connection, "a", 5, "first") == 1
    assert schedule(connection, "a", 1, "second") == 0
    assert counters(connection) == {"duplicate": 1}
    call(connection, "due", 10)
    assert oldest_first(connection, topology.AGAIN) == [b"first"]
    assert schedule(connection, "a", 5, "third") == 1, "once the first is due, the next may be scheduled"


def test_jobs_come_back_at_once_where_they_are_named(connection: Connection) -> None:
    for job in "abc":
        schedule(connection, job, now_ms(connection) + 10**6)
    moved, next_ms = call(connection, "due", 1, "a", "unknown", "c")
    assert (moved, next_ms > 0) == (2, True)
    assert oldest_first(connection, topology.AGAIN) == [b"message of a", b"message of c"]
    assert connection.call("HKEYS", topology.ETA_MESSAGES) == [b"b"]


def test_an_entry_without_its_message_is_cleared_away(connection: Connection) -> None:
    connection.call("ZADD", topology.ETA, 1, "orphan")
    assert call(connection, "due", 10) == [0, -1]
    assert connection.call("EXISTS", topology.ETA) == 0


def test_parked_jobs_of_a_kernel_come_back_in_order_a_few_at_a_time(connection: Connection) -> None:
    push(connection, topology.parked("a.b"), *"abc")
    push(connection, topology.parked("c.d"), "x")
    connection.call("SADD", topology.PARKED, "a.b", "c.d")
    connection.call("ZADD", topology.DEADLINES, 5, "a.b", 6, "c.d")
    assert call(connection, "unpark", "a.b", 2) == 2
    assert connection.call("SISMEMBER", topology.PARKED, "a.b")
    assert call(connection, "unpark", "a.b", 2) == 1
    assert oldest_first(connection, topology.AGAIN) == [b"a", b"b", b"c"]
    assert connection.call("SISMEMBER", topology.PARKED, "a.b") == 0
    assert connection.call("ZRANGE", topology.DEADLINES, 0, -1) == [b"c.d"]
    assert call(connection, "unpark", "a.b", 2) == 0


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_every_place_of_a_message_has_its_name(connection: Connection) -> None:
    lane = topology.lane("tenant")
    connection.call("SADD", topology.HOLDERS, "w")
    connection.call("SADD", topology.LANES, lane)
    connection.call("SADD", topology.DEVICES, "cpu")
    connection.call("SADD", topology.PARKED, "a.b")
    for name in (*topology.lane_lists(), *topology.lane_lists(lane)):
        push(connection, name, "m")
    places = {
        topology.claim("w", LISTS_EACH - 1): 1,
        topology.claim("w", 0, "reclaim"): 2,
        topology.claim("w", 0, "suspects"): 3,
        HELD: 4,
        topology.AGAIN: 5,
        topology.ALONE: 6,
        topology.parked("a.b"): 7,
        topology.device_queue("cpu"): 8,
        topology.alone_queue("cpu"): 9,
    }
    for name, count in places.items():
        push(connection, name, *["m"] * count)
    schedule(connection, "a", 10**15)
    bury(connection, "b", b"m")
    connection.call("HSET", topology.COUNTERS, "accepted", 46, "placed", 17, "fenced", 2)
    assert sizes(connection) == {
        "accepted": 46 + 11,
        **dict.fromkeys(("succeeded", "failed", "cancelled", "expired", "retried", "duplicate"), 0),
        "dead": 1,
        "placed": 17,
        "fenced": 2,
        "lanes": 10,
        "claimed": 1,
        "reclaimed": 5,
        "held": 4,
        "again": 5,
        "alone": 6,
        "parked_now": 7,
        "scheduled_now": 1,
        "queued": 17,
        "dead_letters": 1,
        "waiting": 11 + 5 + 5 + 6 + 7 + 1,
        "in_flight": 21,
        "difference": 0,
    }


def test_an_empty_broker_has_every_name_and_nothing_in_it(connection: Connection) -> None:
    found = sizes(connection)
    assert set(found.values()) == {0}
    assert {"accepted", "waiting", "in_flight", "difference", "succeeded", "expired", "dead", "retried"} <= found.keys()


def test_a_message_that_vanished_is_a_difference(connection: Connection) -> None:
    connection.call("HSET", topology.COUNTERS, "accepted", 3, "succeeded", 1)
    push(connection, topology.AGAIN, "m")
    assert sizes(connection)["difference"] == 1


def test_sizes_are_read_over_whatever_stands_there(connection: Connection) -> None:
    for key in (topology.COUNTERS, topology.LANES, topology.HOLDERS, topology.PARKED, topology.DEVICES, topology.AGAIN):
        connection.call("SET", key, "something else")
    connection.call("HSET", topology.LANE, "something", "else")
    assert set(sizes(connection).values()) == {0}


# -- keys of another type ---------------------------------------------------------------------------------------------


def _commit(connection: Connection) -> None:
    commit(
        connection,
        2,
        won("a"),
        ("b", "retried", record("b", "RETRY"), ""),
        pushes=[("a", topology.LANE, "follow-up")],
        retries=[("b", 0, "m1")],
        parts=[("a", "part")],
        dead=[("a", "", "", "", 0, "", "m0")],
    )


EVERY: dict[str, tuple[list[str], Callable[[Connection], object]]] = {
    "accept": (
        [topology.LANE, topology.lane_list(9), topology.key("a"), topology.EVENTS, topology.LANES],
        lambda connection: accept(connection, (topology.lane_list(9), "b"), keyed("a", "one"), event="told"),
    ),
    "commit": (
        [
            HELD,
            topology.EVENTS,
            topology.COUNTERS,
            topology.ETA,
            topology.ETA_MESSAGES,
            topology.ATTEMPTS,
            topology.DEAD,
            topology.CHORD_PARTS,
        ],
        _commit,
    ),
    "bury": ([topology.DEAD], lambda connection: bury(connection, "a", b"m")),
    "release": (
        [HELD, topology.AGAIN, topology.ALONE],
        lambda connection: call(connection, "release", 2, ".!", keys=(HELD, LEASE)),
    ),
    "sweep": ([topology.HOLDERS], sweep),
    "recover": (
        [
            topology.HOLDERS,
            topology.AGAIN,
            topology.ALONE,
            topology.ATTEMPTS,
            topology.DEAD,
            topology.EVENTS,
            topology.COUNTERS,
        ],
        lambda connection: call(
            connection, "recover", "v", LISTS_EACH, "died", *suspect(topology.held("v", 0), message="m2")
        ),
    ),
    "move": (
        ["target", "one", "two", topology.HOLDERS],
        lambda connection: call(connection, "move", 5, "w", keys=("target", "one", "two")),
    ),
    "transact": (
        ["one", "two"],
        lambda connection: transact(connection, {"one": 1, "two": 1}, ("DEL", "one"), ("LPUSH", "new", "m")),
    ),
    "announce": ([topology.HOLDERS], lambda connection: call(connection, "announce", "", 5000, "u", keys=("lease",))),
    "schedule": ([topology.ETA, topology.ETA_MESSAGES], lambda connection: schedule(connection, "c", 5)),
    "due": ([topology.ETA, topology.ETA_MESSAGES, topology.AGAIN], lambda connection: call(connection, "due", 10)),
    "due of some": (
        [topology.ETA, topology.ETA_MESSAGES, topology.AGAIN],
        lambda connection: call(connection, "due", 10, "scheduled"),
    ),
    "unpark": (
        [topology.parked("a.b"), topology.AGAIN],
        lambda connection: call(connection, "unpark", "a.b", 10),
    ),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, (keys, _) in EVERY.items() for key in keys])
def test_a_key_of_another_type_is_seen_before_anything_is_written(connection: Connection, name: str, key: str) -> None:
    hold(connection, "m0", "m1")
    connection.call("SADD", topology.HOLDERS, "v")
    push(connection, topology.held("v", 0), "m2")
    push(connection, topology.claim("v", 0), "m3")
    push(connection, topology.parked("a.b"), "m4")
    push(connection, "one", "m5")
    push(connection, "two", "m6")
    schedule(connection, "scheduled", 1)
    connection.call("DEL", key)
    if key == topology.key("a"):
        push(connection, key, "no text")
    else:
        connection.call("SET", key, "something else")
    left = everything(connection)
    with pytest.raises(CommandError, match="WRONGTYPE"):
        EVERY[name][1](connection)
    assert everything(connection) == left


@pytest.mark.parametrize("name", EVERY)
def test_and_where_every_key_is_as_it_should_be_it_is_done(connection: Connection, name: str) -> None:
    hold(connection, "m0", "m1")
    push(connection, topology.held("v", 0), "m2")
    push(connection, topology.parked("a.b"), "m4")
    push(connection, "one", "m5")
    push(connection, "two", "m6")
    schedule(connection, "scheduled", 1)
    left = everything(connection)
    EVERY[name][1](connection)
    assert everything(connection) != left


@pytest.mark.parametrize("name", ["lepton:jobs:0", "lepton:reply:me", "celery-task-meta-a"])
def test_a_key_of_a_client_of_another_type_keeps_no_job_from_its_end(connection: Connection, name: str) -> None:
    connection.call("HSET", name, "something", "else")
    hold(connection, "m")
    assert commit(connection, 1, won("a", "lepton:reply:me")) == []
    assert call(connection, "finish", TTL_S, "b", "failed", record("b", "FAILURE"), "lepton:reply:me") == 1
    assert counters(connection) == {"succeeded": 1, "failed": 1}
    assert connection.call("GET", topology.result("a")) == record("a")


# -- the library ------------------------------------------------------------------------------------------------------


def test_every_function_has_its_version_in_its_name(connection: Connection) -> None:
    version, source = functions.library()
    (library,) = connection.call("FUNCTION", "LIST", "LIBRARYNAME", f"lepton_{version}", "WITHCODE")
    found = {each[b"name"].decode(): set(each[b"flags"]) for each in library[b"functions"]}
    assert all(name.endswith(version) for name in found)
    full = {functions.name("accept"): set(), functions.name("sizes"): {b"no-writes"}}
    assert {name: flags for name, flags in found.items() if b"allow-oom" not in flags} == full
    assert "VERSION" not in source


def test_ids_of_ours_carry_the_minute_that_their_note_stands_in(connection: Connection) -> None:
    ids = new_ids(3)
    accept(connection, *((topology.LANE, job, "", "note", "", "m") for job in ids))
    for job in ids:
        assert connection.call("HGET", topology.jobs(minute_of(job) or 0), job) == b"note"
