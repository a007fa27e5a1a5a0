"""The other routers: who of them is alive, and what they have put where.

Routers that do not see one another herd: each sends its jobs to the device that looks idle to all of them
(Mitzenmacher, "How useful is old information?", IEEE Trans. Parallel Distrib. Syst. 11, 2000). A `job.placed` event
stands in the same transaction as the messages that it tells of, so who has read the stream to its end before a decision
knows of all work that was given out before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

from lepton_ai.event import Event
from pipeline.cluster import Cluster

__all__ = ["Peers"]

#: Where a job is no device's any more, or not yet again, though it has not ended.
_BACK: Final = ("job.parked", "job.scheduled")


class Peers:
    """As many as there are. Used by the router's thread."""

    def __init__(self, incarnation: str, cluster: Cluster) -> None:
        self._incarnation = incarnation
        self._cluster = cluster
        self._alive: set[str] = set()

    def __len__(self) -> int:
        return len(self._alive)

    def alive(self, routers: Iterable[str]) -> None:
        """These hold a lease now, ours among them."""
        self._alive = set(routers) - {self._incarnation}

    def heard(self, seen: Event) -> None:
        """Folds in an event of another router: what it has given a device is work that the device has still to do.

        Whoever ends a job tells all of it, so what a router had placed that dies meanwhile needs nothing of its own.
        """
        if seen.source == self._incarnation:
            return
        if seen.type == "router.offline":
            self._alive.discard(seen.source)
        elif seen.type == "router.online":
            self._alive.add(seen.source)
        elif seen.type == "job.placed" and seen.device is not None:
            self._alive.add(seen.source)
            share = min(1.0, _number(seen.data.get("messages"), len(seen.jobs)) / max(1, len(seen.jobs)))
            seconds = seen.data.get("seconds")
            for job, need_s in zip(seen.jobs, seconds if isinstance(seconds, list) else (), strict=False):
                self._cluster.dispatched(job, seen.device, _number(need_s, 0.0), share)
        elif seen.type in _BACK:
            for job in seen.jobs:
                self._cluster.finished(job)


def _number(found: Any, otherwise: float) -> float:
    """What stands in an event, which anybody with the broker's password may write."""
    is_one = isinstance(found, int | float) and 0 <= found < math.inf
    return float(found) if is_one else otherwise
