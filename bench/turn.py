"""One turn of the closed loop: a stream played through a fleet, at once or as jobs arrive, and its results checked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime

import msgspec
import numpy as np

from bench.routing import Pins
from bench.stream import Card, check
from lepton_ai import Client
from lepton_ai.handle import JobHandle
from lepton_ai.job import Cost

__all__ = ["Delay", "Turn", "arrive", "rush"]

#: So many jobs of the stream are handed over together, those of one kernel and one device in one call.
_SLICE = 21
_WAIT_S = 120.0

Submitted = Sequence[tuple[JobHandle, Card]]


class Delay(msgspec.Struct, frozen=True):
    """Where the time of one job went that arrived by the clock."""

    unplaced_s: float
    """From when it was due until a router had placed it."""
    wait_s: float
    """Then until a slot took it."""
    rest_s: float
    """Then until its result was written, with all that the slot had taken at once."""
    device: str
    reason: str
    """Why it was placed there, without the figures."""

    @property
    def total_s(self) -> float:
        return self.unplaced_s + self.wait_s + self.rest_s


class Turn(msgspec.Struct, frozen=True):
    """What a turn came to."""

    seconds: float
    """From the first submit until the last result was in hand."""
    devices: dict[str, int]
    """Jobs by the device that ran them."""
    costs: list[tuple[Card, str, float]]
    """Of each job: its card, its device, and the seconds that it took there."""
    delays: list[Delay] = []
    """Of each job that arrived by the clock."""

    @property
    def latencies_s(self) -> list[float]:
        """Of each job that arrived by the clock."""
        return [delay.total_s for delay in self.delays]

    def p99_ms(self) -> float:
        return float(np.percentile(self.latencies_s, 99)) * 1e3


def rush(client: Client, cards: Sequence[Card], pins: Pins) -> Turn:
    """All jobs at once."""
    submitted: list[tuple[JobHandle, Card]] = []
    start = time.perf_counter()
    for first in range(0, len(cards), _SLICE):
        alike: dict[tuple[str, str | None], list[Card]] = {}
        for card, pin in zip(cards[first : first + _SLICE], pins[first : first + _SLICE], strict=True):
            alike.setdefault((card.kernel, pin), []).append(card)
        for (kernel, pin), each in alike.items():
            jobs = client.submit_many(kernel, [card.arguments() for card in each], device=pin)
            submitted += zip(jobs, each, strict=True)
    return _ended(start, submitted)


def arrive(client: Client, cards: Sequence[Card], pins: Pins, at_s: Sequence[float]) -> Turn:
    """Each job at its time, whatever has become of those before.

    A job's latency is from when it was due (so a client that is late is no excuse) until its result was written.
    """
    submitted: list[tuple[JobHandle, Card]] = []
    due: list[float] = []
    start, began_at = time.perf_counter(), time.time()
    for card, pin, at in zip(cards, pins, at_s, strict=True):
        time.sleep(max(0.0, start + at - time.perf_counter()))
        submitted.append((client.submit(card.kernel, card.arguments(), device=pin), card))
        due.append(began_at + at)
    turn = _ended(start, submitted)
    return msgspec.structs.replace(turn, delays=[_delay(job, at) for (job, _), at in zip(submitted, due, strict=True)])


def _ended(start: float, submitted: Submitted) -> Turn:
    for job, _ in submitted:
        job.result(timeout=_WAIT_S)
    seconds = time.perf_counter() - start
    for job, card in submitted:  # which is no part of the turn
        check(card, job.result())
    costs = list(_costs(submitted))
    return Turn(seconds, dict(Counter(device for _, device, _ in costs)), costs)


def _costs(submitted: Submitted) -> Iterable[tuple[Card, str, float]]:
    for job, card in submitted:
        cost = _cost(job)
        yield card, cost.device, cost.transfer_s + cost.run_s


def _cost(job: JobHandle) -> Cost:
    """What came with the result; nothing is looked up."""
    record = job.meta.record if job.meta is not None else None
    assert record is not None
    assert record.cost is not None
    return record.cost


def _delay(job: JobHandle, due_at: float) -> Delay:
    """Of a job that was due at a time, in seconds since the epoch."""
    placement, cost = job.why(), _cost(job)
    assert placement is not None
    unplaced_s = placement.placed_at - due_at
    rest_s = _done_at(job) - due_at - unplaced_s - cost.wait_s
    return Delay(unplaced_s, cost.wait_s, rest_s, cost.device, placement.reason.partition(":")[0])


def _done_at(job: JobHandle) -> float:
    """Seconds since the epoch, to the millisecond."""
    assert job.meta is not None
    assert job.meta.date_done is not None
    return datetime.fromisoformat(job.meta.date_done).timestamp()
