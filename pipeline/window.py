"""The window: the jobs that a router has claimed and not yet dispatched, each in the claim that keeps it safe."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence

import msgspec

from lepton_ai import topology
from lepton_ai.job import Options
from queues.broker import CLAIM_LIMIT, WAKE, Kind

__all__ = ["Claim", "ClaimedJob", "Window"]


#: A claim is written again when a part of it leaves, so it is bounded in bytes as well as in messages.
_CLAIM_BYTES = 8 * 1024 * 1024
#: What a message is taken to be before one was seen, and the weight of the newest in the mean. A large one counts at
#: once: the next claim must not take hundreds of its kind.
_FIRST_BYTES, _WEIGHT = 128 * 1024.0, 0.05


class ClaimedJob(msgspec.Struct, eq=False):
    """A message that has been read, waiting in a claim for its device."""

    id: str
    kernel: str
    options: Options
    message: bytes
    claim: Claim
    order: int
    deadline_at: float | None = None
    """After when it must not run any more, in seconds since the epoch."""
    sent_at: float = 0.0
    """When it was sent, by its id or by when it was claimed; nought where Celery's event listeners are not shown it."""

    @property
    def alone(self) -> bool:
        """Whether it is a suspect, which runs with nothing beside it."""
        return self.claim.kind is Kind.ALONE


class Claim(msgspec.Struct, eq=False):
    """One durable list of the window, and the messages in it, oldest first."""

    kind: Kind
    number: int
    key: str
    messages: list[bytes] = []
    """Every message of the list, read or not: what LLEN must count."""

    size_bytes: int = 0

    def room(self, mean_bytes: float) -> int:
        """How many more messages of this size it should hold: few enough to be written again in one step."""
        if self.size_bytes >= _CLAIM_BYTES:
            return 0
        return min(CLAIM_LIMIT - len(self.messages), max(1, int((_CLAIM_BYTES - self.size_bytes) / mean_bytes)))


class Window:
    """Claims and the jobs in them. Pure bookkeeping: the router moves the messages."""

    def __init__(self, incarnation: str, limit: int, limit_bytes: int) -> None:
        self._incarnation = incarnation
        self._limit = min(limit, CLAIM_LIMIT * WAKE)
        self._limit_bytes = limit_bytes
        self._mean_bytes = _FIRST_BYTES
        self._claims: dict[tuple[Kind, int], Claim] = {}
        self._jobs: dict[int, ClaimedJob] = {}
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def room(self) -> int:
        """How many more jobs may be claimed, by number and by the size that messages have lately."""
        left = self._limit - sum(len(claim.messages) for claim in self._claims.values())
        left_bytes = self._limit_bytes - sum(claim.size_bytes for claim in self._claims.values())
        if left_bytes <= 0 or left <= 0:
            return 0
        return min(left, max(1, int(left_bytes / self._mean_bytes)))

    def open_claim(self, kind: Kind) -> tuple[Claim, int]:
        """A claim of a kind with room, and how much: the fullest that has some, so that few are open."""
        having = [each for each in self._claims.values() if each.kind is kind and each.room(self._mean_bytes) > 0]
        if having:
            claim = min(having, key=lambda each: each.room(self._mean_bytes))
        else:
            # Where all are full by size, the last takes what a wake-up brings beyond the window.
            number = next((n for n in range(WAKE) if (kind, n) not in self._claims), WAKE - 1)
            key = topology.claim(self._incarnation, number, kind)
            claim = self._claims.setdefault((kind, number), Claim(kind, number, key))
        return claim, max(1, claim.room(self._mean_bytes))

    def hold(self, claim: Claim, messages: Sequence[bytes]) -> None:
        """These messages have been moved to a claim."""
        claim.messages.extend(messages)
        for message in messages:
            claim.size_bytes += len(message)
            self._mean_bytes = max(float(len(message)), (1 - _WEIGHT) * self._mean_bytes + _WEIGHT * len(message))

    def add(
        self,
        job_id: str,
        kernel: str,
        options: Options,
        message: bytes,
        claim: Claim,
        deadline_at: float | None = None,
    ) -> ClaimedJob:
        """A message of a claim has been read and waits for its device."""
        order = next(self._order)
        job = self._jobs[order] = ClaimedJob(job_id, kernel, options, message, claim, order, deadline_at)
        return job

    def expired(self, now: float) -> list[ClaimedJob]:
        """The jobs whose deadline has passed."""
        return [job for job in self._jobs.values() if job.deadline_at is not None and job.deadline_at <= now]

    def jobs(self) -> list[ClaimedJob]:
        """Every job that waits, in the order of their arrival. May be called from any thread."""
        return list(self._jobs.values())

    def first(self, count: int, wanted: Callable[[ClaimedJob], bool] = lambda _: True) -> list[ClaimedJob]:
        """The wanted jobs to look at next: most urgent first, then in the order of their arrival."""
        found = filter(wanted, self._jobs.values())
        return heapq.nsmallest(count, found, key=lambda job: (-job.options.urgency, job.order))

    def left(self, jobs: Iterable[ClaimedJob]) -> None:
        """These jobs have been dispatched."""
        gone = list(jobs)
        for job in gone:
            del self._jobs[job.order]
        self.forget((job.claim, job.message) for job in gone)

    def forget(self, messages: Iterable[tuple[Claim, bytes]]) -> None:
        """These messages are in their claims no longer; a claim that is empty is closed."""
        by_claim: dict[tuple[Kind, int], set[int]] = {}
        for claim, message in messages:
            by_claim.setdefault((claim.kind, claim.number), set()).add(id(message))
        for name, gone in by_claim.items():
            claim = self._claims[name]
            claim.messages = [message for message in claim.messages if id(message) not in gone]
            claim.size_bytes = sum(map(len, claim.messages))
            if not claim.messages:
                del self._claims[name]
