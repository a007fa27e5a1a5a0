"""Regret: what jobs lost by going where they went, seen when they have ended.

A sample is watched: of the jobs of a step that are alike and go to one device, the first. Its real seconds, from the
dispatch until the router hears of its end, are held against two others: what the best other device was predicted to
need then, its wait included; and, by what the model knows now, what the launch would take on the best other device,
against what it took here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from operator import add
from typing import Final

import msgspec

from lepton_ai import topology
from lepton_ai.event import Event, Observation
from lepton_ai.placement.costs import CostModel, Size
from pipeline.cluster import Cluster
from queues.connection import Command

__all__ = ["RATIOS", "Regret"]

#: Upper ends of the classes into which real seconds over the best other device's are counted.
RATIOS: Final = (0.5, 0.9, 1.1, 1.5, 2.0, 4.0, 10.0, math.inf)
#: Jobs that are watched at once, the newest.
_MOST: Final = 10_000


class _Watched(msgspec.Struct, frozen=True):
    since: float
    other_s: float
    """What the best other device was predicted to need, from the dispatch to the end."""


class Regret:
    """Watches jobs, and adds up what is to be told. Used by the router's thread."""

    def __init__(self, cluster: Cluster, model: CostModel, now: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._model = model
        self._now = now
        self._watched: dict[str, _Watched] = {}
        self._sums: dict[str, float] = {}

    def watch(self, job: str, chosen: int, waits: Sequence[float], seconds: Sequence[float]) -> None:
        """A job goes to a device; the finite ones of the others could have had it."""
        finishes = list(map(add, waits, seconds))
        other_s = min((each for at, each in enumerate(finishes) if at != chosen), default=math.inf)
        if other_s == math.inf:
            return
        if len(self._watched) >= _MOST:
            del self._watched[next(iter(self._watched))]
        self._watched[job] = _Watched(self._now(), other_s)

    def ended(self, seen: Event) -> None:
        """Jobs are on their device no longer; those that succeeded there are held against the others."""
        if not self._watched:
            return
        for job in seen.jobs:
            watched = self._watched.pop(job, None)
            if watched is not None and seen.type == "job.succeeded":
                self._add(watched, seen.observation)

    def _add(self, watched: _Watched, launch: Observation | None) -> None:
        real_s = self._now() - watched.since
        added = {"jobs": 1.0, "real_s": real_s, "regret_s": max(0.0, real_s - watched.other_s)}
        if launch is not None and launch.jobs > 0 and (best_s := self._best_other_s(launch)) is not None:
            here_s = (launch.transfer_s + launch.run_s) / launch.jobs
            ratio = here_s / best_s
            if 0 <= ratio < math.inf:  # an event may say anything
                added |= {"hindsight_s": max(0.0, here_s - best_s), "ratios": ratio}
                added[f"ratio_{next(most for most in RATIOS if ratio <= most):g}"] = 1.0
        for name, value in added.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def _best_other_s(self, launch: Observation) -> float | None:
        """What each job of a launch would take on the best other device, as far as is known now."""
        found = []
        for device in self._cluster.devices:
            if device.name != launch.device and device.can_run(launch.kernel, None):
                predicted = self._model.predict(launch.kernel, device.name, Size.of(launch), device.peaks)
                found.append((predicted.run_s + predicted.transfer_s) / launch.jobs / device.speed)
        return min(found, default=None) or None

    def told(self) -> list[Command]:
        """What has come together since the last time, for the broker to add to what it has."""
        commands: list[Command] = [
            ("HINCRBYFLOAT", topology.REGRET, name, value) for name, value in self._sums.items() if value
        ]
        self._sums.clear()
        return commands
