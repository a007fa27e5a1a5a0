"""Cancelling: a mark that outlives every process, and an event that wakes whoever holds the job.

The router ends a marked job that waits in its window, a worker one that it takes, and a worker tells a running kernel
through its context. Whoever asks only leaves the mark; a job that has ended keeps its result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from lepton_ai import event, topology
from lepton_ai.event import Event

__all__ = ["KEPT_S", "mark"]

#: How long a mark waits for its job to be found.
KEPT_S: Final = 86_400


def mark(jobs: Sequence[str], source: str, *, events_kept: int = 20_000) -> list[tuple[Any, ...]]:
    """The commands, to be sent as one transaction, that ask for these jobs to be cancelled."""
    now = time.time()
    told = event.encode(Event("job.cancel_asked", source, jobs=tuple(jobs)))
    marks = [part for job in jobs for part in (f"{now:.3f}", job)]
    return [
        ("ZADD", topology.CANCELLED, *marks),
        ("ZREMRANGEBYSCORE", topology.CANCELLED, "-inf", f"{now - KEPT_S:.3f}"),
        ("XADD", topology.EVENTS, "MAXLEN", "~", events_kept, "*", "e", told),
    ]
