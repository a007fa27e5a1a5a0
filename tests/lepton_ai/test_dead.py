"""Dead letters through every client: straight on a broker and over HTTP, one way and the other."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from lepton_ai import Client, blob, results, topology, wire
from lepton_ai.dead import DeadLetter, Settled, Steps, replay
from lepton_ai.errors import (
    BrokerUnavailable,
    InvalidArguments,
    JobCancelled,
    JobDead,
    JobExpired,
    JobFailed,
    KernelFailed,
    KeyConflict,
)
from lepton_ai.idempotency import KEPT_S, fingerprint, job_id
from lepton_ai.identity import new_id
from lepton_ai.job import Meta, Options
from lepton_ai.terms import Terms
from queues import functions
from queues.broker import Broker
from queues.connection import Connection
from tests.lepton_ai.letters import Asked, bury, client, ingest_url, unreadable, waiting
from tests.pipeline.ingest.served import problem

__all__ = ["client", "ingest_url"]

#: The fingerprint of the jobs that are buried.
MARK = fingerprint("a.b", {"x": np.zeros((2, 3)), "k": 3})


def test_a_dead_letter_says_what_is_known_of_it(client: Asked, connection: Connection) -> None:
    entry, job = bury(connection, trace="Traceback ...")
    (found,) = client.dead()
    assert found == DeadLetter(
        entry=entry,
        job=job,
        kernel="a.b",
        code="poison",
        reason="it killed 3 workers",
        attempts=3,
        died_at=int(entry.partition("-")[0]) / 1000,
        size_bytes=found.size_bytes,
        arguments={"x": [2, 3], "k": 3},
        trace="Traceback ...",
    )
    assert found.size_bytes > 500


def test_one_that_nobody_could_read_is_listed_all_the_same(client: Asked, connection: Connection) -> None:
    entry = unreadable(connection)
    (found,) = client.dead()
    assert (found.entry, found.job, found.code, found.reason) == (entry, "", "unreadable", "no JSON")
    assert found.arguments is found.trace is None


def test_the_newest_come_first_and_no_more_than_asked(client: Asked, connection: Connection) -> None:
    entries = [bury(connection)[0] for _ in range(130)][::-1]
    assert [each.entry for each in client.dead()] == entries[:100]
    assert [each.entry for each in client.dead(limit=3)] == entries[:3]
    assert [each.entry for each in client.dead(limit=125)] == entries[:125]
    assert [each.entry for each in client.dead(limit=1000)] == entries


def test_one_is_found_by_its_entry_and_by_its_job(client: Asked, connection: Connection) -> None:
    (entry, job), *_ = [bury(connection) for _ in range(50)]
    assert [each.entry for each in (*client.dead(job=entry), *client.dead(job=job))] == [entry, entry]
    assert client.dead(job=new_id()) == client.dead(job="1-1") == []


@pytest.mark.parametrize("by", ["entry", "job"])
def test_a_replayed_job_waits_in_its_lane_and_its_old_end_is_forgotten(
    client: Asked, connection: Connection, by: str
) -> None:
    entry, job = bury(connection, options=Options(priority=9))
    other, _ = bury(connection)
    assert client.replay([entry if by == "entry" else job]) == Settled(1)
    (message,) = connection.call("LRANGE", topology.lane_list(9), 0, -1)
    assert wire.read_envelope(message).headers.id == job
    assert [each.entry for each in client.dead()] == [other]
    assert connection.call("EXISTS", topology.result(job)) == connection.call("HEXISTS", topology.ATTEMPTS, job) == 0
    assert connection.call("HGETALL", topology.COUNTERS) == {b"replayed": b"1"}
    with Client(client._url) as own:
        assert own.job(job).state == "waiting"


def test_a_replayed_job_of_a_tenant_goes_back_to_its_lane(client: Asked, connection: Connection) -> None:
    lane = topology.lane("team-a")
    _, job = bury(connection, job_id("k", "team-a"), lane=lane)
    connection.call("SET", topology.key(job), MARK, "EX", 10)
    assert client.replay([job]) == Settled(1)
    assert waiting(connection, lane) == [job]
    assert connection.call("SMEMBERS", topology.LANES) == [lane.encode()]
    assert connection.call("TTL", topology.key(job)) > 1000


def test_a_replayed_job_begins_anew(client: Asked, connection: Connection) -> None:
    job, times = new_id(), Terms(delay_s=1, deadline_s=2).times()
    body = {"x": np.zeros((2, 3)), "k": 3}
    first = wire.retried(wire.retried(wire.envelope(job, "a.b", body, Options(limit_s=7), **times)))
    bury(connection, job, "retries", message=first)
    assert client.replay([job]) == Settled(1)
    (message,) = connection.call("LRANGE", topology.LANE, 0, -1)
    old, new = json.loads(first), json.loads(message)
    assert (old["headers"]["retries"], new["headers"]["retries"]) == (2, 0)
    assert new["headers"]["expires"] is new["headers"]["eta"] is None
    assert old["properties"].pop("delivery_tag") != new["properties"].pop("delivery_tag")
    for name in ("retries", "expires", "eta"):
        del old["headers"][name], new["headers"][name]
    assert new == old


@pytest.mark.parametrize("failure", [JobDead("it killed 3 workers"), KernelFailed("ValueError: x")])
def test_the_failure_that_a_letter_tells_of_is_forgotten(
    client: Asked, connection: Connection, failure: JobFailed
) -> None:
    code = "poison" if isinstance(failure, JobDead) else "retries"
    _, job = bury(connection, code=code, reason=f"it failed 3 times, the last with {failure.message}")
    connection.call("SET", topology.result(job), results.encode(results.failure(job, failure, "Traceback"), "msgpack"))
    assert client.replay([job]) == Settled(1)
    assert connection.call("EXISTS", topology.result(job)) == 0


@pytest.mark.parametrize("code", ["poison", "retries"])
@pytest.mark.parametrize(
    ("record", "told"),
    [
        (results.success("x", {"y": 1}, None), "has succeeded"),
        (results.failure("x", JobCancelled("no")), "was cancelled"),
        (results.failure("x", JobExpired("late")), "has expired"),
        (results.failure("x", InvalidArguments("another")), "has failed in another way"),
        (Meta("FAILURE", {"exc_type": "X", "exc_message": [], "exc_module": "m"}), "has failed in another way"),
        (None, "cannot be read"),
    ],
)
def test_another_end_of_the_job_stands_and_its_letter_is_left(
    client: Asked, connection: Connection, record: Meta | None, told: str, code: str
) -> None:
    entry, job = bury(connection, job_id("k"), code)
    stored = b"odd" if record is None else results.encode(record, "json")
    connection.call("SET", topology.result(job), stored, "EX", 100)
    settled = client.replay([entry])
    assert settled.count == 0
    assert told in settled.left[entry]
    assert waiting(connection) == []
    assert connection.call("GET", topology.result(job)) == stored
    assert [each.entry for each in client.dead()] == [entry]


def test_a_letter_is_left_while_its_key_stands_for_an_open_job(client: Asked, connection: Connection) -> None:
    entry, job = bury(connection, job_id("k"))
    connection.call("DEL", topology.result(job))  # it has expired, and the key with it
    with Client(client._url) as own:
        connection.call("SET", topology.key(job), MARK, "EX", KEPT_S)  # as `accept` and the client do
        assert "not ended" in own.replay([entry]).left[entry]
    assert waiting(connection) == []


def test_a_letter_is_left_while_its_key_stands_for_something_else(client: Asked, connection: Connection) -> None:
    entry, job = bury(connection, job_id("k"))
    connection.call("SET", topology.key(job), b"another job", "EX", 100)
    assert "another job" in client.replay([entry]).left[entry]
    assert connection.call("TTL", topology.key(job)) <= 100


def test_a_replayed_job_has_its_key_again(broker_url: str, client: Asked, connection: Connection) -> None:
    _, job = bury(connection, job_id("k"))
    assert client.replay([job]) == Settled(1)
    assert connection.call("GET", topology.key(job)) == MARK
    assert connection.call("TTL", topology.key(job)) > KEPT_S - 100
    with Client(broker_url) as own:
        assert own.submit("a.b", {"x": np.zeros((2, 3)), "k": 3}, key="k").id == job
        with pytest.raises(KeyConflict):
            own.submit("a.b", {"x": np.zeros((2, 3)), "k": 4}, key="k")
    assert waiting(connection) == [job]


def test_two_letters_of_one_key_are_not_two_jobs(client: Asked, connection: Connection) -> None:
    (first, job), (second, _) = bury(connection, job_id("k")), bury(connection, job_id("k"))
    settled = client.replay(all=True)
    assert settled.count == 1
    assert "not ended" in settled.left[second]
    assert waiting(connection) == [job]
    assert [each.entry for each in client.dead()] == [second]
    assert first != second


@pytest.mark.parametrize("is_async", [False, True])
def test_a_job_that_ends_between_the_look_and_the_replay_is_seen(
    broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    entry, job = bury(connection, job_id("k"))
    tried = 0

    def slowly(ids: Iterable[str] | None) -> Steps[Settled]:
        nonlocal tried
        steps, answer = replay(ids), None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as ended:
                return ended.value  # type: ignore[no-any-return]
            if step.transaction:
                tried += 1
                connection.call("SET", topology.result(job), results.encode(results.success(job, {}, None), "json"))
            answer = yield step

    monkeypatch.setattr("lepton_ai.async_direct.replay" if is_async else "lepton_ai.direct.replay", slowly)
    assert "has succeeded" in Asked(broker_url, is_async=is_async).replay([entry]).left[entry]
    assert tried == 1
    assert waiting(connection) == []


def test_a_follow_up_that_had_no_queue_goes_where_it_was_meant(
    client: Asked, broker: Broker, connection: Connection
) -> None:
    parent, message = new_id(), wire.envelope(new_id(), "other.task", {"k": 1}, Options())
    connection.call("SET", "celery", "something else")
    ended = (60, parent, "failed", b"", "", 1_000_000, b"", "celery", message)
    connection.call(*functions.call("finish", (), ended))
    (letter,) = client.dead()
    assert (letter.job, letter.code) == (parent, "unreadable")
    assert "still no queue: its key holds a string" in client.replay([letter.entry]).left[letter.entry]
    connection.call("DEL", "celery")
    assert client.replay([parent]) == Settled(1)
    assert connection.call("LRANGE", "celery", 0, -1) == [message]
    assert client.dead() == []


def test_a_letter_is_left_where_its_lane_is_no_list(client: Asked, connection: Connection) -> None:
    entry, _ = bury(connection)
    connection.call("SET", topology.LANE, "something else")
    assert "holds a string" in client.replay([entry]).left[entry]
    assert [each.entry for each in client.dead()] == [entry]


def test_all_are_replayed_but_those_that_nobody_can_read(client: Asked, connection: Connection) -> None:
    jobs = [bury(connection)[1] for _ in range(45)]
    entry = unreadable(connection)
    settled = client.replay(all=True)
    assert settled.count == 45
    assert list(settled.left) == [entry]
    assert "no JSON" in settled.left[entry]
    assert waiting(connection) == jobs
    assert [each.entry for each in client.dead()] == [entry]


def test_what_cannot_be_replayed_is_said_and_the_rest_is(client: Asked, connection: Connection) -> None:
    _, job = bury(connection)
    odd = unreadable(connection)
    lies, _ = bury(connection, message=b"{}")
    settled = client.replay([job, odd, lies, "1-1", "nobody"])
    assert settled.count == 1
    assert set(settled.left) == {odd, lies, "1-1", "nobody"}
    assert "nobody can read" in settled.left[odd]
    assert "cannot be read" in settled.left[lies]
    assert "not among" in settled.left["1-1"]
    assert waiting(connection) == [job]


def test_two_operators_at_once_replay_each_once(broker_url: str, ingest_url: str, connection: Connection) -> None:
    jobs = [bury(connection)[1] for _ in range(30)]
    start = threading.Barrier(6)

    def replay(number: int) -> int:
        with Client(ingest_url if number % 2 else broker_url) as own:
            own.dead()
            start.wait(30)
            return own.replay(all=True).count

    with ThreadPoolExecutor(6) as pool:
        counts = list(pool.map(replay, range(6)))
    assert sum(counts) == 30
    assert sorted(waiting(connection)) == sorted(jobs)
    assert connection.call("HGET", topology.COUNTERS, "replayed") == b"30"


def test_what_is_purged_is_gone_and_its_job_keeps_its_error(client: Asked, connection: Connection) -> None:
    entries = [bury(connection) for _ in range(5)]
    assert client.purge([entries[0][0], entries[1][1], "1-1", "nobody"]).count == 2
    assert set(client.purge(["1-1", "nobody"]).left) == {"1-1", "nobody"}
    assert {each.job for each in client.dead()} == {job for _, job in entries[2:]}
    assert connection.call("EXISTS", topology.result(entries[0][1])) == 1
    assert client.purge(all=True) == Settled(3)
    assert client.purge(all=True) == Settled(0)
    assert client.dead() == waiting(connection) == []


@pytest.mark.parametrize("verb", ["replay", "purge"])
@pytest.mark.parametrize("wrong", [{}, {"ids": []}, {"ids": ["1-1"], "all": True}, {"ids": "1-1"}])
def test_all_is_never_meant_by_mistake(client: Asked, verb: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArguments):
        getattr(client, verb)(**wrong)


def test_a_limit_is_one_or_more(client: Asked) -> None:
    with pytest.raises(InvalidArguments):
        client.dead(limit=0)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "http://127.0.0.1:1"])
def test_without_a_broker_it_is_said(url: str) -> None:
    for is_async in (False, True):
        with pytest.raises(BrokerUnavailable):
            Asked(url, is_async=is_async).dead()


# -- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def http(ingest_url: str, connection: Connection) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=ingest_url, timeout=15) as http:
        yield http


def test_dead_letters_over_http(http: httpx.Client, connection: Connection) -> None:
    (first, job), (second, _), (third, _) = (bury(connection) for _ in range(3))
    assert [each["entry"] for each in http.get("/v1/dead").json()] == [third, second, first]
    assert [each["entry"] for each in http.get("/v1/dead", params={"limit": 1, "after": third}).json()] == [second]
    assert http.get(f"/v1/dead/{first}").json() == http.get(f"/v1/dead/{job}").json()
    assert http.get(f"/v1/dead/{job}").json()["arguments"] == {"x": [2, 3], "k": 3}
    assert http.post("/v1/dead/replay", json={"entries": [first]}).json() == {"count": 1, "left": {}}
    assert http.delete(f"/v1/dead/{second}").json() == {"count": 1, "left": {}}
    assert http.delete("/v1/dead").json() == {"count": 1, "left": {}}
    assert http.post("/v1/dead/replay", json={"all": True}).json() == {"count": 0, "left": {}}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/dead?limit=0", None, 422),
        ("GET", "/v1/dead?limit=101", None, 422),
        ("GET", "/v1/dead?after=x", None, 422),
        ("GET", "/v1/dead/1-1", None, 404),
        ("DELETE", "/v1/dead/1-1", None, 404),
        ("POST", "/v1/dead/replay", {}, 422),
        ("POST", "/v1/dead/replay", {"entries": ["1-1"], "all": True}, 422),
        ("POST", "/v1/dead/replay", {"entry": "1-1"}, 422),
        ("POST", "/v1/dead/replay", ["1-1"], 422),
    ],
)
def test_what_is_wrong_is_a_problem(http: httpx.Client, method: str, path: str, body: Any, status: int) -> None:
    problem(http.request(method, path, json=body), status)


# -- blobs ------------------------------------------------------------------------------------------------------------


def with_blob(connection: Connection, place: str = "redis:0123456789abcdef:2") -> tuple[str, str, list[str]]:
    """A letter whose array is in the broker, as the step that buried it left that: its entry, its job and the keys."""
    job = new_id()
    entry, _ = bury(connection, job, options=Options(blobs=(place,)))
    names = blob.keys(job, [place])
    connection.many([("SET", name, "bytes", "EX", blob.LETTER_S) for name in names]) if names else None
    return entry, job, names


def test_a_replayed_jobs_blobs_are_there_for_as_long_as_it_is_open(client: Asked, connection: Connection) -> None:
    _, job, names = with_blob(connection)
    assert client.replay([job]).count == 1
    assert [connection.call("TTL", name) for name in names] == [-1, -1]


def test_a_letter_whose_blobs_are_gone_is_left(client: Asked, connection: Connection) -> None:
    _, job, names = with_blob(connection)
    connection.call("DEL", names[1])
    found = client.replay([job])
    assert (found.count, "gone" in found.left[job]) == (0, True)
    assert connection.call("TTL", names[0]) > 0
    assert waiting(connection) == []


def test_a_letter_whose_array_was_in_shared_memory_is_left(client: Asked, connection: Connection) -> None:
    _, job, _ = with_blob(connection, f"ring:{'0' * 32}:{'1' * 32}:0:1")
    found = client.replay([job])
    assert (found.count, "memory" in found.left[job]) == (0, True)


def test_a_purged_letters_blobs_go_with_it(client: Asked, connection: Connection) -> None:
    entry, _, names = with_blob(connection)
    assert client.purge([entry]).count == 1
    assert all(0 < connection.call("TTL", name) <= blob.DROPPED_S for name in names)
