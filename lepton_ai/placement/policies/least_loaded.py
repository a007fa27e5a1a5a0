"""Each job on the device with the fewest jobs a slot: what a balancer does that counts and does not measure.

Blind to speed: a job that is slow there counts as any other. What a device had before is given in seconds; it is
counted in jobs by what the jobs at hand take there on average.
"""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Plan, Problem, planned

__all__ = ["LeastLoaded"]


class LeastLoaded:
    """Shortest queue by number. Where two are equally short, the first."""

    name = "least_loaded"
    looks_at_costs = False

    def place(self, problem: Problem) -> Plan:
        column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
        can = np.isfinite(problem.seconds)
        total_s = np.where(can, problem.seconds, 0.0).sum(axis=0)
        # Where no job at hand can run, it does not matter how many wait.
        mean_s = np.where(total_s > 0, total_s, 1.0) / np.maximum(can.sum(axis=0), 1)
        # Jobs that run at once are ahead of a slot each: `ready` is the time until all are done.
        queued = problem.ready / mean_s[column]
        return planned(problem, _place(problem.seconds, column, queued, problem.slots))


@compiled
def _place(seconds: Floats, column: Indices, queued: Floats, slots: Floats) -> Indices:
    jobs, devices = len(seconds), len(column)
    device = np.full(jobs, UNPLACED, np.intp)
    for job in range(jobs):
        fewest = np.inf
        for at in range(devices):
            if seconds[job, column[at]] < np.inf and (queued[at] < fewest or device[job] == UNPLACED):
                device[job], fewest = at, queued[at]
        if device[job] != UNPLACED:
            queued[device[job]] += 1 / slots[device[job]]
    return device
