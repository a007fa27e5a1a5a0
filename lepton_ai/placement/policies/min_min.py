"""Again and again, of all jobs the one that can finish soonest, on the device where it does.

Min-min (Ibarra and Kim, "Heuristic algorithms for scheduling independent tasks on nonidentical processors", J. ACM 24,
1977, algorithm D; Maheswaran et al., J. Parallel Distrib. Comput. 59, 1999, section 3.2). What finishes soonest on a
device is the shortest of the jobs left, whatever its backlog: so each device's jobs are sorted once, and a step looks
at one job a device instead of at all of them.
"""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Plan, Problem, planned

__all__ = ["MinMin"]


class MinMin:
    """Short jobs first: good where devices differ, and the long jobs come last."""

    name = "min_min"

    def place(self, problem: Problem) -> Plan:
        column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
        shortest = np.ascontiguousarray(np.argsort(problem.seconds, axis=0, kind="stable").T)
        return planned(problem, _place(problem.seconds, column, shortest, problem.ready, problem.slots))


@compiled
def _place(seconds: Floats, column: Indices, shortest: Indices, ready: Floats, slots: Floats) -> Indices:
    jobs, devices = len(seconds), len(ready)
    ready = ready.copy()
    device = np.full(jobs, UNPLACED, np.intp)
    next_of = np.zeros(len(shortest), np.intp)
    while True:
        best, soonest, chosen = UNPLACED, np.inf, UNPLACED
        for at in range(devices):
            mine = column[at]
            while next_of[mine] < jobs and device[shortest[mine, next_of[mine]]] != UNPLACED:
                next_of[mine] += 1
            if next_of[mine] < jobs:
                job = shortest[mine, next_of[mine]]
                if ready[at] + seconds[job, mine] < soonest:
                    best, soonest, chosen = at, ready[at] + seconds[job, mine], job
        if best == UNPLACED:
            return device
        device[chosen] = best
        ready[best] += seconds[chosen, column[best]] / slots[best]
