"""The auditor: what was submitted and how that was answered, and at the end, what has really become of it.

| word              | means                                                                                      |
|-------------------|--------------------------------------------------------------------------------------------|
| lost              | acknowledged, and no final state after the drain                                           |
| duplicate effects | jobs with more than one committed result: final events of one job, or final replies to it  |
| phantom           | refused, and it ran                                                                        |
| re-executions     | how often the kernel really ran beyond once a job; allowed, for a kill in mid kernel       |
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from lepton_ai import event, results, topology
from lepton_ai.errors import LeptonError
from lepton_ai.job import FINAL_STATES
from queues.connection import Connection

__all__ = ["Audit", "Auditor", "counters", "events_of", "waiting"]

_AT_ONCE = 1000
_ENDS = ("job.succeeded", "job.failed", "job.cancelled", "job.expired", "job.dead", "job.rejected")
#: The terms of P4 (DESIGN.md, section 1): an accepted job is in one of these, or still in a list.
_TERMS = ("succeeded", "failed", "cancelled", "expired", "dead", "retried", "duplicate")


class Audit(msgspec.Struct, frozen=True):
    """What the auditor found."""

    lost: list[str]
    repeated_events: list[str]
    """Jobs with more than one final event."""
    repeated_replies: list[str]
    """Jobs that were answered more than once."""
    phantom: list[int]
    runs: int
    """How often the kernel ran."""
    re_executions: int
    left: dict[str, int]
    """Messages that are still in a list."""
    counters: dict[str, int]
    conservation: int | None
    """Accepted less what it became (P4); None where the broker does not count that yet."""
    bundled: dict[str, int]
    """Jobs that are counted beyond messages still, by the lane or the counter; none where nothing is left."""

    @property
    def duplicate_effects(self) -> int:
        return len({*self.repeated_events, *self.repeated_replies})


class Auditor:
    """Keeps the books. Safe for several threads."""

    def __init__(self, runs: Path) -> None:
        self.acknowledged: dict[str, int] = {}
        """Job numbers by id."""
        self.refused: set[int] = set()
        self.unknown: set[int] = set()
        """Whose submission ended in an error that leaves open what came of it."""
        self._runs = runs
        self._next = 0
        self._lock = threading.Lock()

    @property
    def submitted(self) -> int:
        return self._next

    def numbers(self, count: int) -> range:
        """Fresh job numbers."""
        with self._lock:
            self._next += count
            return range(self._next - count, self._next)

    def acknowledge(self, jobs: Iterable[tuple[str, int]]) -> None:
        with self._lock:
            self.acknowledged.update(jobs)

    def refuse(self, numbers: Iterable[int]) -> None:
        with self._lock:
            self.refused.update(numbers)

    def wonder(self, numbers: Iterable[int]) -> None:
        """Notes numbers of which nobody can say whether they were accepted."""
        with self._lock:
            self.unknown.update(numbers)

    def executed(self) -> Counter[int]:
        """How often each job number really ran, by the file that the kernel writes."""
        return Counter(number for number, _ in self.runs())

    def runs(self) -> list[tuple[int, float]]:
        """Every run of the kernel: the job's number, and when it began by its worker's clock."""
        lines = self._runs.read_text().splitlines() if self._runs.exists() else []
        return [(int(number), float(at)) for number, at in map(str.split, lines)]

    def unfinished(self, connection: Connection, among: Iterable[str] | None = None) -> list[str]:
        """The acknowledged jobs (of these) that have no final state yet."""
        with self._lock:
            jobs = list(self.acknowledged if among is None else among)
        found: list[str] = []
        for at in range(0, len(jobs), _AT_ONCE):
            some = jobs[at : at + _AT_ONCE]
            starts = connection.many([("GETRANGE", topology.result(job), 0, 200) for job in some])
            found += [job for job, start in zip(some, starts, strict=True) if not _is_final(start)]
        return found

    def unsuccessful(self, connection: Connection) -> dict[str, str]:
        """The acknowledged jobs that have ended otherwise than well, each with what its waiter is told."""
        found: dict[str, str] = {}
        jobs = list(self.acknowledged)
        for at in range(0, len(jobs), _AT_ONCE):
            some = jobs[at : at + _AT_ONCE]
            for job, raw in zip(some, connection.many([("GET", topology.result(job)) for job in some]), strict=True):
                if raw is not None and b"SUCCESS" not in raw[:200]:
                    found[job] = str(results.read(raw).result)
        return found

    def audit(self, connection: Connection, events: Mapping[str, int] | None = None) -> Audit:
        """Reads everything back. `events` are the final events of each job where they are not in the stream."""
        executed = self.executed()
        counted = counters(connection)
        left = waiting(connection)
        ends = final_events(connection) if events is None else events
        return Audit(
            self.unfinished(connection),
            sorted(job for job, count in ends.items() if count > 1),
            sorted(job for job, count in _replies(connection).items() if count > 1),
            sorted(self.refused & executed.keys()),
            executed.total(),
            executed.total() - len(executed),
            left,
            counted,
            conservation(counted, left),
            bundled(connection),
        )


def counters(connection: Connection) -> dict[str, int]:
    """What Lepton itself has counted."""
    found: dict[bytes, bytes] = connection.call("HGETALL", topology.COUNTERS)
    return {name.decode(): int(value) for name, value in found.items()}


def conservation(counted: Mapping[str, int], left: Mapping[str, int]) -> int | None:
    """What was accepted less what has become of it: nought, or somebody has lied. None before it is counted."""
    if "accepted" not in counted:
        return None
    ended = sum(counted.get(term, 0) for term in _TERMS)
    return counted["accepted"] - ended - sum(left.values()) - counted.get("bundled", 0)


def bundled(connection: Connection) -> dict[str, int]:
    """Where jobs are counted beyond messages, and how many."""
    found = {name.decode(): int(value) for name, value in connection.call("HGETALL", topology.BUNDLED).items()}
    found["counter"] = counters(connection).get("bundled", 0)
    return {name: count for name, count in found.items() if count}


def waiting(connection: Connection) -> dict[str, int]:
    """How many messages each list of the message path holds now."""
    keys = [key for key in connection.call("KEYS", "lepton*") if not key.startswith(topology.reply("").encode())]
    kinds = connection.many([("TYPE", key) for key in keys]) if keys else []
    lists = [key for key, kind in zip(keys, kinds, strict=True) if kind == b"list"]
    lengths = connection.many([("LLEN", key) for key in lists]) if lists else []
    found = {key.decode(): length for key, length in zip(lists, lengths, strict=True) if length}
    scheduled = connection.call("ZCARD", topology.ETA)
    return {**found, **({topology.ETA: scheduled} if scheduled else {})}


def final_events(connection: Connection) -> Counter[str]:
    """How many final events the stream has of each job."""
    found: Counter[str] = Counter()
    after = "-"
    while entries := connection.call("XRANGE", topology.EVENTS, after, "+", "COUNT", _AT_ONCE):
        for entry, fields in entries:
            after = f"({entry.decode()}"
            for each in event.decode(fields[1]):
                if each.type in _ENDS:
                    found.update(each.jobs)
    return found


def events_of(connection: Connection, kind: str) -> int:
    """How many events of a type the stream has; of jobs each counts."""
    found, after = 0, "-"
    while entries := connection.call("XRANGE", topology.EVENTS, after, "+", "COUNT", _AT_ONCE):
        after = f"({entries[-1][0].decode()}"
        found += sum(
            max(1, len(each.jobs)) for _, fields in entries for each in event.decode(fields[1]) if each.type == kind
        )
    return found


def _replies(connection: Connection) -> Counter[str]:
    """How many final records lie in the reply lists for each job: nobody has popped them."""
    found: Counter[str] = Counter()
    for key in connection.call("KEYS", topology.reply("*")):
        for raw in connection.call("LRANGE", key, 0, -1):
            try:
                meta = results.read(raw)
            except LeptonError:
                continue
            if meta.status in FINAL_STATES:
                found[meta.task_id] += 1
    return found


def _is_final(start: Any) -> bool:
    return isinstance(start, bytes) and any(state.encode() in start for state in FINAL_STATES)
