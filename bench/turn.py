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

__all__ = ["Turn", "arrive", "rush"]

#: So many jobs of the stream are handed over together, those of one kernel and one device in one call.
_SLICE = 21
_WAIT_S = 120.0

Submitted = Sequence[tuple[JobHandle, Card]]


class Turn(msgspec.Struct, frozen=True):
    """What a turn came to."""

    seconds: float
    """From the first submit until the last result was in hand."""
    devices: dict[str, int]
    """Jobs by the device that ran them."""
    costs: list[tuple[Card, str, float]]
    """Of each job: its card, its device, and the seconds that it took there."""
    latencies_s: list[float] = []
    """Of each job that arrived by the clock."""

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
    latencies = [_done_at(job) - at for (job, _), at in zip(submitted, due, strict=True)]
    return msgspec.structs.replace(turn, latencies_s=latencies)


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


def _done_at(job: JobHandle) -> float:
    """Seconds since the epoch, to the millisecond."""
    assert job.meta is not None
    assert job.meta.date_done is not None
    return datetime.fromisoformat(job.meta.date_done).timestamp()
