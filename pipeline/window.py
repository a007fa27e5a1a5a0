"""The window: the jobs that a router has claimed and not yet dispatched, each in the claim that keeps it safe."""

from __future__ import annotations

import heapq
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from lepton_ai import topology
from lepton_ai.job import Options, Pin
from pipeline.sized import Sized
from queues.broker import CLAIM_LIMIT, WAKE, Kind

__all__ = ["Claim", "ClaimedJob", "Window", "exchanged"]


#: A claim is written again when a part of it leaves, so it is bounded in bytes as well as in messages.
_CLAIM_BYTES = 8 * 1024 * 1024
#: What a message is taken to be before one was seen, and the weight of the newest in the mean.
_FIRST_BYTES, _WEIGHT = 128 * 1024.0, 0.05
#: One that is larger than the mean counts at once, while it is among so many: the next claim must not take hundreds of
#: its kind.
_LAST = 32


#: What jobs share that are looked at in the order of their arrival: urgency, kernel, and the device they are pinned to.
Line = tuple[int, str, Pin]


class ClaimedJob(msgspec.Struct, eq=False):
    """A message that has been read, waiting in a claim for its device: a job, or a bundle of jobs."""

    ids: tuple[str, ...]
    """Several of a bundle (lepton_ai/bundle.py)."""
    kernel: str
    options: Options
    message: bytes
    claim: Claim
    order: int
    line: Line
    deadline_at: float | None = None
    """After when it must not run any more, in seconds since the epoch."""
    sent_at: float = 0.0
    """When it was sent, by its id or by when it was claimed; nought where Celery's event listeners are not shown it."""
    sized: Sized | None = None
    """Its size, once it has been priced."""

    @property
    def id(self) -> str:
        """Its id; of a bundle the first one's."""
        return self.ids[0]

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
        self._mean_jobs = 1.0
        self._claims: dict[tuple[Kind, int], Claim] = {}
        self._lines: dict[Line, dict[int, ClaimedJob]] = {}
        """The jobs of each line by their order, the oldest first."""
        self._order = itertools.count()
        self._count = 0
        self._waiting: Counter[int] = Counter()
        """The jobs by their urgency."""

    def __len__(self) -> int:
        return self._count

    @property
    def room(self) -> int:
        """How many more messages may be claimed, by the jobs that are in them lately and by their size."""
        left = self._limit - max(self._count, sum(len(claim.messages) for claim in self._claims.values()))
        left_bytes = self._limit_bytes - sum(claim.size_bytes for claim in self._claims.values())
        if left_bytes <= 0 or left <= 0:
            return 0
        return max(1, min(int(left / self._mean_jobs), int(left_bytes / self._mean_bytes)))

    def open_claim(self, kind: Kind) -> tuple[Claim, int]:
        """A claim of a kind with room, and how much: the fullest that has some, so that few are open."""
        having = [
            each
            for each in self._claims.values()
            if each.kind is kind and each.number != WAKE and each.room(self._mean_bytes) > 0
        ]
        if having:
            claim = min(having, key=lambda each: each.room(self._mean_bytes))
        else:
            # Where all are full by size, the last takes what a wake-up brings beyond the window.
            number = next((n for n in range(WAKE) if (kind, n) not in self._claims), WAKE - 1)
            key = topology.claim(self._incarnation, number, kind)
            claim = self._claims.setdefault((kind, number), Claim(kind, number, key))
        return claim, max(1, claim.room(self._mean_bytes))

    def wake_claim(self) -> Claim:
        """The claim that a wake-up lands in, for what leaves it at once: `open_claim` knows nothing of it."""
        key = topology.claim(self._incarnation, WAKE, Kind.NEW)
        return self._claims.setdefault((Kind.NEW, WAKE), Claim(Kind.NEW, WAKE, key))

    def hold(self, claim: Claim, messages: Sequence[bytes]) -> None:
        """These messages have been moved to a claim."""
        claim.messages.extend(messages)
        sizes = list(map(len, messages))
        claim.size_bytes += sum(sizes)
        if not sizes:
            return
        kept = (1 - _WEIGHT) ** len(sizes)
        mean_bytes = kept * self._mean_bytes + (1 - kept) * sum(sizes) / len(sizes)
        self._mean_bytes = max(mean_bytes, *sizes[-_LAST:])

    def add(
        self,
        ids: tuple[str, ...],
        kernel: str,
        options: Options,
        message: bytes,
        claim: Claim,
        deadline_at: float | None = None,
    ) -> ClaimedJob:
        """A message of a claim has been read and waits for its device."""
        order = next(self._order)
        line = (options.urgency, kernel, options.pin)
        job = ClaimedJob(ids, kernel, options, message, claim, order, line, deadline_at)
        self._lines.setdefault(line, {})[order] = job
        self._count += len(ids)
        self._waiting[options.urgency] += len(ids)
        self._mean_jobs += _WEIGHT * (len(ids) - self._mean_jobs)
        return job

    def waiting(self) -> dict[int, int]:
        """How many jobs wait, by their urgency."""
        return +self._waiting

    def expired(self, now: float) -> list[ClaimedJob]:
        """The jobs whose deadline has passed."""
        return [job for job in self.jobs() if job.deadline_at is not None and job.deadline_at <= now]

    def jobs(self) -> list[ClaimedJob]:
        """Every job that waits, in the order of their arrival. May be called from any thread."""
        found = [job for line in list(self._lines.values()) for job in list(line.values())]
        return sorted(found, key=_order)

    def first(self, count: int, wanted: Callable[[str, Pin], bool] = lambda *_: True) -> list[ClaimedJob]:
        """The jobs to look at next: the most urgent first, then in the order of their arrival.

        So many, or a few more with the last bundle. `wanted` says of a kernel and a pin (a device, a kind, or None)
        whether jobs with both are looked at.
        """
        by_urgency: dict[int, list[Iterable[ClaimedJob]]] = {}
        for (urgency, kernel, pin), line in self._lines.items():
            if wanted(kernel, pin):
                by_urgency.setdefault(urgency, []).append(line.values())
        lines = (lines for _, lines in sorted(by_urgency.items(), reverse=True))
        found: list[ClaimedJob] = []
        for job in itertools.chain.from_iterable(map(_merged, lines)):
            if count <= 0:
                break
            found.append(job)
            count -= len(job.ids)
        return found

    def left(self, jobs: Iterable[ClaimedJob]) -> None:
        """These jobs have been dispatched."""
        gone = list(jobs)
        self.remove(gone)
        self.forget((job.claim, job.message) for job in gone)

    def remove(self, jobs: Iterable[ClaimedJob]) -> None:
        """These jobs wait no more, whatever becomes of their messages."""
        for job in jobs:
            line = self._lines[job.line]
            del line[job.order]
            if not line:
                del self._lines[job.line]
            self._count -= len(job.ids)
            self._waiting[job.options.urgency] -= len(job.ids)

    def exchange(self, claim: Claim, parts: Mapping[int, Sequence[bytes]]) -> None:
        """Messages of a claim, by their `id()`, have become others."""
        claim.messages = exchanged(claim.messages, parts)
        claim.size_bytes = sum(map(len, claim.messages))

    def forget(self, messages: Iterable[tuple[Claim, bytes]]) -> None:
        """These messages are in their claims no longer; a claim that is empty is closed."""
        by_claim: dict[tuple[Kind, int], set[int]] = {}
        for claim, message in messages:
            by_claim.setdefault((claim.kind, claim.number), set()).add(id(message))
        for name, gone in by_claim.items():
            claim = self._claims[name]
            if len(gone) == len(claim.messages):
                claim.messages, claim.size_bytes = [], 0
                del self._claims[name]
            else:
                claim.messages = [message for message in claim.messages if id(message) not in gone]
                claim.size_bytes = sum(map(len, claim.messages))


def exchanged(messages: Iterable[bytes], parts: Mapping[int, Sequence[bytes]]) -> list[bytes]:
    """Messages in their order, those with parts (by their `id()`) as these."""
    return [part for each in messages for part in parts.get(id(each), (each,))]


_order = operator.attrgetter("order")


def _merged(lines: list[Iterable[ClaimedJob]]) -> Iterable[ClaimedJob]:
    """The jobs of lines of one urgency in the order of their arrival."""
    return lines[0] if len(lines) == 1 else heapq.merge(*lines, key=_order)
