"""The window: the jobs that a router has claimed and not yet dispatched, each in the claim that keeps it safe."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable

import msgspec

from lepton_ai import topology
from lepton_ai.job import Options
from queues.broker import CLAIM_LIMIT, WAKE

__all__ = ["Claim", "ClaimedJob", "Window"]


class ClaimedJob(msgspec.Struct, eq=False):
    """A message that has been read, waiting in a claim for its device."""

    id: str
    kernel: str
    options: Options
    message: bytes
    claim: Claim
    order: int


class Claim(msgspec.Struct, eq=False):
    """One durable list of the window, and the messages in it, oldest first."""

    number: int
    key: str
    messages: list[bytes] = []
    """Every message of the list, read or not: what LLEN must count."""

    @property
    def room(self) -> int:
        return CLAIM_LIMIT - len(self.messages)


class Window:
    """Claims and the jobs in them. Pure bookkeeping: the router moves the messages."""

    def __init__(self, incarnation: str, limit: int) -> None:
        self._incarnation = incarnation
        self._limit = min(limit, CLAIM_LIMIT * WAKE)
        self._claims: dict[int, Claim] = {}
        self._jobs: dict[int, ClaimedJob] = {}
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def room(self) -> int:
        """How many more jobs may be claimed."""
        return self._limit - sum(len(claim.messages) for claim in self._claims.values())

    def open_claim(self) -> Claim:
        """A claim with room: the fullest that has some, so that few are open."""
        having = [claim for claim in self._claims.values() if claim.room > 0]
        if having:
            return min(having, key=lambda claim: claim.room)
        number = next(n for n in range(WAKE) if n not in self._claims)
        claim = self._claims[number] = Claim(number, topology.claim(self._incarnation, number))
        return claim

    def add(self, job_id: str, kernel: str, options: Options, message: bytes, claim: Claim) -> None:
        """A message of a claim has been read and waits for its device."""
        order = next(self._order)
        self._jobs[order] = ClaimedJob(job_id, kernel, options, message, claim, order)

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
        by_claim: dict[int, set[int]] = {}
        for claim, message in messages:
            by_claim.setdefault(claim.number, set()).add(id(message))
        for number, gone in by_claim.items():
            claim = self._claims[number]
            claim.messages = [message for message in claim.messages if id(message) not in gone]
            if not claim.messages:
                del self._claims[number]
